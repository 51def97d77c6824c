package fastdp

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/bpf"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// The direct way: frames between containers and a neighbour go past the VXLAN
// device and the IP stack of this host. The programs are told by which device
// and next hop, for as long as somebody watches that this stays true.
const (
	directEvery = time.Second            // how often the programs hear that we watch
	directFor   = 5 * time.Second        // how long they go by that
	routesRest  = 200 * time.Millisecond // between two looks at the routes
	routesEvery = 30 * time.Second       // for what the kernel tells nobody
)

// The pair of devices that joins TCP packets to super-frames, where the
// underlay does not.
const (
	joinerIn  = "vethwe-join"
	joinerOut = "vethwe-joined"
)

// ends are the underlay addresses of this host and of a neighbour.
type ends struct{ local, remote netip.Addr }

// direct is a next hop as the programs want it.
func direct(hop netdev.NextHop) (uplink uint32, gateway netip.Addr) {
	return uint32(hop.Dev), hop.Gateway
}

// routesLocked takes over the neighbours and returns the direct ways to them.
// Those of new ones are looked up soon.
func (d *DataPath) routesLocked(f overlay.Forwarding) map[peer.ShortID]netdev.NextHop {
	if !f.Partial {
		clear(d.ends)
	}
	for _, n := range f.Neighbours {
		d.ends[n.ShortID] = ends{n.Local.Unmap(), n.Remote.Unmap()}
	}
	known := make(map[ends]netdev.NextHop, len(d.ends))
	found := make(map[peer.ShortID]netdev.NextHop, len(d.ends))
	for id, e := range d.ends {
		hop, ok := d.routes[e]
		if !ok {
			d.lookAgain()
		}
		known[e], found[id] = hop, hop
	}
	d.routes = known
	return found
}

// lookAgain has the direct ways looked up soon.
func (d *DataPath) lookAgain() {
	select {
	case d.rerouted <- struct{}{}:
	default:
	}
}

// lookUpLocked finds the direct way between two addresses; zero when there is
// none, or none that we may take.
func (d *DataPath) lookUpLocked(e ends) netdev.NextHop {
	if d.indirect != "" || !e.local.Is4() || !e.remote.Is4() || !usable(e.local) || !usable(e.remote) {
		return netdev.NextHop{}
	}
	hop, err := netdev.NextHopTo(e.remote, e.local)
	if err != nil || !hop.Ether || hop.Source.IsValid() && hop.Source != e.local {
		return netdev.NextHop{}
	}
	return hop
}

// keepDirect watches over the direct ways until ctx ends.
func (d *DataPath) keepDirect(ctx context.Context) error {
	if d.clsact {
		return nil // without tcx we would have to take over devices of the host
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return netdev.WatchRoutes(ctx, d.lookAgain) })
	g.Go(func() error { return d.followRoutes(ctx) })
	return g.Wait()
}

func (d *DataPath) followRoutes(ctx context.Context) error {
	tick := time.NewTicker(directEvery)
	defer tick.Stop()
	rest := time.NewTicker(routesRest)
	defer rest.Stop()
	var looked time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-rest.C:
			select {
			case <-d.rerouted:
			default:
				if time.Since(looked) < routesEvery {
					continue
				}
			}
			looked = time.Now()
			if err := d.refreshDirect(); err != nil {
				return err
			}
		case <-tick.C:
			if err := d.extendDirect(); err != nil {
				return err
			}
		}
	}
}

// extendDirect tells the programs that the direct ways are watched.
func (d *DataPath) extendDirect() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.config
	c.Port, c.DirectUntil = uint16(d.cfg.Port), time.Duration(now.Nano())+cmp.Or(d.cfg.directFor, directFor)
	return d.setConfigLocked(c)
}

