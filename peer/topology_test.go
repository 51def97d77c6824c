package peer

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func infoOf(n Name) Info { return Info{Name: n, UID: UID(n), Port: 6783} }

// world is a set of peers and the links each of them announces.
type world map[Name][]Name

func (w world) link(a, b Name) {
	w[a] = append(w[a], b)
	w[b] = append(w[b], a)
}

func (w world) topology(self Name) *Topology {
	t := NewTopology(infoOf(self), 1)
	for n, list := range w {
		adj := make([]Adjacency, len(list))
		for i, x := range list {
			adj[i].Name = x
		}
		slices.SortFunc(adj, func(a, b Adjacency) int { return int(a.Name) - int(b.Name) })
		if n == self {
			t.SetLocal(infoOf(self), adj)
		} else {
			t.Merge(Record{Info: infoOf(n), Seq: 1, Neighbours: adj})
		}
	}
	return t
}

// The scripts in testdata draw a topology, list its links and say what routes
// follow from them.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			runScript(t, string(b))
		})
	}
}

func runScript(t *testing.T, text string) {
	t.Helper()
	w := world{}
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		at := func(k int) Name { return Name(f[k][0]) }
		var got string
		switch f[0] {
		case "link": // link a b...: a and each of b announce each other
			for k := 2; k < len(f); k++ {
				w.link(at(1), at(k))
			}
			continue
		case "claim": // claim a b: only a announces the link
			w[at(1)] = append(w[at(1)], at(2))
			if _, ok := w[at(2)]; !ok {
				w[at(2)] = nil
			}
			continue
		case "route": // route a b: the way from a to b, hop by hop
			got = w.route(at(1), at(2))
		case "tree": // tree s: who hands a broadcast of s on to whom
			got = w.flood(at(1))
		default:
			t.Fatalf("line %d: %s", i+1, line)
		}
		_, want, _ := strings.Cut(line, "=")
		if want = strings.TrimSpace(want); got != want {
			t.Errorf("line %d: %s: got %q", i+1, strings.TrimSpace(line), got)
		}
	}
}

// route follows the next hops that each peer computes by itself.
func (w world) route(from, to Name) string {
	way := string(rune(from))
	for at := from; at != to; {
		hop, ok := w.topology(at).Snapshot().NextHop(to)
		if !ok || len(way) > 2*len(w) {
			return "none"
		}
		at = hop
		way += string(rune(at))
	}
	return way
}

// flood lists parent>child pairs by level, as the peers compute them.
func (w world) flood(source Name) string {
	var out []string
	for level := []Name{source}; len(level) > 0; {
		var next []Name
		for _, n := range level {
			_, kids, _ := w.topology(n).Snapshot().Tree(source)
			for _, k := range kids {
				if parent, _, ok := w.topology(k).Snapshot().Tree(source); !ok || parent != n {
					return fmt.Sprintf("%c does not accept from %c", rune(k), rune(n))
				}
				out = append(out, string(rune(n))+">"+string(rune(k)))
				next = append(next, k)
			}
		}
		slices.Sort(next)
		level = next
	}
	return strings.Join(out, " ")
}

// oracle computes routes the obvious way.
type oracle struct {
	w    world
	dist map[Name]map[Name]int
}

func (o *oracle) connected(a, b Name) bool {
	return slices.Contains(o.w[a], b) && slices.Contains(o.w[b], a)
}

func newOracle(w world) *oracle {
	o := &oracle{w: w, dist: map[Name]map[Name]int{}}
	for s := range w {
		d := map[Name]int{s: 0}
		for range w {
			for a := range w {
				for b := range w {
					if da, ok := d[a]; ok && o.connected(a, b) {
						if db, ok := d[b]; !ok || da+1 < db {
							d[b] = da + 1
						}
					}
				}
			}
		}
		o.dist[s] = d
	}
	return o
}

