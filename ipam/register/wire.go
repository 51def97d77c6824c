package register

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"

	"weave.local/ipam/space"
	"weave.local/peer"
)

const (
	// Format is the first byte of every message on the wire and of every record
	// on disk, but for a State.
	Format = 1
	// stateFormat is the first byte of a State. States of format 1, without
	// leases, are read as well; nobody has a lease in them.
	stateFormat = 2
	// MaxStateSize bounds an encoded state, in bytes, so that a message with
	// one state stays below what a link carries at once.
	MaxStateSize = 200 << 10
	// maxOps and maxOff bound the lists of one request.
	maxOps = 256
	maxOff = 64
	// maxFrozen bounds the tenancies that one message names.
	maxFrozen = 1024
)

var errShort = errors.New("cut short")

// Append writes the state behind b, in the layout of the package comment.
func (s *State) Append(b []byte) []byte {
	b = append(b, stateFormat)
	b = binary.AppendUvarint(b, s.Term)
	b = binary.AppendUvarint(b, s.Version)
	b = append(b, s.Cluster[:]...)
	b = AppendPrefix(b, s.Range)
	b = appendCommittee(b, s.Committee)
	b = append(b, byte(len(s.Keepers)))
	for _, k := range s.Keepers {
		b = peer.AppendName(b, k)
	}
	b = binary.AppendUvarint(b, uint64(len(s.Members)))
	for _, m := range s.Members {
		b = appendID(b, m.ID)
		b = binary.AppendUvarint(b, m.Epoch)
		b = binary.AppendUvarint(b, m.Serial)
		b = appendMillis(b, m.Lease)
	}
	b = binary.AppendUvarint(b, uint64(len(s.Grants)))
	for _, g := range s.Grants {
		b = append(b, g.First.AsSlice()...)
		b = append(b, g.Last.AsSlice()...)
		b = peer.AppendName(b, g.Owner)
		b = binary.AppendUvarint(b, g.Epoch)
	}
	return b
}

func (s *State) size() int { return len(s.Append(nil)) }

// ParseState reads a state that fills b, and validates it.
func ParseState(b []byte) (*State, error) {
	if len(b) > MaxStateSize {
		return nil, fmt.Errorf("register of %d bytes, more than %d", len(b), MaxStateSize)
	}
	r := Reader{B: b}
	s := r.state()
	if err := r.Done(); err != nil {
		return nil, fmt.Errorf("register: %w", err)
	}
	if err := s.Validate(); err != nil {
		return nil, err
	}
	return s, nil
}

func (r *Reader) state() *State {
	s := &State{}
	f := r.Byte()
	if f != stateFormat && f != 1 {
		r.Fail(fmt.Errorf("format %d, want %d", f, stateFormat))
		return s
	}
	s.Term, s.Version = r.Uvarint(), r.Uvarint()
	copy(s.Cluster[:], r.Bytes(len(s.Cluster)))
	s.Range = r.Prefix()
	if f != 1 {
		s.Committee = r.committee()
	}
	for range r.count(int(r.Byte()), 6) {
		s.Keepers = append(s.Keepers, r.Name())
	}
	for range r.Count(16) {
		m := Member{ID: r.id(), Epoch: r.Uvarint(), Serial: r.Uvarint()}
		if f != 1 {
			m.Lease = r.millis()
		}
		s.Members = append(s.Members, m)
	}
	octets := s.Range.Addr().BitLen() / 8
	for range r.Count(2*octets + 7) {
		first, _ := netip.AddrFromSlice(r.Bytes(octets))
		last, _ := netip.AddrFromSlice(r.Bytes(octets))
		s.Grants = append(s.Grants, Grant{space.Range{First: first, Last: last}, r.Name(), r.Uvarint()})
	}
	return s
}

// Kind says what a message is.
type Kind byte

