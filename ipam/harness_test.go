package ipam

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"weave.local/ipam/register"
	"weave.local/ipam/space"
	"weave.local/peer"
	"weave.local/peer/state"
)

// world is a few peers and the network between them, in one bubble of
// simulated time. Every peer has a real state file.
type world struct {
	t      *testing.T
	ctx    context.Context //nolint:containedctx // of all peers and calls, ended by end
	cancel context.CancelFunc
	dir    string
	peers  []*host

	mu      sync.Mutex
	rand    *rand.Rand
	loss    float64 // part of the messages that get lost; as many are doubled
	delay   time.Duration
	cut     func(a, b peer.Name) bool // true: a cannot send to b
	epochs  map[string]uint64         // cluster and peer: highest epoch seen
	chosen  map[string]string         // cluster, term, version: what it was
	stopped bool
	began   time.Time
}

// host is one peer over its crashes.
type host struct {
	w    *world
	name peer.Name
	cfg  Config

	mu    sync.Mutex
	a     *Allocator // nil while down
	db    *state.DB
	stop  context.CancelFunc
	done  chan struct{}
	fuse  int // crash when this many more hooks were passed; 0: never
	alive bool
	sent  int                   // messages
	last  map[netip.Addr]string // what the file held when it went down
	owned *space.Set            // and what it could hand out
	fence time.Duration         // since boot, as the data path has it
	boot  int
}

// epoch is when the machines of all hosts started.
func (w *world) uptime() time.Duration { return time.Since(w.began) + time.Hour }

// isCut says whether the containers of a host are cut off from others.
func (h *host) isCut() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fence != 0 && h.w.uptime() >= h.fence
}

// reboot starts the machine anew, with the containers it had.
func (h *host) reboot() *host {
	h.mu.Lock()
	h.boot++
	h.fence = 0
	h.mu.Unlock()
	return h.start()
}

const testRange = "10.32.0.0/16"

func newWorld(t *testing.T, dir string, seed uint64) *world {
	ctx, cancel := context.WithCancel(t.Context())
	return &world{
		t: t, ctx: ctx, cancel: cancel, dir: dir, rand: rand.New(rand.NewPCG(seed, 1)), delay: 5 * time.Millisecond,
		epochs: map[string]uint64{}, chosen: map[string]string{}, began: time.Now(),
	}
}

// run is a test in a bubble; at its end every peer is stopped and checked.
func run(t *testing.T, seed uint64, f func(t *testing.T, w *world)) {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ipam") //nolint:usetesting // memory: fsync of a disk is not what is tested
	if err != nil {
		dir = t.TempDir()
	}
	defer func() { _ = os.RemoveAll(dir) }()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, dir, seed)
		defer w.end()
		f(t, w)
		w.check()
		w.checkEpochs()
	})
}

func (w *world) end() {
	w.mu.Lock()
	w.stopped = true
	w.mu.Unlock()
	for _, h := range w.peers {
		h.crash()
	}
	w.cancel()
}

// add makes a peer; it is started by start.
func (w *world) add(n int, init Bootstrap) []*host {
	for range n {
		id := len(w.peers) + 1
		h := &host{w: w, name: peer.Name(id)}
		h.cfg = Config{
			Self:  peer.Info{Name: h.name, NickName: fmt.Sprintf("host%d", id)},
			Range: netip.MustParsePrefix(testRange),
			Init:  init,
			Send:  h.send,
			Reachable: func() []peer.Name {
				h.pass()
				return w.reachable(h.name)
			},
			Nick:    func(n peer.Name) string { return fmt.Sprintf("host%d", n) },
			Changed: h.gossip,
			Uptime:  w.uptime,
			Fence: func(until time.Duration) error {
				h.mu.Lock()
				defer h.mu.Unlock()
				h.fence = until
				return nil
			},
			Lost: func(owner string, addr netip.Prefix) {
				if a := h.up(); a != nil { // it may die meanwhile
					go func() { _ = a.Free(owner, addr.Addr()) }()
				}
			},
			Log: slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
		}
		w.mu.Lock()
		w.peers = append(w.peers, h)
		w.mu.Unlock()
	}
	return w.peers[len(w.peers)-n:]
}

