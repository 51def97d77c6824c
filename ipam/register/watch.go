package register

import (
	"cmp"
	"encoding/binary"
	"slices"
	"time"

	"weave.local/peer"
)

const (
	// lookLeast and lookMost bound the time between two looks at the silence of
	// members, a hundredth of the shortest lease.
	lookLeast = 50 * time.Millisecond
	lookMost  = time.Minute
	// keep is the part of a lease by which the silence on disk may lag behind.
	keep = 8
	// retake is how long after a round in which no majority had frozen anybody
	// this keeper begins the next one for that reason.
	retake = time.Second
)

// margin is the silence after which a lease is over for sure, though the
// clocks of two hosts do not run at quite the same speed.
func margin(lease time.Duration) time.Duration { return lease + lease/20 }

// watch is what a keeper knows of the silence of members: for how long at least
// it has acknowledged no renewal of theirs, since it learned that its committee
// was chosen. It counts while it runs only, and what it forgets makes the
// silence shorter, never longer.
type watch struct {
	committee Committee
	silences  map[Tenancy]*silence
	last      time.Time // until when it was counted; zero: not yet in this run
}

type silence struct {
	lasts  time.Duration
	kept   time.Duration // what of it is on disk
	frozen bool          // never acknowledged again
}

// settle keeps of a watch what is still true in s. Another committee knows
// nothing of the silence that an earlier one met.
func (w *watch) settle(s *State) {
	if s == nil || w.committee != s.Committee {
		*w = watch{last: w.last}
	}
	if s == nil {
		return
	}
	w.committee = s.Committee
	for t := range w.silences {
		if m, ok := s.Member(t.Name); !ok || m.Epoch != t.Epoch {
			delete(w.silences, t)
		}
	}
}

// of is the silence of a member, from nothing on when it is not known.
func (w *watch) of(t Tenancy) *silence {
	if w.silences == nil {
		w.silences = map[Tenancy]*silence{}
	}
	s := w.silences[t]
	if s == nil {
		s = &silence{}
		w.silences[t] = s
	}
	return s
}

// keeps says whether this peer is a keeper whose acknowledgements count.
func (n *Node) keeps() bool {
	if n.state == nil || n.cfg.Self.Store == 0 {
		return false
	}
	m, _ := n.state.Member(n.cfg.Self.Name)
	return m.ID == n.cfg.Self && slices.Contains(n.state.Keepers, m.Name)
}

// look is the time between two looks.
func (n *Node) look() time.Duration {
	every := lookMost
	for _, m := range n.state.Members {
		if m.Lease > 0 {
			every = min(every, max(m.Lease/renewals, lookLeast))
		}
	}
	return every
}

// nextLook is when count has something to do; zero: never.
func (n *Node) nextLook() time.Time {
	if !n.keeps() || !slices.ContainsFunc(n.state.Members, func(m Member) bool { return m.Lease > 0 }) {
		return time.Time{}
	}
	return n.watch.last.Add(n.look())
}

// count adds the time since it was last called to the silence of all members.
// Of a longer time than this peer leaves between two looks, it was not running
// itself, and could not have heard anybody.
func (n *Node) count(now time.Time) {
	w := &n.watch
	passed := now.Sub(w.last)
	if w.last.IsZero() || passed < 0 {
		passed = 0
	}
	w.last = now
	if !n.keeps() {
		return
	}
	passed = min(passed, 2*n.look())
	for _, m := range n.state.Members {
		if m.Lease == 0 || m.Name == n.cfg.Self.Name {
			continue
		}
		s := w.of(Tenancy{m.Name, m.Epoch})
		s.lasts += passed
		switch {
		case !s.frozen && s.lasts >= margin(m.Lease):
			s.frozen = true
			n.freeze(s)
		case !s.frozen && s.lasts-s.kept >= m.Lease/keep:
			s.kept = s.lasts
			n.out.Dirty = true
		}
	}
}

func (n *Node) freeze(s *silence) {
	s.kept = s.lasts
	n.out.Dirty = true
	// Not all keepers at once: their rounds would be in each other's way.
	n.retake = n.watch.last.Add(time.Duration(n.cfg.Rand.Int64N(int64(retake / 2))))
}

// acknowledge answers a renewal.
func (n *Node) acknowledge(now time.Time, from peer.Name, m *Message) {
	member, ok := n.state.Member(from)
	switch {
	case !ok || !n.keeps() || member.ID != (ID{from, m.Store}) || member.Epoch != m.Renewal.Epoch ||
		m.Renewal.Committee != n.state.Committee:
		n.inform(now, from)
		return
	case n.acc.version == n.next() && n.acc.state != nil && n.acc.state.Committee != n.state.Committee:
		return // it may be agreed, and then the next committee counts silence already
	}
	n.count(now)
	r := Renewal{m.Renewal.Nonce, member.Epoch, n.state.Committee}
	s := n.watch.of(Tenancy{from, member.Epoch})
	if s.frozen {
		n.send(now, from, Message{Kind: KindFrozen, Renewal: r})
		return
	}
	if s.lasts = 0; s.kept > 0 {
		s.kept = 0
		n.out.Dirty = true
	}
	n.send(now, from, Message{Kind: KindAck, Renewal: r})
}

// Renew sends a renewal to all keepers.
func (n *Node) Renew(now time.Time, r Renewal) Effects {
	for _, k := range n.state.Keepers {
		n.send(now, k, Message{Kind: KindRenew, Renewal: r})
	}
	return n.take()
}

// frozen are the tenancies that this keeper has frozen, by name.
func (n *Node) frozen() []Tenancy {
	var out []Tenancy
	for t, s := range n.watch.silences {
		if s.frozen && len(out) < maxFrozen {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, byName)
	return out
}

// due are those of them for which a round is to be begun.
func (n *Node) due(now time.Time) []Tenancy {
	if now.Before(n.retake) {
		return nil
	}
	return n.frozen()
}

// gone are the tenancies that a majority of keepers has frozen, as they
// promised in this round.
func (n *Node) gone() []Tenancy {
	var out []Tenancy
	committee := n.state.committee()
	for t, by := range n.round.frozen {
		by = slices.DeleteFunc(slices.Clone(by), func(id ID) bool { return !slices.Contains(committee, id) })
		if majority(len(by), len(committee)) {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, byName)
	return out
}

func byName(a, b Tenancy) int {
	return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Epoch, b.Epoch))
}

// append writes what is to outlive this run behind b.
func (w *watch) append(b []byte) []byte {
	b = appendCommittee(b, w.committee)
	var all []Tenancy
	for t, s := range w.silences {
		if s.kept > 0 || s.frozen {
			all = append(all, t)
		}
	}
	slices.SortFunc(all, byName)
	b = binary.AppendUvarint(b, uint64(len(all)))
	for _, t := range all {
		s := w.silences[t]
		b = append(appendMillis(appendTenancy(b, t), s.kept), byte(bit(s.frozen)))
	}
	return b
}

func (w *watch) parse(r *Reader) {
	w.committee = r.committee()
	for range r.Count(9) {
		s := w.of(r.tenancy())
		s.kept = r.millis()
		s.lasts, s.frozen = s.kept, r.Byte() == 1
	}
}
