package sleeve

import (
	"net/netip"
	"testing"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/overlay/overlaytest"
)

// pair is two hosts with the short ids 1 and 2 and a cable between them.
func pair(t *testing.T, mtu int) (a, b *host) {
	t.Helper()
	a, b = newHost(t, 1), newHost(t, 2)
	join(a.space, b.space, 1, 2, mtu)
	return a, b
}

func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name     string
		addr     func(peer.ShortID) netip.Addr
		mtu      int
		overhead int
	}{
		{"IPv4", addr4, 1500, ipv4Overhead},
		{"IPv6", addr6, 1500, ipv6Overhead},
		{"MTU1280", addr4, 1280, ipv4Overhead},
		{"MTU9000", addr4, 9000, ipv4Overhead},
	} {
		t.Run(c.name, func(t *testing.T) {
			overlaytest.Run(t, func(t *testing.T) overlaytest.Pair {
				a, b := pair(t, c.mtu)
				return overlaytest.Pair{
					A:   overlaytest.End{Path: a.path, Probes: a.probes, Forwarding: forwarding(1, c.addr, 2)},
					B:   overlaytest.End{Path: b.path, Probes: b.probes, Forwarding: forwarding(2, c.addr, 1)},
					MTU: c.mtu - c.overhead - headerLen - frame.EthernetLen,
				}
			})
		})
	}
}
