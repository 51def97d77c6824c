package link

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"weave.local/peer"
)

// node is a mesh under test on a loopback address of its own, so that all use
// the same port as they would on hosts.
type node struct {
	*Mesh
	t    *testing.T
	addr netip.Addr
	stop func() // ends Run and waits for it

	mu  sync.Mutex
	got []string // "from kind payload"
}

const testKind = 9

// hosts gives each test loopback addresses and a port nobody else uses.
type hosts struct {
	t    *testing.T
	port uint16
}

func newHosts(t *testing.T) *hosts {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return &hosts{t: t, port: addrPort(l.Addr()).Port()}
}

func addrOf(name peer.Name) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(name)}) }

type option func(*Config)

func withUID(uid peer.UID) option   { return func(c *Config) { c.Self.UID = uid } }
func noDiscovery(c *Config)         { c.Discovery = false }
func limit(n int) option            { return func(c *Config) { c.ConnLimit = n } }
func at(addr netip.Addr) option     { return func(c *Config) { c.Bind = addr } }
func shortID(i peer.ShortID) option { return func(c *Config) { c.Self.ShortID = i } }

// start runs a peer with the given targets.
func (h *hosts) start(name peer.Name, targets []peer.Name, opts ...option) *node {
	h.t.Helper()
	cfg := Config{
		Self: peer.Info{
			Name: name, UID: peer.UID(name)<<32 | peer.UID(time.Now().Nanosecond()) | 1,
			NickName: fmt.Sprintf("n%d", name), Port: h.port,
		},
		Bind:      addrOf(name),
		Discovery: true,
		Log:       slog.New(slog.NewTextHandler(testWriter{h.t}, &slog.HandlerOptions{Level: slog.LevelInfo})).With("on", uint64(name)),
	}
	for _, t := range targets {
		cfg.Targets = append(cfg.Targets, addrOf(t).String())
	}
	for _, o := range opts {
		o(&cfg)
	}
	m, err := Listen(h.t.Context(), cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	n := &node{Mesh: m, t: h.t, addr: cfg.Bind}
	m.Handle(testKind, func(from peer.Name, b []byte) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.got = append(n.got, fmt.Sprintf("%d %s", from, b))
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			h.t.Errorf("run of %d: %v", name, err)
		}
	})
	h.t.Cleanup(n.stop)
	until(h.t, "run", time.Second, func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.running
	})
	return n
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// until waits for a condition that follows from changes at any of the nodes.
func until(t *testing.T, what string, atMost time.Duration, cond func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		<-tick.C
		if time.Since(begin) > atMost {
			t.Fatalf("%s: not within %v", what, atMost)
		}
	}
	return time.Since(begin)
}

func (n *node) messages() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.got)
}

// meshed says whether all peers see each other with the given number of links
// each.
func meshed(links int, nodes ...*node) func() bool {
	return func() bool {
		for _, n := range nodes {
			if len(n.Neighbours()) != links || len(n.Topology().Reachable()) != len(nodes)-1 {
				return false
			}
		}
		return true
	}
}

// line starts peers 1 - 2 - ... - n, each linked to the next only.
func (h *hosts) line(n int) []*node {
	h.t.Helper()
	var nodes []*node
	for i := 1; i <= n; i++ {
		var targets []peer.Name
		if i > 1 {
			targets = []peer.Name{peer.Name(i - 1)}
		}
		nodes = append(nodes, h.start(peer.Name(i), targets, noDiscovery))
	}
	until(h.t, "line", 10*time.Second, func() bool {
		for _, x := range nodes {
			if len(x.Topology().Reachable()) != n-1 {
				return false
			}
		}
		return true
	})
	return nodes
}

// proxy forwards TCP connections until it is told to swallow everything
// silently, as a cut cable does.
type proxy struct {
	addr netip.AddrPort
	cut  chan struct{}
}

func newProxy(t *testing.T, to netip.AddrPort) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: addrPort(l.Addr()), cut: make(chan struct{})}
	var tasks sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); tasks.Wait() })
	tasks.Go(func() {
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
			t.Cleanup(func() { _ = in.Close(); _ = out.Close() })
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				tasks.Go(func() { p.copy(pair[0], pair[1]) })
			}
		}
	})
	return p
}

func (p *proxy) copy(dst, src net.Conn) {
	b := make([]byte, 64<<10)
	for {
		n, err := src.Read(b)
		select {
		case <-p.cut:
			_, _ = io.Copy(io.Discard, src) // until the test ends
			return
		default:
		}
		if err != nil {
			_ = dst.Close()
			return
		}
		if _, err := dst.Write(b[:n]); err != nil {
			return
		}
	}
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}
