package router

import (
	"maps"
	"slices"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// settle is how long after the loss of a link the link state may still be
// taken for a relay what is a dead daemon: others find out up to one dead
// interval of their links later, and the flooding takes its time.
const settle = 5 * time.Second

// view is all a forwarding decision depends on.
type view struct {
	now        time.Time
	self       peer.Info
	neighbours []overlay.Neighbour                   // peers with a live control link
	paths      map[peer.Name]string                  // usable data path to each neighbour; absent when there is none
	mtus       map[peer.Name]int                     // proven on that path
	peers      []peer.Info                           // everybody in the link state, self included
	nextHop    func(dst peer.Name) (peer.Name, bool) // for frames, as is tree
	tree       func(source peer.Name) (parent peer.Name, children []peer.Name, ok bool)
}

// route is what was last known of the way to a peer.
type route struct {
	info   peer.Info
	via    peer.Name
	path   string
	mtu    int
	parent peer.Name
	kids   []peer.Name
	direct string      // path while the peer was a neighbour; empty: it never was
	proven int         // mtu of that path
	spread []peer.Name // kids of that time
	around bool        // there is a link to the peer, but frames go another way
}

// plan turns views into forwarding state and remembers what the views no
// longer tell: the kernel path to a peer outlives that peer's daemon, so a
// peer whose control link is gone and that nobody else reaches stays where it
// was last seen. The memory of a peer ends when a newer route to it is known.
//
// When a daemon dies its neighbours notice one after the other, and each sees
// for a moment a route through those that have not noticed yet. Such a route is
// used but does not replace the memory of the direct one before it has lasted.
type plan struct {
	routes     map[peer.Name]route
	neighbours map[peer.Name]overlay.Neighbour
	lost       map[peer.Name]time.Time // when the link to a neighbour went
}

func newPlan() *plan {
	return &plan{
		routes:     make(map[peer.Name]route),
		neighbours: make(map[peer.Name]overlay.Neighbour),
		lost:       make(map[peer.Name]time.Time),
	}
}

// forget drops the memory of a peer that was removed for good.
func (pl *plan) forget(name peer.Name) {
	delete(pl.routes, name)
	delete(pl.neighbours, name)
	delete(pl.lost, name)
}

func (pl *plan) step(v view) overlay.Forwarding {
	live := make(map[peer.Name]bool, len(v.neighbours))
	for _, n := range v.neighbours {
		live[n.Name] = true
		pl.neighbours[n.Name] = n
		delete(pl.lost, n.Name)
	}
	for name := range pl.neighbours {
		if _, noted := pl.lost[name]; !noted && !live[name] {
			pl.lost[name] = v.now
		}
	}
	known := make(map[peer.Name]bool, len(v.peers))
	for _, p := range v.peers {
		known[p.Name] = true
		pl.learn(v, p, live)
	}
	pl.dropReusedIDs(known)
	return pl.forwarding(v, live)
}

// learn updates the route to p; a peer without a route keeps its old one.
func (pl *plan) learn(v view, p peer.Info, live map[peer.Name]bool) {
	if p.ShortID == 0 {
		return
	}
	r, before := pl.routes[p.Name]
	r.info = p
	if p.Name == v.self.Name {
		_, r.kids, _ = v.tree(p.Name)
		pl.routes[p.Name] = r
		return
	}
	via, ok := v.nextHop(p.Name)
	if !ok {
		if !before {
			return
		}
		if r.direct != "" && !r.around && pl.justLost(p.Name, v.now) {
			r.via, r.path, r.mtu, r.parent, r.kids = p.Name, r.direct, r.proven, p.Name, r.spread
		}
		pl.routes[p.Name] = r
		return
	}
	switch path := v.paths[via]; {
	case path != "":
		r.via, r.path, r.mtu = via, path, v.mtus[via]
	case before && live[via] && (r.via == via || v.paths[r.via] != ""):
		// What is known is kept while the link's paths are being probed.
	case via == p.Name && !pl.sealed(via):
		r.via, r.path, r.mtu = via, r.direct, r.proven // a first route waits until its path is proven
	case pl.sealed(via):
		r.via, r.path, r.mtu = via, overlay.Sleeve, 0 // but where there is only one, waiting helps nobody
	default:
		r.via, r.path, r.mtu = via, "", 0
	}
	if parent, kids, ok := v.tree(p.Name); ok {
		r.parent, r.kids = parent, kids
	}
	if r.via == p.Name {
		r.direct, r.proven, r.spread = r.path, r.mtu, r.kids
	}
	r.around = live[p.Name] && r.via != p.Name
	pl.routes[p.Name] = r
}

// sealed says whether a neighbour is reached by sleeve only.
func (pl *plan) sealed(name peer.Name) bool { return pl.neighbours[name].Keys != nil }

// justLost says whether the link to a neighbour went so lately that what the
// link state tells may be on its way yet.
func (pl *plan) justLost(name peer.Name, now time.Time) bool {
	at, ok := pl.lost[name]
	return ok && now.Sub(at) < settle
}

// dropReusedIDs forgets peers that are gone and whose short id now belongs to
// somebody else.
func (pl *plan) dropReusedIDs(known map[peer.Name]bool) {
	owner := make(map[peer.ShortID]peer.Name, len(known))
	for name := range known {
		if r, ok := pl.routes[name]; ok {
			owner[r.info.ShortID] = name
		}
	}
	for name, r := range pl.routes {
		if o, ok := owner[r.info.ShortID]; ok && o != name && !known[name] {
			pl.forget(name)
		}
	}
}

func (pl *plan) forwarding(v view, live map[peer.Name]bool) overlay.Forwarding {
	f := overlay.Forwarding{
		Self:  v.self.ShortID,
		Hops:  make(map[peer.ShortID]overlay.Hop, len(pl.routes)),
		Trees: make(map[peer.ShortID]overlay.Tree, len(pl.routes)),
	}
	id := func(n peer.Name) peer.ShortID { return pl.routes[n].info.ShortID }
	var silent []peer.ShortID // neighbours whose daemon is gone but whose kernel may still serve
	for name, r := range pl.routes {
		if name == v.self.Name {
			continue
		}
		if r.path != "" && id(r.via) != 0 {
			f.Hops[r.info.ShortID] = overlay.Hop{Via: id(r.via), Path: r.path, MTU: r.mtu}
		}
		tree := overlay.Tree{Parent: id(r.parent), Children: ids(pl.straight(name), id)}
		if tree.Parent != 0 {
			f.Trees[r.info.ShortID] = tree
		}
		if r.via == name && r.path == overlay.FastDP && !live[name] {
			silent = append(silent, r.info.ShortID)
		}
	}
	own := ids(pl.straight(v.self.Name), id)
	for _, s := range silent {
		if !slices.Contains(own, s) {
			own = append(own, s)
		}
	}
	slices.Sort(own)
	f.Trees[f.Self] = overlay.Tree{Children: own}
	for name, n := range pl.neighbours {
		if live[name] || pl.routes[name].via == name || pl.justLost(name, v.now) {
			if n.ShortID = id(name); n.ShortID != 0 {
				f.Neighbours = append(f.Neighbours, n)
			}
		}
	}
	slices.SortFunc(f.Neighbours, func(a, b overlay.Neighbour) int { return int(a.ShortID) - int(b.ShortID) })
	return f
}

// straight are the neighbours that floods of source go on to, but for those to
// which frames go through another neighbour just now: the copy would be a
// second one to that one.
func (pl *plan) straight(source peer.Name) []peer.Name {
	return slices.DeleteFunc(slices.Clone(pl.routes[source].kids), func(n peer.Name) bool { return pl.routes[n].via != n })
}

// lawful is f without what a path must not do: neither carry frames to
// neighbours to which it is barred nor take any from them.
func lawful(f overlay.Forwarding, path string) overlay.Forwarding {
	off := make(map[peer.ShortID]bool)
	for _, n := range f.Neighbours {
		if barred(n, path) != "" {
			off[n.ShortID] = true
		}
	}
	if len(off) == 0 {
		return f
	}
	f.Neighbours = slices.DeleteFunc(slices.Clone(f.Neighbours), func(n overlay.Neighbour) bool { return off[n.ShortID] })
	f.Hops = maps.Clone(f.Hops)
	maps.DeleteFunc(f.Hops, func(_ peer.ShortID, h overlay.Hop) bool { return h.Path == path && off[h.Via] })
	return f
}

func ids(names []peer.Name, id func(peer.Name) peer.ShortID) []peer.ShortID {
	out := make([]peer.ShortID, 0, len(names))
	for _, n := range names {
		if s := id(n); s != 0 {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}
