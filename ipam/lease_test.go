package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
)

const testLease = 20 * time.Second

// leasedHosts are n peers in a cluster, with leases.
func leasedHosts(t *testing.T, w *world, n int, rng string) []*host {
	t.Helper()
	hosts := w.add(n, consensus(n))
	for _, h := range hosts {
		h.cfg.Lease, h.cfg.Range = testLease, netip.MustParsePrefix(rng)
		h.start()
	}
	for i, h := range hosts {
		h.must(fmt.Sprintf("first%d", i), "")
	}
	settle(3 * time.Second)
	for _, h := range hosts {
		if s := h.up().Status(); s.Lease != testLease || s.LeaseLeft < testLease/2 {
			t.Fatalf("%v: lease %v, %v left", h.name, s.Lease, s.LeaseLeft)
		}
	}
	return hosts
}

// cutOff lets nothing through between some peers and the others.
func (w *world) cutOff(off ...*host) {
	w.mu.Lock()
	defer w.mu.Unlock()
	gone := map[peer.Name]bool{}
	for _, h := range off {
		gone[h.name] = true
	}
	w.cut = func(a, b peer.Name) bool { return gone[a] != gone[b] }
}

func (w *world) whole() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = nil
}

// Two of five are gone for ever: the others come to own the whole range without
// a word of anybody.
func TestReclaim(t *testing.T) {
	run(t, 1, func(t *testing.T, w *world) {
		hosts := leasedHosts(t, w, 5, "10.32.0.0/24")
		for i := range 20 {
			hosts[4].must(fmt.Sprint("there", i), "")
		}
		hosts[3].crash()
		hosts[4].crash()
		settle(testLease)
		if !hosts[4].isCut() {
			t.Fatal("containers of a dead daemon are not cut off when its lease is over")
		}
		settle(testLease / 2)
		got := 3
		for i := 0; ; i++ {
			_, err := hosts[i%3].up().Allocate(w.within(time.Minute), fmt.Sprint("new", i), netip.Prefix{})
			if err != nil {
				if !errors.Is(err, ErrExhausted) {
					t.Fatal(err)
				}
				break
			}
			got++
		}
		if got != 254 {
			t.Errorf("%d of 254 addresses handed out", got)
		}
		// One of them is back with what it had: all that is another's by now.
		hosts[4].start()
		settle(testLease)
		if a := hosts[4].up(); len(a.Owned()) != 0 || hosts[4].isCut() {
			t.Errorf("back with %v, cut off: %v, %s", a.Owned(), hosts[4].isCut(), a.Status().State)
		} else if c := strings.Join(a.Status().Conflicts, "\n"); !strings.Contains(c, "went to host") {
			t.Errorf("told %q", c)
		}
	})
}

// A peer is cut off for longer than its lease: it stops, and goes on with those
// of its addresses that nobody took.
func TestReturn(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		hosts := leasedHosts(t, w, 5, "10.32.0.0/24")
		lone := hosts[4]
		var held []netip.Prefix
		for i := range 4 {
			held = append(held, lone.must(fmt.Sprint("c", i), ""))
		}
		w.cutOff(lone)
		settle(testLease / 2)
		lone.must("in a minority, from what it has", "")
		settle(testLease/2 + time.Second)
		if !lone.isCut() {
			t.Fatal("not cut off when the lease is over")
		}
		_, err := lone.up().Allocate(w.within(time.Second), "late", netip.Prefix{})
		if err == nil || !strings.Contains(err.Error(), "lease over") {
			t.Fatalf("without a lease: %v", err)
		}
		settle(testLease / 4)
		if err := hosts[0].up().Claim(w.within(10*time.Second), "taker", held[1]); err != nil {
			t.Fatalf("an address of a peer whose lease is over: %v", err)
		}
		w.check()
		w.whole()
		settle(testLease / 2)
		for i, p := range held {
			if got, want := slices.Contains(lone.up().Lookup(fmt.Sprint("c", i), netip.Prefix{}), p), i != 1; got != want {
				t.Errorf("%v is still held: %v, want %v", p, got, want)
			}
		}
		if lone.isCut() {
			t.Errorf("still cut off: %s", lone.up().Status().State)
		}
		lone.must("after its return", "")
	})
}

// A lease outlives the daemon, but not the machine.
func TestLeaseOverRestarts(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		hosts := leasedHosts(t, w, 3, testRange)
		lone := hosts[2]
		w.cutOff(lone)
		lone.crash()
		lone.start()
		lone.must("after a restart of the daemon", "")
		lone.crash()
		lone.reboot()
		if !lone.isCut() {
			t.Fatal("containers of a machine that was down are not cut off before it has a lease")
		}
		if got, err := lone.up().Allocate(w.within(time.Second), "x", netip.Prefix{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("after a restart of the machine: %v, %v", got, err)
		}
		w.whole()
		lone.must("with the others back", "")
		if lone.isCut() {
			t.Fatal("cut off with a lease")
		}
	})
}

// Two peers are no cluster for leases; a third one makes it one, and when it is
// gone for good it is none again.
func TestSmallClusters(t *testing.T) {
	run(t, 4, func(t *testing.T, w *world) {
		hosts := w.add(3, consensus(1))
		for _, h := range hosts[:2] {
			h.cfg.Lease = testLease
			h.start().must("first", "")
		}
		settle(time.Second)
		hosts[1].crash()
		settle(3 * testLease)
		hosts[0].must("alone", "")
		if hosts[1].isCut() || hosts[0].isCut() {
			t.Fatal("a lease in a cluster of two")
		}
		hosts[1].start()
		hosts[2].cfg.Lease = testLease
		hosts[2].start().must("first", "")
		settle(5 * time.Second)
		for _, h := range hosts {
			if h.up().Status().Lease != testLease {
				t.Fatalf("%v has no lease", h.name)
			}
		}
		hosts[2].crash()
		settle(2 * testLease)
		for _, h := range hosts[:2] {
			if s := h.up().Status(); len(s.Peers) != 2 || s.Lease != 0 || h.isCut() {
				t.Errorf("%v: %d peers, lease %v", h.name, len(s.Peers), s.Lease)
			}
		}
	})
}

// A register that was lost says nothing of what became of the addresses that are
// in use: after a start of the machine, too, they are cut off until it is met.
func TestLostRegister(t *testing.T) {
	run(t, 5, func(t *testing.T, w *world) {
		hosts := leasedHosts(t, w, 5, "10.32.0.0/24")
		lone := hosts[4]
		held := lone.must("c", "")
		w.cutOff(lone)
		lone.crash()
		lone.corrupt(keyRegister)
		lone.reboot()
		if !lone.isCut() || !strings.Contains(lone.up().Status().State, "register lost") {
			t.Fatalf("cut off: %v, %s", lone.isCut(), lone.up().Status().State)
		}
		settle(2 * testLease)
		if err := hosts[0].up().Claim(w.within(10*time.Second), "taker", held); err != nil {
			t.Fatal(err)
		}
		w.check()
		w.whole()
		settle(testLease / 2)
		if left := lone.up().Lookup("c", netip.Prefix{}); lone.isCut() || len(left) != 0 {
			t.Errorf("back with %v, %s", lone.up().Owned(), lone.up().Status().State)
		}
	})
}
