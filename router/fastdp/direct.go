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
	directRetry = 5 * time.Second        // after something went wrong
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

// lookUp finds the direct way between two addresses; zero when there is none.
func lookUp(e ends) netdev.NextHop {
	if !e.local.Is4() || !e.remote.Is4() || !usable(e.local) || !usable(e.remote) {
		return netdev.NextHop{}
	}
	hop, err := netdev.NextHopTo(e.remote, e.local)
	if err != nil || !hop.Ether || hop.Source.IsValid() && hop.Source != e.local {
		return netdev.NextHop{}
	}
	return hop
}

// keepDirect watches over the direct ways until ctx ends. What goes wrong with
// that costs those ways only, until the next try: frames take the VXLAN device.
func (d *DataPath) keepDirect(ctx context.Context) error {
	if d.clsact {
		return nil // without tcx we would have to take over devices of the host
	}
	for {
		err := d.watchDirect(ctx)
		if err == nil {
			return nil
		}
		d.suspendDirect(err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(cmp.Or(d.cfg.directRetry, directRetry)):
		}
	}
}

// watchDirect goes on until ctx ends, or something goes wrong.
func (d *DataPath) watchDirect(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return netdev.WatchRoutes(ctx, d.lookAgain) })
	g.Go(func() error { return d.followRoutes(ctx) })
	return g.Wait()
}

// suspendDirect has the programs leave the direct ways. If they cannot be told,
// they leave them when they have not heard from us for directFor.
func (d *DataPath) suspendDirect(why error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.setIndirectLocked(why.Error())
	c := d.config
	c.DirectUntil = 0
	if err := d.setConfigLocked(c); err != nil {
		d.log.Debug("direct way not suspended, it will end by itself", "error", err)
	}
}

// setIndirectLocked notes why no frame may take the direct way, "" when some may.
func (d *DataPath) setIndirectLocked(why string) {
	switch why {
	case d.indirect:
		return
	case "":
		d.log.Info("frames to other hosts may go past the IP stack of this one again")
	default:
		d.log.Warn("frames to other hosts take the IP stack of this one, which is slower", "reason", why)
	}
	d.indirect = why
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
	disciplines, err := netdev.TrafficControl()
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	doubted := make(map[ends]bool)
	for id, e := range d.ends {
		doubted[e] = doubted[e] || d.doubted(id)
	}
	uplinks := make(map[int]string)
	for e := range d.routes {
		hop := netdev.NextHop{}
		if why == "" && !doubted[e] {
			hop = lookUp(e)
		}
		d.routes[e] = hop
		if hop.Dev != 0 {
			uplinks[hop.Dev] = ""
		}
	}
	if err := d.takeUplinksLocked(uplinks, disciplines); err != nil {
		return err
	}
	for e, hop := range d.routes {
		if why, ok := uplinks[hop.Dev]; !ok || why != "" {
			d.routes[e] = netdev.NextHop{}
		}
	}
	d.joinLocked(uplinks)
	if err := d.redirectLocked(); err != nil {
		return err
	}
	d.setIndirectLocked(why)
	return nil
}

// takeUplinksLocked puts our program on devices of the underlay and takes it off
// all others. To each device that cannot be used so it notes why not; one that
// is gone it takes out.
func (d *DataPath) takeUplinksLocked(uplinks map[int]string, disciplines map[int][]string) error {
	attached, err := d.objs.AttachedTo(bpf.UplinkIn)
	if err != nil {
		return err
	}
	for dev := range uplinks {
		uplinks[dev] = d.others(dev, disciplines[dev])
		if uplinks[dev] != "" {
			continue
		}
		if err := d.attach(dev, bpf.UplinkIn); err != nil {
			uplinks[dev] = err.Error()
		}
		if _, err := netdev.DeviceByIndex(dev); err != nil {
			delete(uplinks, dev)
		}
	}
	for dev, why := range uplinks {
		if why != d.slow[dev] && why != "" {
			d.log.Warn("frames by a device take the IP stack of this host, which is slower", "device", dev, "reason", why)
		}
	}
	d.slow = uplinks
	var errs []error
	for _, dev := range attached {
		if why, ok := uplinks[dev]; !ok || why != "" {
			errs = append(errs, d.detach(dev, bpf.UplinkIn))
		}
	}
	return errors.Join(errs...)
}

// others says who else looks at what a device receives, by its queueing
// disciplines or programs: the direct way would pass them by.
func (d *DataPath) others(dev int, disciplines []string) string {
	for _, kind := range disciplines {
		if kind == "ingress" || kind == "clsact" {
			return "it has traffic control (" + kind + ")"
		}
	}
	shares, err := d.objs.Shares(dev, bpf.UplinkIn)
	if err != nil || shares {
		return orError("it has BPF programs of others", err)
	}
	return ""
}

// joinLocked has TCP packets joined where no device of the underlay does it.
// One that does hands us super-frames too, which packets must not overtake.
// Without joining, TCP packets take the VXLAN device, so an error is only said.
func (d *DataPath) joinLocked(uplinks map[int]string) {
	wanted := false
	for dev, why := range uplinks {
		if why != "" {
			continue
		}
		super, err := netdev.HandlesSuperFrames(dev)
		if wanted = err == nil && !super; !wanted {
			break
		}
	}
	c := d.config
	in, err := netdev.DeviceByName(joinerIn)
	there := err == nil && uint32(in.Index) == c.Join
	switch {
	case wanted && there, !wanted && c.Join == 0:
		return
	case wanted:
		c.Join, err = d.setUpJoiner()
	default:
		c.Join, err = 0, netdev.DeleteLink(joinerIn)
	}
	if err = errors.Join(err, d.setConfigLocked(c)); err != nil {
		d.warnLocked([]string{fmt.Sprintf("packets of TCP take the IP stack: %v", err)})
	}
}

// setUpJoiner returns the index of the device that packets to be joined go into;
// 0 on error.
func (d *DataPath) setUpJoiner() (uint32, error) {
	in, out, err := netdev.EnsureJoiner(joinerIn, joinerOut)
	if err == nil {
		err = d.attach(out, bpf.JoinIn)
	}
	if err != nil {
		return 0, err
	}
	return uint32(in), nil
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
