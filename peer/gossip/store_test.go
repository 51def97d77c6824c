package gossip

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
)

const tab = "t"

func put(t *testing.T, s *store, key, value string) {
	t.Helper()
	if err := s.set(ident{tab, key}, []byte(value), false); err != nil {
		t.Fatal(err)
	}
}

func del(t *testing.T, s *store, key string) {
	t.Helper()
	if err := s.set(ident{tab, key}, nil, true); err != nil {
		t.Fatal(err)
	}
}

// text shows a table as "origin key=value ...".
func text(s *store) string {
	var out []string
	for _, e := range s.all(tab) {
		out = append(out, fmt.Sprintf("%d %s=%s", uint64(e.Origin), e.Key, e.Value))
	}
	return strings.Join(out, ", ")
}

func wants(t *testing.T, s *store, want string) {
	t.Helper()
	if got := text(s); got != want {
		t.Errorf("peer %d holds %q, want %q", uint64(s.self), got, want)
	}
}

// over sends a set over the wire.
func over(t *testing.T, x set) set {
	t.Helper()
	y, err := parseSet(appendSet(nil, x))
	if err != nil {
		t.Fatal(err)
	}
	return y
}

func delta(t *testing.T, s *store) set {
	t.Helper()
	x, ok := s.delta()
	if !ok {
		t.Fatal("nothing to broadcast")
	}
	return over(t, x)
}

// pullFrom makes to equal to from, as far as from knows.
func pullFrom(t *testing.T, to, from *store) (ahead bool) {
	t.Helper()
	q, err := parseRequest(encodeRequest(request{heads: to.heads()}))
	if err != nil {
		t.Fatal(err)
	}
	sets, ahead := from.lacking(q.heads)
	for _, x := range sets {
		var a assembler
		for _, p := range x.parts(setLimit) {
			whole, err := a.add(over(t, p))
			if err != nil {
				t.Fatal(err)
			}
			if whole != nil {
				if v := to.apply(*whole); v == behind || v == outdated {
					t.Errorf("set of %d does not fit: %d", uint64(x.origin), v)
				}
			}
		}
	}
	return ahead
}

func apply(t *testing.T, s *store, x set, want verdict) {
	t.Helper()
	if got := s.apply(x); got != want {
		t.Errorf("verdict %d, want %d", got, want)
	}
}

func TestDeltas(t *testing.T) {
	t.Parallel()
	a, b := newStore(1, 100), newStore(2, 100)
	apply(t, b, over(t, a.everything()), applied)
	put(t, a, "x", "1")
	put(t, a, "y", "1")
	put(t, a, "x", "2")
	d := delta(t, a)
	if len(d.items) != 2 || d.seq != 3 {
		t.Errorf("%d items up to %d: a change overtaken by a later one needs no telling", len(d.items), d.seq)
	}
	apply(t, b, d, applied)
	wants(t, b, "1 x=2, 1 y=1")
	if _, ok := b.changed[tab]; !ok {
		t.Error("the change is not noted")
	}
	clear(b.changed)
	apply(t, b, d, known)
	put(t, a, "x", "2") // like that already
	if _, ok := a.delta(); ok || len(b.changed) > 0 {
		t.Error("a change from nothing")
	}
	del(t, a, "y")
	del(t, a, "none")
	apply(t, b, delta(t, a), applied)
	wants(t, b, "1 x=2")
}

func TestLostDelta(t *testing.T) {
	t.Parallel()
	a, b := newStore(1, 100), newStore(2, 100)
	apply(t, b, over(t, a.everything()), applied)
	put(t, a, "x", "1")
	delta(t, a) // lost
	put(t, a, "y", "1")
	apply(t, b, delta(t, a), behind)
	wants(t, b, "")
	a.reach[2], b.reach[1] = true, true
	if a.root() == b.root() {
		t.Error("roots are equal")
	}
	if !pullFrom(t, b, a) {
		t.Error("a does not know of b, and does not say that b is ahead")
	}
	wants(t, b, "1 x=1, 1 y=1")
	pullFrom(t, a, b)
	if a.root() != b.root() {
		t.Error("roots differ")
	}
	if pullFrom(t, b, a) || pullFrom(t, newStore(3, 1), b) {
		t.Error("who knows nothing more is ahead")
	}
}

