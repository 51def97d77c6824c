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

A run of a seed is the same each time. WEAVE_MODEL_RUNS=n runs so many seeds,
WEAVE_MODEL_SEED=n that seed alone, both so many from that one on.
*/

const (
	modelRuns  = 1000
	modelSteps = 500
	modelHosts = 5
	modelLease = time.Second
	modelRange = "10.32.0.0/26"
)

type envelopeTo struct {
	from, to peer.Name
	at       time.Duration
	order    int
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
	size   int
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
	w.size = modelHosts + 2*int(seed%2) // also more than can be keepers
	for i := range w.size {
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
	a, b := w.hosts[w.rand.IntN(len(w.hosts))], w.hosts[w.rand.IntN(len(w.hosts))]
	if a == b || a.node == nil || b.node == nil || !a.on || !b.on || a.asleep || b.asleep || b.stalled ||
		a.node.State() == nil || a.node.State() == b.node.State() || w.cut[[2]peer.Name{a.name, b.name}] {
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

// TestModel runs the model by many seeds.
func TestModel(t *testing.T) {
	first, runs := uint64(0), modelRuns
	if v := os.Getenv("WEAVE_MODEL_SEED"); v != "" {
		first, _ = strconv.ParseUint(v, 10, 64)
		runs = 1
	}
	if v := os.Getenv("WEAVE_MODEL_RUNS"); v != "" {
		runs, _ = strconv.Atoi(v)
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
