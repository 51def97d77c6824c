package register

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"weave.local/ipam/space"
	"weave.local/peer"
)

// MaxKeepers is how many peers at most agree on the register.
const MaxKeepers = 5

// MaxLease is the longest lease: ten years.
const MaxLease = 10 * 365 * 24 * time.Hour

// Cluster identifies a cluster for its whole life: a random UUID (RFC 9562,
// version 4), born with its first register. The zero Cluster is none.
type Cluster [16]byte

// String writes the UUID in its usual form.
func (c Cluster) String() string {
	h := hex.EncodeToString(c[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// ID is a peer with its durable store. A peer that lost its store comes back
// under the same name with another Store, and what it promised before no
// longer counts. Store 0 in a register stands for any: a computed first
// register knows names only.
type ID struct {
	Name  peer.Name
	Store uint64
}

// Member is a peer that takes part.
type Member struct {
	ID
	// Epoch is the version in which the peer joined, with this store. It
	// grows with every new join, and requests of an older epoch are void.
	Epoch uint64
	// Serial is the number of the last request of this epoch that was carried
	// out; the next is Serial+1, and no other is accepted.
	Serial uint64
	// Lease is how long the peer may use its grants after it last sent a
	// renewal that a majority of keepers acknowledged, in whole milliseconds.
	// 0: for ever, and its grants are never taken back without a person's word.
	Lease time.Duration
}

// Tenancy is a peer in one of its epochs: what leases are about.
type Tenancy struct {
	Name  peer.Name
	Epoch uint64
}

// Committee names a set of keepers: the version that made it, with its term.
// Whatever changes the set or the store of one in it makes another committee.
// The zero Committee is that of registers written before there were leases.
type Committee struct{ Term, Version uint64 }

// Grant says that all addresses of a range are Owner's, and its alone.
type Grant struct {
	space.Range
	Owner peer.Name
	Epoch uint64 // of the owner; always its present one
}

// State is one version of the register. It is immutable once it has been
// handed to anybody.
type State struct {
	// Term counts the versions that were made without a majority of keepers,
	// on the word of a person that the missing ones are off for good.
	Term    uint64
	Version uint64 // from 1
	Cluster Cluster
	Range   netip.Prefix
	Keepers []peer.Name // members, sorted, at most MaxKeepers
	// Committee is since when Keepers are what they are.
	Committee Committee
	Members   []Member // sorted by name
	Grants    []Grant  // sorted, disjoint, within Range, owned by members
}

// Member finds the member called name.
func (s *State) Member(name peer.Name) (Member, bool) {
	if i, ok := s.find(name); ok {
		return s.Members[i], true
	}
	return Member{}, false
}

func (s *State) find(name peer.Name) (int, bool) {
	return slices.BinarySearchFunc(s.Members, name, func(m Member, n peer.Name) int { return cmp.Compare(m.Name, n) })
}

// Is says whether the member is the peer id.
func (m Member) Is(id ID) bool { return m.Name == id.Name && (m.Store == 0 || m.Store == id.Store) }

// committee are the keepers with the stores they are to have.
func (s *State) committee() []ID {
	out := make([]ID, 0, len(s.Keepers))
	for _, k := range s.Keepers {
		m, _ := s.Member(k)
		out = append(out, m.ID)
	}
	return out
}

// Keeper says whether id is a keeper.
func (s *State) Keeper(id ID) bool {
	m, ok := s.Member(id.Name)
	return ok && m.Is(id) && slices.Contains(s.Keepers, id.Name)
}

// Owner is the grant that holds a; there is none in a nil State.
func (s *State) Owner(a netip.Addr) (Grant, bool) {
	if s == nil {
		return Grant{}, false
	}
	i, _ := slices.BinarySearchFunc(s.Grants, a, func(g Grant, a netip.Addr) int { return g.Last.Compare(a) })
	if i < len(s.Grants) && s.Grants[i].Contains(a) {
		return s.Grants[i], true
	}
	return Grant{}, false
}

// Owners are those who are granted some of what may be handed out of a subnet,
// or the one address, by address.
func (s *State) Owners(of netip.Prefix) []peer.Name {
	sought, ok := space.Hosts(of)
	if !ok {
		sought = space.FromPrefix(of)
	}
	var out []peer.Name
	for _, g := range s.Grants {
		if _, overlap := g.Intersect(sought); overlap && !slices.Contains(out, g.Owner) {
			out = append(out, g.Owner)
		}
	}
	return out
}

// Allows says whether a peer may have an address: not when it is granted to
// another. A nil State allows all.
func (s *State) Allows(name peer.Name, a netip.Addr) bool {
	g, ok := s.Owner(a)
	return !ok || g.Owner == name
}

// Owned are the addresses granted to name.
func (s *State) Owned(name peer.Name) *space.Set {
	var out space.Set
	for _, g := range s.Grants {
		if g.Owner == name {
			out.Add(g.Range)
		}
	}
	return &out
}

// Pool are the addresses granted to nobody.
func (s *State) Pool() *space.Set {
	var out space.Set
	all := space.FromPrefix(s.Range)
	next := all.First // of what no grant so far holds
	for _, g := range s.Grants {
		if next.Less(g.First) {
			out.Add(space.Range{First: next, Last: g.First.Prev()})
		}
		if g.Last == all.Last {
			return &out
		}
		next = g.Last.Next()
	}
	out.Add(space.Range{First: next, Last: all.Last})
	return &out
}

// Newer says whether s is to replace o: both of one cluster, and s of a later
// term or, in the same term, of a later version. Two different states with
// the same numbers exist only when people declared peers off on two sides at
// once; the bytes decide then, the same way everywhere.
func (s *State) Newer(o *State) bool {
	if c := cmp.Or(cmp.Compare(s.Term, o.Term), cmp.Compare(s.Version, o.Version)); c != 0 {
		return c > 0
	}
	return string(s.Append(nil)) > string(o.Append(nil))
}

func (s *State) clone() *State {
	n := *s
	n.Keepers = slices.Clone(s.Keepers)
	n.Members = slices.Clone(s.Members)
	n.Grants = slices.Clone(s.Grants)
	return &n
}

// Validate checks every invariant that the comments of State, Member and
// Grant name.
func (s *State) Validate() error {
	switch {
	case s.Version == 0:
		return fmt.Errorf("register of version 0")
	case s.Cluster == Cluster{}:
		return fmt.Errorf("register without a cluster id")
	case !s.Range.IsValid() || s.Range != s.Range.Masked():
		return fmt.Errorf("register of range %v", s.Range)
	case len(s.Keepers) > MaxKeepers || len(s.Keepers) == 0:
		return fmt.Errorf("register with %d keepers", len(s.Keepers))
	}
	for i, m := range s.Members {
		if m.Name == 0 || m.Epoch == 0 || m.Epoch > s.Version || i > 0 && m.Name <= s.Members[i-1].Name {
			return fmt.Errorf("register with member %s, epoch %d, out of order or of no epoch", m.Name, m.Epoch)
		}
		if m.Lease < 0 || m.Lease > MaxLease {
			return fmt.Errorf("register with member %s, lease %v, want at most %v", m.Name, m.Lease, MaxLease)
		}
	}
	for i, k := range s.Keepers {
		if _, ok := s.Member(k); !ok || i > 0 && k <= s.Keepers[i-1] {
			return fmt.Errorf("register with keeper %s, no member or out of order", k)
		}
	}
	all := space.FromPrefix(s.Range)
	for i, g := range s.Grants {
		m, ok := s.Member(g.Owner)
		if !ok || m.Epoch != g.Epoch {
			return fmt.Errorf("register grants %s to %s, epoch %d, which is no member", g.Range, g.Owner, g.Epoch)
		}
		if !g.Valid() || !all.Covers(g.Range) || i > 0 && !s.Grants[i-1].Last.Less(g.First) {
			return fmt.Errorf("register grants %s, which overlaps or is outside %s", g.Range, s.Range)
		}
	}
	return nil
}
