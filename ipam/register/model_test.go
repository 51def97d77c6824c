package register

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"weave.local/ipam/space"
	"weave.local/peer"
)

/*
The model: hosts with a daemon each and with containers that outlive it, in
virtual time, without goroutines or I/O. What is under test is Node and Lease; the
rest of a daemon is as small as it can be.

	seed ── random steps ──> hosts: disk │ daemon: Node, Lease │ kernel: containers, fence
	                           └───── messages: lost, doubled, late, cut one way ─────┘

A run of a seed is the same each time. WEAVE_MODEL_SEED=n runs that seed alone,
WEAVE_MODEL_RUNS=n so many of them.
*/

const (
	modelRuns  = 1000
	modelSteps = 500
	modelHosts = 5
	modelLease = time.Second
	modelRange = "10.32.0.0/26"
)

// disk is what a host does not forget.
type disk struct {
	store    uint64
	register []byte
	acceptor []byte
	lease    time.Duration // of this boot
	boot     int
	own      map[netip.Addr]bool // records: addresses in use
	giving   map[space.Range]peer.Name
}

// machine is one host.
type machine struct {
	w    *model
	name peer.Name
	rate float64 // of its clocks

	on      bool // the machine runs
	asleep  bool // it is suspended
	stalled bool // the daemon does not get to run
	dead    bool // for ever
	boot    int
	slept   time.Duration // how far its monotonic clock is behind
	sleepAt time.Duration
	disk    disk
	fence   time.Duration       // the kernel's
	live    map[netip.Addr]bool // addresses of containers that run
	sink    []envelopeTo        // what came while it could not run

	// The daemon; nil when it does not run.
	node    *Node
	lease   Lease
	fuse    int // dies at so many more writes or messages; 0: never
	wanted  []Op
	removes []peer.Name
	due     time.Duration // of the next turn
	own     *space.Set    // see owned; nil: to be worked out
}

type envelopeTo struct {
	from, to peer.Name
	at       time.Duration
	order    int
	boot     int
	m        *Message
}

type mail []envelopeTo

func (q mail) Len() int { return len(q) }
func (q mail) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].order < q[j].order
}
func (q mail) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *mail) Push(x any)   { *q = append(*q, x.(envelopeTo)) }
func (q *mail) Pop() any {
	old := *q
	x := old[len(old)-1]
	*q = old[:len(old)-1]
	return x
}

type model struct {
	rand   *rand.Rand
	now    time.Duration // true time
	hosts  []*machine
	mail   mail
	order  int
	cut    map[[2]peer.Name]bool
	loss   float64
	newest *State // of all that anybody learned
	chosen map[[2]uint64]string
	epochs map[peer.Name]uint64
	err    error
	did    map[string]int
}

func newModel(seed uint64) *model {
	w := &model{
		rand: rand.New(rand.NewPCG(seed, 7)), cut: map[[2]peer.Name]bool{}, now: time.Hour,
		chosen: map[[2]uint64]string{}, epochs: map[peer.Name]uint64{}, did: map[string]int{},
	}
	for i := range modelHosts {
		h := &machine{w: w, name: peer.Name(i + 1), rate: 0.98 + 0.04*w.rand.Float64(), live: map[netip.Addr]bool{}}
		h.disk = disk{own: map[netip.Addr]bool{}, giving: map[space.Range]peer.Name{}}
		w.hosts = append(w.hosts, h)
		h.power()
	}
	return w
}

func (w *model) fail(format string, args ...any) {
	if w.err == nil {
		w.err = fmt.Errorf("at %v: "+format, append([]any{w.now}, args...)...)
	}
}

// ---- clocks ----

func (h *machine) uptime() time.Duration { return time.Duration(float64(h.w.now) * h.rate) }

// clock is the monotonic clock, which stands still during sleep.
func (h *machine) clock() time.Time { return time.Unix(0, 0).Add(h.uptime() - h.slept) }

// ---- the daemon ----

func (h *machine) power() {
	h.on, h.asleep, h.boot, h.fence = true, false, h.boot+1, 0
	h.start()
	clear(h.live)
	for a := range h.disk.own { // restarted by Docker, with their addresses
		h.live[a] = true
	}
}