// parent is the lowest-named peer one link nearer to source.
func (o *oracle) parent(source, n Name) Name {
	best := Name(0)
	for a := range o.w {
		da, ok := o.dist[source][a]
		if ok && o.connected(a, n) && da+1 == o.dist[source][n] && (best == 0 || a < best) {
			best = a
		}
	}
	return best
}

func TestRoutesAgainstOracle(t *testing.T) {
	for seed := range uint64(150) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		n := Name(1 + rnd.IntN(14))
		if seed%50 == 0 {
			n = 70 // more than one word of a bitset
		}
		w := world{}
		for a := Name(1); a <= n; a++ {
			w[a*7] = nil
		}
		density := rnd.Float64() * 4 / float64(n)
		for a := Name(1); a <= n; a++ {
			for b := Name(1); b <= n; b++ {
				if a != b && rnd.Float64() < density {
					if w[a*7] = append(w[a*7], b*7); rnd.IntN(6) > 0 && !slices.Contains(w[b*7], a*7) {
						w[b*7] = append(w[b*7], a*7)
					}
				}
			}
		}
		for a := range w {
			slices.Sort(w[a])
			w[a] = slices.Compact(w[a])
		}
		if n < 70 {
			compare(t, seed, w, 0)
		} else {
			compare(t, seed, w, 7*(1+Name(rnd.IntN(70))))
		}
	}
}

func compare(t *testing.T, seed uint64, w world, only Name) {
	t.Helper()
	o := newOracle(w)
	for self := range w {
		if only != 0 && self != only {
			continue
		}
		s := w.topology(self).Snapshot()
		for dst := range w {
			d, reach := o.dist[self][dst]
			hop, ok := s.NextHop(dst)
			if ok != (reach && dst != self) || s.Reaches(dst) != reach {
				t.Fatalf("seed %d: %d to %d: route %v, want %v", seed, self, dst, ok, reach)
			}
			if ok && (!o.connected(self, hop) || o.dist[hop][dst] != d-1) {
				t.Fatalf("seed %d: %d to %d by %d is not nearest", seed, self, dst, hop)
			}
			parent, kids, ok := s.Tree(dst)
			if ok != reach {
				t.Fatalf("seed %d: tree of %d at %d: %v", seed, dst, self, ok)
			}
			if !ok {
				continue
			}
			if want := o.parent(dst, self); parent != want {
				t.Fatalf("seed %d: tree of %d: parent of %d is %d, want %d", seed, dst, self, parent, want)
			}
			for k := range w {
				if want := reach && k != dst && o.parent(dst, k) == self; slices.Contains(kids, k) != want {
					t.Fatalf("seed %d: tree of %d: child %d of %d: want %v", seed, dst, k, self, want)
				}
			}
		}
	}
}

func TestMerge(t *testing.T) {
	top := NewTopology(Info{Name: 5, UID: 50}, 100)
	rec := func(n Name, uid UID, seq uint64) Record { return Record{Info: Info{Name: n, UID: uid}, Seq: seq} }
	for i, step := range []struct {
		r    Record
		want Merged
	}{
		{rec(1, 1, 10), Newer},
		{rec(1, 1, 10), Unchanged},
		{rec(1, 1, 9), Older},
		{rec(1, 2, 10), Newer}, // one number, two runs: the higher UID stands
		{rec(1, 1, 10), Older},
		{rec(1, 1, 11), Newer},
		{rec(5, 50, 100), Unchanged},
		{rec(5, 49, 99), Older},
		{rec(5, 49, 200), Overtaken},
	} {
		if got := top.Merge(step.r); got != step.want {
			t.Errorf("step %d: %d, want %d", i, got, step.want)
		}
	}
	if own := top.SetLocal(Info{Name: 5, UID: 50}, nil); own.Seq != 201 {
		t.Errorf("after being overtaken at 200 our number is %d", own.Seq)
	}
}

