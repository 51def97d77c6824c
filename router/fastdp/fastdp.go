// Package fastdp is the data path in the kernel: a bridge that containers are
// attached to, a VXLAN device as one of its ports, and the programs of
// package bpf on the devices around it.
//
// The kernel does all forwarding by itself: to neighbours, on behalf of other
// peers, and along broadcast trees. This package makes the devices, keeps the
// programs' tables equal to what the router wants, and sends probes. All of
// it is made to outlive the daemon: devices stay, programs and tables are
// pinned in a BPF file system, and New takes over what it finds without a gap
// in the traffic.
//
// # Frames
//
// A frame travels as VXLAN (RFC 7348) to the UDP port of the device. The
// network identifier holds the short id of the source peer in its low 12 bits
// and that of the destination peer in its high 12 bits, 0 when flooded. The
// outer TTL is the hop limit, the outer DF bit that of the packet inside.
//
// # Probes
//
// A probe is a frame with both addresses zero, sent from an ordinary socket
// with DF set, so that its size is proven by its arrival:
//
//	0              8               20       22      30     34
//	+--------------+---------------+--------+-------+------+--------+
//	| VXLAN header | 12 zero bytes | 0x88b5 | token | size | zeroes |
//	+--------------+---------------+--------+-------+------+--------+
//
// Numbers are big endian. size is that of the IP packet the probe stands for,
// in bytes: the probe is as long as a frame with such a packet, but not below
// the least that Ethernet has.
//
// 0x88b5 is the EtherType for local experiments (IEEE 802). The receiver
// takes a probe only if it is the destination, the source is a neighbour and
// the outer source address is that neighbour's.
//
// Instead, there may be a TCP segment over IPv4 (see segments), which finds out
// whether devices on the way do what is left to them.
package fastdp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/router/bpf"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// Config is what a DataPath is made of.
type Config struct {
	Bridge  string      // name of the bridge, made when missing
	MAC     overlay.MAC // address of the bridge
	Port    int         // UDP port of VXLAN; the device is named vxlan-<Port>
	PinDir  string      // mount point of our BPF file system, made when missing
	MTU     int         // of the bridge and the VXLAN device, in bytes: the most that containers send
	TapName string      // device of the sleeve; it may come and go
	OnProbe overlay.ProbeFunc
	Log     *slog.Logger

	// NoShortcut sends every frame through the bridge. Without it, unicast
	// between announced endpoints goes past it, unless rules for bridged
	// frames are in force, which would be passed by, too.
	NoShortcut bool

	noTCX     bool          // for tests: as on a kernel without it
	directFor time.Duration // for tests: how long the programs take the direct way without hearing from us; 0: as ever

	directRetry time.Duration // for tests: after which the direct way is tried again; 0: as ever
}

// DataPath is the fast path. It implements overlay.Switch.
type DataPath struct {
	cfg    Config
	log    *slog.Logger
	objs   *bpf.Objects
	bridge int // interface indices
	vxlan  int

	applied  chan struct{} // tells Run that there was an Apply
	rerouted chan struct{} // and that the direct ways may have changed

	// mu orders writers of kernel state and is therefore held over the
	// system calls that write it, none of which waits for anything. It
	// guards what follows.
	mu       sync.Mutex
	config   bpf.Config
	deferred bool // programs of an older layout run on until our tables are complete
	clsact   bool // the kernel has no tcx
	ports    map[int]bpf.Port
	remote   map[bpf.MAC]bpf.Endpoint // as announced, including those that a local port overrides
	holders  map[bpf.Addr]bpf.MAC     // of addresses, likewise
	told     map[string]bool          // warnings given
	ends     map[peer.ShortID]ends    // underlay addresses of this host and of each neighbour
	routes   map[ends]netdev.NextHop  // direct ways; zero where there is none
	slow     map[int]string           // devices of the underlay, with why frames by them do not take the direct way, "" when they do
	indirect string                   // why no neighbour is reached by the direct way, "" when some are or may be
	barred   string                   // why frames do not go past the bridge, "" when they do
	arp      bool                     // though barred, ARP requests are answered: no rule is about them
	checked  time.Time                // when that was found out

	inherited inherited // of an earlier daemon, for peers that no Apply has named

	// sendMu guards what follows: what Probe and MTU need.
	sendMu     sync.Mutex
	self       peer.ShortID
	neighbours map[peer.ShortID]overlay.Neighbour
	sockets    map[peer.ShortID]*socket

	// examMu guards what follows, for moments only. Whoever holds mu may take it.
	examMu   sync.Mutex
	offloads map[peer.ShortID]*offload
	software bool // the VXLAN device leaves nothing to the devices of the underlay
}

