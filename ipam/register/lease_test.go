package register

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"weave.local/peer"
)

// leasedState is a register of three members that are its keepers.
func leasedState() *State {
	s := Found(Cluster{1}, netip.MustParsePrefix("10.32.0.0/24"), []ID{{1, 1}, {2, 2}, {3, 3}})
	for i := range s.Members {
		s.Members[i].Lease = 10 * time.Second
	}
	return s
}

func answers(s *State, r Renewal, from ...peer.Name) []Answer {
	var out []Answer
	for _, n := range from {
		m, _ := s.Member(n)
		out = append(out, Answer{From: m.ID, Renewal: r})
	}
	return out
}

// A lease lasts from when the renewal was sent, with a majority, and each keeper
// counts once.
func TestLeaseLasts(t *testing.T) {
	s := leasedState()
	l := Lease{Self: ID{1, 1}, Want: 10 * time.Second}
	l.Set(LeaseOver)
	r, ok := l.Renew(time.Hour, 7, s)
	if _, again := l.Renew(time.Hour, 8, s); !ok || again {
		t.Fatalf("due: %v, and again at once: %v", ok, again)
	}
	for _, a := range append(answers(s, r, 2, 2), Answer{From: ID{3, 9}, Renewal: r}, Answer{From: ID{4, 4}, Renewal: r}) {
		if l.Answered(a, s) {
			t.Fatalf("%+v made a majority", a)
		}
	}
	if !l.Answered(answers(s, r, 3)[0], s) || l.Until() != time.Hour+10*time.Second {
		t.Fatalf("with two of three: until %v", l.Until())
	}
}

// A lease may have been given after the machine was started again, or to be
// learned then: of one that was asked for before that nothing is left until it is
// renewed.
func TestLeaseAskedForBeforeTheStart(t *testing.T) {
	given := leasedState()
	asked := leasedState()
	asked.Members[0].Lease = 0
	for name, known := range map[string]*State{"no register": nil, "one of before": asked} {
		l := Lease{Self: ID{1, 1}, Want: 10 * time.Second}
		if op, ok := l.Demand(time.Minute, asked); !ok || op.Lease != l.Want {
			t.Fatalf("%+v is asked for", op)
		}
		record := l.Append(nil, "that boot")
		l = Lease{Self: l.Self, Want: l.Want}
		l.Load(record, "this boot", known)
		if known != nil {
			l.Demand(time.Second, known)
		}
		if until := l.Fence(given, false); until != LeaseOver {
			t.Fatalf("%s: fence at %v", name, until)
		}
		r, ok := l.Renew(time.Hour, 7, given)
		if !ok {
			t.Fatal("no renewal is due")
		}
		for _, a := range answers(given, r, 2, 3) {
			l.Answered(a, given)
		}
		if until := l.Fence(given, false); until != time.Hour+10*time.Second {
			t.Fatalf("%s: fence at %v after a renewal", name, until)
		}
	}
	l := Lease{Self: ID{1, 1}, Want: 10 * time.Second}
	l.Load((&Lease{}).Append(nil, "that boot"), "this boot", asked)
	if l.Until() != 0 {
		t.Error("a host that never asked for a lease is cut off")
	}
}