// a - b, and c that nobody reaches: databases that differ only in c agree, and
// c is forgotten in time.
func TestUnreachablePeersExpire(t *testing.T) {
	w := world{'c': nil}
	w.link('a', 'b')
	a := w.topology('a')
	delete(w, 'c')
	b := w.topology('b')
	b.SetLocal(infoOf('b'), []Adjacency{{Name: 'a'}})
	a.Merge(b.records['b'].Record)
	b.Merge(a.records['a'].Record)
	if a.Snapshot().Digest() != b.Snapshot().Digest() {
		t.Error("digests differ by a peer that cannot be reached")
	}
	b.SetLocal(infoOf('b'), []Adjacency{{Name: 'a'}})
	if a.Snapshot().Digest() == b.Snapshot().Digest() {
		t.Error("digests agree on different records")
	}

	now := time.Unix(1000, 0)
	if gone := a.Expire(now, time.Minute); gone != nil {
		t.Errorf("%v gone at once", gone)
	}
	if gone := a.Expire(now.Add(time.Minute), time.Minute); gone != nil {
		t.Errorf("%v gone too early", gone)
	}
	if gone := a.Expire(now.Add(time.Minute+1), time.Minute); !slices.Equal(gone, []Name{'c'}) {
		t.Errorf("gone %v", gone)
	}
	if _, ok := a.Snapshot().Record('c'); ok {
		t.Error("still there")
	}
}

func TestShortIDs(t *testing.T) {
	w := world{}
	w.link(5, 6)
	w.link(5, 4)
	top := w.topology(5)
	set := func(n Name, id ShortID) {
		r := top.records[n].Record
		r.Seq++
		r.ShortID = id
		if n == 5 {
			top.SetLocal(r.Info, r.Neighbours)
			return
		}
		top.Merge(r)
	}
	if !top.MustChangeShortID() {
		t.Error("none is good enough")
	}
	set(5, 9)
	set(6, 9)
	if top.MustChangeShortID() {
		t.Error("gave way to a higher name")
	}
	set(4, 9)
	if !top.MustChangeShortID() {
		t.Error("kept the id of a lower name")
	}
	if id := top.FreeShortID(9); id != 10 {
		t.Errorf("got %d", id)
	}
	set(4, MaxShortID)
	if id := top.FreeShortID(MaxShortID); id != 1 {
		t.Errorf("after the last comes %d", id)
	}
}

func TestZeroSnapshot(t *testing.T) {
	var s Snapshot
	if _, ok := s.NextHop(1); ok || s.Reaches(1) || len(s.Records()) != 0 || s.Digest() != 0 || s.Connected(1, 2) {
		t.Error("the zero snapshot knows somebody")
	}
	if _, _, ok := s.Tree(1); ok {
		t.Error("the zero snapshot has a tree")
	}
}

func BenchmarkSnapshotOf1000(b *testing.B) {
	w := world{}
	for i := Name(1); i <= 1000; i++ {
		for j := Name(1); j < i; j++ {
			if (i+j)%97 != 0 {
				w.link(i, j)
			}
		}
	}
	top := w.topology(1)
	adj := []Adjacency{{Name: 2, Addr: netip.MustParseAddrPort("192.0.2.1:1")}}
	for b.Loop() {
		top.SetLocal(infoOf(1), adj)
		top.Snapshot()
	}
}

// A thousand peers with few links each, as they join: one more comes, and then
// all broadcast.
func BenchmarkTreesOf1000(b *testing.B) {
	w := world{}
	for i := Name(1); i <= 1000; i++ {
		for step := Name(1); step < 1000; step *= 3 {
			if j := (i+step-1)%1000 + 1; j != i {
				w.link(i, j)
			}
		}
	}
	top := w.topology(1)
	for b.Loop() {
		top.last, top.snap = nil, nil
		s := top.Snapshot()
		for i := Name(1); i <= 1000; i++ {
			s.Tree(i)
		}
	}
}

