package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/peer/link"
)

// node is a peer of a test, on an address of the loopback network.
type node struct {
	*Gossip
	mesh  *link.Mesh
	table *Table
	state *number
	stop  func() // returns when all has ended
}

// number is a state of which the largest wins.
type number struct {
	mu     sync.Mutex
	n      uint64
	gossip *Gossip
	merged map[peer.Name]int
}

func (n *number) Digest() uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.n
}

func (n *number) Encode() []byte { return binary.BigEndian.AppendUint64(nil, n.Digest()) }

func (n *number) Merge(from peer.Name, b []byte) error {
	if len(b) != 8 {
		return fmt.Errorf("number of %d bytes", len(b))
	}
	n.raise(binary.BigEndian.Uint64(b))
	n.mu.Lock()
	defer n.mu.Unlock()
	n.merged[from]++
	return nil
}

// raise announces under its lock, as users may.
func (n *number) raise(v uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if v > n.n {
		n.n = v
		n.gossip.Announce("number")
	}
}

// start runs a peer; it ends with the test at the latest.
func start(t *testing.T, name peer.Name, entries map[string][]byte, targets ...*node) *node {
	t.Helper()
	return startLogged(t, slog.New(slog.DiscardHandler), name, entries, targets...)
}

func startLogged(t *testing.T, log *slog.Logger, name peer.Name, entries map[string][]byte, targets ...*node) *node {
	t.Helper()
	ip := netip.AddrFrom4([4]byte{127, 0, 0, byte(name)})
	cfg := link.Config{
		Self: peer.Info{Name: name, UID: peer.UID(time.Now().UnixNano()), NickName: fmt.Sprint("p", uint64(name))},
		Bind: ip, Log: log,
	}
	for _, n := range targets {
		self := n.mesh.Self()
		cfg.Targets = append(cfg.Targets, fmt.Sprintf("127.0.0.%d:%d", uint64(self.Name), self.Port))
	}
	mesh, err := link.Listen(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	g, err := New(Config{Mesh: mesh, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Gossip: g, mesh: mesh, table: g.Table(tab)}
	n.state = &number{gossip: g, merged: make(map[peer.Name]int)}
	g.Register("number", n.state)
	n.table.Load(entries)
	ctx, cancel := context.WithCancel(t.Context())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return mesh.Run(ctx) })
	group.Go(func() error { return g.Run(ctx) })
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Cleanup(n.stop)
	return n
}

// eventually waits until f returns "", which tells what is missing.
func eventually(t *testing.T, within time.Duration, f func() string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(within)
	defer limit.Stop()
	for {
		missing := f()
		if missing == "" {
			return
		}
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("after %s: %s", within, missing)
		}
	}
}

func (n *node) text() string {
	var out []string
	for _, e := range n.table.All() {
		out = append(out, fmt.Sprintf("%d %s=%s", uint64(e.Origin), e.Key, e.Value))
	}
	return strings.Join(out, ", ")
}

func (n *node) holds(want string) func() string {
	return func() string {
		if got := n.text(); got != want {
			return fmt.Sprintf("peer %d holds %q, want %q", uint64(n.self), got, want)
		}
		return ""
	}
}

// agree waits until all have the same root, and each other as members.
func agree(t *testing.T, within time.Duration, nodes ...*node) {
	t.Helper()
	var want []peer.Name
	for _, n := range nodes {
		want = append(want, n.self)
	}
	eventually(t, within, func() string {
		for _, n := range nodes {
			strangers, members := n.strangers()
			if len(strangers) > 0 || len(members) != len(nodes)-1 {
				return fmt.Sprintf("peer %d has members %v, and %v not", uint64(n.self), members, strangers)
			}
			if got := n.Members(); !reflect.DeepEqual(got, want) {
				return fmt.Sprintf("peer %d has members %v, want %v", uint64(n.self), got, want)
			}
			if n.root() != nodes[0].root() {
				return "roots differ"
			}
		}
		return ""
	})
}

func one(key, value string) map[string][]byte { return map[string][]byte{key: []byte(value)} }

