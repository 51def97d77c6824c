package sim

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/peer/dialer"
)

const (
	reachMost = 300                    // of how many peers each sends to each
	tellOne   = 100 * time.Millisecond // of what follows a join: memberlist tells of each peer up to 16 times
	keptGone  = 11 * time.Minute       // after which all that was known of peers that are gone is forgotten
)

// A cluster of many peers: all join, rest, one and then a tenth crash, and for
// a while one goes and one comes each second. WEAVE_SIM_PEERS and
// WEAVE_SIM_CHURN (a duration) make it larger and longer.
func TestScale(t *testing.T) {
	peers, churn := size(30), lasting(t, "WEAVE_SIM_CHURN", 5*time.Second)
	simulate(t, func(c *cluster) {
		before, most := heap(), 0
		joining := c.measure(func() {
			for i := range peers {
				c.start(peer.Name(i+1), c.some(3))
			}
			took := c.until("join", 5*time.Minute, func() string { most = max(most, c.mostLinks()); return c.full() })
			t.Logf("%d peers: join: full view after %.1f s, at most %d links of one peer", peers, took.Seconds(), most)
		})
		t.Logf("join: %v", joining)
		pass(30*time.Second + time.Duration(peers)*tellOne)
		c.calm("join")
		rest := c.measure(func() { pass(time.Minute) })
		t.Logf("rest: %v, %d kB heap and stacks per peer", rest, (heap()-before)/uint64(peers)>>10)
		c.calm("rest")
		if peers > 2*dialer.MeshMost && most > peers/3 {
			t.Errorf("a peer had %d links", most)
		}
		if peers <= reachMost {
			c.everybodyReached()
		}
		c.kill(t, 1)
		c.kill(t, peers/10)
		if peers <= reachMost {
			c.everybodyReached()
		}
		if churn > 0 {
			c.churn(t, peer.Name(peers), churn, before)
		}
	})
}

// size is a number of peers that the environment may make larger.
func size(n int) int {
	if more, err := strconv.Atoi(os.Getenv("WEAVE_SIM_PEERS")); err == nil {
		return more
	}
	return n
}

// some returns up to n of the peers there are.
func (c *cluster) some(n int) []peer.Name {
	out := slices.Clone(c.order)
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out[:min(n, len(out))]
}

func (c *cluster) kill(t *testing.T, n int) {
	t.Helper()
	begin := time.Now()
	x := c.measure(func() {
		c.crash(c.some(n)...)
		c.until("kill", 2*time.Minute, c.full)
	})
	t.Logf("kill %d: given up by all after %.1f s, %v, %d suspicions and %d deaths of live peers", n, time.Since(begin).Seconds(), x,
		c.watch.suspicions.Swap(0), c.watch.deaths.Swap(0))
}

// mostLinks is how many links that peer has which has the most.
func (c *cluster) mostLinks() (n int) {
	for _, m := range c.peers {
		n = max(n, len(m.mesh.Neighbours()))
	}
	return n
}

// churn has one peer go and one come each second for a while. Empty is what the
// heap held without peers.
func (c *cluster) churn(t *testing.T, last peer.Name, d time.Duration, empty uint64) {
	t.Helper()
	next, peers := last, len(c.order)
	memory := func() uint64 { return (heap() - empty) / uint64(peers) >> 10 }
	rested := memory()
	for end := time.Now().Add(d); time.Now().Before(end); {
		stretch := min(time.Minute, time.Until(end))
		busy := c.measure(func() {
			for begin := time.Now(); time.Since(begin) < stretch; pass(time.Second) {
				next++
				c.start(next, c.some(3))
				c.crash(c.order[rand.IntN(len(c.order))])
			}
		})
		t.Logf("churn: %d of %d came and went: %v, %d kB heap and stacks per peer, %d suspicions and %d deaths of live peers",
			next-last, peers, busy, memory(), c.watch.suspicions.Swap(0), c.watch.deaths.Swap(0))
	}
	t.Logf("after churn: full view after %.1f s, %d suspicions and %d deaths of live peers", c.until("churn", 5*time.Minute, c.full).Seconds(),
		c.watch.suspicions.Swap(0), c.watch.deaths.Swap(0))
	if d < time.Minute || peers > reachMost {
		return // too few are gone to tell; costs hours
	}
	pass(keptGone)
	later := memory()
	t.Logf("%v later: %d kB heap and stacks per peer", keptGone, later)
	if later > 2*rested {
		t.Errorf("%d kB per peer, %d before", later, rested)
	}
}