func TestLongDeltasAreCut(t *testing.T) {
	t.Parallel()
	a, b := newStore(1, 100), newStore(2, 100)
	apply(t, b, over(t, a.everything()), applied)
	for i := range 200 {
		put(t, a, fmt.Sprint("k", i), strings.Repeat("v", 4000))
		put(t, a, "again", fmt.Sprint(i))
	}
	n := 0
	for x, ok := a.delta(); ok; x, ok = a.delta() {
		if size := len(appendSet(nil, x)); size > setLimit {
			t.Errorf("delta of %d bytes", size)
		}
		apply(t, b, over(t, x), applied)
		n++
	}
	if n < 10 || !reflect.DeepEqual(a.all(tab), b.all(tab)) {
		t.Errorf("%d deltas; equal: %t", n, reflect.DeepEqual(a.all(tab), b.all(tab)))
	}
	if len(a.what) != 0 || len(a.pending) != 0 {
		t.Errorf("%d and %d left over", len(a.what), len(a.pending))
	}
	for i := range 2 * maxPending {
		put(t, a, "again", fmt.Sprint(i, "th"))
	}
	if len(a.pending) > maxPending || len(a.what) > maxPending {
		t.Errorf("%d and %d wait", len(a.pending), len(a.what))
	}
}

// A restart: the old entries stay until all of the new ones are known.
func TestNewEpoch(t *testing.T) {
	t.Parallel()
	a, b := newStore(1, 100), newStore(2, 100)
	put(t, a, "x", "1")
	put(t, a, "gone", "1")
	apply(t, b, over(t, a.everything()), applied)
	clear(b.changed)

	again := newStore(1, 200)
	if err := again.load(tab, map[string][]byte{"x": []byte("1"), "y": []byte("1")}); err != nil {
		t.Fatal(err)
	}
	again.giveUp()
	put(t, again, "z", "1")
	apply(t, b, delta(t, again), behind)
	wants(t, b, "1 gone=1, 1 x=1")
	again.reach[2] = true
	pullFrom(t, b, again)
	wants(t, b, "1 x=1, 1 y=1, 1 z=1")
	put(t, a, "late", "1")
	apply(t, b, delta(t, a), outdated)
	wants(t, b, "1 x=1, 1 y=1, 1 z=1")
}

func TestSameEntriesInNewEpochAreNoChange(t *testing.T) {
	t.Parallel()
	a, b := newStore(1, 100), newStore(2, 100)
	put(t, a, "x", "1")
	apply(t, b, over(t, a.everything()), applied)
	clear(b.changed)
	again := newStore(1, 200)
	put(t, again, "other", "1")
	del(t, again, "other")
	put(t, again, "x", "1")
	apply(t, b, over(t, again.everything()), applied)
	if len(b.changed) > 0 {
		t.Errorf("changed: %v", b.changed)
	}
}

// A restart after the clock went back: others know a later epoch.
func TestClockWentBack(t *testing.T) {
	t.Parallel()
	a, b := newStore(1, 100), newStore(2, 100)
	put(t, a, "old", "1")
	apply(t, b, over(t, a.everything()), applied)
	again := newStore(1, 50)
	put(t, again, "new", "1")
	apply(t, b, over(t, again.everything()), outdated)
	again.lacking(b.heads())
	if !again.anew {
		t.Fatal("it does not know that it was overtaken")
	}
	apply(t, b, over(t, again.everything()), applied)
	wants(t, b, "1 new=1")
	if again.anew || again.own().epoch != 101 {
		t.Errorf("epoch %d, anew %t", again.own().epoch, again.anew)
	}
}

func TestForgottenDeletions(t *testing.T) {
	t.Parallel()
	a, b, c := newStore(1, 100), newStore(2, 100), newStore(3, 100)
	put(t, a, "stays", "1")
	for i := range 3000 {
		put(t, a, fmt.Sprint(i), "1")
		if i == 10 {
			apply(t, b, over(t, a.everything()), applied)
		}
		if i > 5 {
			del(t, a, fmt.Sprint(i-5))
		}
		if i == 2990 {
			pullFrom(t, c, a)
		}
	}
	if n := len(a.own().items); n > 3*keepDeleted {
		t.Errorf("%d items for %d entries", n, len(a.all(tab)))
	}
	pullFrom(t, b, a) // too far behind: all anew
	x, _ := a.own().since(head{100, c.replicas[1].seq})
	if x.complete || len(x.items) > 50 {
		t.Errorf("who is little behind gets %d items, complete: %t", len(x.items), x.complete)
	}
	pullFrom(t, c, a)
	for _, s := range []*store{b, c} {
		if got, want := text(s), text(a); got != want {
			t.Errorf("got %s\nwant %s", got, want)
		}
	}
}