// 1 - 2 - 3 - 4
func TestLine(t *testing.T) {
	t.Parallel()
	p1 := start(t, 1, one("a", "1"))
	p2 := start(t, 2, one("a", "2"), p1)
	p3 := start(t, 3, nil, p2)
	p4 := start(t, 4, one("b", "4"), p3)
	agree(t, 15*time.Second, p1, p2, p3, p4)
	for _, n := range []*node{p1, p2, p3, p4} {
		eventually(t, 5*time.Second, n.holds("1 a=1, 2 a=2, 4 b=4"))
	}
	if len(p1.mesh.Neighbours()) != 1 || len(p4.mesh.Neighbours()) != 1 {
		t.Fatal("this is no line")
	}

	pulled := p4.count.pulled.Load()
	p1.table.Set("a", []byte("new"))
	p1.table.Set("c", []byte("1"))
	p2.table.Delete("a")
	for _, n := range []*node{p1, p2, p3, p4} {
		eventually(t, time.Second, n.holds("1 a=new, 1 c=1, 4 b=4"))
	}
	p4.state.raise(7)
	for _, n := range []*node{p1, p2, p3} {
		eventually(t, time.Second, func() string {
			if got := n.state.Digest(); got != 7 {
				return fmt.Sprintf("peer %d has state %d", uint64(n.self), got)
			}
			return ""
		})
	}
	if got := p4.count.pulled.Load(); got != pulled {
		t.Errorf("%d pulls for changes that were broadcast", got-pulled)
	}
}

func TestChangesOfNothing(t *testing.T) {
	t.Parallel()
	p1 := start(t, 11, nil)
	p1.table.Set("k", []byte("v"))
	<-p1.table.Changes()
	p1.table.Set("k", []byte("v"))
	select {
	case <-p1.table.Changes():
		t.Error("a change that changes nothing is signalled")
	default:
	}
}

// 21 - 22 - 23: what is not broadcast at all is found by comparing roots.
func TestLostBroadcasts(t *testing.T) {
	t.Parallel()
	p1 := start(t, 21, one("a", "1"))
	p2 := start(t, 22, nil, p1)
	p3 := start(t, 23, nil, p2)
	agree(t, 15*time.Second, p1, p2, p3)
	p1.mu.Lock()
	put(t, p1.store, "lost", "1")
	del(t, p1.store, "a")
	p1.store.giveUp()
	p1.mu.Unlock()
	p3.state.mu.Lock()
	p3.state.n = 9 // not announced
	p3.state.mu.Unlock()
	agree(t, 20*time.Second, p1, p2, p3)
	for _, n := range []*node{p1, p2, p3} {
		eventually(t, time.Second, n.holds("21 lost=1"))
		if n.state.Digest() != 9 {
			t.Errorf("peer %d has state %d", uint64(n.self), n.state.Digest())
		}
	}

	// A gap tells at once.
	p1.mu.Lock()
	put(t, p1.store, "lost", "2")
	p1.store.giveUp()
	p1.mu.Unlock()
	p1.table.Set("told", []byte("1"))
	for _, n := range []*node{p2, p3} {
		eventually(t, 2*time.Second, n.holds("21 lost=2, 21 told=1"))
	}
}

// 31 - 32 - 33: 33 is stopped and comes back as another run with what it had,
// and more. Readers never see a moment without its entries.
func TestRestartMakesNoHole(t *testing.T) {
	t.Parallel()
	entries := make(map[string][]byte)
	for i := range 500 { // more than one broadcast holds
		entries[fmt.Sprintf("k%03d", i)] = bytes.Repeat([]byte("v"), 200)
	}
	p1 := start(t, 31, nil)
	p2 := start(t, 32, nil, p1)
	p3 := start(t, 33, entries, p2)
	count := func() string {
		if n := len(p1.table.All()); n != len(entries) {
			return fmt.Sprintf("%d entries, want %d", n, len(entries))
		}
		return ""
	}
	eventually(t, 15*time.Second, count)
	p3.stop()
	eventually(t, 5*time.Second, func() string {
		if p1.mesh.Topology().Reaches(33) {
			return "31 has a route to what is stopped"
		}
		return count()
	})
	entries["k999"] = []byte("new")
	again := start(t, 33, entries, p2)
	seen := 0
	eventually(t, 15*time.Second, func() string {
		if n := len(p1.table.All()); n < len(entries)-1 {
			t.Fatalf("only %d entries are left", n)
		}
		seen++
		return count()
	})
	if seen < 2 {
		t.Error("the new run was never waited for")
	}
	agree(t, 30*time.Second, p1, p2, again)
}

