package ipam

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"weave.local/peer"
	"weave.local/peer/state"
)

func TestLoneLaunchNeedsNobody(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		h := w.add(1, consensus(1))[0].start()
		synctest.Wait()
		if s := h.a.Status(); s.State != "idle" || len(s.Peers) != 0 {
			t.Fatalf("before the first request: %+v", s)
		}
		before := time.Now()
		if got := h.must("c1", ""); got.String() != "10.32.0.1/16" {
			t.Fatalf("first address %v", got)
		}
		if took := time.Since(before); took > 0 {
			t.Fatalf("took %v without anybody to ask", took)
		}
		if got := h.must("c1", ""); got.String() != "10.32.0.1/16" {
			t.Fatalf("the same owner again: %v", got)
		}
		if got := h.must("c2", "10.32.7.0/24"); got.String() != "10.32.7.1/24" {
			t.Fatalf("first address of a subnet: %v", got)
		}
		s := h.a.Status()
		if s.State != "ready" || len(s.Peers) != 1 || s.Peers[0].Active != 2 || s.Unowned+s.Peers[0].Addresses != 1<<16 {
			t.Fatalf("status %+v", s)
		}
	})
}

func TestThreePeersAtOnceBecomeOneCluster(t *testing.T) {
	for seed := range uint64(20) {
		run(t, seed, func(t *testing.T, w *world) {
			w.loss = float64(seed%3) * 0.1
			var all sync.WaitGroup
			for _, h := range w.add(3, consensus(3)) {
				h.start()
			}
			for i, h := range w.peers {
				all.Go(func() { h.must(fmt.Sprintf("c%d", i), "") })
			}
			all.Wait()
			settle(5 * time.Second)
			first := w.peers[0].a.Status()
			for _, h := range w.peers {
				s := h.a.Status()
				if s.Cluster != first.Cluster || s.State != "ready" || len(s.Peers) != 3 || len(s.Keepers) != 3 {
					t.Fatalf("%v: %+v", h.name, s)
				}
			}
		})
	}
}

func TestWaitsForConsensus(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		h := w.add(3, consensus(3))[0].start()
		ctx := w.within(time.Minute)
		_, err := h.a.Allocate(ctx, "c", netip.Prefix{})
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "awaiting consensus (quorum: 2, known: 1)") {
			t.Fatalf("error %v", err)
		}
		w.peers[1].start()
		h.must("c", "")
		settle(3 * time.Second)
		w.peers[2].start()
		settle(3 * time.Second)
		if s := w.peers[2].a.Status(); s.State != "ready" || len(s.Peers) != 3 {
			t.Fatalf("the late one: %+v", s)
		}
	})
}

func TestSmallSubnetIsHandedOutWhole(t *testing.T) {
	for seed := range uint64(6) {
		run(t, seed, func(t *testing.T, w *world) {
			if seed%2 == 1 {
				w.loss = 0.2
			}
			for _, h := range w.add(3, consensus(3)) {
				h.start()
			}
			var mu sync.Mutex
			seen := map[netip.Prefix]string{}
			var all sync.WaitGroup
			for i := range 254 {
				h := w.peers[i%3]
				if seed%3 == 2 {
					h = w.peers[min(i/200, 1)]
				}
				all.Go(func() {
					owner := fmt.Sprintf("c%d", i)
					got, err := h.a.Allocate(w.within(5*time.Minute), owner, netip.MustParsePrefix("10.32.1.0/24"))
					if err != nil {
						t.Errorf("%s on %v: %v", owner, h.name, err)
					}
					mu.Lock()
					defer mu.Unlock()
					if other, twice := seen[got]; twice {
						t.Errorf("%v given to %s and %s", got, owner, other)
					}
					seen[got] = owner
				})
			}
			all.Wait()
			if len(seen) != 254 {
				t.Fatalf("%d addresses", len(seen))
			}
			for a := range seen {
				if a == netip.MustParsePrefix("10.32.1.0/24") || a == netip.MustParsePrefix("10.32.1.255/24") {
					t.Fatalf("%v handed out", a)
				}
			}
			settle(3 * time.Second)
			_, err := w.peers[2].a.Allocate(w.within(time.Minute), "one more", netip.MustParsePrefix("10.32.1.0/24"))
			if !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "range exhausted in 10.32.1.0/24: 254 of 254 in use (host1 ") {
				t.Fatalf("one more: %v", err)
			}
			// A freed address is there for any peer.
			if err := w.peers[0].a.FreeAll("c0"); err != nil {
				t.Fatal(err)
			}
			w.peers[2].must("one more", "10.32.1.0/24")
		})
	}
}

