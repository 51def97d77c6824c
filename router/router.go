// Package router decides over which data path each peer is reached and where
// frames go. It probes every path to every neighbour all the time, gathers the
// link state and the announced endpoints, and hands the data paths one desired
// forwarding state whenever any of these change.
package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/peer/gossip"
	"weave.local/peer/link"
	"weave.local/router/overlay"
)

// TableName is the replicated table of endpoints.
const TableName = "endpoints"

const (
	tickEvery  = 100 * time.Millisecond
	coalesce   = 5 * time.Millisecond // changes within it make one forwarding state; a new endpoint speaks soon after
	retryApply = time.Second
	holdQuiet  = 1500 * time.Millisecond
	holdMax    = 10 * time.Second

	maxComplaints = 1000 // entries complained about at most
)

// Config is what a Router is made of.
type Config struct {
	Mesh  *link.Mesh
	Table *gossip.Table // named TableName
	// MTU is that of the devices here, in bytes: larger packets are neither
	// sent nor taken, as the bridge would lose them. 0: there is no limit.
	MTU int
	// Granted says, at the time it is called, which addresses a peer may have;
	// endpoints are taken without the others. Nil: all.
	Granted func() func(peer.Name, netip.Addr) bool
	Log     *slog.Logger
}

// Router chooses paths. Its methods may be called from several goroutines.
type Router struct {
	cfg    Config
	sw     overlay.Switch
	paths  []overlay.Overlay // that may be chosen, in order of preference
	all    []overlay.Overlay // that run: these and the switch
	kick   chan struct{}
	nextID func() uint64
	hold   bool

	applied map[peer.ShortID]overlay.Hop // at last; of decide alone

	mu         sync.Mutex // guards what follows; never held during I/O
	neighbours map[peer.Name]*neighbour
	parted     map[peer.Name]*neighbour // without a link for at most keepParted when last looked at
	byShortID  map[peer.ShortID]peer.Name
	local      map[int]localPort
	published  bool
	forgot     bool               // nothing is inherited any more
	noData     map[peer.Name]bool // neighbours that others are told no data path works to
	plan       *plan
	memory     memory
	badEntries map[string]bool // endpoint entries already complained about
	refused    map[string]bool // announced addresses that are another's, in words
}

type neighbour struct {
	overlay.Neighbour
	outbound bool
	addr     string
	paths    []*pathState // parallel to Router.paths
	reported time.Time
	told     byte
	chosen   string    // usable path in use, "" when none
	mtu      int       // proven on the chosen path
	carried  time.Time // when one was last usable; at first when the neighbour was met
	parted   time.Time // when its last link ended
}

type localPort struct {
	overlay.Port
	seq uint64
}

// New makes a Router over the data paths given in order of preference, the
// first of which owns the bridge's ports.
func New(cfg Config) *Router {
	r := &Router{
		cfg:        cfg,
		kick:       make(chan struct{}, 1),
		nextID:     rand.Uint64,
		neighbours: make(map[peer.Name]*neighbour),
		parted:     make(map[peer.Name]*neighbour),
		byShortID:  make(map[peer.ShortID]peer.Name),
		local:      make(map[int]localPort),
		plan:       newPlan(),
		memory:     make(memory),
		badEntries: make(map[string]bool),
	}
	cfg.Mesh.Handle(MessageKind, r.receive)
	return r
}

// Use sets the data paths: sw, which owns the bridge's ports, and the paths
// that may be chosen, in order of preference; sw need not be among these. It
// must be called once, before any port is set and before Run.
func (r *Router) Use(sw overlay.Switch, paths ...overlay.Overlay) {
	r.sw, r.paths, r.all = sw, paths, paths
	if !slices.ContainsFunc(paths, func(p overlay.Overlay) bool { return p.Name() == sw.Name() }) {
		r.all = append(slices.Clone(paths), sw)
	}
}

// Hold says that the kernel already forwards, left so by an earlier run:
// forwarding states are partial until links, paths and endpoints have come to
// rest, so that nothing is taken away that is merely not known yet, and peers
// that have not been met after that stay as they were. To be called before Run.
func (r *Router) Hold() { r.hold = true }

// SetLocal adds a local port, or replaces it, and announces its endpoint. A new
// port takes its MAC over from whoever has announced that so far.
func (r *Router) SetLocal(p overlay.Port) error {
	if err := r.sw.SetPort(p); err != nil {
		return fmt.Errorf("port %s: %w", p.IfName, err)
	}
	seq := r.mobility(p)
	r.mu.Lock()
	old, replaced := r.local[p.IfIndex]
	if replaced && old.MAC == p.MAC {
		seq = old.seq // it has not moved
	}
	r.local[p.IfIndex] = localPort{Port: p, seq: seq}
	published := r.published
	r.mu.Unlock()
	r.nudge()
	if !published {
		return nil
	}
	if replaced && old.MAC != p.MAC {
		r.withdraw(old.MAC)
	}
	r.cfg.Table.Set(string(p.MAC[:]), encodeEndpoint(seq, p.Endpoint))
	return nil
}

