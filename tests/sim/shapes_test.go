package sim

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"weave.local/peer"
)

// lasting is a time that the environment may make longer.
func lasting(t *testing.T, name string, d time.Duration) time.Duration {
	t.Helper()
	if s := os.Getenv(name); s != "" {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// shape says which of the peers 1 to size have a link, from the higher to the
// lower.
type shape struct {
	name  string
	size  int
	links func(high, low int) bool
	dead  func(from, to peer.Name) bool // ways that are cut; dialled in vain
}

func shapes() []shape {
	random := rand.New(rand.NewPCG(1, 2))
	broken := map[[2]peer.Name]bool{}
	for a := peer.Name(1); a <= 20; a++ {
		for b := peer.Name(1); b < a; b++ {
			broken[[2]peer.Name{a, b}] = random.IntN(5) == 0
		}
	}
	all := func(int, int) bool { return true }
	return []shape{
		{name: "line", size: 30, links: func(h, l int) bool { return h == l+1 }},
		{name: "star", size: 30, links: func(_, l int) bool { return l == 1 }},
		{name: "cliques", size: 21, links: func(h, l int) bool { return l == 1 || h <= 11 || l > 11 }},
		{name: "ring", size: 20, links: func(h, l int) bool { return h == l+1 || h == 20 && l == 1 }},
		{name: "fifth dead", size: 20, links: all, dead: func(a, b peer.Name) bool { return broken[[2]peer.Name{max(a, b), min(a, b)}] }},
		{name: "one way", size: 20, links: all, dead: func(a, b peer.Name) bool { return a > b && broken[[2]peer.Name{a, b}] }},
	}
}

// Whatever the shape, all see all soon, all reach all, and at rest nobody
// suspects anybody. WEAVE_SIM_REST makes the rest longer.
func TestShapes(t *testing.T) {
	rest := lasting(t, "WEAVE_SIM_REST", 30*time.Second)
	for _, s := range shapes() {
		t.Run(s.name, func(t *testing.T) {
			simulate(t, func(c *cluster) {
				if s.dead != nil {
					c.cut("dead", s.dead)
				}
				before := heap()
				for h := 1; h <= s.size; h++ {
					var targets []peer.Name
					for l := 1; l < h; l++ {
						if s.links(h, l) {
							targets = append(targets, peer.Name(l))
						}
					}
					c.start(peer.Name(h), targets, noDiscovery)
				}
				took := c.until("join", 30*time.Second, c.full)
				c.everybodyReached()
				pass(20 * time.Second) // a view that is full, and what follows a join
				c.calm("join")
				x := c.measure(func() { pass(rest) })
				c.calm(fmt.Sprint("at rest for ", rest))
				t.Logf("%s of %d: full view after %.1f s; at rest %v, %d kB", s.name, s.size, took.Seconds(), x, (heap()-before)/uint64(s.size)>>10)
				if s := c.full(); s != "" {
					t.Error(s)
				}
				c.everybodyReached()
			})
		})
	}
}

// A cluster in two parts, for a short while and for so long that each gave the
// other up, is one again within 15 s of the repair. WEAVE_SIM_APART makes the
// longer time longer.
func TestPartitionsHeal(t *testing.T) {
	for _, apart := range []time.Duration{10 * time.Second, lasting(t, "WEAVE_SIM_APART", 45*time.Second)} {
		t.Run(apart.String(), func(t *testing.T) {
			simulate(t, func(c *cluster) {
				const size = 20
				for i := range peer.Name(size) {
					c.start(i+1, c.some(3))
				}
				c.until("join", 10*time.Second, c.full)
				c.cut("half", func(from, to peer.Name) bool { return from <= size/2 != (to <= size/2) })
				pass(apart)
				c.peers[1].table.Set("side", []byte("low"))
				c.peers[size].table.Set("side", []byte("high"))
				c.cut("half", nil)
				took := c.until("repair", 15*time.Second, c.full)
				linked := c.until("links", 15*time.Second-took, func() string {
					for _, m := range c.peers {
						if n := len(m.mesh.Neighbours()); n != size-1 {
							return fmt.Sprintf("%v has %d links", m.name, n)
						}
					}
					return ""
				})
				t.Logf("apart for %v: one again after %.1f s, all linked after %.1f s", apart, took.Seconds(), (took + linked).Seconds())
				c.until("agreement", 5*time.Second, c.full)
				pass(time.Second) // until all know of the last link
				c.everybodyReached()
			})
		})
	}
}
