package peer

import (
	"math/bits"
	"slices"
	"sync"
)

// Snapshot is an immutable state of the link-state database with the routes
// that follow from it. Two peers are connected when the record of each lists
// the other. Peers whose databases agree compute the same trees. The zero
// Snapshot knows nobody.
type Snapshot struct{ g *graph }

// graph numbers the peers in the order of their names; sets of peers are
// bitsets of words 64-bit words, which makes a search in a mesh of a thousand
// peers a matter of microseconds.
type graph struct {
	records []Record // by name
	words   int
	claims  []uint64 // row i: the peers that the record of peer i lists
	adj     []uint64 // row i: the peers connected to peer i
	self    int
	first   []int // by destination: the neighbour to send to, -1 when there is no route
	digest  uint64
	frames  bool // only of links over which a data path works

	// What a search works with: bits of peers not reached yet, and of those
	// that are reached next. Once the graph is made, mu guards these too.
	parent, order []int
	left, next    []uint64

	mu    sync.Mutex // guards what follows, which is computed when first asked for
	trees map[int]tree
	few   []Name // our neighbours in the spanning tree, when made
	data  *graph // of the links over which a data path works: this one when these are all
}

type tree struct {
	parent   Name
	children []Name
	ok       bool
}

// newGraph makes the graph of records. If last is not nil it is one of records
// of the same peers, earlier ones some of them, and saves most of the work.
func newGraph(self Name, records []Record, last *graph) *graph {
	if last == nil {
		slices.SortFunc(records, func(a, b Record) int { return int(a.Name) - int(b.Name) })
	}
	return linkUp(self, records, last, false)
}

// linkUp makes the graph of records in order, of all links or only of those
// that frames can take.
func linkUp(self Name, records []Record, last *graph, frames bool) *graph {
	g := &graph{
		records: records,
		words:   (len(records) + 63) / 64,
		frames:  frames,
		trees:   make(map[int]tree),
	}
	g.self, _ = g.index(self)
	if last != nil {
		g.claims, g.adj = slices.Clone(last.claims), slices.Clone(last.adj)
	} else {
		g.claims, g.adj = make([]uint64, len(records)*g.words), make([]uint64, len(records)*g.words)
	}
	for i := range records {
		if last == nil || records[i].Seq != last.records[i].Seq || records[i].UID != last.records[i].UID {
			g.claim(i)
			g.connect(i)
		}
	}
	g.route()
	return g
}

func (g *graph) index(name Name) (int, bool) {
	return slices.BinarySearchFunc(g.records, name, func(r Record, n Name) int { return int(r.Name) - int(n) })
}

func (g *graph) row(i int) []uint64 { return g.adj[i*g.words : (i+1)*g.words] }

// claim fills the row of what the record of a peer lists. Records and neighbours
// are both sorted: in a full mesh each neighbour's number follows that of the
// one before, and where links are few it is not far to search.
func (g *graph) claim(i int) {
	row := g.claims[i*g.words : (i+1)*g.words]
	clear(row)
	j := 0
	for _, a := range g.records[i].Neighbours {
		if j < len(g.records) && g.records[j].Name < a.Name {
			j++
		}
		if j < len(g.records) && g.records[j].Name < a.Name {
			k, _ := slices.BinarySearchFunc(g.records[j:], a.Name, func(r Record, n Name) int { return int(r.Name) - int(n) })
			j += k
		}
		if j < len(g.records) && g.records[j].Name == a.Name && (!a.NoData || !g.frames) {
			row[j/64] |= 1 << (j % 64)
		}
	}
}

// connect takes into adj what a peer claims now: the other end has to as well.
func (g *graph) connect(i int) {
	bit := uint64(1) << (i % 64)
	for k, claims := range g.claims[i*g.words : (i+1)*g.words] {
		now := uint64(0)
		for w := claims | g.row(i)[k]; w != 0; w &= w - 1 {
			j := k*64 + bits.TrailingZeros64(w)
			other := &g.adj[j*g.words+i/64]
			*other &^= bit
			if claims&(w&-w) != 0 && g.claims[j*g.words+i/64]&bit != 0 {
				*other |= bit
				now |= w & -w
			}
		}
		g.adj[i*g.words+k] = now
	}
}

