package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/peer/gossip"
	"weave.local/peer/link"
	"weave.local/tests/memnet"
)

const (
	port    = 6783
	message = 9 // kind of what these tests send
)

// cluster is peers on hosts of one network.
type cluster struct {
	t     *testing.T
	net   *memnet.Net
	peers map[peer.Name]*member
	order []peer.Name // as they started
	watch witness
	cuts  map[string]func(from, to peer.Name) bool
	down  map[peer.Name]bool

	mu  sync.Mutex
	got map[string]int // "to from text"
}

type member struct {
	name   peer.Name
	mesh   *link.Mesh
	gossip *gossip.Gossip
	table  *gossip.Table
	stop   func() // and wait for the end
}

// witness counts what memberlist says of suspicions, and deaths. Those that
// concern peers that are really dead are told apart by gone.
type witness struct {
	suspicions, deaths atomic.Int64

	mu   sync.Mutex
	gone map[string]bool // names of peers that are down
	told []string
}

func (w *witness) Enabled(context.Context, slog.Level) bool { return true }
func (w *witness) WithAttrs(a []slog.Attr) slog.Handler     { return view{w, a[0].Value.String()} }
func (w *witness) WithGroup(string) slog.Handler            { return w }
func (w *witness) Handle(context.Context, slog.Record) error {
	return nil
}

// view is what one peer logs.
type view struct {
	*witness
	self string
}

// Handle looks at one line of log.
func (v view) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		switch {
		case a.Key == "says" && strings.Contains(a.Value.String(), "Suspect "):
			v.note(&v.suspicions, r.Time, a.Value.String())
		case r.Message == "member" && a.Key == "alive" && !a.Value.Bool():
			var who string
			r.Attrs(func(b slog.Attr) bool { who += b.Value.String() + " "; return true })
			v.note(&v.deaths, r.Time, "dead "+who)
		}
		return true
	})
	return nil
}

// note counts one, unless who says it or whom it is about is down.
func (v view) note(n *atomic.Int64, at time.Time, text string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for name := range v.gone {
		if v.self == name || strings.Contains(text, name) {
			return
		}
	}
	n.Add(1)
	if len(v.told) < 20 {
		v.told = append(v.told, fmt.Sprintf("%s %s: %s", at.Format("04:05.000"), v.self, text))
	}
}

// simulate runs f in a bubble of its own. Timers that yamux keeps in a pool may
// not go from one bubble to the next: the collector empties it.
func simulate(t *testing.T, f func(c *cluster)) {
	t.Helper()
	runtime.GC()
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{
			t: t, net: memnet.New(time.Millisecond), peers: make(map[peer.Name]*member), got: make(map[string]int),
			cuts: make(map[string]func(from, to peer.Name) bool), down: make(map[peer.Name]bool),
		}
		c.watch.gone = make(map[string]bool)
		defer c.end()
		f(c)
	})
}

func (c *cluster) end() {
	var tasks sync.WaitGroup
	for _, m := range c.peers {
		tasks.Go(m.stop)
	}
	tasks.Wait()
	if c.t.Failed() {
		c.watch.mu.Lock()
		told := strings.Join(c.watch.told, "\n")
		c.watch.mu.Unlock()
		c.t.Log(told)
	}
	<-time.After(10 * time.Minute) // timers of memberlist and yamux
}

func addrOf(n peer.Name) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
}

func nameOf(a netip.Addr) peer.Name {
	b := a.As4()
	return peer.Name(b[1])<<16 | peer.Name(b[2])<<8 | peer.Name(b[3])
}

type option func(*link.Config)

func noDiscovery(cfg *link.Config) { cfg.Discovery = false }

// start runs a peer that dials the targets.
func (c *cluster) start(name peer.Name, targets []peer.Name, options ...option) *member {
	c.t.Helper()
	listener, err := c.net.Listen(netip.AddrPortFrom(addrOf(name), port))
	if err != nil {
		c.t.Fatal(err)
	}
	log := slog.New(&c.watch).With("self", name.String())
	cfg := link.Config{
		Self:      peer.Info{Name: name, UID: peer.UID(rand.Uint64() | 1), NickName: fmt.Sprint("host", uint64(name)), Port: port},
		Bind:      addrOf(name),
		Listener:  listener,
		Discovery: true,
		Log:       log,
		Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			return c.net.Dial(ctx, addrOf(name), to)
		},
	}
	for _, n := range targets {
		cfg.Targets = append(cfg.Targets, addrOf(n).String())
	}
	for _, o := range options {
		o(&cfg)
	}
	mesh, err := link.Listen(c.t.Context(), cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	mesh.Handle(message, func(from peer.Name, b []byte) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.got[fmt.Sprintf("%d %d %s", uint64(name), uint64(from), b)]++
	})
	g, err := gossip.New(gossip.Config{Mesh: mesh, Log: log})
	if err != nil {
		c.t.Fatal(err)
	}
	m := &member{name: name, mesh: mesh, gossip: g, table: g.Table("sim")}
	m.table.Load(map[string][]byte{"name": []byte(name.String())})
	ctx, cancel := context.WithCancel(c.t.Context())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return mesh.Run(ctx) })
	group.Go(func() error { return g.Run(ctx) })
	m.stop = sync.OnceFunc(func() {
		cancel()
		if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			c.t.Error(err)
		}
	})
	c.peers[name] = m
	c.order = append(c.order, name)
	c.set(name, false)
	return m
}

