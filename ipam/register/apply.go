package register

import (
	"cmp"
	"crypto/sha256"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"weave.local/ipam/space"
	"weave.local/peer"
)

// OpKind says what a member asks of the register.
type OpKind byte

// The operations of a request.
const (
	// OpGrant asks for a block of the pool within Subnet.
	OpGrant OpKind = 1 + iota
	// OpBlock asks for the one address Range.First, out of the pool, with a
	// few neighbours.
	OpBlock
	// OpRelease gives Range, where it is the sender's, to peer To; to the
	// pool when To is zero or no member.
	OpRelease
	// OpRemove removes peer To, which is off for good; its grants go to the
	// sender.
	OpRemove
	// OpLeave removes the sender; its grants go to the pool. The last member
	// cannot leave.
	OpLeave
	// OpRenew begins a new epoch of the sender, with Lease; what it was granted
	// stays its own.
	OpRenew
)

// Op is one operation.
type Op struct {
	Kind   OpKind
	Subnet netip.Prefix  // OpGrant
	Peers  uint64        // OpGrant: how many peers the sender knows
	Range  space.Range   // OpBlock, OpRelease
	To     peer.Name     // OpRelease, OpRemove
	Lease  time.Duration // OpRenew
}

// Request is what a member asks for at once. With Epoch 0 the sender asks to
// be a member; only OpGrant, OpBlock and OpRenew may go with it. Off are peers that,
// on a person's word, are off for good.
type Request struct {
	From   ID
	Epoch  uint64
	Serial uint64
	Ops    []Op
	Off    []peer.Name
}

const (
	// maxChunk bounds a block granted at once, in addresses.
	maxChunk = 1 << 16
	// claimBits is log2 of the block granted around a claimed address.
	claimBits = 4
)

// stale says whether r cannot change s any more: it was carried out, or the
// sender's membership is not the one it thinks.
func (s *State) stale(r *Request) bool {
	m, ok := s.Member(r.From.Name)
	if r.Epoch == 0 {
		return ok && m.Is(r.From)
	}
	return !ok || !m.Is(r.From) || m.Epoch != r.Epoch || r.Serial <= m.Serial
}

// Apply is the version after s in which those of the requests have been
// carried out that are next in their sender's order, and in which those who are
// gone, their leases being over, are no members; nil when neither changes
// anything. Keepers are taken from live first; where there are to be fewer than
// before, those stay who are sound: known to have what they promised.
func (s *State) Apply(requests []Request, gone []Tenancy, live, sound []peer.Name) *State {
	if len(requests) == 0 && len(gone) == 0 {
		return nil
	}
	next := s.clone()
	next.Version++
	changed := false
	for i := range requests {
		trial := next.clone()
		if trial.request(&requests[i]) && trial.size() <= MaxStateSize {
			next, changed = trial, true
		}
	}
	for _, t := range gone { // whoever has just begun another epoch is not
		if m, ok := next.Member(t.Name); ok && m.Epoch == t.Epoch && m.Lease > 0 {
			changed = next.remove(t.Name, 0) || changed
		}
	}
	if !changed {
		return nil
	}
	next.refill(live, sound)
	if !slices.Equal(s.committee(), next.committee()) {
		next.Committee = Committee{next.Term, next.Version}
	}
	return next
}

// force makes s a version without a majority.
func (s *State) force() {
	s.Term++
	s.Committee = Committee{s.Term, s.Version}
}

func (s *State) request(r *Request) bool {
	if s.stale(r) {
		return false
	}
	i, known := s.find(r.From.Name)
	if r.Epoch == 0 {
		s.join(r.From)
	} else {
		if !known || s.Members[i].Serial+1 != r.Serial {
			return false
		}
		s.Members[i].Serial++
		s.Members[i].Store = r.From.Store
	}
	for _, op := range r.Ops {
		if op.Kind == OpGrant || op.Kind == OpBlock || op.Kind == OpRenew || r.Epoch != 0 {
			s.operate(r.From.Name, op)
		}
	}
	return true
}

// join makes id a member in a new epoch. What its name was granted stays its
// own: containers use it, whatever became of the store.
func (s *State) join(id ID) {
	m := Member{ID: id, Epoch: s.Version}
	i, ok := s.find(id.Name)
	if ok {
		s.Members[i] = m
	} else {
		s.Members = slices.Insert(s.Members, i, m)
	}
	s.enter(m)
	// As a keeper of the next version it starts with nothing promised, which
	// is right whatever it lost.
}