// Kinds of messages between peers.
const (
	// KindPrepare opens a ballot; KindPromise answers it, with the proposal
	// accepted last.
	KindPrepare Kind = 1 + iota
	KindPromise
	// KindAccept asks to accept a state; KindAccepted says it was.
	KindAccept
	KindAccepted
	// KindRefuse says that a later ballot was promised.
	KindRefuse
	// KindBehind says that the sender has not learned the version before.
	KindBehind
	// KindAbstain says that the sender takes no part in founding a cluster.
	KindAbstain
	// KindChosen tells a version that is agreed; KindLearned answers it when
	// Want is set.
	KindChosen
	KindLearned
	// KindRequest asks a keeper for changes.
	KindRequest
	// KindStart asks a peer to found a cluster.
	KindStart
	// KindRenew asks a keeper to acknowledge that the sender lives; KindAck
	// does, KindFrozen says that it no longer will.
	KindRenew
	KindAck
	KindFrozen
	kindEnd
)

// Ballot orders proposals for one version; the zero Ballot comes before all.
type Ballot struct {
	N    uint64
	Name peer.Name
}

func (b Ballot) less(o Ballot) bool { return b.N < o.N || b.N == o.N && b.Name < o.Name }

// Message is what peers send each other about the register. Which fields
// mean something depends on Kind.
type Message struct {
	Kind     Kind
	Want     bool         // KindChosen: answer with KindLearned
	Cluster  Cluster      // zero: the sender has none yet
	Range    netip.Prefix // the sender's
	Store    uint64       // the sender's
	Term     uint64       // of the version before
	Version  uint64       // the version to be agreed; KindLearned: learned
	Ballot   Ballot       // of the round; KindRefuse: Accepted is the one promised
	Accepted Ballot       // KindPromise: of State; zero: none
	State    *State       // KindPromise, KindAccept, KindChosen
	Request  *Request     // KindRequest
	Frozen   []Tenancy    // KindPromise: those the sender has frozen
	Renewal  Renewal      // KindRenew, KindAck, KindFrozen
}

const (
	flagState = 1 << iota
	flagRequest
	flagWant
	flagFrozen
	flagRenewal
)

// Append writes the message behind b.
func (m *Message) Append(b []byte) []byte {
	var flags byte
	if m.State != nil {
		flags |= flagState
	}
	if m.Request != nil {
		flags |= flagRequest
	}
	if m.Want {
		flags |= flagWant
	}
	if len(m.Frozen) > 0 {
		flags |= flagFrozen
	}
	if m.Renewal != (Renewal{}) {
		flags |= flagRenewal
	}
	b = append(b, Format, byte(m.Kind), flags)
	b = append(b, m.Cluster[:]...)
	b = AppendPrefix(b, m.Range)
	b = binary.BigEndian.AppendUint64(b, m.Store)
	b = binary.AppendUvarint(b, m.Term)
	b = binary.AppendUvarint(b, m.Version)
	b = appendBallot(b, m.Ballot)
	b = appendBallot(b, m.Accepted)
	if m.State != nil {
		b = m.State.Append(b)
	}
	if m.Request != nil {
		b = m.Request.append(b)
	}
	if len(m.Frozen) > 0 {
		b = binary.AppendUvarint(b, uint64(len(m.Frozen)))
		for _, t := range m.Frozen {
			b = appendTenancy(b, t)
		}
	}
	if m.Renewal != (Renewal{}) {
		b = binary.BigEndian.AppendUint64(b, m.Renewal.Nonce)
		b = binary.AppendUvarint(b, m.Renewal.Epoch)
		b = appendCommittee(b, m.Renewal.Committee)
	}
	return b
}

