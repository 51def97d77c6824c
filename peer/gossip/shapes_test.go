package gossip

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
)

// shape says which of the peers 1 to size have a link: whether the higher
// dials the lower.
type shape struct {
	name  string
	net   byte
	size  int
	links func(high, low int) bool
	dead  bool // who does not link is dialled in vain
}

func shapes() []shape {
	random := rand.New(rand.NewPCG(1, 2))
	return []shape{
		{name: "line", net: 101, size: 30, links: func(h, l int) bool { return h == l+1 }},
		{name: "cliques", net: 102, size: 21, links: func(h, l int) bool { return l == 1 || h <= 11 || l > 11 }},
		{name: "star", net: 103, size: 30, links: func(_, l int) bool { return l == 1 }},
		{name: "ring", net: 104, size: 20, links: func(h, l int) bool { return h == l+1 || h == 20 && l == 1 }},
		{name: "broken", net: 105, size: 20, links: func(int, int) bool { return random.IntN(5) > 0 }, dead: true},
	}
}

// run starts the peers of a shape and waits until all see all.
func (s shape) run(t *testing.T) *world {
	t.Helper()
	w := newWorld(t, s.net)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.GC() // the first leaves pools
	runtime.ReadMemStats(&before)
	begin := time.Now()
	for h := 1; h <= s.size; h++ {
		var targets []netip.AddrPort
		for l := 1; l < h; l++ {
			switch {
			case s.links(h, l):
				targets = append(targets, w.at(0, l))
			case s.dead:
				targets = append(targets, w.at(1, l))
			}
		}
		w.start(targets...)
	}
	agree(t, 30*time.Second, w.nodes...)
	full := time.Since(begin)
	w.everybodyReached()
	runtime.GC()
	runtime.GC() // the first leaves pools
	runtime.ReadMemStats(&after)
	t.Logf("%s of %d: full view after %v, %d kB heap per peer", s.name, s.size, full.Round(10*time.Millisecond),
		(int64(after.HeapAlloc)-int64(before.HeapAlloc))/int64(s.size)>>10)
	return w
}

// Whatever the shape, all see all soon, all reach all, and at rest nobody
// suspects anybody.
func TestShapes(t *testing.T) {
	t.Parallel()
	var worlds []*world
	for i, s := range shapes() {
		if i < 2 || !testing.Short() {
			worlds = append(worlds, s.run(t))
		}
	}
	var sent []uint64
	for _, w := range worlds {
		sent = append(sent, w.bytes())
	}
	begin := time.Now()
	calm(t, 10*time.Second, worlds...)
	rest := time.Since(begin).Seconds()
	for i, w := range worlds {
		t.Logf("%s: at rest %.0f bytes/s sent per peer", shapes()[i].name, float64(w.bytes()-sent[i])/rest/float64(len(w.nodes)))
		agree(t, 30*time.Second, w.nodes...)
		w.everybodyReached()
	}
}

// 1 - 2 cannot send to each other in one direction; 3 sees both.
func TestOneWay(t *testing.T) {
	t.Parallel()
	directions := []int{fromDialler, toDialler}
	var worlds []*world
	var cables []*cable
	for i, direction := range directions {
		w := newWorld(t, byte(110+i))
		w.start()
		c := w.cable(w.at(0, 1))
		w.start(c.at)
		w.start(w.at(0, 1), w.at(0, 2))
		agree(t, 30*time.Second, w.nodes...)
		c.set(false, direction)
		worlds, cables = append(worlds, w), append(cables, c)
	}
	linked := func(want bool) func() string {
		return func() string {
			for _, w := range worlds {
				for _, n := range w.nodes[:2] {
					if got := len(n.mesh.Neighbours()) == 2; got != want {
						return fmt.Sprintf("peer %d has neighbours %v", uint64(n.self), n.mesh.Neighbours())
					}
				}
			}
			return ""
		}
	}
	eventually(t, 6*time.Second, linked(false))
	pause(t, time.Second) // routes settle
	for _, w := range worlds {
		w.everybodyReached()
	}
	calm(t, 5*time.Second, worlds...)
	for i, w := range worlds {
		w.everybodyReached()
		cables[i].set(true, directions[i])
	}
	eventually(t, 15*time.Second, linked(true))
}