// search returns the shortest-path tree of source: for each peer the one
// before it on the way from source, -1 when there is no way (and for source
// itself), and the peers in order of distance. Of several possible parents a
// peer gets the one of lowest name. Both are good until the next search.
func (g *graph) search(source int) (parent, order []int) {
	if g.parent == nil {
		g.parent, g.order = make([]int, len(g.records)), make([]int, 0, len(g.records))
		g.left, g.next = make([]uint64, g.words), make([]uint64, g.words)
	}
	parent, order = g.parent, append(g.order[:0], source)
	for i := range parent {
		parent[i] = -1
		g.left[i/64] |= 1 << (i % 64)
	}
	g.left[source/64] &^= 1 << (source % 64)
	for begin := 0; begin < len(order); {
		level := order[begin:]
		begin = len(order)
		for _, u := range level {
			for k, w := range g.row(u) {
				w &= g.left[k]
				g.left[k] &^= w
				g.next[k] |= w
				for ; w != 0; w &= w - 1 {
					parent[k*64+bits.TrailingZeros64(w)] = u
				}
			}
		}
		for k, w := range g.next { // the next level is visited by name
			g.next[k] = 0
			for ; w != 0; w &= w - 1 {
				order = append(order, k*64+bits.TrailingZeros64(w))
			}
		}
	}
	return parent, order
}

func (g *graph) route() {
	parent, order := g.search(g.self)
	g.first = make([]int, len(g.records))
	for i := range g.first {
		g.first[i] = -1
	}
	for _, v := range order {
		g.digest ^= mix(g.records[v])
		switch parent[v] {
		case -1:
		case g.self:
			g.first[v] = v
		default:
			g.first[v] = g.first[parent[v]]
		}
	}
}

// mix spreads what identifies a record over 64 bits (the finalizer of
// SplitMix64, applied to each part).
func mix(r Record) uint64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, v := range [...]uint64{uint64(r.Name), uint64(r.UID), r.Seq} {
		h ^= v
		h ^= h >> 30
		h *= 0xbf58476d1ce4e5b9
		h ^= h >> 27
		h *= 0x94d049bb133111eb
		h ^= h >> 31
	}
	return h
}

// Records returns all that is known, by name, our own record included, and
// also records of peers that cannot be reached. Do not modify it.
func (s Snapshot) Records() []Record {
	if s.g == nil {
		return nil
	}
	return s.g.records
}

// Record returns the record of one peer.
func (s Snapshot) Record(name Name) (Record, bool) {
	if s.g == nil {
		return Record{}, false
	}
	i, ok := s.g.index(name)
	if !ok {
		return Record{}, false
	}
	return s.g.records[i], true
}

// Reaches says whether there is a route to name; there is one to ourselves.
func (s Snapshot) Reaches(name Name) bool {
	if s.g == nil {
		return false
	}
	i, ok := s.g.index(name)
	return ok && (i == s.g.self || s.g.first[i] >= 0)
}

// Reachable returns the other peers to which there is a route, by name.
func (s Snapshot) Reachable() []Name {
	var out []Name
	for i, r := range s.Records() {
		if s.g.first[i] >= 0 {
			out = append(out, r.Name)
		}
	}
	return out
}

// ReachableRecords returns our own record and those of the peers to which
// there is a route, by name.
func (s Snapshot) ReachableRecords() []Record {
	var out []Record
	for i, r := range s.Records() {
		if i == s.g.self || s.g.first[i] >= 0 {
			out = append(out, r)
		}
	}
	return out
}

// NextHop returns the neighbour through which dst is reached over the fewest
// links; false when there is no way, or dst is ourselves.
func (s Snapshot) NextHop(dst Name) (Name, bool) {
	if s.g == nil {
		return 0, false
	}
	i, ok := s.g.index(dst)
	if !ok || s.g.first[i] < 0 {
		return 0, false
	}
	return s.g.records[s.g.first[i]].Name, true
}

// FrameHop is NextHop for frames: over the fewest links on which both ends find
// that a data path works. Where there is no such way it is NextHop, so that
// frames take the way that messages have when no way is proven.
//
// Frames cannot circle between peers that know the same: those that the first
// rule holds for are a part of the graph that frames do not leave, and all
// others send towards that part.
func (s Snapshot) FrameHop(dst Name) (Name, bool) {
	if via, ok := s.frames().NextHop(dst); ok {
		return via, true
	}
	return s.NextHop(dst)
}

// FrameTree is Tree for frames, with the rules of FrameHop.
func (s Snapshot) FrameTree(source Name) (parent Name, children []Name, ok bool) {
	if parent, children, ok = s.frames().Tree(source); ok {
		return parent, children, true
	}
	return s.Tree(source)
}

// frames is the state without the links on which no data path works.
func (s Snapshot) frames() Snapshot {
	if s.g == nil {
		return s
	}
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	if s.g.data == nil {
		s.g.data = s.g
		broken := func(a Adjacency) bool { return a.NoData }
		if slices.ContainsFunc(s.g.records, func(r Record) bool { return slices.ContainsFunc(r.Neighbours, broken) }) {
			s.g.data = linkUp(s.g.records[s.g.self].Name, s.g.records, nil, true)
		}
	}
	return Snapshot{s.g.data}
}