// ParseMessage reads a message that fills b.
func ParseMessage(b []byte) (*Message, error) {
	r := Reader{B: b}
	if f := r.Byte(); f != Format {
		return nil, fmt.Errorf("register message of format %d, want %d", f, Format)
	}
	m := &Message{Kind: Kind(r.Byte())}
	flags := r.Byte()
	m.Want = flags&flagWant != 0
	copy(m.Cluster[:], r.Bytes(len(m.Cluster)))
	m.Range = r.Prefix()
	m.Store = r.Uint64()
	m.Term, m.Version = r.Uvarint(), r.Uvarint()
	m.Ballot, m.Accepted = r.ballot(), r.ballot()
	if flags&flagState != 0 {
		m.State = r.state()
	}
	if flags&flagRequest != 0 {
		m.Request = r.request()
	}
	if flags&flagFrozen != 0 {
		n := r.Count(7)
		if n > maxFrozen {
			r.Fail(fmt.Errorf("%d frozen peers", n))
		}
		for range n {
			m.Frozen = append(m.Frozen, r.tenancy())
		}
	}
	if flags&flagRenewal != 0 {
		m.Renewal = Renewal{r.Uint64(), r.Uvarint(), r.committee()}
	}
	if err := r.Done(); err != nil {
		return nil, fmt.Errorf("register message: %w", err)
	}
	return m, m.check()
}

// check refuses what no peer of ours sends.
func (m *Message) check() error {
	if m.Kind == 0 || m.Kind >= kindEnd {
		return fmt.Errorf("register message of kind %d", m.Kind)
	}
	if m.State == nil && (m.Kind == KindAccept || m.Kind == KindChosen) {
		return fmt.Errorf("register message of kind %d without a state", m.Kind)
	}
	if m.Kind == KindPromise && (m.State == nil) != (m.Accepted == Ballot{}) {
		return fmt.Errorf("promise with state and ballot at odds")
	}
	if m.State != nil {
		return m.State.Validate()
	}
	if m.Kind == KindRequest && m.Request == nil {
		return fmt.Errorf("register message without a request")
	}
	return nil
}

func (q *Request) append(b []byte) []byte {
	b = appendID(b, q.From)
	b = binary.AppendUvarint(b, q.Epoch)
	b = binary.AppendUvarint(b, q.Serial)
	b = binary.AppendUvarint(b, uint64(len(q.Off)))
	for _, n := range q.Off {
		b = peer.AppendName(b, n)
	}
	b = binary.AppendUvarint(b, uint64(len(q.Ops)))
	for _, op := range q.Ops {
		b = append(b, byte(op.Kind))
		switch op.Kind {
		case OpGrant:
			b = AppendPrefix(b, op.Subnet)
			b = binary.AppendUvarint(b, op.Peers)
		case OpBlock:
			b = AppendAddr(b, op.Range.First)
		case OpRelease:
			b = AppendAddr(b, op.Range.First)
			b = AppendAddr(b, op.Range.Last)
			b = peer.AppendName(b, op.To)
		case OpRemove:
			b = peer.AppendName(b, op.To)
		case OpRenew:
			b = appendMillis(b, op.Lease)
		case OpLeave:
		}
	}
	return b
}

func (r *Reader) request() *Request {
	q := &Request{From: r.id(), Epoch: r.Uvarint(), Serial: r.Uvarint()}
	n := r.Count(6)
	if n > maxOff {
		r.Fail(fmt.Errorf("request with %d peers that are off", n))
	}
	for range n {
		q.Off = append(q.Off, r.Name())
	}
	if n = r.Count(1); n > maxOps {
		r.Fail(fmt.Errorf("request with %d operations", n))
	}
	for range n {
		op := Op{Kind: OpKind(r.Byte())}
		switch op.Kind {
		case OpGrant:
			op.Subnet = r.Prefix()
			op.Peers = r.Uvarint()
			if op.Peers > math.MaxUint32 {
				r.Fail(fmt.Errorf("%d peers", op.Peers))
			}
		case OpBlock:
			op.Range = space.Single(r.Addr())
		case OpRelease:
			op.Range = space.Range{First: r.Addr(), Last: r.Addr()}
			op.To = r.Name()
			if !op.Range.Valid() {
				r.Fail(fmt.Errorf("release of %v", op.Range))
			}
		case OpRemove:
			op.To = r.Name()
		case OpRenew:
			op.Lease = r.millis()
		case OpLeave:
		default:
			r.Fail(fmt.Errorf("operation %d", op.Kind))
		}
		q.Ops = append(q.Ops, op)
	}
	return q
}