// mobility is the number of a new port: when it was attached, but, since clocks
// differ, above all numbers of its MAC that are known. A port that an earlier
// run attached is set before anything is known of others, and takes nothing
// over from them.
func (r *Router) mobility(p overlay.Port) uint64 {
	since := p.Since
	if since.IsZero() {
		since = time.Now()
	}
	number := uint64(since.UnixNano())
	for _, e := range r.cfg.Table.All() {
		if e.Key != string(p.MAC[:]) {
			continue
		}
		if _, seq, err := parseEndpoint(e.Key, e.Value); err == nil && seq != math.MaxUint64 {
			number = max(number, seq+1)
		}
	}
	return number
}

// RemoveLocal withdraws a local port; an unknown one is no error.
func (r *Router) RemoveLocal(ifIndex int) error {
	r.mu.Lock()
	p, ok := r.local[ifIndex]
	delete(r.local, ifIndex)
	published := r.published
	r.mu.Unlock()
	if ok && published {
		r.withdraw(p.MAC)
	}
	return r.sw.RemovePort(ifIndex)
}

// withdraw ends the announcement of a MAC that a port had, unless another port
// here has it: a container that came back before its old port was gone.
func (r *Router) withdraw(mac overlay.MAC) {
	var left localPort
	r.mu.Lock()
	for _, p := range r.local {
		if p.MAC == mac && p.seq > left.seq {
			left = p
		}
	}
	r.mu.Unlock()
	if left.seq == 0 {
		r.cfg.Table.Delete(string(mac[:]))
		return
	}
	r.cfg.Table.Set(string(mac[:]), encodeEndpoint(left.seq, left.Endpoint))
}

// Publish announces all local ports set so far in one go. Until then they are
// only known here, so that a restarted peer never announces half of what it
// has. Call it once, before the gossip runs.
func (r *Router) Publish() {
	r.mu.Lock()
	entries := make(map[string][]byte, len(r.local))
	for _, p := range r.local {
		entries[string(p.MAC[:])] = encodeEndpoint(p.seq, p.Endpoint)
	}
	r.published = true
	r.mu.Unlock()
	r.cfg.Table.Load(entries)
}

// Forget drops what is remembered of a peer that was removed for good. If an
// earlier run knew it, only its short id is left, and which that is nobody
// knows: all that is inherited goes.
func (r *Router) Forget(name peer.Name) {
	r.mu.Lock()
	r.plan.forget(name)
	delete(r.memory, name)
	r.mu.Unlock()
	r.DropInherited()
}

// DropInherited ends what an earlier run left for peers that have not been met
// since: they may be members no more.
func (r *Router) DropInherited() {
	r.mu.Lock()
	r.forgot = true
	r.mu.Unlock()
	r.nudge()
}

// Probed is the overlay.ProbeFunc of all data paths: it answers the probe over
// the control link, unless it stands for packets that no device here takes.
func (r *Router) Probed(path string, from peer.ShortID, token uint64, size int) {
	if size > r.bound(size) {
		return
	}
	r.mu.Lock()
	name, ok := r.byShortID[from]
	r.mu.Unlock()
	if ok {
		r.send(name, answer(path, token))
	}
}

// bound is size, or the most that the devices here take if that is less.
func (r *Router) bound(size int) int {
	if r.cfg.MTU == 0 {
		return size
	}
	return min(size, max(r.cfg.MTU, smallProbe))
}

func (r *Router) send(to peer.Name, b []byte) {
	if err := r.cfg.Mesh.Send(to, MessageKind, b); err != nil {
		r.cfg.Log.Debug("router message not sent", "peer", to, "err", err)
	}
}

func (r *Router) nudge() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run serves the data paths and keeps the forwarding state up to date until
// ctx ends. Forwarding in the kernel goes on after it.
func (r *Router) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range r.all {
		g.Go(func() error {
			if err := p.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("data path %s: %w", p.Name(), err)
			}
			return nil
		})
	}
	g.Go(func() error { return r.decide(ctx) })
	return g.Wait()
}

// decide is the one goroutine that probes and applies.
func (r *Router) decide(ctx context.Context) error {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	begun := time.Now()
	held, lastChange := r.hold, begun
	due := deadline{timer: time.NewTimer(0)}
	defer due.timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.cfg.Mesh.Changes():
			r.refresh(time.Now())
			lastChange = time.Now()
			due.within(coalesce)
		case <-r.cfg.Table.Changes():
			lastChange = time.Now()
			due.within(coalesce)
		case <-r.kick:
			lastChange = time.Now()
			due.within(coalesce)
		case now := <-tick.C:
			changed := r.probe(now)
			r.tellNoData(now)
			if changed {
				lastChange = now
				due.within(coalesce)
			}
			if held && r.settled(now, begun, lastChange) {
				held = false
				due.within(0)
			}
		case <-due.timer.C:
			due.at = time.Time{}
			if err := r.apply(held); err != nil {
				r.cfg.Log.Warn("forwarding not applied, will be tried again", "err", err)
				due.within(retryApply)
			}
		}
	}
}

