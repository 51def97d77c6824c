package fastdp

import (
	"errors"
	"maps"
	"net/netip"
	"slices"

	"weave.local/peer"
	"weave.local/router/bpf"
	"weave.local/router/overlay"
)

// inherited is what an earlier daemon had the kernel do for peers that nobody
// has named since: their daemons may be away as well, and their kernels serve.
type inherited struct {
	tables
	floods []uint16 // those of them that floods from here go to
}

// Adopted says whether the kernel already forwarded when New came: a daemon
// before this one left it so. It speaks of that until the first Apply.
func (d *DataPath) Adopted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.deferred || d.config.Self != 0
}

// inherit reads what is in the tables. The direct ways are not taken over:
// nobody who would know of a change is there to watch them.
func (d *DataPath) inherit() error {
	in := inherited{tables: tables{endpoints: maps.Clone(d.remote), addresses: maps.Clone(d.holders)}}
	var errs [4]error
	in.neighbours, errs[0] = d.objs.Neighbours.All()
	in.hops, errs[1] = d.objs.Hops.All()
	in.trees, errs[2] = d.objs.Trees.All()
	in.foreign, errs[3] = d.objs.Foreign.All()
	for a, n := range in.neighbours {
		n.Uplink = 0
		in.neighbours[a] = n
	}
	maps.DeleteFunc(in.hops, func(_ uint16, h bpf.Hop) bool { return h.Kind != bpf.KindVXLAN })
	for id, h := range in.hops {
		h.Uplink, h.Gateway = 0, netip.Addr{}
		in.hops[id] = h
	}
	own := in.trees[d.config.Self]
	in.floods = slices.Clone(own.Children[:own.N])
	d.inherited = in
	return errors.Join(errs[:]...)
}

func (in *inherited) empty() bool {
	return len(in.neighbours)+len(in.hops)+len(in.trees)+len(in.endpoints)+len(in.foreign) == 0
}

// met drops what is about one of the peers that f names.
func (in *inherited) met(f overlay.Forwarding) {
	met := map[uint16]bool{uint16(f.Self): true}
	for id := range f.Hops {
		met[uint16(id)] = true
	}
	for id := range f.Trees {
		met[uint16(id)] = true
	}
	for _, n := range f.Neighbours {
		met[uint16(n.ShortID)] = true
	}
	for _, e := range f.Endpoints {
		met[uint16(e.Peer)] = true
	}
	for a, n := range in.neighbours {
		left := slices.DeleteFunc(slices.Clone(n.ID[:n.N]), func(id uint16) bool { return met[id] })
		n.ID = [bpf.MaxSharing]uint16{}
		n.N = copy(n.ID[:], left)
		in.neighbours[a] = n
	}
	maps.DeleteFunc(in.neighbours, func(_ bpf.Addr, n bpf.Neighbour) bool { return n.N == 0 })
	maps.DeleteFunc(in.hops, func(id uint16, _ bpf.Hop) bool { return met[id] })
	maps.DeleteFunc(in.trees, func(id uint16, _ bpf.Tree) bool { return met[id] })
	maps.DeleteFunc(in.foreign, func(id uint16, _ bpf.Subnets) bool { return met[id] })
	maps.DeleteFunc(in.endpoints, func(_ bpf.MAC, e bpf.Endpoint) bool { return met[e.Peer] })
	maps.DeleteFunc(in.addresses, func(_ bpf.Addr, mac bpf.MAC) bool { _, ok := in.endpoints[mac]; return !ok })
	in.floods = slices.DeleteFunc(in.floods, func(id uint16) bool { return met[id] })
}

// addTo adds it to what is wanted, which goes before it.
func (in *inherited) addTo(want *tables, self peer.ShortID) {
	add(want.neighbours, in.neighbours)
	add(want.hops, in.hops)
	add(want.trees, in.trees)
	add(want.endpoints, in.endpoints)
	add(want.addresses, in.addresses)
	add(want.foreign, in.foreign)
	own, ok := want.trees[uint16(self)]
	if !ok {
		return
	}
	for _, id := range in.floods {
		if own.N < len(own.Children) && !slices.Contains(own.Children[:own.N], id) {
			own.Children[own.N] = id
			own.N++
		}
	}
	want.trees[uint16(self)] = own
}

func add[K comparable, V any](to, from map[K]V) {
	for k, v := range from {
		if _, ok := to[k]; !ok {
			to[k] = v
		}
	}
}

// inheritLocked takes into what is wanted what f leaves as it was found.
func (d *DataPath) inheritLocked(want *tables, f overlay.Forwarding) {
	if !f.Inherit {
		d.inherited = inherited{}
		return
	}
	if d.inherited.empty() {
		return // as nearly always
	}
	d.inherited.met(f)
	for _, p := range d.ports { // it is here by now
		delete(d.inherited.endpoints, p.MAC)
	}
	if !f.Partial { // which takes nothing away in any case
		d.inherited.addTo(want, f.Self)
	}
}
