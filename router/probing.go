package router

import (
	"cmp"
	"errors"
	"maps"
	"time"

	"weave.local/peer"
	"weave.local/peer/link"
	"weave.local/router/overlay"
)

// reportEvery is how often a neighbour is told which paths it reaches us over;
// changes are told at once.
const reportEvery = time.Second

// noDataAfter is how long no path to a neighbour may be usable before all peers
// are told. It is longer than what lies between the fall of the one path and
// that of the other, or of the link when it is the neighbour that died.
const noDataAfter = 1500 * time.Millisecond

// keepParted is how long a neighbour may be without a control link until what
// is known of its paths is forgotten. A link is often replaced by one that comes
// up here a moment after the other end closed the old one.
const keepParted = time.Second

// refresh takes over the neighbours of the mesh.
func (r *Router) refresh(now time.Time) {
	excluded, links := r.cfg.Mesh.TakeExcluded(), r.cfg.Mesh.Neighbours()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, name := range excluded { // nothing is kept for their return
		r.plan.forget(name)
		delete(r.memory, name)
	}
	r.linkedLocked(links, now)
}

// linkedLocked is told all neighbours. One whose control link was replaced keeps
// what is known of its paths.
func (r *Router) linkedLocked(links []link.Neighbour, now time.Time) {
	maps.DeleteFunc(r.parted, func(_ peer.Name, n *neighbour) bool { return now.Sub(n.parted) > keepParted })
	seen := make(map[peer.Name]bool, len(links))
	r.byShortID = make(map[peer.ShortID]peer.Name, len(links))
	for _, l := range links {
		seen[l.Name] = true
		n := cmp.Or(r.neighbours[l.Name], r.parted[l.Name])
		delete(r.parted, l.Name)
		if n == nil || n.UID != l.UID {
			n = r.newNeighbour(now)
		}
		r.neighbours[l.Name] = n
		n.Neighbour = toOverlay(l)
		for _, p := range n.paths {
			p.bar(barred(n.Neighbour, p.name), now)
		}
		n.outbound, n.addr = l.Outbound, l.Remote.String()
		if l.ShortID != 0 {
			r.byShortID[l.ShortID] = l.Name
		}
	}
	for name, n := range r.neighbours {
		if !seen[name] {
			delete(r.neighbours, name)
			n.parted, r.parted[name] = now, n
		}
	}
}

func (r *Router) newNeighbour(now time.Time) *neighbour {
	n := &neighbour{carried: now}
	for _, p := range r.paths {
		n.paths = append(n.paths, newPathState(p.Name(), now))
	}
	return n
}

func toOverlay(l link.Neighbour) overlay.Neighbour {
	return overlay.Neighbour{
		Info:    l.Info,
		Local:   l.Local.Addr().Unmap(),
		Remote:  l.Remote.Addr().Unmap(),
		Session: l.Session,
		Keys:    l.Keys,
	}
}

// barred says why a path must not be used to a neighbour; empty when it may.
func barred(n overlay.Neighbour, path string) string {
	if n.Keys != nil && path == overlay.FastDP {
		return "would send in clear (to allow it, name the subnet in --trusted-subnets at both ends)"
	}
	return ""
}

type dueProbe struct {
	to    peer.Name
	id    peer.ShortID
	path  int
	token uint64
	size  int
}

// probe sends what is due and says whether the path to any neighbour changed.
func (r *Router) probe(now time.Time) bool {
	for _, d := range r.dueProbes(now) {
		err := r.paths[d.path].Probe(d.id, d.token, d.size)
		if err != nil {
			r.probeRefused(d, err)
		}
	}
	r.report(now)
	return r.choose(now)
}

func (r *Router) dueProbes(now time.Time) []dueProbe {
	limits := r.limits()
	r.mu.Lock()
	defer r.mu.Unlock()
	var due []dueProbe
	for name, n := range r.neighbours {
		if n.ShortID == 0 {
			continue
		}
		for i, p := range n.paths {
			for _, size := range p.tick(now, limits[n.ShortID][i]) {
				token := r.nextID()
				p.sent(token, size, now)
				due = append(due, dueProbe{to: name, id: n.ShortID, path: i, token: token, size: size})
			}
		}
	}
	return due
}