func (h *host) start() *host {
	t := h.w.t
	t.Helper()
	db, err := state.Open(filepath.Join(h.w.dir, h.name.String()), h.cfg.Log)
	if err != nil {
		t.Fatal(err)
	}
	cfg := h.cfg
	cfg.Store, cfg.Boot = db.Bucket("ipam"), fmt.Sprint("boot ", h.boot)
	a, err := New(cfg)
	if err == nil {
		err = a.FenceNow()
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(h.w.ctx)
	done := make(chan struct{})
	h.mu.Lock()
	h.a, h.db, h.stop, h.done, h.alive, h.fuse = a, db, cancel, done, true, 0
	h.mu.Unlock()
	go func() {
		defer close(done)
		if err := a.Run(ctx); err != nil {
			t.Errorf("%v: Run: %v", h.name, err)
		}
	}()
	go h.antiEntropy(ctx, a)
	return h
}

// crash ends the peer; what is in its file stays.
func (h *host) crash() {
	h.mu.Lock()
	a, db, stop, done := h.a, h.db, h.stop, h.done
	h.a, h.alive = nil, false
	h.mu.Unlock()
	if a == nil {
		return
	}
	stop()
	_ = db.Close() // writes fail from here on
	<-done
	held, owned := a.snapshot()
	h.mu.Lock()
	h.last, h.owned = held, owned
	h.mu.Unlock()
}

// pass is called at points where a process may die: before it writes, and
// before each message it sends.
func (h *host) pass() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fuse == 0 {
		return
	}
	if h.fuse--; h.fuse == 0 {
		h.alive = false
		_ = h.db.Close()
	}
}

// light makes the peer die after some more passes.
func (h *host) light(passes int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fuse = passes
}

func (h *host) up() *Allocator {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.alive {
		return nil
	}
	return h.a
}

func (h *host) send(to peer.Name, payload []byte) error {
	h.pass()
	if h.up() == nil {
		return context.Canceled
	}
	h.mu.Lock()
	h.sent++
	h.mu.Unlock()
	return h.w.carry(h.name, to, payload, func(a *Allocator, b []byte) { a.Receive(h.name, b) })
}

// carry takes a payload to a peer: maybe late, maybe twice, maybe never.
func (w *world) carry(from, to peer.Name, payload []byte, deliver func(*Allocator, []byte)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped || w.cut != nil && w.cut(from, to) {
		return context.Canceled
	}
	if len(payload) > 256<<10 {
		w.t.Errorf("message of %d octets", len(payload))
	}
	copies := 1
	switch p := w.rand.Float64(); {
	case p < w.loss:
		copies = 0
	case p < 2*w.loss:
		copies = 2
	}
	for range copies {
		late := time.Duration(w.rand.Int64N(int64(w.delay) + 1))
		if w.rand.Float64() < w.loss/4 {
			late += time.Duration(w.rand.Int64N(int64(3 * time.Second)))
		}
		time.AfterFunc(late, func() {
			if a := w.host(to).up(); a != nil {
				deliver(a, payload)
			}
		})
	}
	return nil
}

func (w *world) host(name peer.Name) *host {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.peers[name-1]
}

func (w *world) reachable(of peer.Name) []peer.Name {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []peer.Name
	for _, h := range w.peers {
		if h.name != of && h.up() != nil && (w.cut == nil || !w.cut(of, h.name)) {
			out = append(out, h.name)
		}
	}
	return out
}

// gossip stands for the announcement of a new register.
func (h *host) gossip() {
	a := h.up()
	if a == nil {
		return
	}
	for _, to := range h.w.reachable(h.name) {
		h.w.share(a, h.name, to)
	}
}

func (w *world) share(a *Allocator, from, to peer.Name) {
	b := a.Encode()
	_ = w.carry(from, to, b, func(other *Allocator, b []byte) {
		if err := other.Merge(from, b); err != nil {
			w.t.Errorf("Merge: %v", err)
		}
	})
}

// antiEntropy compares with one peer every second.
func (h *host) antiEntropy(ctx context.Context, a *Allocator) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		near := h.w.reachable(h.name)
		if len(near) == 0 || h.up() == nil {
			continue
		}
		h.w.mu.Lock()
		to := near[h.w.rand.IntN(len(near))]
		h.w.mu.Unlock()
		if other := h.w.host(to).up(); other != nil && other.Digest() != a.Digest() {
			h.w.share(a, h.name, to)
		}
	}
}