// start runs the daemon on what is on disk.
func (h *machine) start() {
	d := &h.disk
	if d.store == 0 {
		d.store = h.w.rand.Uint64() | 1
	}
	var s *State
	if d.register != nil {
		s, _ = ParseState(d.register)
	}
	cfg := Config{Self: ID{h.name, d.store}, Range: netip.MustParsePrefix(modelRange), Quorum: modelHosts, Rand: h.w.rand}
	node, err := New(cfg, s, d.acceptor)
	if err != nil {
		d.store = h.w.rand.Uint64() | 1
		cfg.Self.Store = d.store
		node, _ = New(cfg, s, nil)
	}
	h.node, h.fuse, h.wanted, h.removes, h.own = node, 0, nil, nil, nil
	h.lease = Lease{Self: cfg.Self, Want: modelLease}
	if d.boot == h.boot && d.lease != 0 {
		h.lease.Set(d.lease)
	} else if s != nil {
		if m, ok := s.Member(h.name); !ok || m.Lease > 0 {
			h.lease.Set(LeaseOver)
		}
	}
	for a := range h.live { // adopted
		d.own[a] = true
	}
	if s != nil {
		h.setFence()
	}
	h.due = h.w.now
}

// die ends the daemon. The kernel and the containers go on.
func (h *machine) die() { h.node = nil }

// pass is a point where the daemon may die.
func (h *machine) pass() bool {
	if h.node == nil {
		return false
	}
	if h.fuse > 0 {
		if h.fuse--; h.fuse == 0 {
			h.die()
			return false
		}
	}
	return true
}

// do carries effects out: what is durable first, then the fence, then messages.
func (h *machine) do(e Effects) {
	if h.node == nil {
		return
	}
	for _, a := range e.Answers {
		h.lease.Answered(a, h.node.State())
	}
	if e.Dirty || h.lease.Until() != h.disk.lease {
		if !h.pass() {
			return
		}
		if s := h.node.State(); s != nil {
			h.disk.register = s.Append(nil)
		}
		h.disk.acceptor = h.node.Acceptor()
		h.disk.lease, h.disk.boot = h.lease.Until(), h.boot
	}
	s := h.node.State()
	if e.Learned {
		h.w.learned(s)
		h.own = nil
		for r := range h.disk.giving {
			if len(s.Owned(h.name).In(r)) == 0 {
				delete(h.disk.giving, r)
			}
		}
	}
	if s != nil && (e.Learned || h.lease.Until() != h.fence) {
		h.setFence()
	}
	for _, env := range e.Send {
		if !h.pass() {
			return
		}
		h.w.post(h, env)
	}
}

func (h *machine) member() bool {
	if h.node == nil || h.node.State() == nil {
		return false
	}
	m, ok := h.node.State().Member(h.name)
	return ok && m.Is(h.lease.Self)
}

// owned is what may be handed out.
func (h *machine) owned() *space.Set {
	if !h.member() {
		return &space.Set{}
	}
	if h.own == nil {
		h.own = h.node.State().Owned(h.name)
		for r := range h.disk.giving {
			h.own.Remove(r)
		}
	}
	return h.own
}

func (h *machine) disputed() bool {
	own := h.owned()
	for a := range h.disk.own {
		if !own.Has(a) {
			return true
		}
	}
	return false
}

func (h *machine) setFence() {
	h.fence = h.lease.Fence(h.node.State(), h.disputed())
}

func (h *machine) leaseOver() bool { return h.lease.Until() != 0 && h.uptime() >= h.lease.Until() }

// isLive says whether a container here with address a can be heard by others.
func (h *machine) isLive(a netip.Addr) bool {
	return h.on && !h.asleep && h.live[a] && (h.fence == 0 || h.uptime() < h.fence)
}

func (h *machine) reachable() []peer.Name {
	var out []peer.Name
	for _, o := range h.w.hosts {
		if o != h && o.node != nil && o.on && !o.asleep && !h.w.cut[[2]peer.Name{h.name, o.name}] {
			out = append(out, o.name)
		}
	}
	return out
}

// turn is what a daemon does when it is time.
func (h *machine) turn() {
	if h.node == nil || !h.on || h.asleep || h.stalled {
		h.due = h.w.now + 50*time.Millisecond
		return
	}
	now := h.clock()
	h.node.SetPeers(h.reachable())
	h.do(h.node.Tick(now))
	if h.node == nil {
		return
	}
	s := h.node.State()
	if s == nil {
		h.do(h.node.Found(now))
	} else {
		if r, ok := h.lease.Renew(h.uptime(), h.w.rand.Uint64(), s); ok {
			h.do(h.node.Renew(now, r))
		}
		if h.node != nil {
			h.do(h.node.Demand(now, true, h.demands(s), h.off(s)))
		}
	}
	h.plan()
}

