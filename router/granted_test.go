package router

import (
	"net/netip"
	"testing"

	"weave.local/peer"
	"weave.local/router/overlay"
)

func TestAllow(t *testing.T) {
	granted := func(p peer.Name, a netip.Addr) bool { return p == 1 || a != netip.MustParseAddr("10.32.0.2") }
	one, both := []string{"10.32.0.2/24"}, []string{"10.32.0.2/24", "10.32.0.3/24"}
	for _, c := range []struct {
		origin peer.Name
		addrs  []string
		left   int
		ok     bool
	}{{1, both, 2, true}, {2, both, 1, true}, {2, one, 0, false}, {2, nil, 0, true}} {
		var ep overlay.Endpoint
		for _, a := range c.addrs {
			ep.Addrs = append(ep.Addrs, netip.MustParsePrefix(a))
		}
		refused := map[string]bool{}
		if ok := allow(&ep, c.origin, granted, refused); ok != c.ok || len(ep.Addrs) != c.left || len(refused) != len(c.addrs)-c.left {
			t.Errorf("%+v: %v, left %v, refused %v", c, ok, ep.Addrs, refused)
		}
	}
}