// crash takes peers off the network at once and for good; nobody hears a word.
func (c *cluster) crash(names ...peer.Name) {
	for _, n := range names {
		c.set(n, true)
	}
	c.recut()
	var tasks sync.WaitGroup
	for _, n := range names {
		tasks.Go(c.peers[n].stop)
	}
	tasks.Wait()
	for _, n := range names {
		delete(c.peers, n)
	}
	c.order = slices.DeleteFunc(c.order, func(n peer.Name) bool { return c.down[n] })
}

func (c *cluster) set(name peer.Name, down bool) {
	c.watch.mu.Lock()
	defer c.watch.mu.Unlock()
	if down {
		c.down[name], c.watch.gone[name.String()] = true, true
		return
	}
	if c.down[name] {
		delete(c.down, name)
		delete(c.watch.gone, name.String())
		c.recut()
	}
}

// cut makes ways fail for as long as this name stands for them; nil ends it.
func (c *cluster) cut(what string, blocked func(from, to peer.Name) bool) {
	if blocked == nil {
		delete(c.cuts, what)
	} else {
		c.cuts[what] = blocked
	}
	c.recut()
}

func (c *cluster) recut() {
	cuts, down := slices.Collect(maps.Values(c.cuts)), maps.Clone(c.down)
	c.net.Cut(func(a, b netip.Addr) bool {
		from, to := nameOf(a), nameOf(b)
		return down[from] || down[to] || slices.ContainsFunc(cuts, func(f func(a, b peer.Name) bool) bool { return f(from, to) })
	})
}

// pass lets time go by.
func pass(d time.Duration) { <-time.After(d) }

// until waits for something to become right, and returns how long that took.
func (c *cluster) until(what string, most time.Duration, wrong func() string) time.Duration {
	c.t.Helper()
	for begin := time.Now(); ; pass(100 * time.Millisecond) {
		s := wrong()
		if s == "" {
			return time.Since(begin)
		}
		if time.Since(begin) > most {
			c.t.Fatalf("%s: %s, for %v", what, s, most)
		}
	}
}

// full says what is missing until all peers see all, and nobody else, as
// members, in their tables and by routes, and all know the same links.
func (c *cluster) full() string {
	var digest uint64
	for i, n := range c.order {
		m := c.peers[n]
		s := m.mesh.Topology()
		if got := len(m.gossip.Members()); got != len(c.order) {
			return fmt.Sprintf("%v has %d members of %d", n, got, len(c.order))
		}
		if got := len(s.Reachable()); got != len(c.order)-1 {
			return fmt.Sprintf("%v reaches %d", n, got)
		}
		if i > 0 && s.Digest() != digest {
			return fmt.Sprintf("%v knows other links", n)
		}
		digest = s.Digest()
	}
	for _, n := range c.order {
		if got := len(c.peers[n].table.All()); got < len(c.order) {
			return fmt.Sprintf("%v has %d entries", n, got)
		}
	}
	return ""
}

// everybodyReached sends from each peer to each other, one by one and to all,
// and demands that all of it arrives, nothing twice.
func (c *cluster) everybodyReached() {
	c.t.Helper()
	c.mu.Lock()
	clear(c.got)
	c.mu.Unlock()
	for _, n := range c.order {
		c.peers[n].mesh.Broadcast(message, []byte("all"))
		for _, to := range c.order {
			if to != n {
				if err := c.peers[n].mesh.Send(to, message, []byte("one")); err != nil {
					c.t.Errorf("%v to %v: %v", n, to, err)
				}
			}
		}
	}
	pass(2 * time.Second)
	c.mu.Lock()
	defer c.mu.Unlock()
	if want := 2 * len(c.order) * (len(c.order) - 1); len(c.got) != want {
		c.t.Errorf("%d of %d messages arrived", len(c.got), want)
	}
	for what, n := range c.got {
		if n != 1 {
			c.t.Errorf("%q came %d times", what, n)
		}
	}
}

// calm demands that nobody was suspected or given up since the last call who
// is not down.
func (c *cluster) calm(what string) {
	c.t.Helper()
	s, d := c.watch.suspicions.Swap(0), c.watch.deaths.Swap(0)
	if s != 0 || d != 0 {
		c.t.Errorf("%s: %d suspicions, %d false deaths", what, s, d)
	}
}

// cost is what a stretch of time took, per peer and second of it.
type cost struct {
	bytes uint64
	cpu   time.Duration
	links float64 // per peer, at the end
}

// measure returns what f costs; bytes are those sent over links, headers of TCP
// not among them.
func (c *cluster) measure(f func()) cost {
	sent := make(map[*member]uint64)
	for _, m := range c.peers {
		sent[m] = m.mesh.Counters()["bytes_sent"]
	}
	begin, cpu := time.Now(), processTime()
	f()
	took := time.Since(begin).Seconds() * float64(len(c.peers))
	cpu = processTime() - cpu
	var x cost
	for _, m := range c.peers {
		x.bytes += m.mesh.Counters()["bytes_sent"] - sent[m]
		x.links += float64(len(m.mesh.Neighbours())) / float64(len(c.peers))
	}
	x.bytes = uint64(float64(x.bytes) / took)
	x.cpu = time.Duration(float64(cpu) / took)
	return x
}

func (x cost) String() string {
	return fmt.Sprintf("%d bytes/s, %v CPU/s, %.1f links per peer", x.bytes, x.cpu.Round(10*time.Microsecond), x.links)
}

func processTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