var (
	_ overlay.Switch   = (*DataPath)(nil)
	_ overlay.Examiner = (*DataPath)(nil)
)

// New makes the devices and loads the programs, or takes over those that an
// earlier daemon left, with the content of their tables. On error, what it
// made is gone again.
func New(cfg Config) (*DataPath, error) {
	d := &DataPath{
		cfg:        cfg,
		log:        cfg.Log,
		clsact:     cfg.noTCX,
		ports:      make(map[int]bpf.Port),
		remote:     make(map[bpf.MAC]bpf.Endpoint),
		holders:    make(map[bpf.Addr]bpf.MAC),
		told:       make(map[string]bool),
		ends:       make(map[peer.ShortID]ends),
		routes:     make(map[ends]netdev.NextHop),
		applied:    make(chan struct{}, 1),
		rerouted:   make(chan struct{}, 1),
		neighbours: make(map[peer.ShortID]overlay.Neighbour),
		sockets:    make(map[peer.ShortID]*socket),
		offloads:   make(map[peer.ShortID]*offload),
	}
	var undo undoList
	if err := d.setUp(&undo); err != nil {
		for _, step := range slices.Backward(undo) {
			err = errors.Join(err, step())
		}
		return nil, err
	}
	return d, nil
}

// undoList holds what takes back the steps done so far, oldest first.
type undoList []func() error

func (u *undoList) add(f func() error) { *u = append(*u, f) }

func (d *DataPath) setUp(undo *undoList) error {
	mounted, err := mountBPF(d.cfg.PinDir)
	if err != nil {
		return err
	}
	if mounted {
		undo.add(func() error { return unmountBPF(d.cfg.PinDir) })
	}
	if d.objs, err = bpf.Open(d.cfg.PinDir); err != nil {
		return err
	}
	undo.add(d.objs.Close)
	if d.deferred, err = d.objs.Supersedes(); err != nil {
		return err
	}
	if err := d.setUpBridge(undo); err != nil {
		return err
	}
	if err := d.setUpVXLAN(undo); err != nil {
		return err
	}
	if err := d.adopt(); err != nil {
		return err
	}
	return d.attachTAP()
}

func (d *DataPath) setUpBridge(undo *undoList) error {
	name := d.cfg.Bridge
	_, err := netdev.DeviceByName(name)
	created := errors.Is(err, netdev.ErrNoDevice)
	if err := netdev.EnsureBridge(name, d.cfg.MAC, d.cfg.MTU); err != nil {
		return err
	}
	if created {
		undo.add(func() error { return netdev.DeleteLink(name) })
	}
	dev, err := netdev.DeviceByName(name)
	d.bridge = dev.Index
	return err
}

// setUpVXLAN makes the VXLAN device forward. It becomes a port of the bridge
// last: no frame passes it before the programs are there.
func (d *DataPath) setUpVXLAN(undo *undoList) error {
	index, created, err := ensureVXLAN(d.cfg.Port, d.cfg.MTU)
	if err != nil {
		return err
	}
	d.vxlan = index
	if created {
		undo.add(func() error { return netdev.DeleteLink(vxlanName(d.cfg.Port)) })
	}
	whole, err := netdev.TxOffload(vxlanName(d.cfg.Port))
	if err != nil {
		return err
	}
	d.software = !whole
	if err := d.adoptConfig(); err != nil {
		return err
	}
	for _, p := range []bpf.Program{bpf.VXLANIn, bpf.VXLANOut} {
		if err := d.attach(d.vxlan, p); err != nil {
			return err
		}
	}
	return joinBridge(d.cfg.Port, d.cfg.Bridge)
}