// without marks links as carrying no frames, as the first end announces them.
func without(t *Topology, links ...[2]Name) Snapshot {
	for _, l := range links {
		e := t.records[l[0]]
		for i, a := range e.Neighbours {
			e.Neighbours[i].NoData = a.NoData || a.Name == l[1]
		}
	}
	t.snap = nil
	return t.Snapshot()
}

func TestFramesGoRoundLinksWithoutDataPath(t *testing.T) {
	full := world{}
	for a := Name(1); a <= 4; a++ {
		for b := a + 1; b <= 4; b++ {
			full.link(a, b)
		}
	}
	s := without(full.topology(1), [2]Name{3, 1})
	if via, ok := s.FrameHop(3); !ok || via != 2 {
		t.Errorf("frames for 3 go to %v %v, want 2", via, ok)
	}
	if via, ok := s.NextHop(3); !ok || via != 3 {
		t.Errorf("messages for 3 go to %v %v, want 3", via, ok)
	}
	if parent, _, ok := s.FrameTree(3); !ok || parent != 2 {
		t.Errorf("floods of 3 come from %v %v, want 2", parent, ok)
	}
	if _, kids, _ := s.FrameTree(1); !slices.Equal(kids, []Name{2, 4}) {
		t.Errorf("own floods go to %v", kids)
	}
	// Nobody finds a path to 3: everybody sends directly, as messages go.
	s = without(full.topology(1), [2]Name{3, 1}, [2]Name{3, 2}, [2]Name{3, 4})
	if via, ok := s.FrameHop(3); !ok || via != 3 {
		t.Errorf("frames for 3 go to %v %v, want 3", via, ok)
	}
	if parent, _, ok := s.FrameTree(3); !ok || parent != 3 {
		t.Errorf("floods of 3 come from %v %v, want 3", parent, ok)
	}
	if via, ok := s.FrameHop(4); !ok || via != 4 {
		t.Errorf("frames for 4 go to %v %v", via, ok)
	}
	if _, ok := (Snapshot{}).FrameHop(1); ok {
		t.Error("a way although nobody is known")
	}
}

// Whatever links carry no frames: peers that know the same make no loop, every
// frame arrives where messages would, and a flood reaches nobody twice.
func TestFramesNeverCircle(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		w := world{}
		n := Name(2 + r.IntN(9))
		var broken [][2]Name
		for a := Name(1); a <= n; a++ {
			w[a] = append(w[a], nil...)
			for b := Name(1); b < a; b++ {
				if r.IntN(3) == 0 {
					continue
				}
				w.link(a, b)
				if r.IntN(2) == 0 {
					broken = append(broken, [2]Name{a, b})
				}
			}
		}
		snaps := make(map[Name]Snapshot)
		for a := Name(1); a <= n; a++ {
			snaps[a] = without(w.topology(a), broken...)
		}
		for src := Name(1); src <= n; src++ {
			for dst := Name(1); dst <= n; dst++ {
				at := src
				for hops := 0; at != dst; hops++ {
					via, ok := snaps[at].FrameHop(dst)
					if ok != snaps[src].Reaches(dst) || hops > int(n) {
						t.Fatalf("%v, broken %v: from %v to %v: at %v after %d hops, way on %v", w, broken, src, dst, at, hops, ok)
					}
					if !ok {
						break
					}
					at = via
				}
			}
			flood(t, snaps, src)
		}
	}
}

// flood sends a flood of src along all children that take it from their parent.
func flood(t *testing.T, snaps map[Name]Snapshot, src Name) {
	t.Helper()
	got := map[Name]int{}
	next := []Name{src}
	for len(next) > 0 {
		at := next[0]
		next = next[1:]
		if got[at]++; got[at] > 1 {
			t.Fatalf("flood of %v is at %v twice", src, at)
		}
		_, kids, _ := snaps[at].FrameTree(src)
		for _, k := range kids {
			if parent, _, _ := snaps[k].FrameTree(src); parent == at {
				next = append(next, k)
			}
		}
	}
}
