package fastdp

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"weave.local/peer"
	"weave.local/router/bpf"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// tables is the desired content of the programs' tables, local endpoints
// apart.
type tables struct {
	neighbours map[bpf.Addr]bpf.Neighbour
	hops       map[uint16]bpf.Hop
	trees      map[uint16]bpf.Tree
	endpoints  map[bpf.MAC]bpf.Endpoint
	addresses  map[bpf.Addr]bpf.MAC
	foreign    map[uint16]bpf.Subnets // of all ports of any source at a peer
	warnings   []string               // what does not fit
}

// desired translates the router's wishes; routes are those neighbours that are
// reached by the direct way. It does the same for the same wishes, however their
// lists are ordered.
func desired(f overlay.Forwarding, routes map[peer.ShortID]netdev.NextHop) tables {
	t := tables{
		neighbours: make(map[bpf.Addr]bpf.Neighbour, len(f.Neighbours)),
		hops:       make(map[uint16]bpf.Hop, len(f.Hops)),
		trees:      make(map[uint16]bpf.Tree, len(f.Trees)),
		endpoints:  make(map[bpf.MAC]bpf.Endpoint, len(f.Endpoints)),
		addresses:  addressesOf(f.Endpoints),
		foreign:    make(map[uint16]bpf.Subnets),
	}
	known := t.addNeighbours(f.Neighbours, routes)
	for dst, hop := range f.Hops {
		h := bpf.Hop{Kind: bpf.KindSleeve, Via: uint16(hop.Via)}
		if hop.Path == overlay.FastDP {
			n, ok := known[hop.Via]
			if !ok {
				t.warn("peer %d is to be reached through %d, which is no neighbour with an address", dst, hop.Via)
				continue
			}
			h.Kind, h.Remote, h.MTU = bpf.KindVXLAN, n.Remote.Unmap(), hop.MTU
			if local := n.Local.Unmap(); usable(local) && local.Is4() == h.Remote.Is4() {
				h.Local = local
			}
			h.Uplink, h.Gateway = direct(routes[hop.Via])
		}
		t.hops[uint16(dst)] = h
	}
	for src, tree := range f.Trees {
		b := bpf.Tree{Parent: uint16(tree.Parent)}
		children := slices.Sorted(slices.Values(tree.Children))
		if len(children) > bpf.MaxChildren {
			t.warn("%d peers are to get floods from here: only %d do", len(children), bpf.MaxChildren)
			children = children[:bpf.MaxChildren]
		}
		for i, c := range children {
			b.Children[i] = uint16(c)
		}
		b.N = len(children)
		t.trees[uint16(src)] = b
	}
	for _, e := range f.Endpoints {
		subnets, ok := bpf.SubnetsOf(e.Addrs)
		if !ok {
			t.warn("endpoint %s is in more than %d subnets: the rest cannot reach it", e.MAC, bpf.MaxSubnets)
		}
		t.endpoints[bpf.MAC(e.MAC)] = bpf.Endpoint{Peer: uint16(e.Peer), Subnets: subnets}
	}
	t.addForeign(f.Endpoints)
	return t
}

// addForeign gathers the subnets that may hold addresses which nobody announced.
func (t *tables) addForeign(list []overlay.Endpoint) {
	addrs := make(map[peer.ShortID][]netip.Prefix)
	for _, e := range list {
		if e.AnySource {
			addrs[e.Peer] = append(addrs[e.Peer], e.Addrs...)
		}
	}
	for id, a := range addrs {
		slices.SortFunc(a, func(x, y netip.Prefix) int {
			return cmp.Or(x.Addr().Compare(y.Addr()), cmp.Compare(x.Bits(), y.Bits()))
		})
		subnets, ok := bpf.SubnetsOf(a)
		if !ok {
			t.warn("peer %d has containers of any source in more than %d subnets: in the rest, what is behind them is not heard", id, bpf.MaxSubnets)
		}
		t.foreign[uint16(id)] = subnets
	}
}

// addressesOf says who has which address. One that several announce is left
// out: whoever asks for it is answered by themselves.
func addressesOf(list []overlay.Endpoint) map[bpf.Addr]bpf.MAC {
	holders := make(map[bpf.Addr]bpf.MAC, len(list))
	disputed := make(map[bpf.Addr]bool)
	for _, e := range list {
		for _, p := range e.Addrs {
			a := bpf.AddrOf(p.Addr())
			if old, ok := holders[a]; ok && old != bpf.MAC(e.MAC) {
				disputed[a] = true
			}
			holders[a] = bpf.MAC(e.MAC)
		}
	}
	for a := range disputed {
		delete(holders, a)
	}
	return holders
}

// addNeighbours returns those with an address that VXLAN can be sent to.
func (t *tables) addNeighbours(list []overlay.Neighbour, routes map[peer.ShortID]netdev.NextHop) map[peer.ShortID]overlay.Neighbour {
	list = slices.SortedFunc(slices.Values(list), func(a, b overlay.Neighbour) int {
		return cmp.Compare(a.ShortID, b.ShortID)
	})
	known := make(map[peer.ShortID]overlay.Neighbour, len(list))
	for _, n := range list {
		if !usable(n.Remote) || n.ShortID == 0 {
			continue
		}
		known[n.ShortID] = n
		key := bpf.AddrOf(n.Remote)
		v := t.neighbours[key]
		if v.N == len(v.ID) {
			t.warn("more than %d neighbours behind %s: the rest cannot use the fast path", v.N, n.Remote)
			continue
		}
		v.ID[v.N] = uint16(n.ShortID)
		v.Local = n.Local.Unmap()
		v.Uplink, _ = direct(routes[n.ShortID])
		v.N++
		t.neighbours[key] = v
	}
	return known
}

