package link

import (
	"bytes"
	"context"
	"errors"
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

func (n *node) neighbours() []peer.Name {
	var out []peer.Name
	for _, x := range n.Neighbours() {
		out = append(out, x.Name)
	}
	return out
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

// 1 - 2 - 3 - 4
func TestLineRelays(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(4)
	first, last := nodes[0], nodes[3]
	if hop, ok := first.Topology().NextHop(4); !ok || hop != 2 {
		t.Errorf("next hop %v %v", hop, ok)
	}

	if err := first.Send(4, testKind, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	until(t, "message", time.Second, func() bool { return slices.Equal(last.messages(), []string{"1 hello"}) })
	big := bytes.Repeat([]byte("x"), MaxPayload)
	if err := last.Send(1, testKind, big); err != nil {
		t.Fatal(err)
	}
	until(t, "big message", 2*time.Second, func() bool { return slices.Equal(first.messages(), []string{"4 " + string(big)}) })

	if err := first.Send(4, testKind, append(big, 'x')); !errors.Is(err, ErrTooBig) {
		t.Errorf("too big a message: %v", err)
	}
	if err := first.Send(77, testKind, nil); !errors.Is(err, ErrNoRoute) {
		t.Errorf("message to nobody: %v", err)
	}

	for i := range 20 {
		nodes[1].Broadcast(testKind, fmt.Append(nil, "all", i))
	}
	until(t, "broadcasts", time.Second, func() bool {
		return len(first.messages()) == 21 && len(nodes[2].messages()) == 20 && len(last.messages()) == 21
	})
	if n := len(nodes[1].messages()); n != 0 {
		t.Errorf("%d broadcasts came back to their source", n)
	}
	if got := nodes[2].messages()[19]; got != "2 all19" {
		t.Errorf("got %q", got)
	}
}

func TestStreamOverRelays(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(4)
	c, err := nodes[0].Dial(t.Context(), 4)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	s := <-nodes[3].Streams()
	defer func() { _ = s.Close() }()
	if s.From != 1 {
		t.Errorf("from %v", s.From)
	}
	// More than any window, in one direction, then an answer after our end
	// is closed.
	sent := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	go func() {
		_, _ = c.Write(sent)
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(s)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes, %v", len(got), len(sent), err)
	}
	if _, err := s.Write([]byte("thanks")); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	answer, err := io.ReadAll(c)
	if err != nil || string(answer) != "thanks" {
		t.Errorf("answer %q, %v", answer, err)
	}
	if _, err := nodes[0].Dial(t.Context(), 99); !errors.Is(err, ErrNoRoute) {
		t.Errorf("stream to nobody: %v", err)
	}
}

func TestStreamEndsWithItsRelay(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(3)
	c, err := nodes[0].Dial(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	s := <-nodes[2].Streams()
	nodes[1].stop()
	for _, x := range []net.Conn{c, s} {
		_ = x.SetReadDeadline(time.Now().Add(3 * time.Second))
		if _, err := x.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("read after the relay ended: %v", err)
		}
		_ = x.Close()
	}
}

func TestDialHonoursContext(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(2)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := nodes[0].Dial(ctx, 2); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestStreamsThatNobodyTakesAreRefused(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(2)
	for i := range maxStreams {
		c, err := nodes[0].Dial(t.Context(), 2)
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		defer func() { _ = c.Close() }()
	}
	until(t, "refusal", 2*time.Second, func() bool {
		c, err := nodes[0].Dial(t.Context(), 2)
		if err == nil {
			_ = c.Close()
		}
		return errors.Is(err, ErrBusy)
	})
}

// 2 - 1 - 3    and 2, 3 find each other
func TestDiscoveryFromOneTarget(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	nodes := []*node{h.start(1, nil), h.start(2, []peer.Name{1}), h.start(3, []peer.Name{1}), h.start(4, []peer.Name{3})}
	took := until(t, "full mesh", 6*time.Second, meshed(3, nodes...))
	t.Logf("full mesh of four after %v", took)
	ids := make(map[peer.ShortID]peer.Name)
	for _, n := range nodes {
		id := n.Self().ShortID
		if other := ids[id]; id == 0 || other != 0 {
			t.Errorf("short id %d of %v and %v", id, n.Self().Name, other)
		}
		ids[id] = n.Self().Name
		for _, c := range n.Connections() {
			if c.State != Connected {
				t.Errorf("on %v: %+v", n.Self(), c)
			}
		}
	}
	for _, x := range nodes[3].Neighbours() {
		if want := addrOf(x.Name); x.Remote.Addr() != want || x.Local.Addr() != nodes[3].addr {
			t.Errorf("link %v - %v, want to %v", x.Local, x.Remote, want)
		}
		if other := sessionOf(nodes[x.Name-1], 4); x.Session == 0 || other != x.Session {
			t.Errorf("session %x here, %x at the other end", x.Session, other)
		}
	}
}

func sessionOf(n *node, with peer.Name) uint64 {
	for _, x := range n.Neighbours() {
		if x.Name == with {
			return x.Session
		}
	}
	return 0
}

// Peers that dial each other at the same time end up with one link, and with
// the same.
func TestSimultaneousDials(t *testing.T) {
	t.Parallel()
	for range 5 {
		h := newHosts(t)
		all := []peer.Name{1, 2, 3}
		nodes := []*node{h.start(1, all), h.start(2, all), h.start(3, all)}
		until(t, "mesh", 5*time.Second, meshed(2, nodes...))
		before := map[string]uint64{}
		for _, n := range nodes {
			for _, x := range n.Neighbours() {
				before[n.Self().String()+x.String()] = x.Session
			}
		}
		// Whatever dials were still on their way must change nothing.
		hold := time.NewTimer(1500 * time.Millisecond)
		<-hold.C
		for _, n := range nodes {
			if lost := n.Counters()["links_lost"]; lost != 0 {
				t.Errorf("%v lost %d links", n.Self(), lost)
			}
			for _, x := range n.Neighbours() {
				if before[n.Self().String()+x.String()] != x.Session {
					t.Errorf("link %v - %v was replaced", n.Self(), x.Info)
				}
				if other := sessionOf(nodes[x.Name-1], n.Self().Name); other != x.Session {
					t.Errorf("%v and %v keep different links", n.Self(), x.Info)
				}
			}
			if rows := n.Connections(); len(rows) != 2 {
				t.Errorf("%v shows %d connections, itself included?: %+v", n.Self(), len(rows), rows)
			}
		}
		for _, n := range nodes {
			n.stop()
		}
	}
}

// A restarted peer has another UID; its neighbours drop the old link at once
// and take the new one.
func TestRestart(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a, b := h.start(1, nil), h.start(2, []peer.Name{1})
	until(t, "link", 3*time.Second, meshed(1, a, b))
	b.stop()
	until(t, "loss", 300*time.Millisecond, func() bool { return len(a.Neighbours()) == 0 })
	again := h.start(2, []peer.Name{1}, withUID(4711))
	until(t, "link again", 2*time.Second, meshed(1, a, again))
	if got := a.Neighbours()[0].UID; got != 4711 {
		t.Errorf("UID %d", got)
	}
	if r, ok := a.Topology().Record(2); !ok || r.UID != 4711 {
		t.Errorf("record %+v %v", r, ok)
	}
}

// A target that comes up later is found by retrying.
func TestTargetNotUpYet(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, []peer.Name{2})
	until(t, "failure", 2*time.Second, func() bool {
		c := a.Connections()
		return len(c) == 1 && c[0].State == Failed && c[0].Err == "connection refused" && !c[0].Retry.IsZero() &&
			c[0].Addr == netip.AddrPortFrom(addrOf(2), h.port).String()
	})
	b := h.start(2, nil)
	until(t, "link", 3*time.Second, meshed(1, a, b))
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

// 1 - (cable) - 2 - 3: the cable is cut without a word. Both ends notice, and
// so does 3.
func TestSilentCutIsNoticed(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	b := h.start(2, nil, noDiscovery)
	c := h.start(3, []peer.Name{2}, noDiscovery)
	cable := newProxy(t, netip.AddrPortFrom(b.addr, h.port))
	a := h.start(1, nil, noDiscovery)
	if err := a.Connect([]string{cable.addr.String()}); err != nil {
		t.Fatal(err)
	}
	until(t, "mesh", 3*time.Second, func() bool { return len(a.Topology().Reachable()) == 2 && len(c.Topology().Reachable()) == 2 })
	a.Forget([]string{cable.addr.String()})
	// Idle links stay up by hellos alone.
	hold := time.NewTimer(deadAfter + time.Second)
	<-hold.C
	if lost := a.Counters()["links_lost"]; lost != 0 {
		t.Fatalf("an idle link was dropped")
	}
	close(cable.cut)
	took := until(t, "both ends drop the link", deadAfter+2*tickEvery, func() bool {
		return len(a.Neighbours()) == 0 && len(b.Neighbours()) == 1
	})
	until(t, "routes", 300*time.Millisecond, func() bool { return len(c.Topology().Reachable()) == 1 })
	t.Logf("noticed after %v", took)
	if err := a.Send(3, testKind, nil); !errors.Is(err, ErrNoRoute) {
		t.Errorf("send over a dead link: %v", err)
	}
}

// Someone connects and says nothing, or nonsense.
func TestMuteAndStrangeConnections(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil)
	to := netip.AddrPortFrom(a.addr, h.port).String()
	for _, words := range []string{"", "GET / HTTP/1.0\r\n\r\n", "weave\x01\x02", "weave/\x01\x01\x00\x00\x00", "weave/\x01\x01\xff\xff\x01aaaa"} {
		c, err := net.Dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, words)
		defer func() { _ = c.Close() }()
	}
	b := h.start(2, []peer.Name{1})
	until(t, "link beside them", 2*time.Second, meshed(1, a, b))
	c, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetReadDeadline(time.Now().Add(handshakeWait + 2*time.Second))
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("a mute connection is kept: %v", err)
	}
}

func TestOtherVersionIsRefusedInWords(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	l, err := net.Listen("tcp", netip.AddrPortFrom(addrOf(9), h.port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("weave/\x07\x09"))
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	a := h.start(1, []peer.Name{9})
	until(t, "words", 2*time.Second, func() bool {
		c := a.Connections()
		return len(c) == 1 && strings.Contains(c[0].Err, "versions 7 to 9, this one 1 to 1")
	})
}

// Two live peers with one name: the second is refused by whoever knows the
// first, and by the first itself.
func TestNameCollision(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a, b := h.start(1, nil), h.start(2, []peer.Name{1})
	until(t, "link", 3*time.Second, meshed(1, a, b))
	twin := h.start(2, []peer.Name{1, 2}, withUID(99), at(addrOf(5)))
	until(t, "refusals", 3*time.Second, func() bool {
		n := 0
		for _, c := range twin.Connections() {
			if c.State == Failed && strings.Contains(c.Err, "--name") {
				n++
			}
		}
		return n == 2
	})
	if got := a.Neighbours(); len(got) != 1 || got[0].UID != b.Self().UID {
		t.Errorf("neighbours %+v", got)
	}
}

func TestConnLimit(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil, limit(1))
	b := h.start(2, []peer.Name{1}, noDiscovery)
	until(t, "link", 3*time.Second, meshed(1, a, b))
	c := h.start(3, []peer.Name{1}, noDiscovery)
	until(t, "refusal", 3*time.Second, func() bool {
		rows := c.Connections()
		return len(rows) == 1 && strings.Contains(rows[0].Err, "limit of 1 links")
	})
}

func TestShortIDsAreMadeUnique(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil, shortID(7))
	b := h.start(2, []peer.Name{1}, shortID(7))
	c := h.start(3, []peer.Name{1}, shortID(7))
	until(t, "unique ids", 5*time.Second, func() bool {
		return b.Self().ShortID != 7 && c.Self().ShortID != 7 && b.Self().ShortID != c.Self().ShortID
	})
	if a.Self().ShortID != 7 {
		t.Error("the lowest name lost its id")
	}
	until(t, "announced", time.Second, func() bool {
		for _, n := range a.Neighbours() {
			if n.ShortID == 7 {
				return false
			}
		}
		return true
	})
}

