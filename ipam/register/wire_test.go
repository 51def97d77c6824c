package register

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"weave.local/ipam/space"
	"weave.local/peer"
)

func sample() *State {
	return &State{
		Term: 1, Version: 300, Cluster: Cluster{0xc1}, Range: netip.MustParsePrefix("10.32.0.0/12"),
		Keepers: []peer.Name{0x0a0b0c0d0e0f}, Committee: Committee{1, 299},
		Members: []Member{{ID{0x0a0b0c0d0e0f, 7}, 3, 4, 86_400_000 * time.Millisecond}},
		Grants:  []Grant{{space.FromPrefix(netip.MustParsePrefix("10.32.0.0/24")), 0x0a0b0c0d0e0f, 3}},
	}
}

// The layout of the package comment, octet for octet.
const golden = "02" + "01" + "ac02" + "c1000000000000000000000000000000" + "040a2000000c" +
	"01" + "ab02" + "01" + "0a0b0c0d0e0f" +
	"01" + "0a0b0c0d0e0f" + "0000000000000007" + "03" + "04" + "80b89929" +
	"01" + "0a200000" + "0a2000ff" + "0a0b0c0d0e0f" + "03"

// The same in format 1, which knew no leases.
const goldenWithoutLeases = "01" + "01" + "ac02" + "c1000000000000000000000000000000" + "040a2000000c" +
	"01" + "0a0b0c0d0e0f" +
	"01" + "0a0b0c0d0e0f" + "0000000000000007" + "03" + "04" +
	"01" + "0a200000" + "0a2000ff" + "0a0b0c0d0e0f" + "03"

func TestStateWithoutLeases(t *testing.T) {
	b, err := hex.DecodeString(goldenWithoutLeases)
	if err != nil {
		t.Fatal(err)
	}
	want := sample()
	want.Committee, want.Members[0].Lease = Committee{}, 0
	if got, err := ParseState(b); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
}

func TestStateLayout(t *testing.T) {
	b := sample().Append(nil)
	if got := hex.EncodeToString(b); got != golden {
		t.Fatalf("got  %s\nwant %s", got, golden)
	}
	back, err := ParseState(b)
	if err != nil || !reflect.DeepEqual(back, sample()) {
		t.Fatalf("%+v, %v", back, err)
	}
	for i := range b {
		if _, err := ParseState(b[:i]); err == nil {
			t.Errorf("%d octets of it are taken for a state", i)
		}
	}
}

func messages() []*Message {
	v6 := netip.MustParsePrefix("fd00:1::/64")
	return []*Message{
		{Kind: KindPrepare, Range: testRange, Store: 5, Version: 1, Ballot: Ballot{9, 3}},
		{Kind: KindPromise, Cluster: Cluster{1}, Range: testRange, Term: 2, Version: 301, Ballot: Ballot{9, 3}, Accepted: Ballot{8, 1}, State: sample()},
		{Kind: KindChosen, Want: true, Range: v6, State: sample()},
		{Kind: KindRequest, Range: v6, Request: &Request{
			From: ID{3, 4}, Epoch: 5, Serial: 6, Off: []peer.Name{7},
			Ops: []Op{
				{Kind: OpGrant, Subnet: v6, Peers: 3},
				{Kind: OpBlock, Range: space.Range{First: v6.Addr(), Last: v6.Addr()}},
				{Kind: OpRelease, Range: space.FromPrefix(v6), To: 9},
				{Kind: OpRemove, To: 9},
				{Kind: OpLeave},
				{Kind: OpRenew, Lease: 3 * time.Second},
			},
		}},
		{Kind: KindPromise, Range: testRange, Version: 301, Ballot: Ballot{9, 3}, Frozen: []Tenancy{{7, 8}, {9, 300}}},
		{Kind: KindRenew, Cluster: Cluster{1}, Range: testRange, Renewal: Renewal{1 << 60, 5, Committee{1, 300}}},
		{Kind: KindAck, Cluster: Cluster{1}, Range: testRange, Renewal: Renewal{1, 5, Committee{1, 300}}},
	}
}

func TestMessagesComeBack(t *testing.T) {
	for _, m := range messages() {
		b := m.Append(nil)
		back, err := ParseMessage(b)
		if err != nil || !reflect.DeepEqual(back, m) {
			t.Errorf("%+v\n%+v, %v", m, back, err)
		}
		for i := range b {
			if _, err := ParseMessage(b[:i]); err == nil {
				t.Errorf("%d octets of %+v are taken for a message", i, m)
			}
		}
		if _, err := ParseMessage(append(b, 0)); err == nil {
			t.Errorf("an octet more is taken for a message")
		}
	}
}

func FuzzParseState(f *testing.F) {
	f.Add(sample().Append(nil))
	f.Add(Computed(Cluster{1}, netip.MustParsePrefix("fd00::/48"), []peer.Name{1, 2, 3}).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseState(b)
		if err != nil {
			return
		}
		again, err := ParseState(s.Append(nil))
		if err != nil || !reflect.DeepEqual(s, again) {
			t.Fatalf("%+v comes back as %+v, %v", s, again, err)
		}
		s.Pool()
	})
}

func FuzzParseMessage(f *testing.F) {
	for _, m := range messages() {
		f.Add(m.Append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMessage(b)
		if err != nil {
			return
		}
		again, err := ParseMessage(m.Append(nil))
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Fatalf("%+v comes back as %+v, %v", m, again, err)
		}
		if m.Request != nil { // no request that parses does harm
			s := Found(Cluster{1}, testRange, []ID{{1, 1}, {2, 2}})
			q := *m.Request
			q.From, q.Epoch, q.Serial = ID{1, 1}, 1, 1
			if next := s.Apply([]Request{q}, nil, nil, nil); next != nil {
				if err := next.Validate(); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func FuzzParseAcceptor(f *testing.F) {
	f.Add((&acceptor{version: 301, promised: Ballot{3, 1}, accepted: Ballot{2, 2}, state: sample()}).encode())
	f.Add((&acceptor{version: 1}).encode())
	w := watch{committee: Committee{1, 2}}
	*w.of(Tenancy{3, 4}) = silence{lasts: time.Hour, kept: time.Hour, frozen: true}
	*w.of(Tenancy{5, 6}) = silence{lasts: time.Second, kept: time.Second}
	f.Add(w.append((&acceptor{version: 1}).encode()))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, w, err := parseAcceptor(b)
		if err != nil {
			return
		}
		kept := w.append(nil)
		b2 := append(a.encode(), kept...)
		again, wAgain, err := parseAcceptor(b2)
		if err != nil || !reflect.DeepEqual(a, again) || !bytes.Equal(kept, wAgain.append(nil)) {
			t.Fatalf("%+v %+v comes back as %+v %+v, %v", a, w, again, wAgain, err)
		}
	})
}
