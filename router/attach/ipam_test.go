package attach

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/ipam"
	"weave.local/peer"
	"weave.local/peer/state"
	"weave.local/router/netdev"
	"weave.local/router/netdev/netdevtest"
)

// newHostWithIPAM is a host that is a cluster by itself: the range is
// 10.32.0.0/16, the default subnet 10.32.0.0/24.
func newHostWithIPAM(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	db, err := state.Open(filepath.Join(t.TempDir(), "ipam.db"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	h.alloc, err = ipam.New(ipam.Config{
		Self:  peer.Info{Name: 0x020000000001, UID: 1, ShortID: 1, NickName: "u1"},
		Range: p("10.32.0.0/16"), DefaultSubnet: p("10.32.0.0/24"),
		Init:      ipam.Bootstrap{Mode: ipam.Consensus, N: 1},
		Store:     db.Bucket("ipam"),
		Send:      func(peer.Name, []byte) error { return nil },
		Reachable: func() []peer.Name { return nil },
		Log:       slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- h.alloc.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(func() { // while the allocator can still be told
		if err := h.RemoveAll(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	h.restart()
	return h
}

func (h *host) owned(id string) []string {
	var out []string
	for _, a := range h.alloc.Lookup(id, netip.Prefix{}) {
		out = append(out, a.String())
	}
	slices.Sort(out)
	return out
}

func (h *host) wantOwned(id string, want ...string) {
	h.t.Helper()
	if got := h.owned(id); !slices.Equal(got, want) {
		h.t.Errorf("%s owns %v, want %v", id, got, want)
	}
}

func TestAllocatedAddresses(t *testing.T) {
	h := newHostWithIPAM(t)
	red, blue := netdevtest.Namespace(t), netdevtest.Namespace(t)
	reqs, err := ParseRequests("net:default net:10.32.1.0/24 ip:10.32.2.9/24 10.9.0.1/24 net:default")
	if err != nil {
		t.Fatal(err)
	}
	first, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red}, reqs)
	if err != nil || len(first) != 4 {
		t.Fatalf("Attach = %v, %v", first, err)
	}
	h.wantAddrs("red", red, "ethwe", "10.32.0.1/24", "10.32.1.1/24", "10.32.2.9/24", "10.9.0.1/24")
	h.wantOwned("red", "10.32.0.1/24", "10.32.1.1/24", "10.32.2.9/24", "10.9.0.1/24")
	if again, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red}, reqs); err != nil || !slices.Equal(again, first) {
		t.Errorf("Attach again = %v, %v, want %v", again, err, first)
	}
	_, err = h.Attach(t.Context(), Target{ID: "blue", NetNS: blue}, append([]Request{{}}, ip("10.32.2.9/24")...))
	if err == nil || !strings.Contains(err.Error(), "10.32.2.9") {
		t.Errorf("address of another: %v", err)
	}
	h.wantOwned("blue")
	h.attach("blue", blue, nil)
	h.wantAddrs("blue", blue, "ethwe", "10.32.0.2/24")

	for _, step := range []struct {
		reqs []Request
		took string
		rest []string
	}{
		{nil, "10.32.0.1/24", []string{"10.32.1.1/24", "10.32.2.9/24", "10.9.0.1/24"}},
		{nil, "", []string{"10.32.1.1/24", "10.32.2.9/24", "10.9.0.1/24"}},
		{[]Request{{Net: p("10.32.1.0/24")}}, "10.32.1.1/24", []string{"10.32.2.9/24", "10.9.0.1/24"}},
		{ip("10.32.2.9/24"), "10.32.2.9/24", []string{"10.9.0.1/24"}},
	} {
		got, err := h.Detach(t.Context(), Target{ID: "red"}, step.reqs)
		if err != nil || len(got) > 1 || (len(got) == 1) != (step.took != "") || (len(got) == 1 && got[0].String() != step.took) {
			t.Errorf("Detach %v = %v, %v, want %s", step.reqs, got, err, step.took)
		}
		h.wantAddrs("red", red, "ethwe", step.rest...)
		h.wantOwned("red", step.rest...)
	}
	// What was freed goes to the next one.
	h.attach("red", red, nil)
	h.wantAddrs("red", red, "ethwe", "10.9.0.1/24", "10.32.0.1/24")
}

func TestFailureFreesAddresses(t *testing.T) {
	h := newHostWithIPAM(t)
	red := netdevtest.Namespace(t)
	boom := errors.New("boom")
	h.ports.failWith(boom)
	if _, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red}, nil); !errors.Is(err, boom) {
		t.Errorf("Attach: %v", err)
	}
	h.wantOwned("red")
	if _, err := h.Expose(t.Context(), nil, ExposeOptions{}); !errors.Is(err, boom) {
		t.Errorf("Expose: %v", err)
	}
	h.wantOwned(HostID)
	h.ports.failWith(nil)
	h.wantAddrs(HostID, "", testBridge)
}

func TestAddressesOfTheDead(t *testing.T) {
	h := newHostWithIPAM(t)
	h.grace = 300 * time.Millisecond
	h.restart()
	stop := h.run()
	red := netdevtest.Namespace(t)
	h.attach("red", red, nil)
	netdevtest.End(t, red)
	eventually(t, "the port is removed", func() bool { return h.ports.len() == 0 })
	h.wantOwned("red", "10.32.0.1/24")
	again := netdevtest.Namespace(t)
	h.attach("red", again, nil) // in time
	h.wantAddrs("red", again, "ethwe", "10.32.0.1/24")
	h.ContainerDied("red")
	netdevtest.End(t, again)
	eventually(t, "the address is freed", func() bool { return len(h.owned("red")) == 0 })
	stop()

	// One that dies while the daemon is away.
	pink := netdevtest.Namespace(t)
	a := h.attach("pink", pink, nil)
	netdevtest.End(t, pink)
	eventually(t, "the interface is gone", func() bool { return !netdev.Exists(a.HostIf) })
	h.restart()
	h.wantOwned("pink")
}

func TestAllocatedExposure(t *testing.T) {
	h := newHostWithIPAM(t)
	for range 2 {
		h.expose(ExposeOptions{}, nil)
	}
	h.wantAddrs(HostID, "", testBridge, "10.32.0.1/24")
	h.wantOwned(HostID, "10.32.0.1/24")
	h.expose(ExposeOptions{}, []Request{{Net: p("10.32.1.0/24")}})
	h.wantOwned(HostID, "10.32.0.1/24", "10.32.1.1/24")
	h.hide(1, nil)
	h.wantAddrs(HostID, "", testBridge, "10.32.1.1/24")
	h.hide(0, nil)
	// A reset gives everything back.
	red := netdevtest.Namespace(t)
	h.attach("red", red, nil)
	if err := h.RemoveAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if owned := h.alloc.Owned(); len(owned) != 0 {
		t.Errorf("still owned: %v", owned)
	}
}

// Addresses in use that the allocator has lost are told to it again.
func TestLostAllocations(t *testing.T) {
	h := newHostWithIPAM(t)
	red := netdevtest.Namespace(t)
	h.attach("red", red, nil)
	h.expose(ExposeOptions{}, nil)
	for _, id := range []string{"red", HostID} {
		if err := h.alloc.FreeAll(id); err != nil {
			t.Fatal(err)
		}
	}
	h.restart()
	defer h.run()()
	eventually(t, "both are claimed again", func() bool { return len(h.owned("red")) == 1 && len(h.owned(HostID)) == 1 })
	h.wantOwned("red", "10.32.0.1/24")
}

// A crash comes at any moment between the allocator's record and the journal.
func TestAddressesOfNobody(t *testing.T) {
	h := newHostWithIPAM(t)
	red := netdevtest.Namespace(t)
	a := h.attach("red", red, nil)
	for _, owner := range []string{"red", "ghost", HostID, ipam.Anonymous} {
		if _, err := h.alloc.Allocate(t.Context(), owner, p("10.32.7.0/24")); err != nil {
			t.Fatal(err)
		}
	}
	h.restart()
	owned := h.alloc.Owned()
	if len(owned) != 2 || !slices.Equal(owned["red"], a.Addrs) {
		t.Errorf("owned are %v, want those of red and one of Docker", owned)
	}
	h.wantAddrs("red", red, "ethwe", a.Addrs[0].String())
}
