package link

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/peer/handshake"
)

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

// A machine copied while it runs has the name and the UID of the other, too, and
// is no connection to ourselves: both ends say what is wrong, it is tried less
// and less, and nobody else is disturbed.
func TestCopyOfARunningPeer(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a, b := h.start(1, nil, withUID(50)), h.start(2, []peer.Name{1})
	until(t, "link", 3*time.Second, meshed(1, a, b))
	twin := h.start(1, []peer.Name{1, 6}, withUID(50), at(addrOf(6)))
	told := func(n *node) bool {
		return slices.ContainsFunc(n.Connections(), func(c Connection) bool {
			return c.State == Failed && strings.Contains(c.Err, "both ends have the name") && strings.Contains(c.Err, "--name")
		})
	}
	until(t, "both told", 3*time.Second, func() bool { return told(a) && told(twin) })
	if rows := twin.Connections(); len(rows) != 1 {
		t.Errorf("the way to ourselves is shown: %+v", rows)
	}
	if n := a.Counters()["links_established"]; n != 1 || len(b.Neighbours()) != 1 {
		t.Errorf("%d links made", n)
	}
}

// Two live peers with one name, far from each other: both say so, and the
// records they supersede become rare.
func TestTwinsFarApart(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	c := h.start(3, nil, noDiscovery)
	d := h.start(4, []peer.Name{3}, noDiscovery)
	a := h.start(1, []peer.Name{3}, noDiscovery, withUID(50))
	until(t, "mesh", 3*time.Second, func() bool { return len(d.Topology().Reachable()) == 2 })
	other := h.start(1, []peer.Name{4}, noDiscovery, withUID(99), at(addrOf(6)))
	told := func(n *node) bool {
		return slices.ContainsFunc(n.Connections(), func(c Connection) bool {
			return c.State == Failed && c.Peer.Name == 1 && strings.Contains(c.Err, "--name")
		})
	}
	until(t, "both told", 30*time.Second, func() bool { return told(a) && told(other) })
	if told(c) || told(d) {
		t.Error("others are told of a twin, too")
	}
	if len(c.Neighbours()) != 2 || len(d.Neighbours()) != 2 {
		t.Error("links of others are disturbed")
	}
	var w twin
	w.met(peer.Info{Name: 1}, time.Unix(1000, 0))
	for range 10 {
		w.answered++
	}
	if got := w.wait(); got != jumpMost {
		t.Errorf("superseded again after %v", got)
	}
	if w.met(peer.Info{Name: 1}, time.Unix(2000, 0)); w.wait() != jumpEvery {
		t.Errorf("a later one is superseded only after %v", w.wait())
	}
}

func TestConnLimit(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil, limit(1))
	b := h.start(2, []peer.Name{1}, noDiscovery)
	until(t, "link", 3*time.Second, meshed(1, a, b))
	// Whoever has no other way gets in, and has to go when there is one.
	c := h.start(3, []peer.Name{1}, noDiscovery)
	links := func(n *node, want int) bool {
		return len(n.Neighbours()) == want && len(n.Topology().Reachable()) == 2
	}
	until(t, "guest", 3*time.Second, func() bool { return links(a, 2) && links(b, 1) && links(c, 1) })
	if err := c.Connect([]string{addrOf(2).String()}); err != nil {
		t.Fatal(err)
	}
	until(t, "one has to go", 6*time.Second, func() bool { return links(a, 1) })
	until(t, "refusal", 6*time.Second, func() bool {
		for _, n := range []*node{b, c} {
			for _, r := range n.Connections() {
				if r.State == Failed && strings.Contains(r.Err, "refused by the other end: limit of 1 links") {
					return len(a.Topology().Reachable()) == 2
				}
			}
		}
		return false
	})
}

