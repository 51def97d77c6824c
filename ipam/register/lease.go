package register

import (
	"encoding/binary"
	"slices"
	"time"
)

// Renewal is one proof that a peer lives. The answers to it name the epoch and
// the committee that the keeper knows.
type Renewal struct {
	Nonce     uint64 // never used twice
	Epoch     uint64 // of the sender
	Committee Committee
}

// Answer is what a keeper says to a renewal.
type Answer struct {
	From ID
	Renewal
	// Frozen says that the keeper no longer acknowledges anything of this
	// epoch: the sender has to begin another.
	Frozen bool
}

const (
	// maxAttempts is how many renewals may be under way.
	maxAttempts = 4
	// renewals is how many are sent during a lease.
	renewals = 100
	// renewLeast is the least time between two, and renewAgain the most as long
	// as the last one has not been acknowledged.
	renewLeast = 100 * time.Millisecond
	renewAgain = time.Second
)

// leastLeased is how many members a cluster has at least when there are leases
// in it: of two, the one that is left is no majority and could only lose by them.
const leastLeased = 3

// LeaseOver is an end of a lease that lies before everything: no nanosecond had
// passed since boot.
const LeaseOver = time.Duration(1)

// Lease is a peer's side of a lease. All its times are of the clock that also
// counts while the machine sleeps (CLOCK_BOOTTIME), since boot. It is not safe
// for concurrent use.
type Lease struct {
	Self ID
	// Want is how long the lease is to be; 0: there is to be none.
	Want time.Duration

	until    time.Duration
	next     time.Duration // of the next renewal
	attempts []attempt     // oldest first
	frozen   uint64        // the epoch of which a keeper said that it is frozen
}

type attempt struct {
	Renewal
	sent time.Duration
	acks []ID
}

// Until is when the lease is over; 0: there is none.
func (l *Lease) Until() time.Duration { return l.until }

// Set makes the lease end at until, whatever it was.
func (l *Lease) Set(until time.Duration) {
	l.until, l.next, l.attempts = until, 0, nil
}

// Append writes when the lease is over behind b: Format, eight octets of
// nanoseconds since boot, and the id of that boot.
func (l *Lease) Append(b []byte, boot string) []byte {
	return append(binary.BigEndian.AppendUint64(append(b, Format), uint64(l.until)), boot...)
}

// Load takes over what an earlier run wrote, if that was in the same boot. Of a
// lease of which the end is not known, nothing is left: one that s has, or one
// that was written in another boot, which may have been asked for only and then
// be in a later register than s.
func (l *Lease) Load(b []byte, boot string, s *State) {
	var until time.Duration
	if len(b) > 9 && b[0] == Format {
		until = time.Duration(binary.BigEndian.Uint64(b[1:]))
		if string(b[9:]) == boot {
			l.Set(until)
			return
		}
	}
	held := until != 0
	if s != nil {
		m, ok := s.Member(l.Self.Name)
		held = held || !ok || m.Lease > 0
	}
	if held {
		l.Set(LeaseOver)
	}
}

// want is the lease that the register is to have for this peer: none in a
// cluster that is too small. Without a register it may be any cluster.
func (l *Lease) want(s *State) time.Duration {
	if s == nil {
		return l.Want
	}
	members := len(s.Members)
	if _, ok := s.Member(l.Self.Name); !ok {
		members++
	}
	if members < leastLeased {
		return 0
	}
	return l.Want.Truncate(time.Millisecond)
}

// Length says how long a renewal lasts: as long as the register has it, or as
// is wanted of the register if that is shorter. 0: there is nothing to renew.
func (l *Lease) Length(s *State) time.Duration {
	if s == nil {
		return 0
	}
	m, ok := s.Member(l.Self.Name)
	if !ok || m.ID != l.Self || m.Lease == 0 {
		return 0
	}
	if want := l.want(s); want > 0 {
		return min(want, m.Lease)
	}
	return m.Lease
}

// Demand is what to ask of the register when the lease there is not as it should
// be, or when a keeper has given up on this peer. Before that is sent the lease
// must be told to whoever keeps to it: it ends no later now than the one that
// others may count on from when they hear of it.
func (l *Lease) Demand(now time.Duration, s *State) (Op, bool) {
	want := l.want(s)
	m, ok := s.Member(l.Self.Name)
	ours := ok && m.Is(l.Self)
	switch {
	case !ours && want == 0:
		return Op{}, false
	case ours && m.Lease == want && (want == 0 || m.Epoch != l.frozen):
		if want == 0 {
			l.Set(0)
		}
		return Op{}, false
	case want > 0:
		if latest := now + want; l.until == 0 || l.until > latest {
			l.Set(latest)
		}
	}
	return Op{Kind: OpRenew, Lease: want}, true
}

// Fence is when the containers here are to be cut off from other hosts, 0 for
// never: at the end of the lease, and at once as long as an address in use here is
// not granted to this peer (stray), which others may have by now. A nil State
// grants nothing.
func (l *Lease) Fence(s *State, stray bool) time.Duration {
	if stray && (l.until != 0 || l.want(s) > 0) {
		return LeaseOver
	}
	return l.until
}

// Next is when the next renewal is to be sent.
func (l *Lease) Next() time.Duration { return l.next }

// Renew begins a renewal, if there is a lease and one is due at now. It is to be
// sent at once to all keepers of s.
func (l *Lease) Renew(now time.Duration, nonce uint64, s *State) (Renewal, bool) {
	length := l.Length(s)
	if length == 0 || now < l.next {
		return Renewal{}, false
	}
	m, _ := s.Member(l.Self.Name)
	r := Renewal{nonce, m.Epoch, s.Committee}
	l.attempts = append(l.attempts, attempt{Renewal: r, sent: now})
	if len(l.attempts) > maxAttempts {
		l.attempts = slices.Delete(l.attempts, 0, 1)
	}
	l.next = now + min(max(length/renewals, renewLeast), renewAgain)
	return r, true
}

// Answered takes a keeper's answer and says whether the lease is longer by it:
// it lasts from when the renewal was sent, once a majority of the keepers of s
// has acknowledged that very renewal as the committee that they are in s.
func (l *Lease) Answered(a Answer, s *State) bool {
	length := l.Length(s)
	i := slices.IndexFunc(l.attempts, func(t attempt) bool { return t.Renewal == a.Renewal })
	switch {
	case length == 0 || i < 0 || a.Committee != s.Committee || !slices.Contains(s.committee(), a.From):
		return false
	case a.Frozen:
		l.frozen = a.Epoch
		return false
	}
	t := &l.attempts[i]
	if slices.Contains(t.acks, a.From) {
		return false
	}
	t.acks = append(t.acks, a.From)
	if !majority(len(t.acks), len(s.Keepers)) {
		return false
	}
	sent := t.sent
	l.attempts = slices.Delete(l.attempts, 0, i+1)
	l.next = max(l.next, sent+max(length/renewals, renewLeast))
	until := sent + length
	if until <= l.until {
		return false
	}
	l.until = until
	return true
}

// majority says whether n of all are more than half.
func majority(n, all int) bool { return 2*n > all }
