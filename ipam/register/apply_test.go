package register

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"weave.local/ipam/space"
	"weave.local/peer"
)

func rangeOf(s string) space.Range { return space.FromPrefix(netip.MustParsePrefix(s)) }

func found(t *testing.T, rng string, n int) *State {
	t.Helper()
	var ids []ID
	for i := range n {
		ids = append(ids, ID{peer.Name(i + 1), uint64(100 + i)})
	}
	s := Found(Cluster{1}, netip.MustParsePrefix(rng), ids)
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	return s
}

// ask is the next request of a member.
func ask(s *State, name peer.Name, ops ...Op) Request {
	m, _ := s.Member(name)
	return Request{From: m.ID, Epoch: m.Epoch, Serial: m.Serial + 1, Ops: ops}
}

func apply(t *testing.T, s *State, q ...Request) *State {
	t.Helper()
	next := s.Apply(q, nil, nil, nil)
	if next == nil {
		t.Fatalf("nothing came of %+v", q)
	}
	if err := next.Validate(); err != nil {
		t.Fatal(err)
	}
	return next
}

// A release that comes a second time, after the same addresses were granted
// to the same peer again, must not take them away while they are in use.
func TestLateReleaseIsVoid(t *testing.T) {
	s := found(t, "10.32.0.0/24", 2)
	s = apply(t, s, ask(s, 1, Op{Kind: OpGrant, Subnet: s.Range}))
	block := s.Owned(1).Ranges()[0]
	release := ask(s, 1, Op{Kind: OpRelease, Range: block, To: 2})
	s = apply(t, s, release)
	if !s.Owned(2).Covers(block) {
		t.Fatal("not released")
	}
	s = apply(t, s, ask(s, 2, Op{Kind: OpRelease, Range: block, To: 1}))
	for _, late := range []Request{
		release,
		{From: release.From, Epoch: release.Epoch, Serial: release.Serial + 5, Ops: release.Ops},
	} {
		if next := s.Apply([]Request{late}, nil, nil, nil); next != nil {
			t.Fatalf("serial %d after %+v was carried out: %+v", late.Serial, s.Members[0], next.Grants)
		}
	}
	// Nor does one of an epoch before the peer lost its store.
	again := ask(s, 1, Op{Kind: OpRelease, Range: block})
	s = apply(t, s, Request{From: ID{1, 999}})
	if !s.Owned(1).Covers(block) {
		t.Fatal("a new store lost what containers use")
	}
	if next := s.Apply([]Request{again}, nil, nil, nil); next != nil {
		t.Fatal("a request of the old store was carried out")
	}
	if m, _ := s.Member(1); m.Epoch != s.Version || m.Serial != 0 {
		t.Fatalf("member %+v in version %d", m, s.Version)
	}
}

func TestShares(t *testing.T) {
	for _, c := range []struct {
		rng, subnet string
		peers       uint64
		want        string
	}{
		{"10.32.0.0/12", "10.32.0.0/12", 3, "10.32.0.0-10.32.255.255"}, // the cap
		{"10.32.0.0/16", "10.32.0.0/16", 3, "10.32.0.0-10.32.31.255"},
		{"10.32.0.0/16", "10.32.1.0/24", 3, "10.32.1.0-10.32.1.31"},
		{"10.32.0.0/16", "10.32.1.0/24", 1, "10.32.1.0-10.32.1.63"},
		{"10.32.0.0/16", "10.32.1.0/24", 1000, "10.32.1.1"},
		{"10.32.0.0/16", "10.32.1.0/30", 1, "10.32.1.1"},
		{"10.32.0.0/25", "10.32.0.0/24", 1, "10.32.0.0-10.32.0.31"}, // subnet larger than the range
		{"10.32.0.0/16", "10.33.0.0/24", 1, ""},
		{"10.32.0.0/16", "10.32.0.0/31", 1, ""},
	} {
		s := Found(Cluster{1}, netip.MustParsePrefix(c.rng), []ID{{1, 1}})
		got, ok := share(s.Pool(), netip.MustParsePrefix(c.subnet), c.peers)
		if ok != (c.want != "") || ok && got.String() != c.want {
			t.Errorf("%+v: %v %v", c, got, ok)
		}
	}
}

