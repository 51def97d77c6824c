package fastdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// graph is hosts with cables between some of them, by index.
type graph struct {
	line
	cables [][2]int
}

func newGraph(t *testing.T, k kind, hosts int, cables ...[2]int) *graph {
	t.Helper()
	g := &graph{cables: cables}
	for i := range hosts {
		g.line = append(g.line, startedWith(t, peer.ShortID(i+1), k))
	}
	for _, c := range cables {
		join(g.line[c[0]], g.line[c[1]], 1500)
	}
	return g
}

// parents is the tree of shortest ways from a host over the cables, ties by
// index; -1 where there is none.
func parents(hosts, from int, cables [][2]int) []int {
	p := slices.Repeat([]int{-1}, hosts)
	p[from] = from
	for queue := []int{from}; len(queue) > 0; queue = queue[1:] {
		var next []int
		for _, c := range cables {
			for _, e := range [][2]int{c, {c[1], c[0]}} {
				if e[0] == queue[0] && p[e[1]] < 0 {
					next = append(next, e[1])
				}
			}
		}
		slices.Sort(next)
		for _, n := range slices.Compact(next) {
			p[n] = queue[0]
		}
		queue = append(queue, slices.Compact(next)...)
	}
	return p
}

// want is what the router would want of host i with those cables.
func (g *graph) want(i int, cables [][2]int) overlay.Forwarding {
	f := overlay.Forwarding{Self: g.line[i].id, Hops: map[peer.ShortID]overlay.Hop{}, Trees: map[peer.ShortID]overlay.Tree{}}
	for _, c := range cables {
		for _, e := range [][2]int{c, {c[1], c[0]}} {
			if n := g.line[e[1]]; e[0] == i {
				f.Neighbours = append(f.Neighbours, overlay.Neighbour{
					Info: peer.Info{Name: peer.Name(n.id), ShortID: n.id}, Local: g.line[i].addr(), Remote: n.addr()})
			}
		}
	}
	towards := parents(len(g.line), i, cables)
	for j, other := range g.line {
		tree := overlay.Tree{}
		above := parents(len(g.line), j, cables)
		for child, parent := range above {
			if parent == i && child != i {
				tree.Children = append(tree.Children, g.line[child].id)
			}
		}
		if j != i && above[i] >= 0 {
			tree.Parent = g.line[above[i]].id
			via := j
			for towards[via] != i {
				via = towards[via]
			}
			f.Hops[other.id] = overlay.Hop{Via: g.line[via].id, Path: overlay.FastDP}
			for _, c := range other.containers {
				f.Endpoints = append(f.Endpoints, c.port.Endpoint)
			}
		}
		f.Trees[other.id] = tree
	}
	return f
}

func (g *graph) applyTo(i int, cables [][2]int) {
	g.line[i].t.Helper()
	h := g.line[i]
	h.must(func() error { return errors.Join(h.dp.Apply(g.want(i, cables)), h.dp.refreshRules()) })
}

const numbered = 0x88b6 // EtherType of our frames, for local experiments (IEEE 802)

// shout is a numbered frame to all.
func (c *container) shout(n uint64) []byte {
	f := append([]byte{255, 255, 255, 255, 255, 255}, c.port.MAC[:]...)
	f = binary.BigEndian.AppendUint16(f, numbered)
	return append(binary.BigEndian.AppendUint64(f, n), make([]byte, 40)...)
}

// number names a frame of shout by its sender and number.
func number(f []byte) string {
	if len(f) < 22 || binary.BigEndian.Uint16(f[12:]) != numbered {
		return ""
	}
	return fmt.Sprintf("%x %d", f[6:12], binary.BigEndian.Uint64(f[14:]))
}

// ring is the cables of n hosts in a circle.
func ring(n int) (cables [][2]int) {
	for i := range n {
		cables = append(cables, [2]int{min(i, (i+1)%n), max(i, (i+1)%n)})
	}
	return cables
}

