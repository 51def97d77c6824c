package ipam

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"weave.local/peer"
)

// TestChaos lets five peers allocate, claim, free, donate, crash at any write
// or message, restart, leave the network one way or both ways, with a fifth of
// the messages lost and a fifth doubled or late, with leases of several lengths
// and without, and holds them to the
// invariants of world.check all the while. When the storm is over everybody
// gets an address again.
func TestChaos(t *testing.T) {
	runs := uint64(12)
	if testing.Short() {
		runs = 3
	}
	for seed := range runs {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			run(t, seed, func(t *testing.T, w *world) { storm(t, w, 400, time.Duration(seed%3)*3*time.Second) })
		})
	}
}

// tally counts what calls came to.
type tally struct {
	calls  sync.WaitGroup
	mu     sync.Mutex
	counts map[string]int
}

func (c *tally) run(what string, call func() error) {
	c.calls.Go(func() {
		name := what
		if err := call(); err != nil {
			name += " failed"
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.counts[name]++
	})
}

func storm(t *testing.T, w *world, steps int, lease time.Duration) {
	w.loss = 0.2
	for _, h := range w.add(5, consensus(5)) {
		h.cfg.Range = netip.MustParsePrefix("10.32.0.0/23") // small: donations are common
		h.cfg.Lease = lease
		h.start()
	}
	count := &tally{counts: map[string]int{}}
	for step := range steps {
		w.act(count)
		if step%4 == 0 {
			settle(time.Duration(w.dice(300)) * time.Millisecond)
			w.check()
		}
	}
	w.mu.Lock()
	w.cut, w.loss = nil, 0
	w.mu.Unlock()
	for _, h := range w.peers {
		h.light(0)
		if h.up() == nil {
			h.crash()
			h.start()
		}
	}
	settle(10 * time.Second)
	w.check()
	for i, h := range w.peers {
		h.must(fmt.Sprintf("after the storm %d", i), "10.32.0.0/23")
	}
	count.calls.Wait()
	if count.counts["allocate"] == 0 || count.counts["claim"] == 0 || count.counts["free"] == 0 {
		t.Fatalf("nothing happened: %v", count.counts)
	}
	t.Log(count.counts, "register version", w.peers[0].a.Status().Version)
}

// act lets one thing happen.
func (w *world) act(count *tally) {
	h := w.peers[w.dice(len(w.peers))]
	owner := fmt.Sprintf("c%d", w.dice(40))
	subnet := netip.MustParsePrefix([]string{"10.32.0.0/23", "10.32.1.0/24", "10.32.0.64/27"}[w.dice(3)])
	a := h.up()
	switch what := w.dice(20); {
	case a == nil:
		h.crash() // in full, and back
		h.start()
	case what < 10:
		count.run("allocate", func() error {
			_, err := a.Allocate(w.within(20*time.Second), owner, subnet)
			return err
		})
	case what < 12:
		addr := netip.AddrFrom4([4]byte{10, 32, 1, byte(w.dice(256))})
		count.run("claim", func() error {
			return a.Claim(w.within(20*time.Second), owner, netip.PrefixFrom(addr, 24))
		})
	case what < 15:
		count.run("free", func() error { return a.FreeAll(owner) })
	case what < 17:
		h.light(1 + w.dice(30))
	case what < 19:
		w.split()
	default:
		settle(time.Duration(w.dice(5000)) * time.Millisecond)
	}
}

// dice is a number from 0 to below n.
func (w *world) dice(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rand.IntN(n)
}

// split cuts some directions between some pairs, in no regular way; now and
// then all is whole again.
func (w *world) split() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rand.IntN(3) == 0 {
		w.cut = nil
		return
	}
	type way struct{ from, to peer.Name }
	dead := map[way]bool{}
	for from := range w.peers {
		for to := range w.peers {
			if w.rand.IntN(3) == 0 {
				dead[way{peer.Name(from + 1), peer.Name(to + 1)}] = true
			}
		}
	}
	w.cut = func(a, b peer.Name) bool { return dead[way{a, b}] }
}