// Two halves that were apart for longer than it takes to be given up see each
// other within 15 s of the repair, by themselves.
func TestHalvesHeal(t *testing.T) {
	t.Parallel()
	const half = 6 // enough to confirm suspicions, which makes them short
	w := newWorld(t, 112)
	var cables []*cable
	for h := 1; h <= 2*half; h++ {
		var targets []netip.AddrPort
		for l := 1; l < h; l++ {
			at := w.at(0, l)
			if l <= half && h > half {
				c := w.cable(at)
				cables = append(cables, c)
				at = c.at
			}
			targets = append(targets, at)
		}
		w.start(targets...)
	}
	agree(t, 15*time.Second, w.nodes...)
	for _, c := range cables {
		c.set(false, fromDialler, toDialler)
	}
	eventually(t, 40*time.Second, func() string {
		for _, n := range w.nodes {
			if got := len(n.Members()); got != half {
				return fmt.Sprintf("peer %d still has %d members", uint64(n.self), got)
			}
		}
		return ""
	})
	w.nodes[0].table.Set("side", []byte("low"))
	w.nodes[half].table.Set("side", []byte("high"))
	pause(t, time.Duration(rand.IntN(10))*time.Second) // at whatever point of the waits
	begin := time.Now()
	for _, c := range cables {
		c.set(true, fromDialler, toDialler)
	}
	agree(t, 15*time.Second, w.nodes...)
	t.Logf("merged after %v", time.Since(begin).Round(10*time.Millisecond))
	eventually(t, 15*time.Second-time.Since(begin), func() string {
		for _, n := range w.nodes {
			if got := len(n.mesh.Neighbours()); got != 2*half-1 {
				return fmt.Sprintf("peer %d has %d links", uint64(n.self), got)
			}
		}
		return ""
	})
	t.Logf("all linked after %v", time.Since(begin).Round(10*time.Millisecond))
	w.everybodyReached()
}

// 1 sends to 4 over 2, which falls silent as a host without power does: soon
// all goes over 3, nobody else is given up, and 2 comes back unnoticed.
func TestRelayDies(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 113)
	w.start()
	c1 := w.cable(w.at(0, 1))
	w.start(c1.at)
	w.start(w.at(0, 1))
	c2 := w.cable(w.at(0, 2))
	w.start(c2.at, w.at(0, 3))
	agree(t, 30*time.Second, w.nodes...)
	if hop, _ := w.nodes[0].mesh.Topology().NextHop(4); hop != 2 {
		t.Fatalf("the way is over %v", hop)
	}
	arrived := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.got)
	}
	// gap sends for some time and returns the longest during which nothing
	// arrived, and when the sender's route changed.
	gap := func(d time.Duration, hop peer.Name) (longest, changed time.Duration) {
		begin := time.Now()
		last, had := begin, arrived()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for i := 0; time.Since(begin) < d; i++ {
			<-tick.C
			_ = w.nodes[0].mesh.Send(4, helloKind, []byte(fmt.Sprint(begin.UnixNano(), i))) // lost meanwhile
			if via, ok := w.nodes[0].mesh.Topology().NextHop(4); ok && via == hop && changed == 0 {
				changed = time.Since(begin)
			}
			for _, n := range []*node{w.nodes[0], w.nodes[3]} {
				for _, name := range []peer.Name{1, 3, 4} {
					// Memberlist alone may suspect a peer behind the relay for
					// longer than it lasts; to us a peer is dead only
					// when there is no route either.
					if !slices.Contains(n.Members(), name) {
						t.Fatalf("peer %d took %d for dead", uint64(n.self), uint64(name))
					}
				}
			}
			now := time.Now()
			if n := arrived(); n > had {
				last, had = now, n
			}
			longest = max(longest, now.Sub(last))
		}
		return longest, changed
	}
	stalled := stalls(t)
	if longest, _ := gap(time.Second, 2); longest > 2*stalled()+500*time.Millisecond {
		t.Fatalf("nothing arrived for %v while all was well", longest)
	}
	for _, c := range []*cable{c1, c2} {
		c.set(false, fromDialler, toDialler)
	}
	longest, changed := gap(6*time.Second, 3)
	stall := stalled()
	if changed == 0 || changed > 3*time.Second+2*stall { // 2.5 s, and how often it is looked at
		t.Errorf("noticed after %v", changed)
	}
	if longest > changed+time.Second+2*stall {
		t.Errorf("nothing arrived for %v, although noticed after %v", longest, changed)
	}
	t.Logf("noticed after %v, traffic flows again after %v", changed.Round(time.Millisecond), longest.Round(time.Millisecond))
	eventually(t, 30*time.Second, func() string {
		if n := len(w.nodes[0].Members()); n != 3 {
			return fmt.Sprintf("%d members", n)
		}
		return ""
	})
	for _, c := range []*cable{c1, c2} {
		c.set(true, fromDialler, toDialler)
	}
	_ = stalled()
	longest, changed = gap(11*time.Second, 2)
	if changed == 0 || longest > time.Second+2*stalled() {
		t.Errorf("with the relay back (%v) nothing arrived for %v", changed, longest)
	}
	agree(t, 15*time.Second, w.nodes...)
}
