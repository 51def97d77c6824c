package attach

import (
	"errors"
	"strings"
	"testing"

	"weave.local/router/netdev"
	"weave.local/router/netdev/netdevtest"
)

func TestAttachAndDetach(t *testing.T) {
	netdevtest.Need(t)
	before := netdevtest.Host(t)
	h := newHost(t)
	red, blue := netdevtest.Namespace(t), netdevtest.Namespace(t)
	r := h.attach("red", red, ip("10.2.1.5/24"))
	h.attach("blue", blue, ip("10.2.1.6/24"))
	mustReach(t, red, blue, "10.2.1.6", "10.2.1.5")
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24")
	if len(r.HostIf) != len("vethwepl")+7 || !strings.HasPrefix(r.HostIf, "vethwepl") || r.MAC[0]&3 != 2 {
		t.Errorf("attachment %+v", r)
	}
	link := netdevtest.In(t, red, "ip", "link", "show", "ethwe")
	if !strings.Contains(link, "mtu 1400") || !strings.Contains(link, r.MAC.String()) {
		t.Errorf("ethwe: %s", link)
	}
	if routes := netdevtest.In(t, red, "ip", "route"); !strings.Contains(routes, "224.0.0.0/4 dev ethwe scope link") {
		t.Errorf("routes: %s", routes)
	}
	if v := netdevtest.In(t, red, "cat", "/proc/sys/net/ipv4/neigh/ethwe/base_reachable_time"); v != "5" {
		t.Errorf("base_reachable_time of ethwe is %s", v)
	}

	// Again, and one more: same interface, same MAC.
	if again := h.attach("red", red, ip("10.2.1.5/24")); again.MAC != r.MAC || again.IfIndex != r.IfIndex {
		t.Errorf("attached again as %+v, was %+v", again, r)
	}
	if more := h.attach("red", red, ip("10.3.0.1/16")); more.MAC != r.MAC || more.IfIndex != r.IfIndex {
		t.Errorf("one more address gave %+v, was %+v", more, r)
	}
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24", "10.3.0.1/16")

	got, err := h.Detach(t.Context(), Target{ID: "red"}, ip("10.2.1.5/24"))
	if err != nil || len(got) != 1 || got[0] != p("10.2.1.5/24") {
		t.Errorf("Detach = %v, %v", got, err)
	}
	h.wantAddrs("red", red, "ethwe", "10.3.0.1/16")
	if got, err := h.Detach(t.Context(), Target{ID: "red"}, ip("10.2.1.5/24")); err != nil || len(got) != 0 {
		t.Errorf("Detach of what is not there = %v, %v", got, err)
	}
	if got, err := h.Detach(t.Context(), Target{ID: "red"}, []Request{{Net: p("10.3.0.0/16")}}); err != nil || len(got) != 1 {
		t.Errorf("Detach by subnet = %v, %v", got, err)
	}
	if _, listed := h.find("red"); listed || netdev.Exists(r.HostIf) || h.ports.len() != 1 {
		t.Errorf("red is still there: %v", h.List())
	}
	if out, err := netdevtest.Try(t, red, "ip", "link", "show", "ethwe"); err == nil {
		t.Errorf("ethwe is still there: %s", out)
	}

	if err := h.RemoveAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := netdevtest.Changes(before, netdevtest.Host(t)); d != "" {
		t.Errorf("the host has changed:\n%s", d)
	}
	if h.ports.len() != 0 || len(h.store.All()) != 0 {
		t.Errorf("left over: ports %v, journal %v", h.ports.set, h.store.All())
	}
}

func TestAttachRefusals(t *testing.T) {
	h := newHost(t)
	red, blue := netdevtest.Namespace(t), netdevtest.Namespace(t)
	h.attach("red", red, ip("10.2.1.5/24"))
	netdevtest.In(t, blue, "ip", "link", "add", "ethwe", "type", "veth", "peer", "name", "other")
	for _, c := range []struct {
		what, id, ns string
		reqs         []Request
		want         string
	}{
		{"host", "x", "/proc/self/ns/net", ip("10.2.1.9/24"), "--net=host"},
		{"dead", "x", "/proc/4194305/ns/net", ip("10.2.1.9/24"), "x is not running"},
		{"no namespace", "x", "/etc/passwd", ip("10.2.1.9/24"), "no network namespace"},
		{"address of another", "x", blue, ip("10.2.1.5/24"), "10.2.1.5 is held by container red on this host"},
		{"other length", "red", red, ip("10.2.1.5/16"), "attached already, as 10.2.1.5/24"},
		{"same network", "x", red, ip("10.2.1.9/24"), "shares its network with red"},
		{"ethwe of somebody else", "x", blue, ip("10.2.1.9/24"), "ethwe that is not ours"},
		{"allocation is off", "x", blue, nil, "name the address"},
		{"nobody", "", blue, ip("10.2.1.9/24"), "no container"},
	} {
		_, err := h.Attach(t.Context(), Target{ID: c.id, NetNS: c.ns}, c.reqs)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", c.what, err, c.want)
		}
	}
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24")
	if list := h.List(); len(list) != 2 || h.ports.len() != 1 || len(h.store.All()) != 1 {
		t.Errorf("refusals left traces: %v, journal %v", list, h.store.All())
	}
}