func TestCutOffMinorityUsesItsOwn(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		for _, h := range w.add(3, consensus(3)) {
			h.start()
		}
		for _, h := range w.peers {
			h.must("first", "")
		}
		lost := w.peers[2]
		w.mu.Lock()
		w.cut = func(a, b peer.Name) bool { return (a == lost.name) != (b == lost.name) }
		w.mu.Unlock()
		lost.must("second", "") // of its own block
		_, err := lost.a.Allocate(w.within(time.Minute), "third", netip.MustParsePrefix("10.32.200.0/24"))
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting for keepers host1, host2 (1 of 3 reachable)") {
			t.Fatalf("a new subnet in the minority: %v", err)
		}
		w.peers[0].must("majority", "10.32.200.0/24")
		w.mu.Lock()
		w.cut = nil
		w.mu.Unlock()
		lost.must("third", "10.32.200.0/24")
	})
}

func TestClaims(t *testing.T) {
	run(t, 4, func(t *testing.T, w *world) {
		for _, h := range w.add(2, consensus(2)) {
			h.start()
		}
		one, two := w.peers[0], w.peers[1]
		claim := func(h *host, owner, addr string) error {
			return h.a.Claim(w.within(30*time.Second), owner, netip.MustParsePrefix(addr))
		}
		const id = "3f2a9b1c0d4e5f60718293a4b5c6d7e8"
		for _, c := range []struct {
			h           *host
			owner, addr string
			want        string
		}{
			{one, id, "10.32.9.7/24", ""},
			{one, id, "10.32.9.7/24", ""}, // again
			{one, "other", "10.32.9.7/24", "10.32.9.7 is held by container 3f2a9b1c0d4e on this host"},
			{two, "other", "10.32.9.7/24", "10.32.9.7 is held by container 3f2a9b1c0d4e on host1"},
			{two, "other", "10.32.9.8/24", ""}, // of the first one's block, free
			{one, "third", "10.32.9.8/24", "10.32.9.8 is held by container other on host2"},
			{two, "outside", "192.168.5.5/24", ""},
			{one, "outside", "192.168.5.5/24", ""}, // known on each peer alone
			{two, "other", "192.168.5.5/24", "192.168.5.5 is held by container outside on this host"},
		} {
			err := claim(c.h, c.owner, c.addr)
			if got := fmt.Sprint(err); c.want == "" && err != nil || c.want != "" && got != c.want {
				t.Errorf("%s claims %s on %v: %v, want %q", c.owner, c.addr, c.h.name, err, c.want)
			}
		}
		if err := claim(one, "x", "10.32.9.9/24"); err != nil {
			t.Fatal(err)
		}
		one.crash()
		err := claim(two, "y", "10.32.9.9/24")
		if err == nil || !strings.Contains(err.Error(), "10.32.9.9 belongs to host1, which is not reachable") {
			t.Errorf("claim of what a lost peer owns: %v", err)
		}
	})
}

func TestFreeIsFinalAndOnlyForTheOwner(t *testing.T) {
	run(t, 5, func(t *testing.T, w *world) {
		h := w.add(1, consensus(1))[0].start()
		a := h.must("c1", "")
		if err := h.a.Free("c2", a.Addr()); !errors.Is(err, ErrHeld) {
			t.Fatalf("freed by another: %v", err)
		}
		if err := h.a.Free("c1", a.Addr()); err != nil {
			t.Fatal(err)
		}
		if err := h.a.Free("c1", a.Addr()); err != nil {
			t.Fatalf("freed again: %v", err)
		}
		if got := h.must("c2", ""); got != a {
			t.Fatalf("%v, want the lowest free %v", got, a)
		}
		x, y := h.must(Anonymous, ""), h.must(Anonymous, "")
		if x == y {
			t.Fatalf("anonymous owners share %v", x)
		}
		if err := h.a.Free("_"+x.Addr().String(), x.Addr()); err != nil {
			t.Fatal(err)
		}
		if got := h.a.Owned(); len(got) != 2 || len(got["c2"]) != 1 || len(got["_"+y.Addr().String()]) != 1 {
			t.Fatalf("owned %v", got)
		}
	})
}

func TestRestartKeepsAddressesAndMembership(t *testing.T) {
	run(t, 6, func(t *testing.T, w *world) {
		for _, h := range w.add(3, consensus(3)) {
			h.start()
		}
		h := w.peers[0]
		a, b := h.must("c1", ""), h.must("c2", "10.32.9.0/24")
		for _, p := range w.peers {
			p.must("own", "")
		}
		settle(3 * time.Second)
		before := h.a.Status()
		h.crash()
		h.start()
		if got := h.a.Lookup("c1", netip.Prefix{}); len(got) != 1 || got[0] != a {
			t.Fatalf("after a restart: %v, want %v", got, a)
		}
		for _, other := range w.peers[1:] {
			other.crash()
		}
		if got := h.must("c2", "10.32.9.0/24"); got != b {
			t.Fatalf("%v, want %v", got, b)
		}
		h.must("c3", "") // of its own block, with nobody there
		if after := h.a.Status(); after.Cluster != before.Cluster || after.Version != before.Version {
			t.Fatalf("before %+v after %+v", before, after)
		}
	})
}