func (t *tables) warn(format string, args ...any) {
	t.warnings = append(t.warnings, fmt.Sprintf(format, args...))
}

// Apply makes the programs forward as f says. The tables gain what is new
// before they lose what is old, so that frames are not lost on the way.
func (d *DataPath) Apply(f overlay.Forwarding) error {
	d.setNeighbours(f.Self, f.Neighbours, f.Partial)
	d.examine(f)
	select {
	case d.applied <- struct{}{}:
	default:
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	want := desired(f, d.routesLocked(f))
	d.warnLocked(want.warnings)
	d.inheritLocked(&want, f)
	d.setRemoteLocked(want, f.Partial)
	changes, err := d.changesLocked(want)
	if err != nil {
		return err
	}
	for _, c := range changes {
		if err := c.Grow(); err != nil {
			return err
		}
	}
	if err := errors.Join(d.reconfigureLocked(f), d.silenceMovedLocked(want.endpoints)); err != nil {
		return err
	}
	if f.Partial {
		return nil
	}
	if err := d.switchOverLocked(); err != nil {
		return err
	}
	var errs []error
	for _, c := range slices.Backward(changes) {
		errs = append(errs, c.Shrink())
	}
	return errors.Join(append(errs, d.sweep())...)
}

// changesLocked lists the tables' changes in the order in which they may
// grow: what names others comes after those it names.
func (d *DataPath) changesLocked(want tables) ([]bpf.Change, error) {
	neighbours, err1 := d.objs.Neighbours.Towards(want.neighbours, nil)
	hops, err2 := d.objs.Hops.Towards(want.hops, nil)
	trees, err3 := d.objs.Trees.Towards(want.trees, nil)
	all := want.endpoints
	for index, p := range d.ports {
		// What is announced of a local port's MAC is that it has moved on.
		if e, announced := all[p.MAC]; announced && e.Peer != 0 {
			continue
		}
		all[p.MAC] = localEndpoint(index, p)
		for _, a := range p.Addrs[:p.N] {
			want.addresses[a] = p.MAC
		}
	}
	endpoints, err4 := d.objs.Endpoints.Towards(all, nil)
	addresses, err5 := d.objs.Addresses.Towards(want.addresses, nil)
	foreign, err6 := d.objs.Foreign.Towards(want.foreign, nil)
	return []bpf.Change{neighbours, hops, trees, endpoints, addresses, foreign}, errors.Join(err1, err2, err3, err4, err5, err6)
}

// reconfigureLocked follows changes of the own short id, of the TAP and of
// what forbids the shortcut.
func (d *DataPath) reconfigureLocked(f overlay.Forwarding) error {
	c := d.config
	c.TAP = d.findTAP()
	if f.Self != 0 || !f.Partial {
		c.Self = uint16(f.Self)
	}
	moved := c.TAP != d.config.TAP
	if err := d.setConfigLocked(c); err != nil {
		return err
	}
	if !moved {
		return nil
	}
	return d.attachTAP()
}

// switchOverLocked puts our programs in the place of those of another layout,
// now that our tables are complete.
func (d *DataPath) switchOverLocked() error {
	if !d.deferred {
		return nil
	}
	d.deferred = false
	d.lookAgain()
	errs := []error{d.attach(d.vxlan, bpf.VXLANIn), d.attachTAP()}
	if d.config.Join != 0 {
		_, err := d.setUpJoiner()
		errs = append(errs, err)
	}
	for index := range d.ports {
		if index != d.bridge {
			errs = append(errs, d.attachPort(index))
		}
	}
	errs = append(errs, d.attach(d.vxlan, bpf.VXLANOut))
	if err := errors.Join(errs...); err != nil {
		d.deferred = true // and once more with the next Apply
		return err
	}
	return d.objs.DropOtherLayouts()
}

// silenceMovedLocked cuts off ports whose MAC has moved on though they are still
// there, and lets those speak whose MAC is back.
func (d *DataPath) silenceMovedLocked(endpoints map[bpf.MAC]bpf.Endpoint) error {
	var errs []error
	for index, p := range d.ports {
		to := endpoints[p.MAC].Peer
		if to != 0 {
			errs = append(errs, netdev.ForgetMAC(index, p.MAC))
			d.warnLocked([]string{fmt.Sprintf("device %d is cut off: its address %s was attached at peer %d after it", index, overlay.MAC(p.MAC), to)})
		}
		if moved := to != 0; p.Moved != moved {
			p.Moved = moved
			d.ports[index] = p
			errs = append(errs, d.objs.Ports.Put(uint32(index), p))
		}
	}
	return errors.Join(errs...)
}

// setRemoteLocked keeps the announcements, for the time when a local port of
// the same address is gone.
func (d *DataPath) setRemoteLocked(announced tables, partial bool) {
	if !partial {
		clear(d.remote)
		clear(d.holders)
	}
	maps.Copy(d.remote, announced.endpoints)
	maps.Copy(d.holders, announced.addresses)
}

// warnLocked says each thing once.
func (d *DataPath) warnLocked(warnings []string) {
	const most = 1000 // things remembered
	for _, w := range warnings {
		if d.told[w] || len(d.told) >= most {
			continue
		}
		d.told[w] = true
		d.log.Warn("fast path cannot do all that is wanted", "reason", w)
	}
}