// plan sets when the next turn is.
func (h *machine) plan() {
	h.due = h.w.now + 200*time.Millisecond
	if h.node == nil {
		return
	}
	if at := h.node.Next(); !at.IsZero() {
		h.due = min(h.due, h.w.now+max(time.Millisecond, at.Sub(h.clock())))
	}
	if h.lease.Length(h.node.State()) > 0 {
		h.due = min(h.due, h.w.now+max(time.Millisecond, h.lease.Next()-h.uptime()))
	}
}

func (h *machine) off(s *State) []peer.Name {
	h.removes = slices.DeleteFunc(h.removes, func(n peer.Name) bool {
		_, ok := s.Member(n)
		return !ok || h.w.hosts[n-1].node != nil
	})
	return h.removes
}

func (h *machine) demands(s *State) []Op {
	var ops []Op
	if op, ok := h.lease.Demand(h.uptime(), s); ok {
		ops = append(ops, op)
	}
	own := h.owned()
	for _, a := range sortedAddrs(h.disk.own) { // wanted back
		if !own.Has(a) {
			if g, taken := s.Owner(a); taken && g.Owner != h.name {
				h.lose(a)
			} else if !taken {
				ops = append(ops, Op{Kind: OpBlock, Range: space.Single(a)})
			}
		}
	}
	for _, r := range sortedRanges(h.disk.giving) {
		ops = append(ops, Op{Kind: OpRelease, Range: r, To: h.disk.giving[r]})
	}
	for _, n := range h.off(s) {
		ops = append(ops, Op{Kind: OpRemove, To: n})
	}
	return append(ops, h.wanted...)
}

// lose ends the use of an address that is another's.
func (h *machine) lose(a netip.Addr) {
	delete(h.live, a)
	delete(h.disk.own, a)
	h.w.did["lost"]++
	h.setFence()
}

// ---- what users do ----

func (h *machine) allocate() bool {
	own := h.owned()
	if h.leaseOver() {
		return false
	}
	for _, r := range own.Ranges() {
		for a := r.First; ; a = a.Next() {
			if !h.disk.own[a] {
				return h.use(a)
			}
			if a == r.Last {
				break
			}
		}
	}
	if len(h.wanted) == 0 && h.node != nil {
		h.wanted = []Op{{Kind: OpGrant, Subnet: netip.MustParsePrefix(modelRange), Peers: modelHosts}}
	}
	return false
}

// use records an address, durably, and starts a container with it.
func (h *machine) use(a netip.Addr) bool {
	if !h.pass() {
		return false
	}
	h.disk.own[a] = true
	if !h.pass() {
		return false // recorded, and nobody has it
	}
	h.live[a] = true
	h.wanted = nil
	h.w.did["allocate"]++
	h.w.checkAddr(a)
	return true
}

func (h *machine) claim(a netip.Addr) {
	switch own := h.owned(); {
	case h.node == nil || h.disk.own[a] || h.leaseOver():
	case own.Has(a):
		h.use(a)
	case h.node.State() != nil:
		if _, taken := h.node.State().Owner(a); !taken {
			h.wanted = []Op{{Kind: OpBlock, Range: space.Single(a)}}
		}
	}
}

func (h *machine) free() {
	for _, a := range sortedAddrs(h.disk.own) {
		if h.w.rand.IntN(2) == 0 {
			delete(h.live, a)
			if h.pass() {
				delete(h.disk.own, a)
			}
		}
	}
}

// give gives some free addresses away to another member.
func (h *machine) give() {
	own := h.owned().Clone()
	for a := range h.disk.own {
		own.Remove(space.Single(a))
	}
	block, ok := Donation(&own, netip.MustParsePrefix(modelRange))
	to := h.w.hosts[h.w.rand.IntN(modelHosts)].name
	if ok && to != h.name && h.pass() {
		h.disk.giving[block], h.own = to, nil
		h.w.did["give"]++
	}
}

// ---- the network ----

