package router

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
	"weave.local/router/seal"
)

// Peers of the tests: this one is a.
const (
	a peer.Name = iota + 0xa
	b
	c
)

func info(n peer.Name) peer.Info {
	return peer.Info{Name: n, UID: peer.UID(n), ShortID: peer.ShortID(n), Port: 6783}
}

func neighbourOf(n peer.Name) overlay.Neighbour {
	return overlay.Neighbour{Info: info(n), Remote: netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), Session: uint64(n)}
}

// fullView is what a sees of
//
//	a --- b
//	 \   /
//	   c
func fullView() view {
	return view{
		now:        time.Unix(1000, 0),
		self:       info(a),
		neighbours: []overlay.Neighbour{neighbourOf(b), neighbourOf(c)},
		paths:      map[peer.Name]string{b: overlay.FastDP, c: overlay.FastDP},
		peers:      []peer.Info{info(a), info(b), info(c)},
		nextHop:    func(n peer.Name) (peer.Name, bool) { return n, true },
		tree: func(s peer.Name) (peer.Name, []peer.Name, bool) {
			if s == a {
				return 0, []peer.Name{b, c}, true
			}
			return s, nil, true
		},
	}
}

// Where only sleeve may be used there is nothing to wait for: the first frames go
// before a probe was answered. Elsewhere they wait.
func TestFirstRoute(t *testing.T) {
	v := fullView()
	v.paths = nil
	v.neighbours[0].Keys = new(seal.Session)
	f := newPlan().step(v)
	if got, ok := f.Hops[peer.ShortID(b)]; !ok || got.Path != overlay.Sleeve || got.Via != peer.ShortID(b) {
		t.Errorf("to a peer that is sealed: %+v", got)
	}
	if got, ok := f.Hops[peer.ShortID(c)]; ok {
		t.Errorf("to one that is not: %+v", got)
	}
}

// cutView is the same after the link a-c broke: c is reached through b.
//
//	a --- b --- c
func cutView() view {
	v := fullView()
	v.neighbours = v.neighbours[:1]
	delete(v.paths, c)
	v.nextHop = func(peer.Name) (peer.Name, bool) { return b, true }
	v.tree = func(s peer.Name) (peer.Name, []peer.Name, bool) {
		if s == a {
			return 0, []peer.Name{b}, true
		}
		return b, nil, true
	}
	return v
}

// deadView is what a sees when the daemon of c was killed: nobody has a link
// to c any more.
func deadView() view {
	v := cutView()
	v.nextHop = func(n peer.Name) (peer.Name, bool) { return b, n == b }
	tree := v.tree
	v.tree = func(s peer.Name) (peer.Name, []peer.Name, bool) {
		if s == c {
			return 0, nil, false
		}
		return tree(s)
	}
	return v
}

func hop(t *testing.T, f overlay.Forwarding, to peer.Name, via peer.Name, path string) {
	t.Helper()
	got, ok := f.Hops[peer.ShortID(to)]
	if want := (overlay.Hop{Via: peer.ShortID(via), Path: path}); !ok || got != want {
		t.Errorf("hop to %v: %v (known %v), want %v", to, got, ok, want)
	}
}

func isNeighbour(f overlay.Forwarding, n peer.Name) bool {
	return slices.ContainsFunc(f.Neighbours, func(x overlay.Neighbour) bool { return x.Name == n })
}

func TestPlanDirect(t *testing.T) {
	f := newPlan().step(fullView())
	hop(t, f, b, b, overlay.FastDP)
	hop(t, f, c, c, overlay.FastDP)
	if kids := f.Trees[f.Self].Children; !slices.Equal(kids, []peer.ShortID{peer.ShortID(b), peer.ShortID(c)}) {
		t.Errorf("own broadcasts go to %v", kids)
	}
	if parent := f.Trees[peer.ShortID(c)].Parent; parent != peer.ShortID(c) {
		t.Errorf("broadcasts of c accepted from %v", parent)
	}
}

