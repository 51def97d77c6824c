package gossip

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/peer/link"
)

const helloKind = 9 // of the messages of these tests

// world is a network of peers on loopback addresses of its own, in which only
// those may link that the test lets.
type world struct {
	t     *testing.T
	net   byte // second byte of the addresses
	port  uint16
	nodes []*node // index 0 is peer 1
	watch witness

	mu  sync.Mutex
	got map[string]int // "to from text"
}

// witness counts what memberlist says of suspicions, and deaths.
type witness struct{ suspicions, deaths atomic.Int64 }

func (w *witness) Enabled(context.Context, slog.Level) bool { return true }
func (w *witness) WithAttrs([]slog.Attr) slog.Handler       { return w }
func (w *witness) WithGroup(string) slog.Handler            { return w }
func (w *witness) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		switch {
		case a.Key == "says" && strings.Contains(strings.ToLower(a.Value.String()), "suspect"):
			w.suspicions.Add(1)
		case r.Message == "member" && a.Key == "alive" && !a.Value.Bool():
			w.deaths.Add(1)
		}
		return true
	})
	return nil
}

func newWorld(t *testing.T, network byte) *world {
	t.Helper()
	l, err := net.Listen("tcp", netip.AddrFrom4([4]byte{127, network, 0, 1}).String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return &world{t: t, net: network, port: uint16(l.Addr().(*net.TCPAddr).Port), got: make(map[string]int)}
}

// at is where a peer listens; with another place than 0, somewhere else.
func (w *world) at(place byte, name int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, w.net, place, byte(name)}), w.port)
}

// start runs the next peer, which dials the targets and nobody else.
func (w *world) start(targets ...netip.AddrPort) *node {
	w.t.Helper()
	name := peer.Name(len(w.nodes) + 1)
	cfg := link.Config{
		Self: peer.Info{Name: name, UID: peer.UID(time.Now().UnixNano()), NickName: fmt.Sprint("p", uint64(name)), Port: w.port},
		Bind: w.at(0, int(name)).Addr(), Log: slog.New(&w.watch),
	}
	for _, a := range targets {
		cfg.Targets = append(cfg.Targets, a.String())
	}
	mesh, err := link.Listen(w.t.Context(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	mesh.Handle(helloKind, func(from peer.Name, b []byte) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.got[fmt.Sprintf("%d %d %s", uint64(name), uint64(from), b)]++
	})
	g, err := New(Config{Mesh: mesh, Log: cfg.Log})
	if err != nil {
		w.t.Fatal(err)
	}
	n := &node{Gossip: g, mesh: mesh, table: g.Table(tab)}
	n.table.Load(one("name", cfg.Self.NickName))
	ctx, cancel := context.WithCancel(w.t.Context())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return mesh.Run(ctx) })
	group.Go(func() error { return g.Run(ctx) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			w.t.Error(err)
		}
	})
	w.t.Cleanup(n.stop)
	w.nodes = append(w.nodes, n)
	return n
}

// everybodyReached sends from each peer to each other, one by one and to all,
// and waits until all has arrived, nothing twice. Messages are best effort and
// a link may come up or, on a busy machine, go down meanwhile: it tries again.
func (w *world) everybodyReached() {
	w.t.Helper()
	want := 2 * len(w.nodes) * (len(w.nodes) - 1)
	for try := 1; ; try++ {
		eventually(w.t, 20*time.Second, func() string {
			for _, n := range w.nodes[1:] {
				if n.mesh.Topology().Digest() != w.nodes[0].mesh.Topology().Digest() {
					return "peers disagree about links"
				}
			}
			return ""
		})
		missing := w.hello(fmt.Sprint(try), want)
		w.mu.Lock()
		for what, n := range w.got {
			if n != 1 {
				w.t.Errorf("%q came %d times", what, n)
			}
		}
		clear(w.got)
		w.mu.Unlock()
		if missing == 0 {
			return
		}
		if try == 4 {
			w.t.Fatalf("%d of %d messages did not arrive", missing, want)
		}
		w.t.Logf("%d of %d messages did not arrive, once more", missing, want)
	}
}