// adoptConfig carries the configuration over that the kernel works by, with
// the devices as they are now.
func (d *DataPath) adoptConfig() error {
	old, err := d.objs.Config()
	if err != nil {
		return err
	}
	// Past the bridge or not is as before until Run has looked at the rules.
	switch {
	case d.cfg.NoShortcut:
		d.barred = "so configured"
	case old.Features&bpf.FeatureShortcut == 0:
		d.barred, d.arp = notLooked, old.Features&bpf.FeatureARP != 0
	}
	d.config = bpf.Config{Self: old.Self, VXLAN: uint32(d.vxlan), TAP: d.findTAP(), Features: d.featuresLocked(), LeaseUntil: old.LeaseUntil}
	return d.objs.SetConfig(d.config)
}

// setConfigLocked gives the programs a configuration, with the features that
// they may use by now.
func (d *DataPath) setConfigLocked(c bpf.Config) error {
	c.Features = d.featuresLocked()
	if c == d.config {
		return nil
	}
	if err := d.objs.SetConfig(c); err != nil {
		return err
	}
	d.config = c
	return nil
}

// SetLease has the programs cut the ports here off from other peers from until
// on, whether this program runs then or not.
func (d *DataPath) SetLease(until time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.config
	c.LeaseUntil = until
	return d.setConfigLocked(c)
}

// findTAP is the index of the sleeve's device, 0 when it is not there.
func (d *DataPath) findTAP() uint32 {
	if d.cfg.TapName == "" {
		return 0
	}
	dev, err := netdev.DeviceByName(d.cfg.TapName)
	if err != nil {
		return 0
	}
	return uint32(dev.Index)
}

// attachTAP puts the program on the sleeve's device, if there is one.
func (d *DataPath) attachTAP() error {
	if d.config.TAP == 0 {
		return nil
	}
	err := d.attach(int(d.config.TAP), bpf.TAPIn)
	if err != nil && d.findTAP() != d.config.TAP {
		return nil // it went meanwhile
	}
	return err
}

// adopt takes over ports and endpoints of an earlier daemon and renews the
// programs on the ports. Ports whose device is gone are forgotten.
func (d *DataPath) adopt() error {
	ports, err := d.objs.Ports.All()
	if err != nil {
		return err
	}
	endpoints, err := d.objs.Endpoints.All()
	if err != nil {
		return err
	}
	addresses, err := d.objs.Addresses.All()
	if err != nil {
		return err
	}
	for mac, e := range endpoints {
		if e.Peer != 0 {
			d.remote[mac] = e
		}
	}
	for a, mac := range addresses {
		if _, ok := d.remote[mac]; ok {
			d.holders[a] = mac
		}
	}
	for index, p := range ports {
		d.ports[int(index)] = p
	}
	if err := d.inherit(); err != nil {
		return err
	}
	if err := d.sweep(); err != nil {
		return err
	}
	var errs []error
	for index := range d.ports {
		if index != d.bridge {
			errs = append(errs, d.attachPort(index))
		}
	}
	return errors.Join(errs...)
}

// sweep forgets ports whose device is gone, or whose index is another
// device's by now, and with them their pins.
func (d *DataPath) sweep() error {
	devices, err := netdev.Devices()
	if err != nil {
		return err
	}
	alive := make(map[int]bool, len(devices))
	for _, dev := range devices {
		alive[dev.Index] = dev.Index == d.bridge || d.attached(dev.Index, bpf.PortIn)
	}
	var errs []error
	for index := range d.ports {
		if !alive[index] {
			errs = append(errs, d.removePortLocked(index))
		}
	}
	return errors.Join(append(errs, d.objs.SweepLinks())...)
}

// Name is overlay.FastDP.
func (d *DataPath) Name() string { return overlay.FastDP }

// Counters returns frames counted by event; see bpf.Objects.Counters for the
// names.
func (d *DataPath) Counters() (map[string]uint64, error) { return d.objs.Counters() }