// An answer of another committee than the one that the peer knows counts
// nothing, nor does a keeper give one as a committee that it is not.
func TestStaleCommittee(t *testing.T) {
	old := leasedState()
	now := old.clone()
	now.Version, now.Committee = 2, Committee{0, 2}
	l := Lease{Self: ID{1, 1}, Want: 10 * time.Second}
	l.Set(LeaseOver)
	r, _ := l.Renew(time.Hour, 7, old)
	for _, a := range answers(old, r, 2, 3) {
		if l.Answered(a, now) {
			t.Fatal("acknowledgements of an earlier committee count")
		}
	}
	keeper, err := New(Config{Self: ID{2, 2}, Range: now.Range, Quorum: 3, Rand: rand.New(rand.NewPCG(1, 1))}, now, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(100, 0)
	ask := func(r Renewal) (kinds []Kind) {
		e := keeper.Receive(at, 1, &Message{Kind: KindRenew, Cluster: now.Cluster, Range: now.Range, Store: 1, Renewal: r})
		for _, env := range e.Send {
			kinds = append(kinds, env.Kind)
		}
		return kinds
	}
	if got := ask(r); len(got) != 1 || got[0] != KindChosen {
		t.Errorf("to an earlier committee: answers %v, want the newest version", got)
	}
	r.Committee = now.Committee
	if got := ask(r); len(got) != 1 || got[0] != KindAck {
		t.Errorf("to its own committee: answers %v", got)
	}
	// Having accepted a version with another committee, it says nothing.
	next := now.clone()
	next.Version, next.Committee = 3, Committee{0, 3}
	keeper.Receive(at, 3, &Message{Kind: KindAccept, Cluster: now.Cluster, Range: now.Range, Store: 3, Version: 3, Ballot: Ballot{1, 3}, State: next})
	if got := ask(r); len(got) != 0 {
		t.Errorf("having accepted the next committee: answers %v", got)
	}
}

// What of a keeper's silence is on disk is never longer than what it counted,
// and a frozen tenancy stays so.
func TestSilenceOverRestart(t *testing.T) {
	s := leasedState()
	cfg := Config{Self: ID{2, 2}, Range: s.Range, Quorum: 3, Rand: rand.New(rand.NewPCG(1, 1))}
	n, err := New(cfg, s, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(100, 0)
	pass := func(d time.Duration) {
		for end := at.Add(d); at.Before(end); at = at.Add(100 * time.Millisecond) {
			n.Tick(at)
		}
	}
	pass(time.Second) // the first look is where it begins
	pass(8 * time.Second)
	counted := n.watch.of(Tenancy{1, 1}).lasts
	n, err = New(cfg, s, n.Acceptor())
	if err != nil {
		t.Fatal(err)
	}
	if kept := n.watch.of(Tenancy{1, 1}).lasts; kept > counted || kept < counted-10*time.Second/keep {
		t.Fatalf("%v of %v kept", kept, counted)
	}
	at = at.Add(time.Hour) // it did not run, and heard nobody
	pass(time.Second)
	if len(n.frozen()) > 0 {
		t.Fatal("time in which the keeper did not run is silence")
	}
	pass(10 * time.Second)
	if n, err = New(cfg, s, n.Acceptor()); err != nil || len(n.frozen()) != 2 {
		t.Fatalf("frozen after the next restart: %v, %v", n.frozen(), err)
	}
	late := Renewal{Nonce: 1, Epoch: s.Members[0].Epoch, Committee: s.Committee}
	e := n.Receive(at, 1, &Message{Kind: KindRenew, Cluster: s.Cluster, Range: s.Range, Store: 1, Renewal: late})
	if len(e.Send) != 1 || e.Send[0].Kind != KindFrozen {
		t.Errorf("a frozen member that renews gets %+v", e.Send)
	}
}

// A keeper's silence is longer than a lease by any two clocks of which neither
// is wrong by more than 2 %.
func TestMargin(t *testing.T) {
	for _, lease := range []time.Duration{time.Second, 24 * time.Hour, MaxLease} {
		longest := time.Duration(float64(lease) / 0.98)          // by the holder's clock
		shortest := time.Duration(float64(margin(lease)) / 1.02) // by the keeper's
		if shortest <= longest {
			t.Errorf("lease of %v: it may last %v, and is over for a keeper after %v", lease, longest, shortest)
		}
	}
}

// A keeper counts silence from when it learned of its committee: not what it met
// before, as a member or in another committee.
func TestNewKeeper(t *testing.T) {
	s := Found(Cluster{1}, netip.MustParsePrefix("10.32.0.0/24"), []ID{{1, 1}, {2, 2}, {3, 3}, {4, 4}})
	for i := range s.Members {
		s.Members[i].Lease = 10 * time.Second
	}
	next := s.clone()
	next.Version, next.Committee, next.Keepers = 2, Committee{0, 2}, []peer.Name{1, 2, 4}
	for _, self := range []ID{{2, 2}, {4, 4}} {
		n, err := New(Config{Self: self, Range: s.Range, Quorum: 3, Rand: rand.New(rand.NewPCG(1, 1))}, s, nil)
		if err != nil {
			t.Fatal(err)
		}
		at := time.Unix(100, 0)
		for range 200 {
			n.Tick(at)
			at = at.Add(100 * time.Millisecond)
		}
		n.Merge(at, 1, next)
		n.Tick(at)
		if kept := n.watch.of(Tenancy{1, 1}).lasts; kept != 0 || len(n.frozen()) > 0 {
			t.Errorf("peer %v begins with a silence of %v, frozen %v", self.Name, kept, n.frozen())
		}
	}
}