func TestFailedAttachLeavesNothing(t *testing.T) {
	h := newHost(t)
	red := netdevtest.Namespace(t)
	before := netdevtest.Host(t)
	boom := errors.New("boom")
	h.ports.failWith(boom)
	if _, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red}, ip("10.2.1.5/24")); !errors.Is(err, boom) {
		t.Fatalf("error %v", err)
	}
	h.ports.failWith(nil)
	if d := netdevtest.Changes(before, netdevtest.Host(t)); d != "" || len(h.store.All()) != 0 || len(h.List()) != 1 {
		t.Errorf("left over: journal %v, host:\n%s", h.store.All(), d)
	}
	a := h.attach("red", red, ip("10.2.1.5/24"))
	h.ports.failWith(boom)
	if _, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red}, ip("10.2.1.6/24")); !errors.Is(err, boom) {
		t.Fatalf("error %v", err)
	}
	h.ports.failWith(nil)
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24")
	h.restart()
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24")
	if b, _ := h.find("red"); b.MAC != a.MAC || b.IfIndex != a.IfIndex {
		t.Errorf("after a restart %+v, before %+v", b, a)
	}
}

func TestRestartedContainerGetsANewInterface(t *testing.T) {
	h := newHost(t)
	first, second := netdevtest.Namespace(t), netdevtest.Namespace(t)
	a := h.attach("red", first, ip("10.2.1.5/24"))
	b := h.attach("red", second, ip("10.2.1.5/24"))
	if a.HostIf == b.HostIf || netdev.Exists(a.HostIf) || h.ports.len() != 1 {
		t.Errorf("first %+v, second %+v, ports %v", a, b, h.ports.set)
	}
	h.wantAddrs("red", second, "ethwe", "10.2.1.5/24")
}

func TestNoMulticastRoute(t *testing.T) {
	h := newHost(t)
	red := netdevtest.Namespace(t)
	if _, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red, NoMulticastRoute: true}, ip("10.2.1.5/24")); err != nil {
		t.Fatal(err)
	}
	if routes := netdevtest.In(t, red, "ip", "route"); strings.Contains(routes, "224.0.0.0/4") {
		t.Errorf("routes: %s", routes)
	}
}

func TestEndpoints(t *testing.T) {
	h := newHost(t)
	id := strings.Repeat("0123456789abcdef", 4)
	spec := EndpointSpec{ID: id, Addrs: ip2("10.32.0.1/12")}
	e, err := h.CreateEndpoint(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if e.HostIf != "vethwl012345678" || e.PeerIf != "vethwg012345678" || e.MAC[0]&3 != 2 {
		t.Errorf("endpoint %+v", e)
	}
	if port, _ := h.ports.get(h.List()[1].IfIndex); port.MAC != e.MAC || port.Addrs[0] != p("10.32.0.1/12") {
		t.Errorf("announced as %+v", port)
	}
	if d, err := netdev.DeviceByName(e.PeerIf); err != nil || d.MAC != e.MAC || d.MTU != testMTU {
		t.Errorf("peer end %+v, %v", d, err)
	}
	if _, err := h.CreateEndpoint(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("created twice: %v", err)
	}
	if _, err := h.CreateEndpoint(t.Context(), EndpointSpec{ID: "short"}); err == nil {
		t.Error("a short id is accepted")
	}

	// As the engine does: moved, renamed, addressed, started.
	red := netdevtest.Namespace(t)
	netdevtest.In(t, "", "ip", "link", "set", e.PeerIf, "netns", red)
	netdevtest.In(t, red, "ip", "link", "set", e.PeerIf, "name", "ethwe0")
	netdevtest.In(t, red, "ip", "addr", "add", "10.32.0.1/12", "dev", "ethwe0")
	netdevtest.In(t, red, "ip", "link", "set", "ethwe0", "up")
	if err := h.JoinEndpoint(t.Context(), id, red); err != nil {
		t.Fatal(err)
	}
	blue := netdevtest.Namespace(t)
	h.attach("blue", blue, ip("10.32.0.2/12"))
	mustReach(t, red, blue, "10.32.0.2", "10.32.0.1")
	h.restart()
	h.wantAddrs(id, red, "ethwe0", "10.32.0.1/12")
	if a, _ := h.find(id); a.MAC != e.MAC || a.NetNS != red || a.Kind != KindEndpoint {
		t.Errorf("after a restart %+v", a)
	}
	for range 2 {
		if err := h.DeleteEndpoint(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if netdev.Exists(e.HostIf) || h.ports.len() != 1 {
		t.Errorf("left over: %v", h.ports.set)
	}
	// Given another MAC and nobody in the way, it is made again.
	spec.MAC = [6]byte{2, 42, 0, 0, 0, 9}
	if e, err := h.CreateEndpoint(t.Context(), spec); err != nil || e.MAC != spec.MAC {
		t.Errorf("made again: %+v, %v", e, err)
	}
}