// Connected says whether both peers announce a link to each other.
func (s Snapshot) Connected(a, b Name) bool {
	if s.g == nil {
		return false
	}
	i, okA := s.g.index(a)
	j, okB := s.g.index(b)
	return okA && okB && s.g.row(i)[j/64]&(1<<(j%64)) != 0
}

// ReachesAround says whether there is a way to a neighbour besides the link to
// it.
func (s Snapshot) ReachesAround(name Name) bool {
	if s.g == nil {
		return false
	}
	i, ok := s.g.index(name)
	if !ok || i == s.g.self {
		return false
	}
	near := slices.Clone(s.g.row(s.g.self))
	near[i/64] &^= 1 << (i % 64)
	left := make([]uint64, s.g.words)
	for k := range left {
		left[k] = ^uint64(0)
	}
	left[s.g.self/64] &^= 1 << (s.g.self % 64)
	left[i/64] &^= 1 << (i % 64)
	for found := []int{i}; len(found) > 0; {
		row := s.g.row(found[len(found)-1])
		found = found[:len(found)-1]
		for k, w := range row {
			if w &= left[k]; w&near[k] != 0 {
				return true
			}
			left[k] &^= w
			for ; w != 0; w &= w - 1 {
				found = append(found, k*64+bits.TrailingZeros64(w))
			}
		}
	}
	return false
}

// Tree returns our place in the broadcast tree of source: the neighbour its
// broadcasts come from (0 when source is ourselves) and those they go on to.
// It is false when source cannot reach us.
func (s Snapshot) Tree(source Name) (parent Name, children []Name, ok bool) {
	if s.g == nil {
		return 0, nil, false
	}
	i, known := s.g.index(source)
	if !known {
		return 0, nil, false
	}
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	t, done := s.g.trees[i]
	if !done {
		t = s.g.tree(i)
		s.g.trees[i] = t
	}
	return t.parent, t.children, t.ok
}

func (g *graph) tree(source int) tree {
	parent, _ := g.search(source)
	t := tree{ok: source == g.self || parent[g.self] >= 0}
	if !t.ok {
		return t
	}
	if source != g.self {
		t.parent = g.records[parent[g.self]].Name
	}
	for v, p := range parent {
		if p == g.self {
			t.children = append(t.children, g.records[v].Name)
		}
	}
	return t
}

// branches is how many peers one attaches to the spanning tree at a time.
const branches = 3

// Spanning returns our neighbours in a tree of all reachable peers which is the
// same for all of them, and in which nobody has more than four neighbours as
// far as links allow. Do not modify it.
func (s Snapshot) Spanning() []Name {
	if s.g == nil {
		return nil
	}
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	if s.g.few == nil {
		s.g.few = s.g.spanning()
	}
	return s.g.few
}

// spanning grows the tree from the lowest name; who is in it attaches three of
// those that are not, and more only when nobody else can.
func (g *graph) spanning() []Name {
	left := make([]uint64, g.words)
	root, count := g.self, -1
	for i := len(g.records) - 1; i >= 0; i-- {
		if i == g.self || g.first[i] >= 0 {
			left[i/64] |= 1 << (i % 64)
			root = i
			count++
		}
	}
	left[root/64] &^= 1 << (root % 64)
	few, tree := []Name{}, []int{root}
	for count > 0 {
		before := count
		for i := 0; i < len(tree); i++ {
			for _, v := range g.take(tree[i], left) {
				tree = append(tree, v)
				count--
				if v == g.self {
					few = append(few, g.records[tree[i]].Name)
				} else if tree[i] == g.self {
					few = append(few, g.records[v].Name)
				}
			}
		}
		if count == before {
			break // not reached: routes say that all can be
		}
	}
	return few
}

// take removes from left some peers that u is connected to, and returns them.
func (g *graph) take(u int, left []uint64) (out []int) {
	for k, w := range g.row(u) {
		for w &= left[k]; w != 0; w &= w - 1 {
			left[k] &^= w & -w
			if out = append(out, k*64+bits.TrailingZeros64(w)); len(out) == branches {
				return out
			}
		}
	}
	return out
}

// Digest tells two databases apart by the records of reachable peers. Others
// do not count: they are forgotten at different times at different peers.
func (s Snapshot) Digest() uint64 {
	if s.g == nil {
		return 0
	}
	return s.g.digest
}