// refreshDirect looks all routes up anew and makes the tables, and the programs
// on the devices of the underlay, follow.
func (d *DataPath) refreshDirect() error {
	ipsec, err := netdev.HasIPsecPolicies()
	why := ""
	if err != nil || ipsec {
		why = orError("IPsec policies are in force", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if why != d.indirect && why != "" {
		d.log.Info("frames to other hosts take the IP stack of this one, which is slower", "reason", why)
	}
	d.indirect = why
	shared := make(map[int]string) // devices that are not ours alone
	uplinks := make(map[int]bool)
	for e := range d.routes {
		hop := d.lookUpLocked(e)
		if hop.Dev != 0 {
			if _, ok := shared[hop.Dev]; !ok {
				shared[hop.Dev] = d.others(hop.Dev)
			}
			if shared[hop.Dev] != "" {
				hop = netdev.NextHop{}
			}
		}
		d.routes[e] = hop
		if hop.Dev != 0 {
			uplinks[hop.Dev] = true
		}
	}
	for dev, why := range shared {
		if why != "" {
			d.warnLocked([]string{fmt.Sprintf("frames by device %d take the IP stack: %s", dev, why)})
		}
	}
	return errors.Join(d.joinLocked(uplinks), d.attachUplinksLocked(uplinks), d.redirectLocked())
}

// others says who else looks at what a device receives: the direct way would
// pass them by.
func (d *DataPath) others(dev int) string {
	kind, err := netdev.IngressFilters(dev)
	if err != nil || kind != "" {
		return orError("it has traffic control ("+kind+")", err)
	}
	shares, err := d.objs.Shares(dev, bpf.UplinkIn)
	if err != nil || shares {
		return orError("it has BPF programs of others", err)
	}
	return ""
}

// attachUplinksLocked puts our program on devices of the underlay and takes it
// off all others.
func (d *DataPath) attachUplinksLocked(uplinks map[int]bool) error {
	attached, err := d.objs.AttachedTo(bpf.UplinkIn)
	if err != nil {
		return err
	}
	var errs []error
	for _, dev := range attached {
		if !uplinks[dev] {
			errs = append(errs, d.detach(dev, bpf.UplinkIn))
		}
	}
	for dev := range uplinks {
		if d.uplinks[dev] {
			continue
		}
		if err := d.attach(dev, bpf.UplinkIn); err != nil {
			if _, gone := netdev.DeviceByIndex(dev); gone == nil {
				errs = append(errs, err)
			}
			delete(uplinks, dev)
		}
	}
	d.uplinks = uplinks
	return errors.Join(errs...)
}

// joinLocked has TCP packets joined where no device of the underlay does it.
// One that does hands us super-frames too, which packets must not overtake.
func (d *DataPath) joinLocked(uplinks map[int]bool) error {
	wanted := len(uplinks) > 0
	for dev := range uplinks {
		super, err := netdev.HandlesSuperFrames(dev)
		wanted = wanted && err == nil && !super
	}
	c := d.config
	if !wanted {
		if c.Join == 0 {
			return nil
		}
		c.Join = 0
		return errors.Join(d.setConfigLocked(c), netdev.DeleteLink(joinerIn))
	}
	in, out, err := netdev.EnsureJoiner(joinerIn, joinerOut)
	if err != nil {
		return err
	}
	c.Join = uint32(in)
	return errors.Join(d.attach(out, bpf.JoinIn), d.setConfigLocked(c))
}

// redirectLocked writes the direct ways into the tables as they stand.
func (d *DataPath) redirectLocked() error {
	hops, err1 := d.objs.Hops.All()
	neighbours, err2 := d.objs.Neighbours.All()
	errs := []error{err1, err2}
	for dst, h := range hops {
		was := h
		h.Uplink, h.Gateway = direct(d.routes[d.ends[peer.ShortID(h.Via)]])
		if h.Kind == bpf.KindVXLAN && h != was {
			errs = append(errs, d.objs.Hops.Put(dst, h))
		}
	}
	for remote, n := range neighbours {
		was := n
		n.Uplink, _ = direct(d.routes[d.ends[peer.ShortID(n.ID[0])]])
		if n != was {
			errs = append(errs, d.objs.Neighbours.Put(remote, n))
		}
	}
	return errors.Join(errs...)
}