// snapshot is what the peer holds in the range, and what it could hand out.
func (a *Allocator) snapshot() (map[netip.Addr]string, *space.Set) {
	a.mu.Lock()
	defer a.mu.Unlock()
	held := map[netip.Addr]string{}
	for addr, r := range a.records {
		if a.cfg.Range.Contains(addr) {
			held[addr] = r.owner
		}
	}
	own := a.space.Owned().Clone()
	return held, &own
}

// check is the invariants: no address held twice (I2), no address that two
// peers could hand out, one value per version (I1), epochs that only grow
// (I4).
func (w *world) check() {
	w.t.Helper()
	holder := map[netip.Addr]peer.Name{}
	var all space.Set
	for _, h := range w.peers {
		h.mu.Lock()
		a, held, owned := h.a, h.last, h.owned
		h.mu.Unlock()
		if a != nil {
			held, owned = a.snapshot()
			a.mu.Lock()
			st := a.state
			a.mu.Unlock()
			w.checkState(st)
		}
		if h.isCut() {
			held, owned = nil, nil
		}
		for addr := range held {
			if other, twice := holder[addr]; twice {
				w.t.Fatalf("%v is held on %v and on %v", addr, other, h.name)
			}
			holder[addr] = h.name
		}
		if owned == nil {
			continue
		}
		for _, r := range owned.Ranges() {
			if both := all.In(r); len(both) > 0 {
				w.t.Fatalf("%v could be handed out by %v and by another peer", both, h.name)
			}
			all.Add(r)
		}
	}
}

func (w *world) checkState(st *register.State) {
	w.t.Helper()
	if st == nil {
		return
	}
	key := fmt.Sprintf("%v %d %d", st.Cluster, st.Term, st.Version)
	text := string(st.Append(nil))
	if was, ok := w.chosen[key]; ok && was != text {
		w.t.Fatalf("two registers for %s", key)
	}
	w.chosen[key] = text
	for _, m := range st.Members {
		w.epochs[fmt.Sprintf("%v %v %d", st.Cluster, m.Name, st.Version)] = m.Epoch
	}
}

// checkEpochs compares the epochs of each peer over all versions seen.
func (w *world) checkEpochs() {
	w.t.Helper()
	type seen struct{ version, epoch uint64 }
	by := map[string][]seen{}
	for key, epoch := range w.epochs {
		var c, n string
		var v uint64
		if _, err := fmt.Sscan(key, &c, &n, &v); err != nil {
			w.t.Fatal(err)
		}
		by[c+n] = append(by[c+n], seen{v, epoch})
	}
	for who, list := range by {
		slices.SortFunc(list, func(a, b seen) int { return int(a.version) - int(b.version) })
		for i := 1; i < len(list); i++ {
			if list[i].epoch < list[i-1].epoch {
				w.t.Fatalf("%s: epoch %d in version %d after %d", who, list[i].epoch, list[i].version, list[i-1].epoch)
			}
		}
	}
}

func consensus(n int) Bootstrap { return Bootstrap{Mode: Consensus, N: n} }

// within is a context of simulated time.
func (w *world) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(w.ctx, d)
	context.AfterFunc(w.ctx, cancel)
	return ctx
}

func (h *host) must(owner, subnet string) netip.Prefix {
	h.w.t.Helper()
	var p netip.Prefix
	if subnet != "" {
		p = netip.MustParsePrefix(subnet)
	}
	got, err := h.up().Allocate(h.w.within(30*time.Second), owner, p)
	if err != nil {
		h.w.t.Fatalf("%v: Allocate(%s, %s): %v", h.name, owner, subnet, err)
	}
	return got
}

// settle lets simulated time pass.
func settle(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// edit changes the file of a peer that is down.
func (h *host) edit(change func(*state.Bucket) error) {
	h.w.t.Helper()
	db, err := state.Open(filepath.Join(h.w.dir, h.name.String()), h.cfg.Log)
	if err != nil {
		h.w.t.Fatal(err)
	}
	if err := change(db.Bucket("ipam")); err != nil {
		h.w.t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		h.w.t.Fatal(err)
	}
}

// wipe loses the file of a peer that is down.
func (h *host) wipe() {
	if err := os.Remove(filepath.Join(h.w.dir, h.name.String())); err != nil {
		h.w.t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last, h.owned = nil, nil
}

func (h *host) corrupt(key string) {
	h.edit(func(b *state.Bucket) error {
		if _, ok := b.Get(key); !ok {
			return fmt.Errorf("no key %s", key)
		}
		return b.Put(key, []byte{0xff})
	})
}

// count is how many messages the peer has sent.
func (h *host) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sent
}