func TestPlanNoHopBeforeAPathIsProven(t *testing.T) {
	v := fullView()
	v.paths = nil
	f := newPlan().step(v)
	if len(f.Hops) != 0 {
		t.Errorf("hops %v over paths nobody has seen carry a frame", f.Hops)
	}
	if !isNeighbour(f, b) {
		t.Error("a neighbour that is not announced to the data paths can't be probed")
	}
}

// The size that a neighbour's path carries holds for all that goes by way of it,
// also while it is only remembered.
func TestPlanKeepsSizes(t *testing.T) {
	p := newPlan()
	want := func(what string, f overlay.Forwarding, to peer.Name, mtu int) {
		t.Helper()
		if got := f.Hops[peer.ShortID(to)].MTU; got != mtu {
			t.Errorf("%s: %d bytes to %v, want %d", what, got, to, mtu)
		}
	}
	v := fullView()
	v.mtus = map[peer.Name]int{b: 1400, c: 1300}
	f := p.step(v)
	want("direct", f, b, 1400)
	want("direct", f, c, 1300)
	v.mtus = map[peer.Name]int{b: 1376, c: 1450}
	f = p.step(v)
	want("changed", f, b, 1376)
	want("changed", f, c, 1450)
	v = cutView()
	v.mtus = map[peer.Name]int{b: 1376}
	want("relayed", p.step(v), c, 1376)
	v = deadView()
	v.mtus = map[peer.Name]int{b: 1376}
	want("remembered", p.step(v), c, 1450)
}

func TestPlanRelaysAroundACut(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	v := cutView()
	f := p.step(v)
	hop(t, f, c, b, overlay.FastDP)
	if !isNeighbour(f, c) {
		t.Error("frames that c sent directly are not accepted any more while others find out")
	}
	v.now = v.now.Add(2 * settle)
	f = p.step(v)
	hop(t, f, c, b, overlay.FastDP)
	if isNeighbour(f, c) {
		t.Error("c still counts as neighbour although it is reached through b for long")
	}
	if kids := f.Trees[f.Self].Children; !slices.Equal(kids, []peer.ShortID{peer.ShortID(b)}) {
		t.Errorf("own broadcasts go to %v: c would get them twice", kids)
	}
}

func TestPlanKeepsThePathToAKilledDaemon(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	f := p.step(deadView())
	hop(t, f, c, c, overlay.FastDP)
	if !isNeighbour(f, c) {
		t.Error("frames of c's kernel are not accepted any more")
	}
	if kids := f.Trees[f.Self].Children; !slices.Contains(kids, peer.ShortID(c)) {
		t.Errorf("broadcasts go to %v: c's containers get no ARP", kids)
	}
	if f.Trees[peer.ShortID(c)].Parent != peer.ShortID(c) {
		t.Error("broadcasts of c's kernel are not accepted any more")
	}
	// The daemon of c comes back; until its paths are proven again the old
	// hop stands.
	back := fullView()
	delete(back.paths, c)
	hop(t, p.step(back), c, c, overlay.FastDP)
}

// TestPlanSeesThroughTheRelayThatIsNone: the daemon of c was killed; we notice
// first, and b, which has not yet, looks like a relay for a moment.
func TestPlanSeesThroughTheRelayThatIsNone(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	p.step(cutView())
	v := deadView()
	v.now = v.now.Add(time.Second)
	f := p.step(v)
	hop(t, f, c, c, overlay.FastDP)
	if !isNeighbour(f, c) || f.Trees[peer.ShortID(c)].Parent != peer.ShortID(c) {
		t.Error("frames of c's kernel are not accepted any more")
	}
	v.now = v.now.Add(time.Hour)
	f = p.step(v)
	hop(t, f, c, c, overlay.FastDP)
	if !isNeighbour(f, c) {
		t.Error("frames of c's kernel are not accepted any more an hour later")
	}
}

// TestPlanKeepsTheRelayToAKilledDaemon: c was reached through b for long when
// its daemon died; the way of old would lead nowhere.
func TestPlanKeepsTheRelayToAKilledDaemon(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	p.step(cutView())
	v := cutView()
	v.now = v.now.Add(time.Hour)
	p.step(v)
	dead := deadView()
	dead.now = v.now.Add(time.Second)
	hop(t, p.step(dead), c, b, overlay.FastDP)
}