func (w *model) post(h *machine, env Envelope) {
	copies := 1
	switch p := w.rand.Float64(); {
	case w.cut[[2]peer.Name{h.name, env.To}] || p < w.loss:
		return
	case p < 2*w.loss:
		copies = 2
	}
	m := env.Message
	for range copies {
		late := time.Duration(w.rand.Int64N(int64(20 * time.Millisecond)))
		if w.rand.Float64() < w.loss/2 {
			late += time.Duration(w.rand.Int64N(int64(3 * modelLease)))
		}
		w.order++
		heap.Push(&w.mail, envelopeTo{from: h.name, to: env.To, at: w.now + late, order: w.order, m: &m})
	}
}

func (w *model) deliver(env envelopeTo) {
	h := w.hosts[env.to-1]
	switch {
	case !h.on || h.asleep || h.node == nil:
	case h.stalled: // waits in a socket
		if len(h.sink) < 64 {
			h.sink = append(h.sink, env)
		}
	default:
		h.do(h.node.Receive(h.clock(), env.from, env.m))
		due := h.due
		h.plan()
		h.due = min(due, h.due)
	}
}

func (h *machine) resume() {
	h.stalled = false
	sink := h.sink
	h.sink = nil
	for _, env := range sink {
		h.w.deliver(env)
	}
	h.due = h.w.now
}

// pass lets time pass.
func (w *model) pass(d time.Duration) {
	end := w.now + d
	for w.err == nil {
		var next *machine
		at := end
		for _, h := range w.hosts {
			if h.node != nil && h.due < at {
				next, at = h, h.due
			}
		}
		if len(w.mail) > 0 && w.mail[0].at <= at {
			w.now = max(w.now, w.mail[0].at)
			w.deliver(heap.Pop(&w.mail).(envelopeTo))
			continue
		}
		w.now = max(w.now, at)
		if next == nil {
			return
		}
		next.turn()
	}
}

// gossip lets one host tell another its register.
func (w *model) gossip() {
	a, b := w.hosts[w.rand.IntN(modelHosts)], w.hosts[w.rand.IntN(modelHosts)]
	if a == b || a.node == nil || b.node == nil || !a.on || !b.on || a.asleep || b.asleep || b.stalled ||
		a.node.State() == nil || w.cut[[2]peer.Name{a.name, b.name}] {
		return
	}
	b.do(b.node.Merge(b.clock(), a.name, a.node.State()))
}

// ---- invariants ----

// learned checks that a version has one value and that epochs grow.
func (w *model) learned(s *State) {
	key, text := [2]uint64{s.Term, s.Version}, string(s.Append(nil))
	if was, ok := w.chosen[key]; ok && was != text {
		w.fail("two registers for version %v", key)
		return
	} else if ok {
		return
	}
	w.chosen[key] = text
	if err := s.Validate(); err != nil {
		w.fail("%v", err)
	}
	if w.newest == nil || s.Newer(w.newest) {
		w.newest = s
	}
	if s != w.newest {
		return
	}
	for _, m := range s.Members {
		if m.Epoch < w.epochs[m.Name] {
			w.fail("epoch %d of %v after %d", m.Epoch, m.Name, w.epochs[m.Name])
		}
		w.epochs[m.Name] = m.Epoch
	}
}

// checkAddr: no address is held by two containers that can both be heard.
func (w *model) checkAddr(a netip.Addr) {
	var holder *machine
	for _, h := range w.hosts {
		if !h.isLive(a) {
			continue
		}
		if holder != nil {
			w.fail("%v is held on %v and on %v", a, holder.name, h.name)
		}
		holder = h
	}
}

func (w *model) check() {
	seen := map[netip.Addr]bool{}
	for _, h := range w.hosts {
		for a := range h.live {
			if seen[a] {
				w.checkAddr(a)
			}
			seen[a] = true
		}
	}
}

// ---- a run ----

