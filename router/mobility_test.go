package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/peer/gossip"
	"weave.local/peer/link"
	"weave.local/router/overlay"
)

// table is a data path that keeps what it is told and carries nothing.
type table struct {
	mu sync.Mutex
	f  overlay.Forwarding
}

func (*table) Name() string                          { return overlay.FastDP }
func (*table) MTU(peer.ShortID) int                  { return 0 }
func (*table) Probe(peer.ShortID, uint64, int) error { return nil }
func (*table) SetPort(overlay.Port) error            { return nil }
func (*table) RemovePort(int) error                  { return nil }
func (*table) SetLease(time.Duration) error          { return nil }
func (*table) Counters() (map[string]uint64, error)  { return nil, nil }
func (*table) Run(ctx context.Context) error         { <-ctx.Done(); return nil }

func (*table) Traffic() (map[peer.ShortID]overlay.Traffic, error) { return nil, nil }

func (d *table) Apply(f overlay.Forwarding) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.f = f
	return nil
}

// where is the peer that a MAC is told to be at; 0: nobody else.
func (d *table) where(m overlay.MAC) peer.ShortID {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.f.Endpoints {
		if e.MAC == m {
			return e.Peer
		}
	}
	return 0
}

// member is a router with a real link to the others, on an address of the
// loopback network.
type member struct {
	*Router
	mesh *link.Mesh
	path *table
}

func (m member) id() peer.ShortID { return m.mesh.Self().ShortID }

func startMember(t *testing.T, name peer.Name, targets ...member) member {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	cfg := link.Config{
		Self: peer.Info{Name: name, UID: peer.UID(time.Now().UnixNano()), NickName: name.String()},
		Bind: netip.AddrFrom4([4]byte{127, 0, 0, byte(name)}), Log: log,
	}
	for _, n := range targets {
		self := n.mesh.Self()
		cfg.Targets = append(cfg.Targets, fmt.Sprintf("127.0.0.%d:%d", uint64(self.Name), self.Port))
	}
	mesh, err := link.Listen(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	g, err := gossip.New(gossip.Config{Mesh: mesh, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	m := member{New(Config{Mesh: mesh, Table: g.Table(TableName), Log: log}), mesh, &table{}}
	m.Use(m.path, m.path)
	m.Publish()
	ctx, cancel := context.WithCancel(t.Context())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return mesh.Run(ctx) })
	group.Go(func() error { return g.Run(ctx) })
	group.Go(func() error { return m.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return m
}

// within waits until all know a MAC to be at a peer; the peer itself knows it at
// nobody else. It returns how long that took.
func within(t *testing.T, limit time.Duration, all []member, m overlay.MAC, at peer.ShortID) time.Duration {
	t.Helper()
	begin := time.Now()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		behind := slices.IndexFunc(all, func(x member) bool {
			want := at
			if x.id() == at {
				want = 0
			}
			return x.id() == 0 || x.path.where(m) != want
		})
		took := time.Since(begin)
		switch {
		case behind < 0:
			return took
		case took > limit:
			t.Fatalf("after %s peer %d has %s at peer %d, want %d", took, all[behind].id(), m, all[behind].path.where(m), at)
		}
		<-tick.C
	}
}

// A MAC that is attached on one host after the other is at the last one for
// everybody, though the first ones say nothing of an end, or say so late, and
// whatever their clocks show.
func TestMACMoves(t *testing.T) {
	first := startMember(t, a)
	second := startMember(t, b, first)
	third := startMember(t, c, first, second)
	all := []member{first, second, third}
	mac := overlay.MAC{2, 7}
	port := func(index int, since time.Time) overlay.Port {
		return overlay.Port{IfIndex: index, IfName: "x", Since: since,
			Endpoint: overlay.Endpoint{MAC: mac, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/24")}}}
	}
	set := func(m member, p overlay.Port) {
		t.Helper()
		if err := m.SetLocal(p); err != nil {
			t.Fatal(err)
		}
	}
	// A clock that is a day ahead: its announcement is the newest by far.
	set(first, port(1, time.Now().Add(24*time.Hour)))
	within(t, 20*time.Second, all, mac, first.id())
	for i, m := range []member{second, third, first, third} {
		set(m, port(10+i, time.Now()))
		t.Logf("move %d: known to all after %s", i+1, within(t, time.Second, all, mac, m.id()).Round(time.Millisecond))
	}
	// A port that was left gets another address: no reason to move back.
	left := port(10, time.Time{})
	left.Addrs = append(left.Addrs, netip.MustParsePrefix("10.32.1.1/24"))
	set(second, left)
	// The ends come late and out of order. The first host has had it twice.
	for _, x := range []struct {
		m     member
		index int
	}{{first, 1}, {second, 10}, {first, 12}} {
		if err := x.m.RemoveLocal(x.index); err != nil {
			t.Fatal(err)
		}
	}
	set(first, overlay.Port{IfIndex: 50, Endpoint: overlay.Endpoint{MAC: overlay.MAC{2, 8}}})
	set(second, overlay.Port{IfIndex: 51, Endpoint: overlay.Endpoint{MAC: overlay.MAC{2, 9}}})
	within(t, time.Second, all, overlay.MAC{2, 8}, first.id())
	within(t, time.Second, all, overlay.MAC{2, 9}, second.id())
	within(t, time.Second, all, mac, third.id())
	if err := third.RemoveLocal(11); err != nil { // it came back since
		t.Fatal(err)
	}
	set(third, overlay.Port{IfIndex: 52, Endpoint: overlay.Endpoint{MAC: overlay.MAC{2, 10}}})
	within(t, time.Second, all, overlay.MAC{2, 10}, third.id())
	within(t, time.Second, all, mac, third.id())
	if err := third.RemoveLocal(13); err != nil {
		t.Fatal(err)
	}
	within(t, time.Second, all, mac, 0)
}