func TestOwnerGoneEndsItsCalls(t *testing.T) {
	run(t, 7, func(t *testing.T, w *world) {
		h := w.add(1, consensus(3))[0].start()
		errs := make(chan error)
		go func() {
			_, err := h.a.Allocate(w.ctx, "c", netip.Prefix{})
			errs <- err
		}()
		synctest.Wait()
		if s := h.a.Status(); len(s.Allocates) != 1 || s.Allocates[0].Owner != "c" {
			t.Fatalf("status %+v", s)
		}
		if err := h.a.FreeAll("c"); err != nil {
			t.Fatal(err)
		}
		if err := <-errs; !errors.Is(err, ErrGone) {
			t.Fatalf("error %v", err)
		}
	})
}

func TestBadSubnets(t *testing.T) {
	run(t, 8, func(t *testing.T, w *world) {
		h := w.add(1, consensus(1))[0].start()
		for subnet, want := range map[string]string{
			"10.32.1.7/24":   "subnet 10.32.1.7/24 has host bits; its network is 10.32.1.0/24",
			"10.32.1.0/31":   "subnet 10.32.1.0/31 has fewer than four addresses; the smallest is a /30",
			"192.168.0.0/24": "subnet 192.168.0.0/24 is outside the address range 10.32.0.0/16",
			"fd00::/64":      "subnet fd00::/64 is outside the address range 10.32.0.0/16",
		} {
			if _, err := h.a.Allocate(w.ctx, "c", netip.MustParsePrefix(subnet)); err == nil || err.Error() != want {
				t.Errorf("%s: %v, want %q", subnet, err, want)
			}
		}
	})
}

// A keeper that cannot write must not say anything that depends on what it
// could not write.
func TestSaysNothingThatIsNotDurable(t *testing.T) {
	run(t, 9, func(t *testing.T, w *world) {
		w.add(1, consensus(1))[0].start().must("c", "")
		w.add(1, consensus(2))[0].start().must("c", "")
		settle(3 * time.Second)
		keeper, other := w.peers[0], w.peers[1]
		_ = keeper.db.Close()
		sent := keeper.count()
		if _, err := other.a.Allocate(w.within(10*time.Second), "d", netip.MustParsePrefix("10.32.250.0/24")); err == nil {
			t.Fatal("granted by a keeper that cannot write")
		}
		if now := keeper.count(); now != sent {
			t.Fatalf("the keeper sent %d messages", now-sent)
		}
		if s := keeper.a.Status().State; !strings.Contains(s, "state cannot be written") {
			t.Fatalf("state %q", s)
		}
		if _, err := keeper.a.Allocate(w.within(10*time.Second), "d", netip.Prefix{}); err == nil {
			t.Fatal("an address without a record")
		}
	})
}

// What an address of our own space takes, in memory and with the state file on
// the disk that temporary files are on.
func BenchmarkAllocateFromOwnSpace(b *testing.B) {
	b.Run("disk", func(b *testing.B) { allocateFromOwnSpace(b, b.TempDir()) })
	b.Run("memory", func(b *testing.B) {
		dir, err := os.MkdirTemp("/dev/shm", "ipam") //nolint:usetesting // what is measured is all but the disk
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		allocateFromOwnSpace(b, dir)
	})
}

func allocateFromOwnSpace(b *testing.B, dir string) {
	log := slog.New(slog.DiscardHandler)
	db, err := state.Open(dir+"/weave.db", log)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	a, err := New(Config{
		Self: peer.Info{Name: 1}, Range: netip.MustParsePrefix("10.32.0.0/12"), Store: db.Bucket("ipam"),
		Send: func(peer.Name, []byte) error { return nil }, Reachable: func() []peer.Name { return nil }, Log: log,
	})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	for i := range 1000 { // a host with many containers
		if _, err := a.Allocate(ctx, fmt.Sprintf("old%d", i), netip.Prefix{}); err != nil {
			b.Fatal(err)
		}
	}
	var took []time.Duration
	for b.Loop() {
		begun := time.Now()
		got, err := a.Allocate(ctx, "c", netip.Prefix{})
		took = append(took, time.Since(begun))
		if err != nil {
			b.Fatal(err)
		}
		if err := a.Free("c", got.Addr()); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}
