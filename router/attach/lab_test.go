package attach

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"weave.local/ipam"
	"weave.local/peer/state"
	"weave.local/router/firewall"
	"weave.local/router/netdev"
	"weave.local/router/netdev/netdevtest"
	"weave.local/router/overlay"
)

func TestMain(m *testing.M) { netdevtest.Main(m) }

const (
	testBridge = "weave"
	testMTU    = 1400
)

func p(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func ip(s string) []Request { return []Request{{IP: p(s)}} }

// ports stands for the router: it knows the ports that are set.
type ports struct {
	mu   sync.Mutex
	set  map[int]overlay.Port
	fail error // answer of the next SetPort calls
}

func (p *ports) setPort(port overlay.Port) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail != nil {
		return p.fail
	}
	p.set[port.IfIndex] = port
	return nil
}

func (p *ports) removePort(index int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.set, index)
	return nil
}

func (p *ports) failWith(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fail = err
}

func (p *ports) get(index int) (overlay.Port, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	port, ok := p.set[index]
	return port, ok
}

func (p *ports) len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.set)
}

// host is one daemon's worth of what attach works with.
type host struct {
	*Manager
	t     *testing.T
	ports *ports
	store *state.Bucket
	alloc *ipam.Allocator
	grace time.Duration
}

// newHost makes the bridge and a reconciled Manager; all of it goes with the
// test.
func newHost(t *testing.T) *host {
	t.Helper()
	netdevtest.Need(t)
	db, err := state.Open(filepath.Join(t.TempDir(), "weave.db"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	h := &host{t: t, store: db.Bucket("attachments"), grace: time.Hour}
	h.restart()
	t.Cleanup(func() {
		if err := h.RemoveAll(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return h
}

// restart puts a new Manager over what the old one left.
func (h *host) restart() {
	h.t.Helper()
	if err := netdev.EnsureBridge(testBridge, [6]byte{2, 0, 0, 0, 0, 1}, testMTU); err != nil {
		h.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(h.t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	fw, err := firewall.New(firewall.Config{Bridge: testBridge, Log: log})
	if err != nil {
		h.t.Fatal(err)
	}
	h.ports = &ports{set: make(map[int]overlay.Port)}
	h.Manager, err = New(Config{
		Bridge: testBridge, MTU: testMTU, Alloc: h.alloc, Store: h.store,
		SetPort: h.ports.setPort, RemovePort: h.ports.removePort,
		Firewall: fw, Grace: h.grace, Log: log,
	})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := h.Reconcile(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
}

// run runs the Manager until the returned function is called.
func (h *host) run() (stop func()) {
	ctx, cancel := context.WithCancel(h.t.Context())
	ended := make(chan error)
	go func() { ended <- h.Run(ctx) }()
	return func() {
		cancel()
		if err := <-ended; err != nil {
			h.t.Error(err)
		}
	}
}

func (h *host) attach(id, ns string, reqs []Request) Attachment {
	h.t.Helper()
	if _, err := h.Attach(h.t.Context(), Target{ID: id, NetNS: ns}, reqs); err != nil {
		h.t.Fatal(err)
	}
	a, ok := h.find(id)
	if !ok {
		h.t.Fatalf("%s is not listed", id)
	}
	return a
}

func (h *host) find(id string) (Attachment, bool) {
	list := h.List()
	i := slices.IndexFunc(list, func(a Attachment) bool { return a.ID == id })
	if i < 0 {
		return Attachment{}, false
	}
	return list[i], true
}

// wantAddrs compares what is listed, announced and really there.
func (h *host) wantAddrs(id, ns, dev string, want ...string) {
	h.t.Helper()
	var addrs []netip.Prefix
	for _, w := range want {
		addrs = append(addrs, p(w))
	}
	a, _ := h.find(id)
	if !slices.Equal(a.Addrs, addrs) {
		h.t.Errorf("%s is listed with %v, want %v", id, a.Addrs, addrs)
	}
	if port, ok := h.ports.get(a.IfIndex); ok != (len(want) > 0) || ok && port.MAC != a.MAC || !slices.Equal(port.Addrs, addrs) {
		h.t.Errorf("%s is announced as %+v (%v), want %v", id, port, ok, addrs)
	}
	var real []netip.Prefix
	look := func() (err error) { real, err = netdev.Addrs(dev); return err }
	var err error
	if ns == "" {
		err = look()
	} else {
		err = netdev.Do(ns, look)
	}
	byText := func(a, b netip.Prefix) int { return a.Compare(b) }
	slices.SortFunc(real, byText)
	slices.SortFunc(addrs, byText)
	if err != nil || !slices.Equal(real, addrs) {
		h.t.Errorf("%s has %v on %s, want %v (%v)", id, real, dev, addrs, err)
	}
}

// eventually waits for something that happens by itself.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// reach opens a TCP connection from one namespace to an address in another, ""
// for the host, and returns the address that the server sees it come from.
func reach(from, to, addr string) (seen netip.Addr, err error) {
	const patience = 2 * time.Second
	in := func(ns string, f func() error) error {
		if ns == "" {
			return f()
		}
		return netdev.Do(ns, f)
	}
	var l *net.TCPListener
	err = in(to, func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 0)))
		return err
	})
	if err != nil {
		return seen, err
	}
	defer func() { _ = l.Close() }()
	err = in(from, func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), patience)
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err != nil {
		return seen, err
	}
	if err := l.SetDeadline(time.Now().Add(patience)); err != nil {
		return seen, err
	}
	c, err := l.AcceptTCP()
	if err != nil {
		return seen, err
	}
	defer func() { _ = c.Close() }()
	remote, err := netip.ParseAddrPort(c.RemoteAddr().String())
	return remote.Addr(), err
}

func mustReach(t *testing.T, from, to, addr, seen string) {
	t.Helper()
	got, err := reach(from, to, addr)
	if err != nil || got != netip.MustParseAddr(seen) {
		t.Errorf("connection to %s comes from %s (%v), want %s", addr, got, err, seen)
	}
}

func mustNotReach(t *testing.T, from, to, addr string) {
	t.Helper()
	if got, err := reach(from, to, addr); err == nil {
		t.Errorf("connection to %s is made, from %s, and must not be", addr, got)
	}
}

func ip2(s string) []netip.Prefix { return []netip.Prefix{p(s)} }
