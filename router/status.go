package router

import (
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// PathStatus is what is known of the data path to one neighbour.
type PathStatus struct {
	Peer   peer.Name
	Path   string // path in use; empty while none is proven
	MTU    int    // largest IP packet proven to pass on it, bytes
	Reason string // why a better path is not in use; empty when none is better
}

// Paths returns the state of the path to each neighbour.
func (r *Router) Paths() map[peer.Name]PathStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[peer.Name]PathStatus, len(r.neighbours))
	for name, n := range r.neighbours {
		s := PathStatus{Peer: name, Path: n.chosen, Reason: n.reason(n.chosen)}
		for _, p := range n.paths {
			if p.name == n.chosen {
				s.MTU = p.mtu
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

// Counters returns the counters of the data path that owns the ports.
func (r *Router) Counters() (map[string]uint64, error) { return r.sw.Counters() }