func TestKeepersAreOddAndLive(t *testing.T) {
	for members, want := range map[int]int{1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5, 9: 5} {
		if s := found(t, "10.32.0.0/24", members); len(s.Keepers) != want {
			t.Errorf("%d members: keepers %v, want %d", members, s.Keepers, want)
		}
	}
	s := found(t, "10.32.0.0/24", 5)
	s = apply(t, s, ask(s, 1, Op{Kind: OpRemove, To: 2}))
	if !slices.Equal(s.Keepers, []peer.Name{1, 3, 4}) {
		t.Errorf("keepers %v", s.Keepers)
	}
	next := s.Apply([]Request{ask(s, 1)}, nil, []peer.Name{1, 4, 5}, nil)
	if !slices.Equal(next.Keepers, []peer.Name{1, 4, 5}) {
		t.Errorf("with 3 gone: keepers %v", next.Keepers)
	}
}

func TestComputedIsTheSameEverywhereAndShared(t *testing.T) {
	a := Computed(Cluster{1}, testRange, []peer.Name{1, 2, 3})
	b := Computed(Cluster{1}, testRange, []peer.Name{3, 2, 1, 1})
	if string(a.Append(nil)) != string(b.Append(nil)) || a.Validate() != nil {
		t.Fatalf("%+v\n%+v", a, b)
	}
	for _, n := range []peer.Name{1, 2, 3} {
		if got := a.Owned(n).Size(); got != 32 {
			t.Errorf("%v has %d addresses", n, got)
		}
	}
}

// TestApplyAgainstSlowOracle carries out random requests, fresh ones and late
// ones, and compares with an owner per address.
func TestApplyAgainstSlowOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := Found(Cluster{1}, netip.MustParsePrefix("10.32.0.0/26"), []ID{{1, 1}, {2, 2}, {3, 3}})
		owner := map[netip.Addr]peer.Name{}
		var sent []Request
		name := func(label string) peer.Name { return peer.Name(rapid.IntRange(1, 4).Draw(t, label)) }
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			if len(sent) > 0 && rapid.IntRange(0, 3).Draw(t, "late") == 0 {
				q := sent[rapid.IntRange(0, len(sent)-1).Draw(t, "which")]
				if next := s.Apply([]Request{q}, nil, nil, nil); next != nil && q.Epoch != 0 {
					t.Fatalf("%+v was carried out twice", q)
				}
				continue
			}
			from := name("from")
			q := ask(s, from, drawOp(t, name("to")))
			if _, ok := s.Member(from); !ok {
				q = Request{From: ID{from, uint64(from)}}
			}
			next := s.Apply([]Request{q}, nil, nil, nil)
			if next == nil {
				t.Fatalf("%+v was refused", q)
			}
			sent = append(sent, q)
			follow(t, owner, s, next, from, q)
			s = next
		}
	})
}

func drawOp(t *rapid.T, to peer.Name) Op {
	first := netip.MustParseAddr("10.32.0.0").As4()
	first[3] = byte(rapid.IntRange(0, 70).Draw(t, "first"))
	last := first
	last[3] += byte(rapid.IntRange(0, 20).Draw(t, "length"))
	r := space.Range{First: netip.AddrFrom4(first), Last: netip.AddrFrom4(last)}
	switch OpKind(rapid.IntRange(1, 6).Draw(t, "kind")) {
	case OpGrant:
		return Op{Kind: OpGrant, Subnet: netip.PrefixFrom(r.First, rapid.IntRange(24, 30).Draw(t, "bits")).Masked(), Peers: 3}
	case OpBlock:
		return Op{Kind: OpBlock, Range: r}
	case OpRemove:
		return Op{Kind: OpRemove, To: to}
	case OpLeave:
		return Op{Kind: OpLeave}
	default:
		return Op{Kind: OpRelease, Range: r, To: to}
	}
}