func TestTargets(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil)
	err := a.Connect([]string{"127.0.0.2", "no-such-host.invalid", "127.0.0.3:0", "127.0.0.3"})
	if err == nil || !strings.Contains(err.Error(), "no-such-host.invalid") || !strings.Contains(err.Error(), "127.0.0.3:0") {
		t.Errorf("error %v does not name what is wrong", err)
	}
	if got := a.Targets(); !slices.Equal(got, []string{"127.0.0.2", "127.0.0.3"}) {
		t.Errorf("targets %v", got)
	}
	a.Forget([]string{"127.0.0.3"})
	if err := a.ReplaceTargets([]string{"127.0.0.4", "127.0.0.5:99"}); err != nil {
		t.Error(err)
	}
	if got := a.Targets(); !slices.Equal(got, []string{"127.0.0.4", "127.0.0.5:99"}) {
		t.Errorf("targets %v", got)
	}
	b := h.start(2, nil, noDiscovery)
	if err := a.Connect([]string{"127.0.0.2"}); err != nil {
		t.Error(err)
	}
	until(t, "link", time.Second, meshed(1, a, b))
}

func TestTakenPort(t *testing.T) {
	h := newHosts(t)
	a := h.start(1, nil)
	_, err := Listen(t.Context(), Config{Self: a.Self(), Bind: a.addr, Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("got %v", err)
	}
}

// After Run nothing is left of a mesh. Not parallel: it counts goroutines.
func TestNothingIsLeft(t *testing.T) {
	before := stacks()
	h := newHosts(t)
	nodes := h.line(3)
	c, err := nodes[0].Dial(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	s := <-nodes[2].Streams()
	_, _ = nodes[2].Dial(t.Context(), 1) // never taken
	_, _ = io.WriteString(c, "x")
	for _, n := range nodes {
		n.stop()
	}
	if _, err := io.ReadAll(s); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Log("read:", err)
	}
	until(t, "goroutines gone:\n"+stacks(), 2*time.Second, func() bool {
		return strings.Count(stacks(), "goroutine ") <= strings.Count(before, "goroutine ")
	})
	if err := nodes[0].Send(3, testKind, nil); !errors.Is(err, ErrNoRoute) {
		t.Errorf("send after the end: %v", err)
	}
	if err := nodes[0].Connect([]string{"localhost"}); err != nil {
		t.Log(err)
	}
	if err := nodes[0].Run(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("second run: %v", err)
	}
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}