func shapes() map[string]func(t *testing.T, k kind) *graph {
	return map[string]func(t *testing.T, k kind) *graph{
		"line": func(t *testing.T, k kind) *graph { return newGraph(t, k, 5, ring(5)[:4]...) },
		"ring": func(t *testing.T, k kind) *graph { return newGraph(t, k, 5, ring(5)...) },
		"full": func(t *testing.T, k kind) *graph {
			return newGraph(t, k, 4, [2]int{0, 1}, [2]int{0, 2}, [2]int{0, 3}, [2]int{1, 2}, [2]int{1, 3}, [2]int{2, 3})
		},
	}
}

// populate puts a container on each host and watches what arrives there.
func (g *graph) populate() (cs []*container, got []*sightings) {
	for i, h := range g.line {
		cs = append(cs, h.container(fmt.Sprintf("10.32.0.%d/24", i+1)))
	}
	for i, c := range cs {
		g.applyTo(i, g.cables)
		got = append(got, c.watch(number))
	}
	return cs, got
}

// flooded is how many flooded frames the hosts have accepted.
func (g *graph) flooded() (n uint64) {
	for _, h := range g.line {
		n += h.counter("rx_flooded")
	}
	return n
}

// Each broadcast comes to each host once, whatever the shape.
func TestBroadcastOnce(t *testing.T) {
	const each = 50
	for name, shape := range shapes() {
		t.Run(name, func(t *testing.T) {
			g := shape(t, kind{})
			cs, got := g.populate()
			for n := range uint64(each) {
				for _, c := range cs {
					c.raw(c.shout(n))
				}
			}
			all := each * (len(cs) - 1)
			for i, x := range got {
				wait(t, fmt.Sprintf("%d frames at host %d", all, i+1), func() bool { n, _ := x.total(); return n >= all })
			}
			// One more from each comes after all that may be on its way twice.
			for _, c := range cs {
				c.raw(c.shout(each))
			}
			for i, x := range got {
				wait(t, "the last frames", func() bool { n, _ := x.total(); return n >= all+len(cs)-1 })
				if n, most := x.total(); n != all+len(cs)-1 || most != 1 {
					t.Errorf("host %d: %d frames, want %d; one of them %d times", i+1, n, all+len(cs)-1, most)
				}
			}
		})
	}
}

// While the routes of a ring change, host by host, no frame comes to anybody more
// often than there are ways around the ring, and none goes on for ever.
func TestNoLoopWhileRoutesChange(t *testing.T) {
	const turns = 40
	g := newGraph(t, kind{}, 5, ring(5)...)
	cs, got := g.populate()
	accepted := g.flooded()
	sent := uint64(0)
	for range turns {
		cables := g.cables
		if down := rand.IntN(2 * len(cables)); down < len(cables) {
			cables = slices.Delete(slices.Clone(cables), down, down+1)
		}
		for _, i := range rand.Perm(len(cs)) {
			g.applyTo(i, cables)
			for _, c := range cs {
				c.raw(c.shout(sent))
			}
			sent++
		}
	}
	for i := range cs {
		g.applyTo(i, g.cables)
	}
	// What is still under way comes to rest.
	last := uint64(0)
	wait(t, "rest", func() bool {
		now := g.flooded()
		still := now == last
		last = now
		<-time.After(50 * time.Millisecond)
		return still
	})
	frames := sent * uint64(len(cs))
	if n := last - accepted; n > 2*frames*uint64(len(cs)-1) {
		t.Errorf("%d frames were accepted %d times", frames, n)
	}
	for i, x := range got {
		n, most := x.total()
		t.Logf("host %d: %d of %d frames, at most %d times", i+1, n, frames-sent, most)
		if most > 2 {
			t.Errorf("host %d got a frame %d times", i+1, most)
		}
		x.mu.Lock()
		copies := slices.Sorted(maps.Values(x.seen))
		x.mu.Unlock()
		if twice := len(copies) - slices.Index(copies, 2); slices.Contains(copies, 2) && twice > len(copies)/20 {
			t.Errorf("host %d got %d of %d frames twice", i+1, twice, len(copies))
		}
	}
	// And all is as it should be.
	for i, c := range cs {
		c.raw(c.shout(sent))
		for j, x := range got {
			if i != j {
				wait(t, "a frame after all changes", func() bool { return x.count(number(c.shout(sent))) == 1 })
			}
		}
	}
}
