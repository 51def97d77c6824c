package attach

import (
	"fmt"
	"strings"
	"testing"

	"weave.local/router/netdev/netdevtest"
	"weave.local/router/overlay"
)

// One address too many is refused in a sentence, and nothing has changed.
func TestTooManyAddresses(t *testing.T) {
	h := newHost(t)
	red, blue := netdevtest.Namespace(t), netdevtest.Namespace(t)
	var reqs []Request
	var want []string
	for i := range overlay.MaxAddrs + 1 {
		addr := fmt.Sprintf("10.2.%d.5/24", i)
		reqs, want = append(reqs, ip(addr)...), append(want, addr)
	}
	most, over := reqs[:overlay.MaxAddrs], reqs[overlay.MaxAddrs:]
	refused := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "would have 9 addresses") || !strings.Contains(err.Error(), "at most 8") {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := h.Attach(t.Context(), Target{ID: "blue", NetNS: blue}, reqs)
	refused("nine at once", err)
	if _, there := h.find("blue"); there || len(h.store.All()) != 0 {
		t.Errorf("left after a refusal: %v, journal %v", h.List(), h.store.All())
	}
	h.attach("red", red, most)
	_, err = h.Attach(t.Context(), Target{ID: "red", NetNS: red}, over)
	refused("the ninth", err)
	h.wantAddrs("red", red, "ethwe", want[:overlay.MaxAddrs]...)
	h.attach("red", red, most[:1]) // what is there already costs nothing
	if _, err := h.Detach(t.Context(), Target{ID: "red", NetNS: red}, most[:1]); err != nil {
		t.Fatal(err)
	}
	h.attach("red", red, over)
	h.wantAddrs("red", red, "ethwe", want[1:]...)
	if _, err := h.Detach(t.Context(), Target{ID: "red", NetNS: red}, reqs); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Expose(t.Context(), most, ExposeOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err = h.Expose(t.Context(), over, ExposeOptions{})
	refused("the host's ninth", err)
	h.wantAddrs(HostID, "", testBridge, want[:overlay.MaxAddrs]...)
}

// The permission to send from any source, and the time of attachment, outlive the
// daemon; the permission ends with the attachment.
func TestAnySourceIsKept(t *testing.T) {
	h := newHost(t)
	red := netdevtest.Namespace(t)
	port := func() overlay.Port {
		t.Helper()
		a, _ := h.find("red")
		port, ok := h.ports.get(a.IfIndex)
		if !ok || port.Since.IsZero() {
			t.Fatalf("port %+v (%v)", port, ok)
		}
		return port
	}
	attach := func(addr string, anySource bool) {
		t.Helper()
		if _, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red, AnySource: anySource}, ip(addr)); err != nil {
			t.Fatal(err)
		}
	}
	attach("10.2.1.5/24", false)
	first := port()
	if first.AnySource {
		t.Error("any source without permission")
	}
	attach("10.2.1.5/24", true)
	attach("10.3.1.5/24", false)
	for _, when := range []string{"attached", "after a restart"} {
		if p := port(); !p.AnySource || !p.Since.Equal(first.Since) {
			t.Errorf("%s: %+v, was %+v", when, p, first)
		}
		h.restart()
	}
	if _, err := h.Detach(t.Context(), Target{ID: "red", NetNS: red}, []Request{{Net: p("10.2.1.0/24")}, {Net: p("10.3.1.0/24")}}); err != nil {
		t.Fatal(err)
	}
	attach("10.2.1.5/24", false)
	if p := port(); p.AnySource || !p.Since.After(first.Since) {
		t.Errorf("attached anew as %+v, was %+v", p, first)
	}

	e, err := h.CreateEndpoint(t.Context(), EndpointSpec{ID: "0123456789", Addrs: ip2("10.2.1.9/24")})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.AllowAnySource(t.Context(), "0123456789"); err != nil {
		t.Error(err)
	}
	for range 2 {
		a, _ := h.find("0123456789")
		if port, ok := h.ports.get(a.IfIndex); !ok || !port.AnySource || port.MAC != e.MAC {
			t.Errorf("endpoint is %+v (%v)", port, ok)
		}
		h.restart()
	}
	for _, id := range []string{"red", "nobody"} {
		if err := h.AllowAnySource(t.Context(), id); err == nil {
			t.Errorf("%s, which is no endpoint, was allowed any source", id)
		}
	}
}