func (w *model) step() {
	h := w.hosts[w.rand.IntN(modelHosts)]
	switch what := w.rand.IntN(100); {
	case h.dead:
	case !h.on:
		if w.rand.IntN(3) == 0 {
			w.did["power"]++
			h.power()
		}
	case h.asleep:
		if w.rand.IntN(3) == 0 {
			h.asleep = false
			h.slept += h.uptime() - h.sleepAt
			h.due = w.now
		}
	case h.stalled:
		if w.rand.IntN(2) == 0 {
			h.resume()
		}
	case h.node == nil:
		if w.rand.IntN(2) == 0 {
			w.did["restart"]++
			h.start()
		}
	case what < 30:
		h.allocate()
	case what < 36:
		all := space.FromPrefix(netip.MustParsePrefix(modelRange))
		a := all.First
		for range w.rand.IntN(int(all.Size()) - 1) {
			a = a.Next()
		}
		h.claim(a)
	case what < 44:
		h.free()
	case what < 48:
		h.give()
	case what < 54:
		h.fuse = 1 + w.rand.IntN(20)
	case what < 59:
		w.split()
		if w.rand.IntN(2) == 0 { // long enough to be given up
			for range 4 {
				w.pass(time.Duration(w.rand.Int64N(int64(modelLease))))
				w.gossip()
				h = w.hosts[w.rand.IntN(modelHosts)]
				if h.on && !h.asleep && h.node != nil {
					h.allocate()
				}
				w.check()
			}
		}
	case what < 70:
	default:
		w.harm(h, what)
	}
	w.gossip()
	switch w.rand.IntN(12) {
	case 0:
		w.pass(time.Duration(w.rand.Int64N(int64(modelLease / 2))))
	case 1, 2, 3, 4, 5, 6:
	default:
		w.pass(time.Duration(w.rand.Int64N(int64(100 * time.Millisecond))))
	}
	w.check()
}

// harm lets something happen to a whole host.
func (w *model) harm(h *machine, what int) {
	switch {
	case what < 74:
		w.did["stall"]++
		h.stalled = true
	case what < 78:
		w.did["sleep"]++
		h.asleep, h.sleepAt = true, h.uptime()
	case what < 82: // power goes
		h.on = false
		h.die()
		clear(h.live)
	case what < 84 && w.canLose(): // the disk is new; containers run on
		w.did["wipe"]++
		h.die()
		h.disk = disk{own: map[netip.Addr]bool{}, giving: map[space.Range]peer.Name{}}
	case what < 86 && w.canLose():
		w.did["corrupt"]++
		h.die()
		h.disk.acceptor = []byte{0xff}
	case what == 86 && w.dead() < 2 && w.canLose():
		w.did["dead"]++
		h.dead, h.on = true, false
		h.die()
		clear(h.live)
	case what >= 87 && what < 90: // a person says so
		off := w.hosts[w.rand.IntN(modelHosts)]
		if off.dead {
			w.did["rmpeer"]++
			h.removes = []peer.Name{off.name}
		}
	}
}

// canLose says whether a majority of keepers is left when one more loses what it
// promised: without, the register is at an end, and people have to help.
func (w *model) canLose() bool {
	s := w.newest
	if s == nil {
		return false
	}
	for _, h := range w.hosts {
		if !h.dead && (h.node == nil || h.node.acc.state != nil) {
			return false // another version may be agreed that nobody knows yet
		}
	}
	up := 0
	for _, m := range s.Members {
		h := w.hosts[m.Name-1]
		switch {
		case h.dead:
		case !m.Is(ID{m.Name, h.disk.store}) || len(h.disk.acceptor) < 2:
			return false // it may become a keeper before it is a member again
		default:
			up += bit(slices.Contains(s.Keepers, m.Name))
		}
	}
	return majority(up-1, len(s.Keepers))
}

func (w *model) dead() (n int) {
	for _, h := range w.hosts {
		n += bit(h.dead)
	}
	return n
}

// split cuts some directions, in no regular way, or heals all.
func (w *model) split() {
	clear(w.cut)
	if w.rand.IntN(3) == 0 {
		return
	}
	part := 1 + w.rand.IntN(4)
	for _, a := range w.hosts {
		for _, b := range w.hosts {
			if w.rand.IntN(8) < part {
				w.cut[[2]peer.Name{a.name, b.name}] = true
			}
		}
	}
}

// heal ends all trouble and demands what must be true then.
func (w *model) heal() {
	clear(w.cut)
	w.loss = 0
	for _, h := range w.hosts {
		switch {
		case h.dead:
			continue
		case !h.on:
			h.power()
		case h.asleep:
			h.asleep = false
			h.slept += h.uptime() - h.sleepAt
		case h.stalled:
			h.resume()
		}
		if h.node == nil {
			h.start()
		}
		h.fuse, h.wanted = 0, nil
	}
	for range 32 {
		w.pass(modelLease / 4)
		for range 5 {
			w.gossip()
		}
		w.check()
	}
	for _, h := range w.hosts {
		if h.dead || w.err != nil {
			continue
		}
		s := h.node.State()
		for _, g := range s.Grants {
			if m, _ := s.Member(g.Owner); w.hosts[g.Owner-1].dead && m.Lease > 0 && w.alive(s) {
				w.fail("%v still has %v, and will not be back", g.Owner, g.Range)
			}
		}
		h.free()
		for try := 0; !h.allocate(); try++ {
			if try == 100 {
				w.fail("%v gets no address: lease until %v, clock %v, wants %v, owns %v, pool %v", h.name, h.lease.Until(), h.uptime(), h.wanted, h.owned().Ranges(), s.Pool().Ranges())
				break
			}
			w.share(h)
			w.pass(50 * time.Millisecond)
			s = h.node.State()
		}
	}
	w.check()
}