// enter makes the grants of m those of its present epoch.
func (s *State) enter(m Member) {
	for i := range s.Grants {
		if s.Grants[i].Owner == m.Name {
			s.Grants[i].Epoch = m.Epoch
		}
	}
}

func (s *State) operate(from peer.Name, op Op) {
	switch op.Kind {
	case OpGrant:
		if block, ok := share(s.Pool(), op.Subnet, max(op.Peers, uint64(len(s.Members)))); ok {
			s.grant(block, from)
		}
	case OpBlock:
		if block, ok := around(s.Pool(), op.Range.First); ok {
			s.grant(block, from)
		}
	case OpRelease:
		s.transfer(from, op.Range, op.To)
	case OpRemove:
		if op.To != from {
			s.remove(op.To, from)
		}
	case OpLeave:
		s.remove(from, 0)
	case OpRenew:
		if i, ok := s.find(from); ok {
			s.Members[i].Epoch, s.Members[i].Serial, s.Members[i].Lease = s.Version, 0, op.Lease
			s.enter(s.Members[i])
		}
	}
}

// share is the block of the pool that one of so many peers gets in subnet:
// with every peer served, half of it is still there.
func share(pool *space.Set, subnet netip.Prefix, peers uint64) (space.Range, bool) {
	all, hosts, ok := both(subnet)
	if !ok {
		return space.Range{}, false
	}
	free := pool.SizeIn(hosts)
	if free == 0 {
		return space.Range{}, false
	}
	return cut(pool, all, hosts, min(max(1, free/(2*max(1, peers))), maxChunk))
}

// both are all addresses of a subnet and those that may be handed out.
func both(subnet netip.Prefix) (all, hosts space.Range, ok bool) {
	hosts, ok = space.Hosts(subnet)
	return space.FromPrefix(subnet), hosts, ok
}

// cut is a block of at most limit addresses of set within all, with at least
// one of hosts in it.
func cut(set *space.Set, all, hosts space.Range, limit uint64) (space.Range, bool) {
	block, ok := set.Chunk(all, limit)
	if ok && block.First == block.Last { // not the one that nobody can use
		block, ok = set.Chunk(hosts, 1)
	}
	return block, ok
}

// Donation is the block a peer gives away out of its free addresses in
// subnet: up to half of them.
func Donation(free *space.Set, subnet netip.Prefix) (space.Range, bool) {
	all, hosts, ok := both(subnet)
	if !ok {
		return space.Range{}, false
	}
	return cut(free, all, hosts, max(1, free.SizeIn(hosts)/2))
}

// around is the largest aligned block of the pool about a, up to
// 2^claimBits addresses.
func around(pool *space.Set, a netip.Addr) (space.Range, bool) {
	for k := min(claimBits, a.BitLen()); k >= 0; k-- {
		block := space.FromPrefix(netip.PrefixFrom(a, a.BitLen()-k))
		if pool.Covers(block) {
			return block, true
		}
	}
	return space.Range{}, false
}

// grant gives r, which is the pool's, to a member.
func (s *State) grant(r space.Range, to peer.Name) {
	m, ok := s.Member(to)
	if !ok {
		return
	}
	at, _ := slices.BinarySearchFunc(s.Grants, r.First, func(g Grant, a netip.Addr) int { return g.First.Compare(a) })
	s.Grants = melt(slices.Insert(s.Grants, at, Grant{r, to, m.Epoch}))
}

// transfer gives what from owns within r to another member; to the pool when
// to is none.
func (s *State) transfer(from peer.Name, r space.Range, to peer.Name) {
	heir, ok := s.Member(to)
	out := make([]Grant, 0, len(s.Grants)+2)
	for _, g := range s.Grants {
		part, overlap := g.Intersect(r)
		if g.Owner != from || !overlap {
			out = append(out, g)
			continue
		}
		if g.First.Less(part.First) {
			out = append(out, Grant{space.Range{First: g.First, Last: part.First.Prev()}, from, g.Epoch})
		}
		if ok {
			out = append(out, Grant{part, to, heir.Epoch})
		}
		if part.Last.Less(g.Last) {
			out = append(out, Grant{space.Range{First: part.Last.Next(), Last: g.Last}, from, g.Epoch})
		}
	}
	s.Grants = melt(out)
}