func TestDeadOriginExpires(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	a, b := newStore(1, 100), newStore(2, 100)
	put(t, a, "x", "1")
	put(t, b, "y", "1")
	apply(t, b, over(t, a.everything()), applied)
	alive := true
	step := func(d time.Duration) {
		now = now.Add(d)
		b.expire(now, func(peer.Name) bool { return alive })
	}
	step(time.Hour)
	alive = false
	step(time.Second)
	step(59 * time.Second)
	wants(t, b, "1 x=1, 2 y=1")
	alive = true
	step(10 * time.Second)
	alive = false
	step(time.Second)
	step(60 * time.Second)
	wants(t, b, "1 x=1, 2 y=1")
	clear(b.changed)
	step(time.Second)
	wants(t, b, "2 y=1")
	if _, ok := b.changed[tab]; !ok {
		t.Error("the change is not noted")
	}
	b.reach[1], a.reach[2] = true, true
	pullFrom(t, b, a)
	wants(t, b, "1 x=1, 2 y=1")
}

// Nothing out of reach is handed on: others would never get rid of it.
func TestUnreachableOriginIsNotHandedOn(t *testing.T) {
	t.Parallel()
	a, b, c := newStore(1, 100), newStore(2, 100), newStore(3, 100)
	put(t, a, "x", "1")
	apply(t, b, over(t, a.everything()), applied)
	b.reach[3], c.reach[2] = true, true
	pullFrom(t, c, b)
	pullFrom(t, b, c)
	wants(t, c, "")
	if b.root() != c.root() {
		t.Error("roots differ for a peer out of reach")
	}
}

func TestEntryLimits(t *testing.T) {
	t.Parallel()
	a := newStore(1, 100)
	if a.set(ident{tab, strings.Repeat("k", MaxKey+1)}, nil, false) == nil {
		t.Error("a long key is accepted")
	}
	if a.set(ident{tab, "k"}, make([]byte, MaxValue+1), false) == nil {
		t.Error("a long value is accepted")
	}
	for i := range 2 * maxOwned / MaxValue {
		if a.set(ident{tab, fmt.Sprint(i)}, make([]byte, MaxValue), false) != nil {
			break
		}
	}
	if n := a.own().size; n < maxOwned || n > maxOwned+2*MaxValue {
		t.Errorf("%d bytes", n)
	}
	if err := a.set(ident{tab, "0"}, nil, true); err != nil {
		t.Error(err)
	}
}

// Many peers change, lose broadcasts, restart and pull at random; at the end
// all hold what each origin holds.
func TestConvergence(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		const n = 6
		var all [n]*store
		epoch := uint64(1)
		fresh := func(i int) {
			epoch++
			all[i] = newStore(peer.Name(i+1), epoch)
			for j := range n {
				all[i].reach[peer.Name(j+1)] = j != i
			}
		}
		for i := range n {
			fresh(i)
		}
		for range 3000 {
			i, j := rnd.IntN(n), rnd.IntN(n)
			switch key := fmt.Sprint(rnd.IntN(30)); rnd.IntN(20) {
			case 0:
				pullFrom(t, all[i], all[j])
			case 1:
				if rnd.IntN(20) == 0 {
					fresh(i)
				}
			case 2, 3, 4:
				if x, ok := all[i].delta(); ok {
					for k := range n {
						if k != i && rnd.IntN(3) > 0 {
							all[k].apply(over(t, x))
						}
					}
				}
			case 5, 6, 7, 8:
				del(t, all[i], key)
			default:
				put(t, all[i], key, fmt.Sprint(rnd.IntN(5)))
			}
		}
		for range 2 {
			for i := range n {
				pullFrom(t, all[(i+1)%n], all[i])
			}
		}
		var want []string
		for i := range n {
			own := newStore(99, 1)
			own.replicas[peer.Name(i+1)] = all[i].own()
			if s := text(own); s != "" {
				want = append(want, s)
			}
		}
		for i := range n {
			wants(t, all[i], strings.Join(want, ", "))
			if all[i].root() != all[0].root() {
				t.Errorf("seed %d: roots differ", seed)
			}
		}
	}
}
