package router

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// PathStatus is what is known of the data path to one neighbour.
type PathStatus struct {
	Peer   peer.Name
	Path   string // path in use; empty while none is proven
	MTU    int    // largest IP packet proven to pass on it, bytes
	Reason string // why a better path is not in use, or the one in use is not as good as it might be; else empty

	// Via is the neighbour that relays frames to this one while no path to
	// it works; 0 when none does.
	Via peer.Name
}

// Paths returns the state of the path to each neighbour.
func (r *Router) Paths() map[peer.Name]PathStatus {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[peer.Name]PathStatus, len(r.neighbours))
	for name, n := range r.neighbours {
		s := PathStatus{Peer: name, Path: n.chosen, Reason: n.reason(n.chosen, now)}
		if way := r.plan.routes[name]; way.around && n.chosen == "" {
			s.Via = way.via
		}
		for i, p := range n.paths {
			if p.name != n.chosen {
				continue
			}
			s.MTU = p.mtu
			if x, ok := r.paths[i].(overlay.Examiner); ok && s.Reason == "" {
				s.Reason = x.Remark(n.ShortID)
			}
		}
		out[name] = s
	}
	return out
}

// Endpoints returns the endpoints announced by other peers, as they are
// forwarded to.
func (r *Router) Endpoints() []overlay.Endpoint {
	entries := r.cfg.Table.All()
	topo := r.cfg.Mesh.Topology()
	self := r.cfg.Mesh.Self().Name
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.remoteLocked(r.memory.recall(entries, topo.Reaches, time.Now()), self)
}

// PeerTraffic is what one data path exchanged with one peer.
type PeerTraffic struct {
	Peer peer.Info
	Path string
	overlay.Traffic
}

// Traffic returns what was exchanged with each peer by each data path, ordered
// by peer and path. Peers whose name is not known any more are left out.
func (r *Router) Traffic() ([]PeerTraffic, error) {
	known := make(map[peer.ShortID]peer.Info)
	r.mu.Lock()
	for _, way := range r.plan.routes {
		known[way.info.ShortID] = way.info
	}
	r.mu.Unlock()
	var out []PeerTraffic
	for _, p := range r.all {
		all, err := p.Traffic()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.Name(), err)
		}
		for id, t := range all {
			if info, ok := known[id]; ok {
				out = append(out, PeerTraffic{Peer: info, Path: p.Name(), Traffic: t})
			}
		}
	}
	slices.SortFunc(out, func(a, b PeerTraffic) int {
		return cmp.Or(cmp.Compare(a.Peer.Name, b.Peer.Name), cmp.Compare(a.Path, b.Path))
	})
	return out, nil
}

// Counters returns the counters of the data path that owns the ports.
func (r *Router) Counters() (map[string]uint64, error) { return r.sw.Counters() }