// deadline is a timer that is only ever brought forward, so that a stream of
// changes can't put it off for ever.
type deadline struct {
	timer *time.Timer
	at    time.Time // zero: it has fired
}

func (d *deadline) within(wait time.Duration) {
	at := time.Now().Add(wait)
	if d.at.IsZero() || at.Before(d.at) {
		d.at = at
		d.timer.Reset(wait)
	}
}

// settled says whether the forwarding state found in the kernel may be
// replaced by what is known by now.
func (r *Router) settled(now, begun, lastChange time.Time) bool {
	if now.Sub(begun) > holdMax {
		return true
	}
	if now.Sub(lastChange) < holdQuiet {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.neighbours {
		if n.chosen == "" {
			return false
		}
	}
	return len(r.neighbours) > 0
}

func (r *Router) apply(partial bool) error {
	f := r.forwarding()
	f.Partial = partial
	f.Inherit = r.inherits()
	var errs []error
	for _, p := range r.inOrder(f.Hops) {
		if err := p.Apply(lawful(f, p.Name())); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p.Name(), err))
		}
	}
	r.applied = f.Hops
	return errors.Join(errs...)
}

// inherits says whether peers not met yet may be in the kernel's tables.
func (r *Router) inherits() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hold && !r.forgot
}

// inOrder are the data paths, and first those that hops are taken from: a
// neighbour that two paths count as theirs would get floods twice.
func (r *Router) inOrder(hops map[peer.ShortID]overlay.Hop) []overlay.Overlay {
	left := make(map[string]int)
	for dst, old := range r.applied {
		if hops[dst].Path != old.Path {
			left[old.Path]++
		}
	}
	return slices.SortedStableFunc(slices.Values(r.all), func(a, b overlay.Overlay) int { return left[b.Name()] - left[a.Name()] })
}

func (r *Router) forwarding() overlay.Forwarding {
	entries := r.cfg.Table.All()
	topo := r.cfg.Mesh.Topology()
	self := r.cfg.Mesh.Self()
	v := view{
		now:     time.Now(),
		self:    self,
		paths:   make(map[peer.Name]string),
		mtus:    make(map[peer.Name]int),
		nextHop: topo.FrameHop,
		tree:    topo.FrameTree,
	}
	for _, rec := range topo.Records() {
		v.peers = append(v.peers, rec.Info)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, n := range r.neighbours {
		v.neighbours = append(v.neighbours, n.Neighbour)
		if n.chosen != "" {
			v.paths[name], v.mtus[name] = n.chosen, n.mtu
		}
	}
	f := r.plan.step(v)
	f.Endpoints = r.remoteLocked(r.memory.recall(entries, topo.Reaches, time.Now()), self.Name)
	return f
}

// remoteLocked turns the table into the endpoints of other peers. Where two
// peers announce one address the higher mobility number wins, and a peer whose
// short id is not known cannot be sent to yet.
func (r *Router) remoteLocked(entries []gossip.Entry, self peer.Name) []overlay.Endpoint {
	type claim struct {
		seq uint64
		ep  overlay.Endpoint
	}
	best := make(map[overlay.MAC]claim, len(entries))
	granted := r.granted()
	refused := map[string]bool{}
	for _, p := range r.local {
		if p.seq > best[p.MAC].seq {
			best[p.MAC] = claim{seq: p.seq}
		}
	}
	for _, e := range entries {
		if e.Origin == self {
			continue
		}
		ep, seq, err := parseEndpoint(e.Key, e.Value)
		if err != nil {
			r.complainLocked(e, err)
			continue
		}
		if ep.Peer = r.plan.routes[e.Origin].info.ShortID; ep.Peer == 0 {
			continue
		}
		if !allow(&ep, e.Origin, granted, refused) {
			continue
		}
		if c, ok := best[ep.MAC]; !ok || seq > c.seq {
			best[ep.MAC] = claim{seq: seq, ep: ep}
		}
	}
	r.refuseLocked(refused)
	out := make([]overlay.Endpoint, 0, len(best))
	for _, c := range best {
		if c.ep.Peer != 0 {
			out = append(out, c.ep)
		}
	}
	return out
}

// complainLocked logs a bad entry once; it disturbs nothing else.
func (r *Router) complainLocked(e gossip.Entry, err error) {
	key := e.Origin.String() + e.Key
	if r.badEntries[key] || len(r.badEntries) >= maxComplaints {
		return
	}
	r.badEntries[key] = true
	r.cfg.Log.Warn("endpoint of another peer ignored", "peer", e.Origin, "err", err)
}