// limits asks each path for its device's limit, outside the lock; ours holds
// for all.
func (r *Router) limits() map[peer.ShortID][]int {
	r.mu.Lock()
	known := make([]peer.ShortID, 0, len(r.neighbours))
	for _, n := range r.neighbours {
		if n.ShortID != 0 {
			known = append(known, n.ShortID)
		}
	}
	r.mu.Unlock()
	limits := make(map[peer.ShortID][]int, len(known))
	for _, id := range known {
		for _, p := range r.paths {
			limits[id] = append(limits[id], r.bound(p.MTU(id)))
		}
	}
	return limits
}

func (r *Router) probeRefused(d dueProbe, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.neighbours[d.to]
	if n == nil {
		return
	}
	p := n.paths[d.path]
	delete(p.pending, d.token)
	if tooBig := (*overlay.TooBigError)(nil); errors.As(err, &tooBig) {
		p.refused(d.size, tooBig.MTU, nil)
		return
	}
	if absent := (*overlay.AbsentError)(nil); errors.As(err, &absent) {
		p.absent = absent.Why.Error()
	}
	p.refused(d.size, 0, err)
}

// report tells neighbours over which paths our frames reach them, which is
// what they cannot see themselves.
func (r *Router) report(now time.Time) {
	type note struct {
		to     peer.Name
		health byte
		lacks  string
	}
	var notes []note
	r.mu.Lock()
	for name, n := range r.neighbours {
		var health byte
		var lacks string
		for _, p := range n.paths {
			lacks = cmp.Or(lacks, p.absent)
			if p.up {
				health |= 1 << pathCode(p.name)
			}
		}
		if health == n.told && now.Sub(n.reported) < reportEvery {
			continue
		}
		n.told, n.reported = health, now
		notes = append(notes, note{to: name, health: health, lacks: lacks})
	}
	r.mu.Unlock()
	for _, n := range notes {
		r.send(n.to, report(n.health, n.lacks))
	}
}

// receive handles a message of another router.
func (r *Router) receive(from peer.Name, b []byte) {
	m, err := parseMessage(b)
	if err != nil {
		r.cfg.Log.Debug("router message ignored", "peer", from, "err", err)
		return
	}
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.neighbours[from]
	if n == nil {
		return
	}
	for i, p := range n.paths {
		switch {
		case m.typ == typeReport:
			p.peerUp = m.health&(1<<pathCode(p.name)) != 0
			if p.name == overlay.FastDP {
				p.peerLacks = m.lacks
			}
		case p.name != m.path || p.ack(m.token, now):
		default:
			if x, ok := r.paths[i].(overlay.Examiner); ok {
				x.Answered(n.ShortID, m.token)
			}
		}
	}
}

// choose picks the best usable path to each neighbour and says whether any
// choice or its MTU changed. With none usable the last choice stands, until the
// link state shows another way.
func (r *Router) choose(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	changed := false
	for _, n := range r.neighbours {
		best, mtu := n.best()
		if best != "" {
			n.carried = now
		}
		if mtu != n.mtu {
			n.mtu, changed = mtu, true
		}
		if best == n.chosen {
			continue
		}
		r.cfg.Log.Info("data path", "peer", n.Name, "was", n.chosen, "now", best, "reason", n.reason(best, now))
		n.chosen, changed = best, true
	}
	return changed
}

// best is the first usable path with its MTU, one that loses much only when all
// do; empty when none is usable.
func (n *neighbour) best() (path string, mtu int) {
	for _, p := range n.paths {
		switch {
		case !p.usable():
		case !p.loss.heavy:
			return p.name, p.mtu
		case path == "":
			path, mtu = p.name, p.mtu
		}
	}
	return path, mtu
}

// tellNoData tells the mesh to which neighbours no data path works, when that
// changed.
func (r *Router) tellNoData(now time.Time) {
	names := make(map[peer.Name]bool)
	r.mu.Lock()
	for name, n := range r.neighbours {
		if n.chosen == "" && now.Sub(n.carried) > noDataAfter {
			names[name] = true
		}
	}
	same := maps.Equal(names, r.noData)
	r.noData = names
	r.mu.Unlock()
	if !same {
		r.cfg.Mesh.SetNoData(names)
	}
}

// reason says why paths better than chosen are not used; empty when chosen is
// the best there is.
func (n *neighbour) reason(chosen string, now time.Time) string {
	out := ""
	for _, p := range n.paths {
		if p.name == chosen {
			break
		}
		if out != "" {
			out += "; "
		}
		out += p.name + ": " + p.why(now)
	}
	return out
}
