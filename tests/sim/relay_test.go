package sim

import (
	"fmt"
	"testing"
	"time"

	"weave.local/peer"
)

// 1 sends to 4 over 2, which falls silent as a host without power does: it is
// noticed within 2.5 s (and what the clock of the loop adds), from then on all
// goes over 3, nobody else is given up by memberlist, and 2 comes back without
// harm to others.
//
//	  2
//	 / \
//	1   4
//	 \ /
//	  3
func TestRelayDies(t *testing.T) {
	for round := range 8 {
		simulate(t, func(c *cluster) {
			c.start(1, nil, noDiscovery)
			c.start(2, []peer.Name{1}, noDiscovery)
			c.start(3, []peer.Name{1}, noDiscovery)
			c.start(4, []peer.Name{2, 3}, noDiscovery)
			c.until("join", 20*time.Second, c.full)
			pass(time.Duration(round) * 1300 * time.Millisecond)
			c.calm("rest")
			c.watch.mu.Lock()
			c.watch.gone[peer.Name(2).String()] = true // it is right to give it up, and it gives up all
			c.watch.mu.Unlock()
			longest, changed := c.gap(6*time.Second, 2, 3, func() {
				c.cut("power", func(from, to peer.Name) bool { return from == 2 || to == 2 })
			})
			if changed == 0 || changed > 2700*time.Millisecond || longest > changed+time.Second {
				t.Errorf("noticed after %v, nothing arrived for %v", changed, longest)
			}
			// Comes back when it is about to give the others up.
			pass(time.Duration(round) * 400 * time.Millisecond)
			longest, changed = c.gap(15*time.Second, 3, 2, func() { c.cut("power", nil) })
			if changed == 0 || longest > time.Second {
				t.Errorf("with the relay back (%v) nothing arrived for %v", changed, longest)
			}
			c.until("all back", 15*time.Second, c.full)
			if n := c.watch.deaths.Load(); n > 0 {
				t.Errorf("%d false deaths", n)
			}
			t.Logf("%d suspicions", c.watch.suspicions.Load())
		})
	}
}

// gap has 1 send to 4 while something happens, and returns for how long
// nothing arrived at most, and when the way to 4 went from one relay over to
// the other.
func (c *cluster) gap(d time.Duration, was, is peer.Name, happens func()) (longest, changed time.Duration) {
	c.t.Helper()
	if hop, _ := c.peers[1].mesh.Topology().NextHop(4); hop != was {
		c.t.Fatalf("the way is over %v", hop)
	}
	arrived := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.got)
	}
	begin := time.Now()
	happens()
	last, had := begin, arrived()
	for i := 0; time.Since(begin) < d; i++ {
		_ = c.peers[1].mesh.Send(4, message, fmt.Append(nil, begin.UnixNano(), i)) // lost meanwhile
		pass(5 * time.Millisecond)
		if hop, ok := c.peers[1].mesh.Topology().NextHop(4); ok && hop == is && changed == 0 {
			changed = time.Since(begin)
		}
		if n := arrived(); n > had {
			last, had = time.Now(), n
		}
		longest = max(longest, time.Since(last))
	}
	return longest, changed
}
