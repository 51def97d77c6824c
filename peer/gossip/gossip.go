package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/peer/link"
)

// Kinds of the messages of this package on the links.
const (
	PacketKind    byte = 2 // memberlist's packets
	BroadcastKind byte = 4 // changes of tables, and states
)

// Config is what a Gossip is made of.
type Config struct {
	Mesh *link.Mesh
	Log  *slog.Logger
}

// Gossip is this peer's part in membership and replication. Its methods may be
// called from several goroutines.
type Gossip struct {
	mesh  *link.Mesh
	log   *slog.Logger
	self  peer.Name
	wire  *transport
	send  chan struct{} // something is to be broadcast
	kick  chan struct{} // wakes the loop that tends
	count counters

	mu         sync.Mutex // guards what follows; never held during I/O
	running    bool
	store      *store
	tables     map[string]*Table
	states     map[string]*shared
	complaints map[complaint]struct{}
	pulls      *pulls
	members    map[peer.Name]bool // alive, says memberlist
	greet      time.Time          // when to broadcast all we own; zero: not
}

type counters struct {
	sent, received, malformed, mergeErrors, pulled, pullErrors, served, lostPackets atomic.Uint64
}

// Counters returns events counted since the start, under stable names.
func (g *Gossip) Counters() map[string]uint64 {
	c := &g.count
	return map[string]uint64{
		"broadcasts_sent":     c.sent.Load(),
		"broadcasts_received": c.received.Load(),
		"messages_malformed":  c.malformed.Load(),
		"merge_errors":        c.mergeErrors.Load(),
		"pulls":               c.pulled.Load(),
		"pull_errors":         c.pullErrors.Load(),
		"pulls_served":        c.served.Load(),
		"packets_dropped":     c.lostPackets.Load(),
	}
}

// New makes a Gossip and sets its handlers on the mesh, which must not run yet.
func New(cfg Config) (*Gossip, error) {
	if cfg.Mesh == nil || cfg.Log == nil {
		return nil, errors.New("gossip needs a mesh and a logger")
	}
	self := cfg.Mesh.Self().Name
	g := &Gossip{
		mesh:       cfg.Mesh,
		log:        cfg.Log,
		self:       self,
		send:       make(chan struct{}, 1),
		kick:       make(chan struct{}, 1),
		store:      newStore(self, uint64(time.Now().UnixNano())),
		tables:     make(map[string]*Table),
		states:     make(map[string]*shared),
		complaints: make(map[complaint]struct{}),
		pulls:      newPulls(),
		members:    make(map[peer.Name]bool),
	}
	g.wire = newTransport(g)
	cfg.Mesh.Handle(PacketKind, g.wire.receive)
	cfg.Mesh.Handle(BroadcastKind, g.receive)
	return g, nil
}

// Run takes part until ctx ends. It is the only reader of the mesh's streams.
// It may be called once.
func (g *Gossip) Run(ctx context.Context) error {
	g.mu.Lock()
	if g.running {
		g.mu.Unlock()
		return errors.New("gossip runs already")
	}
	g.running = true
	g.store.giveUp() // the first broadcast has it all
	g.mu.Unlock()

	group, ctx := errgroup.WithContext(ctx)
	ml, err := g.openMembers(ctx)
	if err != nil {
		return fmt.Errorf("membership: %w", err)
	}
	group.Go(func() error { return g.acceptStreams(ctx) })
	group.Go(func() error { return g.transmit(ctx) })
	group.Go(func() error { return g.tend(ctx) })
	group.Go(func() error { return g.keepJoined(ctx, ml) })
	err = group.Wait()
	if e := ml.Shutdown(); e != nil {
		g.log.Debug("membership not closed", "err", e)
	}
	return err
}

// Members returns the peers that are alive, ourselves included, by name: those
// memberlist says are, and those to which there is a route.
func (g *Gossip) Members() []peer.Name {
	alive := map[peer.Name]bool{g.self: true}
	for _, n := range g.mesh.Topology().Reachable() {
		alive[n] = true
	}
	g.mu.Lock()
	for n := range g.members {
		alive[n] = true
	}
	g.mu.Unlock()
	out := make([]peer.Name, 0, len(alive))
	for n := range alive {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// change changes own entries and has them told.
func (g *Gossip) change(table string, f func(*store) error) {
	g.mu.Lock()
	err := f(g.store)
	g.notifyLocked()
	g.mu.Unlock()
	signal(g.send)
	if err != nil {
		g.log.Error("table not changed", "table", table, "err", err)
	}
}

// notifyLocked tells the readers of tables that changed.
func (g *Gossip) notifyLocked() {
	for name := range g.store.changed {
		if t := g.tables[name]; t != nil {
			signal(t.changes)
		}
	}
	clear(g.store.changed)
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// receive takes a broadcast of another peer.
func (g *Gossip) receive(from peer.Name, b []byte) {
	g.count.received.Add(1)
	r := reader{b: b}
	version, typ := r.byte(), r.byte()
	var err error
	switch {
	case version != wireVersion:
		err = fmt.Errorf("broadcast: %w: version %d", errWire, version)
	case typ == castSet:
		err = g.receiveSet(from, r.b)
	case typ == castState:
		err = g.receiveState(from, r.b)
	default: // of a later revision
	}
	if err != nil {
		g.count.malformed.Add(1)
		g.complain(from, err.Error())
	}
}

func (g *Gossip) receiveSet(from peer.Name, b []byte) error {
	x, err := parseSet(b)
	if err != nil {
		return err
	}
	if x.origin != from || x.more {
		return fmt.Errorf("set: %w: of %s", errWire, x.origin)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch g.store.apply(x) {
	case applied:
		g.notifyLocked()
	case behind, outdated:
		g.pulls.want(from, time.Now(), false)
		signal(g.kick)
	case known:
	}
	return nil
}

// transmit broadcasts own changes and states.
func (g *Gossip) transmit(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-g.send:
		}
		for {
			x, ok := g.nextSet()
			if !ok {
				break
			}
			g.count.sent.Add(1)
			g.mesh.Broadcast(BroadcastKind, appendSet([]byte{wireVersion, castSet}, x))
		}
		g.sendStates()
	}
}

// nextSet returns what is to be broadcast next.
func (g *Gossip) nextSet() (set, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.greet.IsZero() && !time.Now().Before(g.greet) || g.store.anew {
		g.greet = time.Time{}
		return g.store.everything(), true
	}
	return g.store.delta()
}

// root tells how far we are, tables and states together.
func (g *Gossip) root() uint64 {
	digests := g.digests()
	g.mu.Lock()
	root := g.store.root()
	g.mu.Unlock()
	for name, d := range digests {
		root ^= mixState(name, d)
	}
	return root
}

// compare takes the root of another peer.
func (g *Gossip) compare(name peer.Name, theirs uint64) {
	ours := g.root()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pulls.compare(name, theirs, ours, time.Now())
	signal(g.kick)
}
