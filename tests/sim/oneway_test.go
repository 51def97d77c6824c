package sim

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
)

// 1 - 2 fail in one direction, either one, while 3 sees both: the pair is
// relayed soon, nobody is suspected, and linked again when that is over.
func TestOneWay(t *testing.T) {
	for _, deaf := range []peer.Name{1, 2} {
		simulate(t, func(c *cluster) {
			c.start(1, nil, noDiscovery)
			c.start(2, []peer.Name{1}, noDiscovery)
			c.start(3, []peer.Name{1, 2}, noDiscovery)
			c.until("join", 10*time.Second, c.full)
			pass(5 * time.Second)
			c.calm("join")
			linked := func(want bool) func() string {
				return func() string {
					for _, n := range []peer.Name{1, 2} {
						if got := len(c.peers[n].mesh.Neighbours()) == 2; got != want {
							return fmt.Sprintf("%v has both links: %v", n, got)
						}
					}
					return ""
				}
			}
			c.cut("deaf", func(from, to peer.Name) bool { return to == deaf && from == 3-deaf })
			took := c.until("noticed", 6*time.Second, linked(false))
			c.until("routes", time.Second, c.full)
			c.everybodyReached()
			pass(time.Minute)
			c.calm("relayed")
			c.everybodyReached()
			c.cut("deaf", nil)
			t.Logf("noticed after %.1f s, linked again after %.1f s", took.Seconds(), c.until("repair", 15*time.Second, linked(true)).Seconds())
		})
	}
}

// A link is cut under load in a ring: it is noticed within 2.5 s, traffic takes
// the other way at once, and nobody is given up.
func TestLinkIsCutUnderLoad(t *testing.T) {
	simulate(t, func(c *cluster) {
		c.start(1, nil, noDiscovery)
		c.start(2, []peer.Name{1}, noDiscovery)
		c.start(3, []peer.Name{1}, noDiscovery)
		c.start(4, []peer.Name{2, 3}, noDiscovery)
		c.until("join", 20*time.Second, c.full)
		longest, changed := c.gap(10*time.Second, 2, 3, func() {
			c.cut("link", func(from, to peer.Name) bool {
				return slices.Equal([]peer.Name{min(from, to), max(from, to)}, []peer.Name{2, 4})
			})
		})
		if changed == 0 || changed > 2700*time.Millisecond || longest > changed+time.Second {
			t.Errorf("noticed after %v, nothing arrived for %v", changed, longest)
		}
		pass(30 * time.Second)
		if n := c.watch.deaths.Load(); n > 0 {
			t.Errorf("%d false deaths", n)
		}
		t.Logf("noticed after %v, traffic flows again after %v, %d suspicions", changed, longest, c.watch.suspicions.Load())
	})
}

// Many entries of all peers cost nothing while none changes: what travels is
// the root in the acks of pings. WEAVE_SIM_PEERS makes it more peers.
func TestTablesAtRest(t *testing.T) {
	const entries = 50000
	peers := size(20)
	var rest [2]cost
	for i, n := range []int{1, entries / peers} {
		simulate(t, func(c *cluster) {
			for name := range peer.Name(peers) {
				m := c.start(name+1, c.some(3))
				all := make(map[string][]byte, n)
				for k := range n {
					all[fmt.Sprint("endpoint ", k)] = []byte("02:00:00:00:00:01 10.32.0.1/12")
				}
				m.table.Load(all)
			}
			c.until("join", time.Minute, c.full)
			c.until("entries", time.Minute, func() string {
				for _, m := range c.peers {
					if got := len(m.table.All()); got != n*peers {
						return fmt.Sprintf("%v has %d", m.name, got)
					}
				}
				return ""
			})
			pass(30 * time.Second)
			rest[i] = c.measure(func() { pass(time.Minute) })
			t.Logf("%d entries: at rest %v", n*peers, rest[i])
		})
	}
	if rest[1].bytes > rest[0].bytes+250 {
		t.Errorf("%d entries cost %d bytes/s per peer more than %d", entries, rest[1].bytes-rest[0].bytes, peers)
	}
}