// follow checks what became of every address.
func follow(t *rapid.T, owner map[netip.Addr]peer.Name, s, next *State, from peer.Name, q Request) {
	if err := next.Validate(); err != nil {
		t.Fatal(err)
	}
	var op Op
	if len(q.Ops) > 0 {
		op = q.Ops[0]
	}
	_, heir := next.Member(op.To)
	for a := s.Range.Addr(); s.Range.Contains(a); a = a.Next() {
		was, want := owner[a], owner[a]
		g, _ := next.Owner(a)
		switch {
		case (op.Kind == OpGrant || op.Kind == OpBlock) && was == 0 && g.Owner == from:
			want = from
			if op.Kind == OpGrant && !op.Subnet.Contains(a) {
				t.Fatalf("%v is outside %v", a, op.Subnet)
			}
		case op.Kind == OpRelease && was == from && op.Range.Contains(a):
			want = 0
			if heir {
				want = op.To
			}
		case op.Kind == OpRemove && was == op.To && op.To != from:
			want = from
		case op.Kind == OpLeave && was == from && len(s.Members) > 1:
			want = 0
		}
		if g.Owner != want {
			t.Fatalf("%v: %v, was %v, want %v after %+v", a, g.Owner, was, want, q)
		}
		owner[a] = want
	}
	if op.Kind == OpBlock {
		if g, ok := next.Owner(op.Range.First); s.Range.Contains(op.Range.First) && !ok {
			t.Fatalf("%v is still nobody's: %v", op.Range.First, g)
		}
	}
}

func TestFullRegisterRefusesAndLives(t *testing.T) {
	s := Found(Cluster{1}, netip.MustParsePrefix("10.0.0.0/8"), []ID{{1, 1}, {2, 2}, {3, 3}})
	for i := range (MaxStateSize - s.size()) / 15 { // grants that never touch, 15 octets each
		a := netip.AddrFrom4([4]byte{10, byte(i >> 15), byte(i >> 7), byte(i << 1)})
		s.Grants = append(s.Grants, Grant{space.Single(a), 1, 1})
	}
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	var all []Request
	for i := range 3 {
		var ops []Op
		for j := range 200 {
			a := netip.AddrFrom4([4]byte{10, byte(200 + i), byte(j), 17})
			ops = append(ops, Op{Kind: OpBlock, Range: space.Single(a)})
		}
		all = append(all, ask(s, peer.Name(i+1), ops...))
	}
	if next := s.Apply(all, nil, nil, nil); next != nil {
		t.Fatalf("%d octets, more than %d", next.size(), MaxStateSize)
	}
	if next := s.Apply([]Request{ask(s, 1, Op{Kind: OpRelease, Range: rangeOf("10.0.0.0/9")})}, nil, nil, nil); next == nil || next.size() >= s.size() {
		t.Fatal("a full register takes nothing back")
	}
}

func TestValidateFindsEveryFault(t *testing.T) {
	good := apply(t, found(t, "10.32.0.0/24", 3), Request{From: ID{9, 9}, Ops: []Op{{Kind: OpGrant, Subnet: testRange}}})
	for name, spoil := range map[string]func(*State){
		"version 0":        func(s *State) { s.Version = 0 },
		"no cluster":       func(s *State) { s.Cluster = Cluster{} },
		"host bits":        func(s *State) { s.Range = netip.MustParsePrefix("10.32.0.1/24") },
		"no keeper":        func(s *State) { s.Keepers = nil },
		"stranger keeps":   func(s *State) { s.Keepers[2] = 77 },
		"keepers unsorted": func(s *State) { s.Keepers[0], s.Keepers[1] = s.Keepers[1], s.Keepers[0] },
		"members unsorted": func(s *State) { s.Members[0], s.Members[1] = s.Members[1], s.Members[0] },
		"future epoch":     func(s *State) { s.Members[0].Epoch = s.Version + 1 },
		"stranger owns":    func(s *State) { s.Grants[0].Owner = 77 },
		"old epoch":        func(s *State) { s.Grants[0].Epoch-- },
		"outside":          func(s *State) { s.Grants[0].Last = netip.MustParseAddr("10.32.1.0") },
		"backwards": func(s *State) {
			s.Grants[0].First, s.Grants[0].Last = s.Grants[0].Last, s.Grants[0].First
		},
		"overlap": func(s *State) { s.Grants = append(s.Grants, s.Grants[0]) },
	} {
		s := good.clone()
		spoil(s)
		if err := s.Validate(); err == nil {
			t.Errorf("%s: no fault found", name)
		}
	}
}

func ExampleCluster_String() {
	fmt.Println(Cluster{0x12, 0x34, 15: 0xff})
	// Output: 12340000-0000-0000-0000-0000000000ff
}