// alive says whether a majority of the keepers is not dead, and there are leases.
func (w *model) alive(s *State) bool {
	up := 0
	for _, k := range s.Keepers {
		up += 1 - bit(w.hosts[k-1].dead)
	}
	return majority(up, len(s.Keepers))
}

// share stands for a donation: with an empty pool, some peer gives to h.
func (w *model) share(h *machine) {
	if hosts, _ := space.Hosts(netip.MustParsePrefix(modelRange)); h.node.State().Pool().SizeIn(hosts) > 0 {
		return
	}
	for _, o := range w.hosts {
		if o.node != nil && o != h && len(o.disk.giving) == 0 {
			o.give()
			for r := range o.disk.giving {
				o.disk.giving[r] = h.name
			}
		}
	}
}

func (w *model) run(steps int) error {
	w.pass(3 * time.Second)
	w.loss = 0.1
	for range steps {
		if w.err != nil {
			return w.err
		}
		w.step()
	}
	w.heal()
	return w.err
}

// TestModel runs the model by many seeds.
func TestModel(t *testing.T) {
	first, runs := uint64(0), modelRuns
	if v := os.Getenv("WEAVE_MODEL_RUNS"); v != "" {
		runs, _ = strconv.Atoi(v)
	}
	if v := os.Getenv("WEAVE_MODEL_SEED"); v != "" {
		first, _ = strconv.ParseUint(v, 10, 64)
		runs = 1
	}
	defer debug.SetGCPercent(debug.SetGCPercent(1000)) // short-lived garbage
	var next atomic.Uint64
	var mu sync.Mutex
	var errs []error
	var workers sync.WaitGroup
	did := map[string]int{}
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for {
				n := next.Add(1) - 1
				mu.Lock()
				failed := len(errs) > 0
				mu.Unlock()
				if n >= uint64(runs) || failed {
					return
				}
				w := newModel(first + n)
				err := w.run(modelSteps)
				mu.Lock()
				for what, times := range w.did {
					did[what] += times
				}
				if err != nil {
					errs = append(errs, fmt.Errorf("WEAVE_MODEL_SEED=%d: %w\n%v", first+n, err, w))
				}
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	t.Logf("%d runs of %d steps from seed %d: %v", runs, modelSteps, first, did)
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if runs >= modelRuns && (did["allocate"] == 0 || did["lost"] == 0 || did["dead"] == 0 || did["give"] == 0) {
		t.Fatalf("nothing happened: %v", did)
	}
}

func sortedAddrs(m map[netip.Addr]bool) []netip.Addr {
	out := make([]netip.Addr, 0, len(m))
	for a := range m {
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func sortedRanges(m map[space.Range]peer.Name) []space.Range {
	out := make([]space.Range, 0, len(m))
	for r := range m {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b space.Range) int { return a.First.Compare(b.First) })
	return out
}

// String tells how things stand, for when a run has failed.
func (w *model) String() string {
	text := ""
	for _, h := range w.hosts {
		text += fmt.Sprintf("%v due=%v stalled=%v on=%v dead=%v asleep=%v store=%x boot=%d lease=%v fence=%v up=%v uses=%v\n", h.name, h.due, h.stalled, h.on, h.dead, h.asleep,
			h.disk.store, h.boot, h.lease.Until(), h.fence, h.uptime(), sortedAddrs(h.disk.own))
		if h.node == nil {
			continue
		}
		if s := h.node.State(); s != nil {
			text += fmt.Sprintf("   term %d version %d committee %v keepers %v members %v\n", s.Term, s.Version, s.Committee, s.Keepers, s.Members)
		}
		n := h.node
		text += fmt.Sprintf("   acceptor %d %v %v round %+v want %+v notNow %v frozen %v clock %v\n", n.acc.version, n.acc.promised, n.acc.accepted, n.round, n.want, n.notNow, n.frozen(), h.clock())
	}
	return text
}
