package register

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"weave.local/ipam/space"
	"weave.local/peer"
)

// disk is what a host does not forget.
type disk struct {
	store    uint64
	register []byte
	acceptor []byte
	lease    []byte
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
	written time.Duration // the lease on disk
	kept    *State        // the register on disk
	own     *space.Set    // see owned; nil: to be worked out
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
	cfg := Config{Self: ID{h.name, d.store}, Range: netip.MustParsePrefix(modelRange), Quorum: h.w.size, Rand: h.w.rand}
	node, err := New(cfg, s, d.acceptor)
	if err != nil {
		d.store = h.w.rand.Uint64() | 1
		cfg.Self.Store = d.store
		node, _ = New(cfg, s, nil)
	}
	h.node, h.fuse, h.wanted, h.removes, h.own = node, 0, nil, nil, nil
	h.lease, h.written, h.kept = Lease{Self: cfg.Self, Want: modelLease}, 0, nil
	h.lease.Load(d.lease, fmt.Sprint(h.boot), s)
	for a := range h.live { // adopted
		d.own[a] = true
	}
	h.setFence()
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
	if e.Dirty || h.lease.Until() != h.written {
		if !h.pass() {
			return
		}
		if s := h.node.State(); s != h.kept {
			h.disk.register, h.kept = s.Append(nil), s
		}
		h.disk.acceptor = h.node.Acceptor()
		h.disk.lease, h.written = h.lease.Append(nil, fmt.Sprint(h.boot)), h.lease.Until()
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

// setFence tells the kernel; without a register only to cut off.
func (h *machine) setFence() {
	if s, stray := h.node.State(), h.disputed(); s != nil || stray {
		h.fence = h.lease.Fence(s, stray)
	}
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
		h.wanted = []Op{{Kind: OpGrant, Subnet: netip.MustParsePrefix(modelRange), Peers: uint64(h.w.size)}}
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
	to := h.w.hosts[h.w.rand.IntN(len(h.w.hosts))].name
	if ok && to != h.name && h.pass() {
		h.disk.giving[block], h.own = to, nil
		h.w.did["give"]++
	}
}