// hello has all greet all and returns how many of the messages do not arrive.
func (w *world) hello(text string, want int) int {
	for _, n := range w.nodes {
		n.mesh.Broadcast(helloKind, []byte("all "+text))
		for _, to := range w.nodes {
			if to != n {
				_ = n.mesh.Send(to.self, helloKind, []byte("one "+text)) // seen by what arrives
			}
		}
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for begin := time.Now(); ; <-tick.C {
		w.mu.Lock()
		n := len(w.got)
		w.mu.Unlock()
		if n >= want || time.Since(begin) > 5*time.Second {
			return want - n
		}
	}
}

// bytes is how much all peers together have sent.
func (w *world) bytes() (n uint64) {
	for _, x := range w.nodes {
		n += x.mesh.Counters()["bytes_sent"]
	}
	return n
}

// stalls measures for how long this process gets no processor. The function
// returned tells the longest time and begins anew.
func stalls(t *testing.T) func() time.Duration {
	t.Helper()
	var longest atomic.Int64
	done := make(chan struct{})
	var tasks sync.WaitGroup
	t.Cleanup(func() { close(done); tasks.Wait() })
	tasks.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for last := time.Now(); ; {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			now := time.Now()
			longest.Store(max(longest.Load(), int64(now.Sub(last))))
			last = now
		}
	})
	return func() time.Duration { return time.Duration(longest.Swap(0)) }
}

// calm waits while nothing is supposed to happen in these worlds, and demands
// that nobody was suspected. Where the machine itself stood still for as long
// as makes a peer seem silent, a suspicion proves nothing: it tries again.
func calm(t *testing.T, d time.Duration, worlds ...*world) {
	t.Helper()
	stalled := stalls(t)
	for try := 1; ; try++ {
		for _, w := range worlds {
			w.watch.suspicions.Store(0)
		}
		_ = stalled()
		pause(t, d)
		stall, suspicions := stalled(), int64(0)
		for _, w := range worlds {
			suspicions += w.watch.suspicions.Load()
			if n := w.watch.deaths.Load(); n > 0 {
				t.Errorf("%d deaths at rest among %d peers", n, len(w.nodes))
			}
		}
		if suspicions == 0 {
			return
		}
		if stall < 300*time.Millisecond {
			t.Errorf("%d suspicions at rest", suspicions)
			return
		}
		t.Logf("%d suspicions, but the machine stood still for %v", suspicions, stall)
		if try == 3 {
			return
		}
	}
}

// pause waits while nothing is supposed to happen.
func pause(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// cable forwards connections to an address. Each direction may be cut: what is
// sent meanwhile waits, as it does in TCP.
type cable struct {
	at netip.AddrPort

	mu   sync.Mutex
	open [2]chan struct{} // closed while the direction is not cut: from and to who dials
}

const (
	fromDialler = iota
	toDialler
)

func (w *world) cable(to netip.AddrPort) *cable {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	c := &cable{at: l.Addr().(*net.TCPAddr).AddrPort()}
	for i := range c.open {
		c.open[i] = make(chan struct{})
		close(c.open[i])
	}
	var tasks sync.WaitGroup
	var conns []net.Conn // of the goroutine below
	ended := make(chan struct{})
	w.t.Cleanup(func() {
		_ = l.Close()
		<-ended
		c.set(true, fromDialler, toDialler)
		for _, conn := range conns {
			_ = conn.Close()
		}
		tasks.Wait()
	})
	go func() {
		defer close(ended)
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to.String())
			if err != nil {
				_ = in.Close()
				continue
			}
			conns = append(conns, in, out)
			tasks.Go(func() { c.copy(out, in, fromDialler) })
			tasks.Go(func() { c.copy(in, out, toDialler) })
		}
	}()
	return c
}

// set opens or cuts directions.
func (c *cable) set(open bool, directions ...int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range directions {
		select {
		case <-c.open[d]:
			if !open {
				c.open[d] = make(chan struct{})
			}
		default:
			if open {
				close(c.open[d])
			}
		}
	}
}

func (c *cable) gate(d int) chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open[d]
}

func (c *cable) copy(dst, src net.Conn, direction int) {
	b := make([]byte, 64<<10)
	for {
		n, err := src.Read(b)
		<-c.gate(direction)
		if n > 0 {
			if _, e := dst.Write(b[:n]); e != nil {
				err = e
			}
		}
		if errors.Is(err, io.EOF) {
			_ = dst.(*net.TCPConn).CloseWrite()
			return
		}
		if err != nil {
			_ = dst.Close()
			_ = src.Close()
			return
		}
	}
}