// 41 - 42 - 43: without 42 the others change apart; with it they come together.
func TestPartition(t *testing.T) {
	t.Parallel()
	p1 := start(t, 41, one("a", "1"))
	p3 := start(t, 43, one("a", "3"))
	p2 := start(t, 42, nil, p1, p3)
	agree(t, 15*time.Second, p1, p2, p3)
	p2.stop()
	eventually(t, 5*time.Second, func() string {
		if p1.mesh.Topology().Reaches(43) || p3.mesh.Topology().Reaches(41) {
			return "there is still a route"
		}
		return ""
	})
	p1.table.Set("b", []byte("1"))
	p3.table.Delete("a")
	p3.table.Set("c", []byte("3"))
	eventually(t, time.Second, p1.holds("41 a=1, 41 b=1, 43 a=3"))
	again := start(t, 42, one("x", "2"), p1, p3)
	for _, n := range []*node{p1, again, p3} {
		eventually(t, 15*time.Second, n.holds("41 a=1, 41 b=1, 42 x=2, 43 c=3"))
	}
	agree(t, 40*time.Second, p1, again, p3)
}

// Nonsense is counted and logged once, and disturbs nothing.
func TestNonsense(t *testing.T) {
	t.Parallel()
	var log logBuffer
	p1 := startLogged(t, slog.New(slog.NewTextHandler(&log, nil)), 51, one("a", "1"))
	p2 := start(t, 52, one("a", "2"), p1)
	agree(t, 15*time.Second, p1, p2)
	for range 3 {
		p2.mesh.Broadcast(BroadcastKind, []byte{wireVersion, castSet, 1, 2, 3})
		p2.mesh.Broadcast(BroadcastKind, appendPush([]byte{wireVersion, castState}, push{"number", 77, []byte("no number")}))
		p2.mesh.Broadcast(BroadcastKind, []byte{wireVersion, 99})
		stolen := set{origin: 51, epoch: maxEpoch, complete: true}
		p2.mesh.Broadcast(BroadcastKind, appendSet([]byte{wireVersion, castSet}, stolen))
	}
	conn, err := p2.mesh.Dial(t.Context(), 51)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte{streamPull, 0, 0, 0, 2, frameRequest, 99}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, func() string {
		c := p1.Counters()
		if c["messages_malformed"] != 7 || c["merge_errors"] != 3 {
			return fmt.Sprint(c)
		}
		return ""
	})
	if n := strings.Count(log.String(), "gossip ignored"); n != 4 {
		t.Errorf("%d complaints, want 4:\n%s", n, log.String())
	}
	p2.table.Set("a", []byte("new"))
	eventually(t, time.Second, p1.holds("51 a=1, 52 a=new"))
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A state that never agrees, such as that of another cluster, keeps nothing else
// from working.
func TestStatesThatNeverAgree(t *testing.T) {
	t.Parallel()
	p1 := start(t, 61, nil)
	p2 := start(t, 62, nil, p1)
	agree(t, 15*time.Second, p1, p2)
	p1.mu.Lock()
	p1.states["number"].State = stubborn(1)
	p1.mu.Unlock()
	p2.mu.Lock()
	p2.states["number"].State = stubborn(2)
	p2.mu.Unlock()
	before := p1.count.pulled.Load()
	eventually(t, 20*time.Second, func() string {
		if n := p1.count.pulled.Load() - before; n < 2 {
			return fmt.Sprintf("%d pulls", n)
		}
		return ""
	})
	p1.table.Set("still", []byte("works"))
	eventually(t, time.Second, p2.holds("61 still=works"))
}

type stubborn uint64

func (s stubborn) Digest() uint64                { return uint64(s) }
func (s stubborn) Encode() []byte                { return []byte{byte(s)} }
func (s stubborn) Merge(peer.Name, []byte) error { return nil }