// aroundView is fullView while no data path works over the link a-c: frames go
// through b, messages as before.
func aroundView() view {
	v := cutView()
	v.neighbours = fullView().neighbours
	return v
}

func TestPlanGoesRoundALinkWithoutDataPath(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	v := aroundView()
	f := p.step(v)
	hop(t, f, c, b, overlay.FastDP)
	if !isNeighbour(f, c) {
		t.Error("c is no neighbour: nothing would notice that the path works again")
	}
	if kids := f.Trees[f.Self].Children; !slices.Equal(kids, []peer.ShortID{peer.ShortID(b)}) {
		t.Errorf("own broadcasts go to %v", kids)
	}
	// The daemon of c dies: the direct way is no better than before.
	v = deadView()
	v.now = v.now.Add(time.Hour)
	hop(t, p.step(v), c, b, overlay.FastDP)
	// It comes back, and nobody knows yet that the link carries nothing.
	back := fullView()
	delete(back.paths, c)
	f = p.step(back)
	hop(t, f, c, b, overlay.FastDP)
	if kids := f.Trees[f.Self].Children; !slices.Equal(kids, []peer.ShortID{peer.ShortID(b)}) {
		t.Errorf("own broadcasts go to %v: b would get them twice", kids)
	}
	hop(t, p.step(fullView()), c, c, overlay.FastDP)
}

// No path to c works from anywhere, and then the link to the relay goes: what
// was last known to work stands.
func TestPlanFallsBackToTheDirectWay(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	p.step(aroundView())
	v := fullView()
	v.paths = nil
	hop(t, p.step(v), c, c, overlay.FastDP)
}

func TestPlanForgets(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	p.forget(c)
	v := deadView()
	v.peers = v.peers[:2]
	f := p.step(v)
	if _, ok := f.Hops[peer.ShortID(c)]; ok || isNeighbour(f, c) {
		t.Error("a removed peer is still forwarded to")
	}
}

func TestPlanGivesAReusedShortIDToItsNewOwner(t *testing.T) {
	p := newPlan()
	p.step(fullView())
	v := deadView()
	d := info(0xd)
	d.ShortID = peer.ShortID(c)
	v.peers = []peer.Info{info(a), info(b), d}
	v.nextHop = func(n peer.Name) (peer.Name, bool) { return b, n != c }
	f := p.step(v)
	hop(t, f, c, b, overlay.FastDP) // the short id of c, now that of d
	if isNeighbour(f, c) {
		t.Error("the old owner of the short id is still a neighbour")
	}
}

// A path that cannot seal knows nothing of neighbours with keys.
func TestLawful(t *testing.T) {
	sealed := neighbourOf(2)
	sealed.Keys = new(seal.Session)
	f := overlay.Forwarding{
		Neighbours: []overlay.Neighbour{neighbourOf(1), sealed},
		Hops:       map[peer.ShortID]overlay.Hop{},
	}
	for i := range f.Neighbours {
		f.Neighbours[i].ShortID = peer.ShortID(i + 1)
	}
	for dst := range peer.ShortID(4) {
		f.Hops[dst+1] = overlay.Hop{Via: dst%2 + 1, Path: []string{overlay.FastDP, overlay.Sleeve}[dst/2]}
	}
	got := lawful(f, overlay.FastDP)
	if len(got.Neighbours) != 1 || got.Neighbours[0].ShortID != 1 {
		t.Errorf("neighbours %v", got.Neighbours)
	}
	if _, ok := got.Hops[2]; ok || len(got.Hops) != 3 {
		t.Errorf("hops %v", got.Hops)
	}
	if got := lawful(f, overlay.Sleeve); len(got.Neighbours) != 2 || len(got.Hops) != 4 {
		t.Errorf("sleeve gets %v", got)
	}
	if len(f.Neighbours) != 2 || len(f.Hops) != 4 {
		t.Error("the forwarding itself is changed")
	}
}