// A peer of another cluster is refused with the reason at both ends, seldom
// tries again, and is taken when somebody says so.
func TestStranger(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil)
	b := h.start(2, []peer.Name{1})
	c := h.start(3, []peer.Name{1})
	until(t, "mesh", 3*time.Second, meshed(2, a, b, c))
	a.Refuse(3, "it belongs elsewhere")
	b.Refuse(3, "it belongs elsewhere")
	until(t, "parted", 3*time.Second, func() bool { return meshed(1, a, b)() && meshed(0, c)() })
	shown := func(n *node) func() bool {
		return func() bool {
			return slices.ContainsFunc(n.Connections(), func(r Connection) bool {
				return r.State == Failed && strings.Contains(r.Err, "it belongs elsewhere")
			})
		}
	}
	until(t, "reason there", 3*time.Second, shown(c))
	until(t, "reason here", 3*time.Second, shown(a))
	made := c.Counters()["links_established"]
	until(t, "another attempt", 5*time.Second, func() bool {
		rows := c.Connections()
		return len(rows) > 0 && strings.Contains(rows[0].Err, "refused by the other end")
	})
	if n := c.Counters()["links_established"]; n != made {
		t.Errorf("%d links were made after the refusal", n-made)
	}
	if err := errors.Join(a.Connect([]string{addrOf(3).String()}), b.Connect([]string{addrOf(3).String()})); err != nil {
		t.Error(err)
	}
	until(t, "mesh again", 3*time.Second, meshed(2, a, b, c))
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

// A name is resolved again at each try: the host behind it may have moved. One
// that does not resolve keeps being tried.
func TestNamesAreResolvedAgain(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	var mu sync.Mutex
	tries := 0
	a := h.start(1, nil, noDiscovery, func(c *Config) { c.Targets = []string{"host.example"} }, func(c *Config) {
		c.resolve = func(_ context.Context, host string, port uint16) ([]netip.AddrPort, error) {
			mu.Lock()
			defer mu.Unlock()
			tries++
			switch {
			case host != "host.example":
				return nil, errors.New("asked for another name")
			case tries == 1:
				return nil, errors.New("no such host")
			case tries == 2:
				return []netip.AddrPort{netip.AddrPortFrom(addrOf(2), port)}, nil // nobody is there
			}
			return []netip.AddrPort{netip.AddrPortFrom(addrOf(3), port)}, nil
		}
	})
	b := h.start(3, nil, noDiscovery)
	until(t, "link", 8*time.Second, meshed(1, a, b))
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

// stranger shakes hands with n by itself. Its welcome stands for what it
// thinks of the link.
func stranger(t *testing.T, n *node, self peer.Info) (net.Conn, *handshake.Other, error) {
	t.Helper()
	c, err := net.Dial("tcp", netip.AddrPortFrom(n.addr, n.Self().Port).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(handshakeWait))
	h, err := handshake.Greet(c, handshake.Self{Info: self, Nonce: rand.Uint64()}, true)
	if err != nil {
		t.Fatal(err)
	}
	return c, h, h.Conclude(func() *handshake.Refusal { return nil })
}

// Of two links that one peer opens, the chair keeps the first.
func TestChairKeepsTheFirstLink(t *testing.T) {
	t.Parallel()
	a := newHosts(t).start(1, nil, withUID(10))
	self := peer.Info{Name: 2, UID: 20, ShortID: 3, Port: 1}
	_, first, err := stranger(t, a, self)
	if err != nil || first.Chair {
		t.Fatalf("%+v %v", first, err)
	}
	_, _, err = stranger(t, a, self)
	if r := (*handshake.Refusal)(nil); !errors.As(err, &r) || r.Code != handshake.RefuseDuplicate || !r.Remote {
		t.Fatalf("second link: %v", err)
	}
	if got := sessionOf(a, 2); got != first.Session {
		t.Errorf("session %x, want that of the first link, %x", got, first.Session)
	}
}

// The other end takes the chair's word: it gives up the link that the chair no
// longer has.
func TestChairReplacesALink(t *testing.T) {
	t.Parallel()
	a := newHosts(t).start(1, nil, withUID(10))
	self := peer.Info{Name: 2, UID: 5, ShortID: 3, Port: 1}
	old, first, err := stranger(t, a, self)
	if err != nil || !first.Chair {
		t.Fatalf("%+v %v", first, err)
	}
	until(t, "first link", time.Second, func() bool { return sessionOf(a, 2) == first.Session })
	_, second, err := stranger(t, a, self)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "second link", time.Second, func() bool { return sessionOf(a, 2) == second.Session })
	if _, err := io.Copy(io.Discard, old); err != nil {
		t.Errorf("the old connection is not closed: %v", err)
	}
}