// Traffic is what was exchanged with each neighbour on this path, and what was
// dropped by peer, since the tables were made.
func (d *DataPath) Traffic() (map[peer.ShortID]overlay.Traffic, error) {
	d.sendMu.Lock()
	ids := slices.Collect(maps.Keys(d.neighbours))
	d.sendMu.Unlock()
	all := make(map[peer.ShortID]overlay.Traffic, len(ids))
	for _, id := range ids {
		t, err := d.objs.Traffic(uint16(id))
		if err != nil {
			return nil, err
		}
		all[id] = overlay.Traffic{Tx: overlay.Flow(t.Tx), Rx: overlay.Flow(t.Rx)}
	}
	losses, err := d.objs.Losses()
	for id, dropped := range losses {
		t := all[peer.ShortID(id)]
		t.Dropped = dropped
		all[peer.ShortID(id)] = t
	}
	return all, err
}

// Run passes arriving probes on, watches for rules that concern bridged
// frames, keeps the direct ways, and examines devices, until ctx ends.
func (d *DataPath) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.watchRules(ctx) })
	g.Go(func() error { return d.keepDirect(ctx) })
	g.Go(func() error { return d.watchOffloads(ctx) })
	g.Go(func() error {
		return d.objs.ReadProbes(ctx, func(p bpf.Probe) {
			if d.cfg.OnProbe != nil {
				d.cfg.OnProbe(overlay.FastDP, peer.ShortID(p.From), p.Token, p.Size)
			}
		})
	})
	return g.Wait()
}

// Close lets go of the kernel's objects, to be called after Run has ended.
// Forwarding goes on, but no longer by the direct way.
func (d *DataPath) Close() error {
	d.mu.Lock()
	c := d.config
	c.DirectUntil = 0
	err := d.setConfigLocked(c)
	d.mu.Unlock()
	d.sendMu.Lock()
	sockets := d.sockets
	d.sockets = make(map[peer.ShortID]*socket)
	d.sendMu.Unlock()
	errs := []error{err}
	for _, s := range sockets {
		errs = append(errs, s.conn.Close())
	}
	return errors.Join(append(errs, d.objs.Close())...)
}

// Present says whether a data path is on this host, in use or left by an
// earlier daemon.
func Present(cfg Config) bool { return netdev.Exists(vxlanName(cfg.Port)) }

// Remove takes every trace of the data path off the host: devices, programs,
// tables and the mount of the BPF file system. No DataPath may be in use. It
// goes on after an error, and is no error when nothing is there.
func Remove(cfg Config) error {
	var errs []error
	// The devices first: containers are never on a bridge that does not
	// isolate them.
	errs = append(errs, removeVXLANs(cfg.Bridge), netdev.DeleteLink(vxlanName(cfg.Port)),
		netdev.DeleteLink(cfg.Bridge), netdev.DeleteLink(joinerIn), detachAllFilters())
	if isBPF(cfg.PinDir) {
		errs = append(errs, bpf.DetachAll(cfg.PinDir))
	}
	errs = append(errs, unmountBPF(cfg.PinDir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the fast data path: %w", err)
	}
	return nil
}

// neighbour is what is known of a neighbour by the last Apply.
func (d *DataPath) neighbour(id peer.ShortID) (n overlay.Neighbour, self peer.ShortID, ok bool) {
	d.sendMu.Lock()
	defer d.sendMu.Unlock()
	n, ok = d.neighbours[id]
	return n, d.self, ok
}

// setNeighbours replaces what Probe and MTU know, and closes the sockets of
// those who are gone or have moved.
func (d *DataPath) setNeighbours(self peer.ShortID, list []overlay.Neighbour, partial bool) {
	d.sendMu.Lock()
	d.self = self
	now := make(map[peer.ShortID]overlay.Neighbour, len(list))
	if partial {
		maps.Copy(now, d.neighbours)
	}
	for _, n := range list {
		now[n.ShortID] = n
	}
	d.neighbours = now
	var closing []*socket
	for id, s := range d.sockets {
		if n, ok := now[id]; !ok || s.local != n.Local || s.remote != n.Remote {
			delete(d.sockets, id)
			closing = append(closing, s)
		}
	}
	d.sendMu.Unlock()
	for _, s := range closing {
		_ = s.conn.Close() // a UDP socket has nothing to lose
	}
}

// usable says whether VXLAN can be sent to an underlay address: one that
// needs a zone cannot be named in a tunnel key.
func usable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
}
