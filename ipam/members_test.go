package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"weave.local/peer"
)

// trio is three peers of one cluster, each with an address in use.
func trio(t *testing.T, w *world) []*host {
	t.Helper()
	for _, h := range w.add(3, consensus(3)) {
		h.start()
	}
	for _, h := range w.peers {
		h.must("c", "")
	}
	settle(3 * time.Second)
	return w.peers
}

func TestRemovePeerTakesOverItsAddresses(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		p := trio(t, w)
		had := p[0].a.Status().Peers
		of := func(list []PeerShare, name peer.Name) uint64 {
			i := slices.IndexFunc(list, func(s PeerShare) bool { return s.Name == name })
			if i < 0 {
				return 0
			}
			return list[i].Addresses
		}
		if _, err := p[0].a.RemovePeer(w.within(time.Minute), p[2].name); err == nil || !strings.Contains(err.Error(), "host3 is connected") {
			t.Fatalf("removing a peer that is up: %v", err)
		}
		p[2].crash()
		p[2].last, p[2].owned = nil, nil // off for good
		n, err := p[0].a.RemovePeer(w.within(time.Minute), p[2].name)
		if err != nil || n != of(had, p[2].name) || n == 0 {
			t.Fatalf("%d addresses, %v; it had %d", n, err, of(had, p[2].name))
		}
		now := p[0].a.Status()
		if len(now.Peers) != 2 || of(now.Peers, p[0].name) != of(had, p[0].name)+n {
			t.Fatalf("before %+v after %+v", had, now.Peers)
		}
		if n, err := p[1].a.RemovePeer(w.within(time.Minute), p[2].name); n != 0 || err != nil {
			t.Fatalf("removed again: %d, %v", n, err)
		}
		// It comes back after all: its address is ours now, unless in use.
		p[2].start()
		settle(5 * time.Second)
		s := p[2].a.Status()
		if s.State != "ready" || len(s.Peers) != 3 || s.Active != 1 {
			t.Fatalf("the one that came back: %+v", s)
		}
	})
}

func TestRemoveTheOnlyKeeper(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a := w.add(1, consensus(1))[0].start()
		a.must("c", "")
		b := w.add(1, consensus(2))[0].start()
		b.must("c", "")
		if s := b.a.Status(); len(s.Keepers) != 1 || s.Keepers[0] != a.name {
			t.Fatalf("keepers %v", s.Keepers)
		}
		a.crash()
		a.last, a.owned = nil, nil
		n, err := b.a.RemovePeer(w.within(time.Minute), a.name)
		if err != nil || n == 0 {
			t.Fatalf("%d addresses, %v", n, err)
		}
		b.must("d", "10.32.99.0/24")
		if s := b.a.Status(); len(s.Peers) != 1 || s.Peers[0].Addresses+s.Unowned != 1<<16 {
			t.Fatalf("status %+v", s)
		}
	})
}

func TestRemoveTwoOfThreeKeepers(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		p := trio(t, w)
		for _, h := range p[1:] {
			h.crash()
			h.last, h.owned = nil, nil
		}
		_, err := p[0].a.RemovePeer(w.within(time.Minute), p[1].name)
		if err == nil || !strings.Contains(err.Error(), "host3 keep the register with it and cannot be reached") {
			t.Fatalf("one of two: %v", err)
		}
		if _, err := p[0].a.RemovePeer(w.within(time.Minute), p[2].name); err != nil {
			t.Fatal(err)
		}
		settle(time.Second)
		if s := p[0].a.Status(); len(s.Peers) != 1 || len(s.Keepers) != 1 {
			t.Fatalf("status %+v", s)
		}
		p[0].must("d", "10.32.99.0/24")
	})
}

func TestLeaveHandsBack(t *testing.T) {
	for seed := range uint64(4) {
		run(t, seed, func(t *testing.T, w *world) {
			w.loss = float64(seed) * 0.06
			p := trio(t, w)
			for i, h := range p { // one after the other, the last one alone
				if err := h.a.FreeAll("c"); err != nil {
					t.Fatal(err)
				}
				if err := h.a.Leave(w.within(time.Minute)); err != nil {
					t.Fatalf("%v leaves: %v", h.name, err)
				}
				if s := h.a.Status().State; s != "left" {
					t.Fatalf("state %q", s)
				}
				h.crash()
				h.owned = nil
				if i == 2 {
					break
				}
				settle(3 * time.Second)
				s := p[i+1].a.Status()
				if len(s.Peers) != 2-i || slices.Contains(s.Keepers, h.name) {
					t.Fatalf("after %v left: %+v", h.name, s)
				}
				p[i+1].must("more", fmt.Sprintf("10.32.%d.0/24", 100+i))
			}
		})
	}
}

func TestAllLeaveAtOnce(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		var all sync.WaitGroup
		for _, h := range trio(t, w) {
			all.Go(func() {
				if err := h.a.FreeAll("c"); err != nil {
					t.Error(err)
				}
				if err := h.a.Leave(w.within(time.Minute)); err != nil {
					t.Errorf("%v leaves: %v", h.name, err)
				}
			})
		}
		all.Wait()
	})
}

func TestEmptyLoneClusterGoesOver(t *testing.T) {
	for seed := range uint64(6) {
		run(t, seed, func(t *testing.T, w *world) {
			apart := true
			w.cut = func(a, b peer.Name) bool { return apart && a != b }
			for _, h := range w.add(2, consensus(1)) {
				h.start()
				h.must("c", "")
			}
			used := w.peers[seed%2]
			other := w.peers[1-seed%2]
			if err := other.a.FreeAll("c"); err != nil {
				t.Fatal(err)
			}
			if seed >= 4 { // both empty
				if err := used.a.FreeAll("c"); err != nil {
					t.Fatal(err)
				}
			}
			want := used.a.Status().Cluster
			w.mu.Lock()
			apart = false
			w.mu.Unlock()
			settle(15 * time.Second)
			s, o := used.a.Status(), other.a.Status()
			if s.Cluster != o.Cluster || seed < 4 && s.Cluster != want || len(s.Conflicts)+len(o.Conflicts) > 0 || len(o.Peers) != 2 {
				t.Fatalf("one %+v\nother %+v", s, o)
			}
			other.must("c", "")
		})
	}
}