// melt joins neighbouring grants of one owner into one, in place.
func melt(sorted []Grant) []Grant {
	out := sorted[:0]
	for _, g := range sorted {
		if n := len(out); n > 0 && out[n-1].Owner == g.Owner && out[n-1].Last.Next() == g.First {
			out[n-1].Last = g.Last
			continue
		}
		out = append(out, g)
	}
	return out
}

// remove ends the membership of name; its grants go to heir. The last member
// stays: a register that nobody keeps could never change again.
func (s *State) remove(name, heir peer.Name) bool {
	i, ok := s.find(name)
	if !ok || len(s.Members) == 1 {
		return false
	}
	s.transfer(name, space.FromPrefix(s.Range), heir)
	s.Members = slices.Delete(s.Members, i, i+1)
	return true
}

// refill brings the keepers to the largest odd number, up to MaxKeepers, for
// which there are members: an even one more keeper would have to be up for a
// majority and add nothing. Live members come first, of those the present
// keepers, then those that have been members longest: a keeper that is gone
// is replaced with the next change.
func (s *State) refill(live, sound []peer.Name) {
	s.Keepers = slices.DeleteFunc(s.Keepers, func(k peer.Name) bool {
		_, ok := s.Member(k)
		return !ok
	})
	want := min(MaxKeepers, len(s.Members))
	if want > 0 && want%2 == 0 {
		want--
	}
	rank := slices.Clone(s.Members)
	down := func(n peer.Name) int { return 1 - bit(slices.Contains(live, n)) }
	sitting := func(n peer.Name) int { return 1 - bit(slices.Contains(s.Keepers, n)) }
	unsure := func(n peer.Name) int { return 1 - bit(slices.Contains(sound, n)) }
	slices.SortFunc(rank, func(a, b Member) int {
		return cmp.Or(
			cmp.Compare(down(a.Name), down(b.Name)),
			cmp.Compare(sitting(a.Name), sitting(b.Name)),
			cmp.Compare(unsure(a.Name), unsure(b.Name)),
			cmp.Compare(a.Epoch, b.Epoch),
			cmp.Compare(a.Name, b.Name))
	})
	s.Keepers = nil
	for _, m := range rank[:want] {
		s.Keepers = append(s.Keepers, m.Name)
	}
	slices.Sort(s.Keepers)
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Found is the first version of a new cluster: members as given, nothing
// granted.
func Found(id Cluster, rng netip.Prefix, members []ID) *State {
	s := &State{Version: 1, Cluster: id, Range: rng}
	for _, m := range members {
		s.Members = append(s.Members, Member{ID: m, Epoch: 1})
	}
	slices.SortFunc(s.Members, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	s.Members = slices.CompactFunc(s.Members, func(a, b Member) bool { return a.Name == b.Name })
	s.refill(nil, nil)
	s.Committee = Committee{s.Term, s.Version}
	return s
}

// Computed is the first version that every peer works out alone from the same
// list of names: each is granted an equal block, the largest power of two
// with which half of the range stays in the pool.
func Computed(id Cluster, rng netip.Prefix, names []peer.Name) *State {
	var ids []ID
	for _, n := range names {
		ids = append(ids, ID{Name: n})
	}
	s := Found(id, rng, ids)
	all := space.FromPrefix(rng)
	limit := uint64(1) << (bits.Len64(max(1, all.Size()/(2*uint64(max(1, len(s.Members)))))) - 1)
	for _, m := range s.Members {
		if block, ok := s.Pool().Chunk(all, limit); ok {
			s.grant(block, m.Name)
		}
	}
	return s
}

// SeedCluster is the id that every peer with the same sorted list of names comes
// to.
func SeedCluster(rng netip.Prefix, names []peer.Name) Cluster {
	b := AppendPrefix(nil, rng)
	for _, n := range names {
		b = peer.AppendName(b, n)
	}
	sum := sha256.Sum256(b)
	c := Cluster(sum[:16])
	c[6] = c[6]&0x0f | 0x80 // UUID version 8: made by a rule of our own
	c[8] = c[8]&0x3f | 0x80
	return c
}