func TestTwoClustersInUseStayApart(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		apart := true
		w.cut = func(a, b peer.Name) bool { return apart && a != b }
		for _, h := range w.add(2, consensus(1)) {
			h.start()
			h.must("c", "10.32.1.0/24")
		}
		w.mu.Lock()
		apart = false
		w.mu.Unlock()
		settle(15 * time.Second)
		s, o := w.peers[0].a.Status(), w.peers[1].a.Status()
		if s.Cluster == o.Cluster {
			t.Fatal("merged")
		}
		for _, st := range []Status{s, o} {
			if len(st.Conflicts) != 1 || !strings.Contains(st.Conflicts[0], s.Cluster) || !strings.Contains(st.Conflicts[0], o.Cluster) {
				t.Fatalf("conflicts %q", st.Conflicts)
			}
		}
		if text := w.peers[0].a.Conflicts()[w.peers[1].name]; text != s.Conflicts[0] {
			t.Errorf("the conflict with the other peer is %q", text)
		}
		for _, h := range w.peers { // each goes on by itself
			h.must("d", "10.32.1.0/24")
			h.crash()
			h.last, h.owned = nil, nil
		}
	})
}

func TestOtherRangeIsReported(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		w.add(2, consensus(1))
		w.peers[1].cfg.Range = netip.MustParsePrefix("10.40.0.0/16")
		for _, h := range w.peers {
			h.start()
			h.must("c", "")
		}
		settle(5 * time.Second)
		s := w.peers[0].a.Status()
		if len(s.Conflicts) != 1 || !strings.Contains(s.Conflicts[0], "10.40.0.0/16 and this peer from 10.32.0.0/16") {
			t.Fatalf("conflicts %q", s.Conflicts)
		}
	})
}

func TestSeedsNeedNobody(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		init := Bootstrap{Mode: Seed, Seeds: []peer.Name{3, 1, 2}}
		w.cut = func(a, b peer.Name) bool { return a != b }
		got := map[netip.Prefix]bool{}
		for _, h := range w.add(3, init) {
			h.start()
			got[h.must("c", "")] = true
		}
		if len(got) != 3 {
			t.Fatalf("addresses %v", got)
		}
		w.mu.Lock()
		w.cut = nil
		w.mu.Unlock()
		w.add(1, Bootstrap{Mode: Seed, Seeds: init.Seeds})[0].start().must("fourth", "")
		settle(5 * time.Second)
		for _, h := range w.peers {
			if s := h.a.Status(); s.State != "ready" || len(s.Peers) != 4 || len(s.Conflicts) > 0 {
				t.Fatalf("%v: %+v", h.name, s)
			}
		}
	})
}

func TestObserverAsksOthersToBegin(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		for _, h := range w.add(2, consensus(2)) {
			h.start()
		}
		o := w.add(1, Bootstrap{Mode: Observer})[0].start()
		settle(3 * time.Second)
		for _, h := range w.peers {
			if s := h.a.Status(); s.State != "idle" {
				t.Fatalf("%v: %q", h.name, s.State)
			}
		}
		if err := o.a.Prime(w.within(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		o.must("c", "")
	})
}

func TestObserversAloneWait(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		for _, h := range w.add(2, Bootstrap{Mode: Observer}) {
			h.start()
		}
		if err := w.peers[0].a.Prime(w.within(30 * time.Second)); err == nil {
			t.Fatal("observers founded a cluster")
		}
		if s := w.peers[0].a.Status().State; s != "priming" {
			t.Fatalf("state %q", s)
		}
	})
}

// TestLostStoreComesBackAsNewMember loses a keeper's file: what it promised is
// gone, so it must not count as the keeper it was; its address is claimed
// again by what is attached.
func TestLostStoreComesBackAsNewMember(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		p := trio(t, w)
		h := p[1]
		addr := h.a.Lookup("c", netip.Prefix{})[0]
		var epoch uint64
		for _, e := range h.a.Status().Entries {
			if e.Peer == h.name {
				epoch = e.Epoch
			}
		}
		h.crash()
		h.wipe()
		h.start()
		if err := h.a.Claim(w.within(30*time.Second), "c", addr); err != nil {
			t.Fatal(err)
		}
		for _, e := range h.a.Status().Entries {
			if e.Peer == h.name && e.Epoch <= epoch {
				t.Fatalf("epoch %d after %d", e.Epoch, epoch)
			}
		}
		h.must("d", "")
	})
}

func TestCorruptRecordsAreSetAside(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		p := trio(t, w)
		h := p[0]
		addr := h.a.Lookup("c", netip.Prefix{})[0]
		for _, key := range []string{keyRegister, keyAcceptor, ownKey(addr.Addr()), keyStore} {
			h.crash()
			h.corrupt(key)
			h.start()
			synctest.Wait()
			if got := h.a.Owned(); len(got) == 0 {
				t.Fatalf("%s damaged: the address in use is forgotten", key)
			}
			if err := h.a.Claim(w.within(30*time.Second), "c", addr); err != nil {
				t.Fatalf("%s damaged: %v", key, err)
			}
			if got := h.must("next "+key, ""); got == addr {
				t.Fatalf("%s damaged: %v handed out twice", key, got)
			}
			settle(3 * time.Second)
			w.check()
		}
	})
}
