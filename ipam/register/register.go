// Package register is the small replicated record of who owns which addresses
// of a cluster: pure, a state machine that takes events and gives effects.
//
// # Agreement
//
// The register is a chain of versions. Version v+1 is agreed by single-decree
// Paxos among the keepers that version v names; a value is a whole State. An
// acceptor's promise and what it accepted are durable before it answers, and
// are void as soon as the version is known. Only keepers propose; any member
// asks a keeper (KindRequest), again and again, until it sees in the register
// that its request was carried out: a member has one request under way, with
// a serial number that the register counts, so that no request is carried out
// twice or late. Whoever is behind is answered with the newest version.
//
// The first version is agreed by whoever takes part: a majority of max(N, peers
// met), where N is how many peers the cluster is to start with. Its value is
// a new cluster id, the peers that promised as members, and no grants.
//
// When a person says that keepers are off for good (Request.Off), all the
// others together count as a majority, and the version made that way begins a
// new term.
//
// # Leases
//
// A member with a lease proves to the keepers all the time that it lives: it
// sends them a renewal with a new nonce (KindRenew), and when a majority of one
// committee has acknowledged that (KindAck), it may go on until its lease is
// over, counted from when it sent the renewal; see Lease.
//
// A keeper counts for how long it has acknowledged nothing, see watch. When
// that is longer than the lease by a margin, it freezes the member in its epoch:
// durably, it acknowledges nothing any more (KindFrozen), and says so with its
// promises. A proposer to whom a majority has promised that removes the member.
// A keeper that has accepted a version with another committee acknowledges
// nothing either before it knows what became of that version.
//
// # Layout
//
// Names take six octets, stores eight, numbers are unsigned varints, addresses
// a length octet (4 or 16) and the octets, prefixes an address and an octet of
// bits. Most significant octet first. A list is its length and its items.
//
//	State    format=2 · term · version · cluster[16] · range prefix ·
//	         committee · u8 n, n × keeper name ·
//	         n, n × (name store epoch serial lease) ·
//	         n, n × (first last [4 or 16 octets each, as the range] owner epoch)
//	Message  format=1 · u8 kind · u8 flags (1 state, 2 request, 4 want answer,
//	         8 frozen, 16 renewal) ·
//	         cluster[16] · range prefix · store · term · version · ballot ·
//	         accepted ballot ·
//	         [State] · [Request] · [n, n × (name epoch)] · [nonce[8] epoch committee]
//	ballot   number · name
//	lease    milliseconds
//	committee term · version
//	Request  name store · epoch · serial · n, n × name off · n, n × (u8 kind · …)
//	         1 grant: prefix peers · 2 block: address · 3 release: address address name ·
//	         4 remove: name · 5 leave · 6 renew: lease
//	Acceptor format=1 · version · promised ballot · accepted ballot · u8 has state · [State] ·
//	         committee · n, n × (name epoch silence u8 frozen), missing in older ones
//	silence  milliseconds
//
// A State of format 1 has neither committee nor leases.
package register

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"weave.local/peer"
)

// Config is what a Node needs.
type Config struct {
	Self  ID
	Range netip.Prefix
	// Quorum is how many peers the cluster is to start with, N of the package
	// comment; 0: this peer founds none and takes no part in founding one.
	Quorum int
	Rand   *rand.Rand
}

// Envelope is a message on its way.
type Envelope struct {
	To peer.Name
	Message
}

// Effects are what the caller has to do after a call, in this order: make
// Durable durable when Dirty, then act on a new State, then send.
type Effects struct {
	Dirty   bool
	Learned bool // State changed
	Send    []Envelope
	// Foreign are registers of other clusters that were met.
	Foreign []Foreign
	// Told are peers that said they have learned the newest version, see Tell.
	Told []peer.Name
	// Answers are what keepers say to renewals.
	Answers []Answer
}

// Foreign is a peer with a register of another cluster, or of another range.
type Foreign struct {
	Peer    peer.Name
	Cluster Cluster
	Range   netip.Prefix
	State   *State // nil: not told
}

// Node is one peer's part in the register. It is not safe for concurrent use.
type Node struct {
	cfg   Config
	state *State // newest version known; nil before the first
	acc   acceptor
	peers []peer.Name // reachable, without self
	// met are the peers that take part in founding a cluster; self included.
	met      map[ID]bool
	founding bool
	round    *round
	watch    watch
	accepted time.Time             // when acc.state was accepted; zero: in an earlier run
	retake   time.Time             // no round for what is frozen here alone before
	notNow   time.Time             // no new round before
	lost     int                   // rounds lost in a row
	top      uint64                // highest ballot number met
	queue    map[peer.Name]Request // what members asked of us as a keeper
	want     want
	out      Effects
}

// acceptor is what this peer promised and accepted for one version.
type acceptor struct {
	version  uint64
	promised Ballot
	accepted Ballot
	state    *State
}

// New makes a node from what was durable: the newest version (nil: none) and
// the acceptor's record (nil: none).
func New(cfg Config, state *State, acceptorRecord []byte) (*Node, error) {
	n := &Node{cfg: cfg, state: state, met: map[ID]bool{}, queue: map[peer.Name]Request{}}
	if cfg.Quorum > 0 {
		n.met[cfg.Self] = true
	}
	if acceptorRecord != nil {
		acc, watch, err := parseAcceptor(acceptorRecord)
		if err != nil {
			return nil, err
		}
		if acc.version == n.next() {
			n.acc = *acc
		}
		n.watch = *watch
	}
	n.watch.settle(n.state)
	return n, nil
}

// State is the newest version known; nil before the first.
func (n *Node) State() *State { return n.state }

// Acceptor is the record to keep together with State.
func (n *Node) Acceptor() []byte { return n.watch.append(n.acc.encode()) }

// Founding says how far the first version is: whether this peer works on it,
// how many must agree, and how many take part as far as is known.
func (n *Node) Founding() (working bool, quorum, known int) {
	return n.founding && n.state == nil, n.foundingQuorum(), n.known()
}

// next is the version that is to be agreed.
func (n *Node) next() uint64 {
	if n.state == nil {
		return 1
	}
	return n.state.Version + 1
}

// term is the term of the version before the one that is to be agreed.
func (n *Node) term() uint64 {
	if n.state == nil {
		return 0
	}
	return n.state.Term
}

func (n *Node) cluster() Cluster {
	if n.state == nil {
		return Cluster{}
	}
	return n.state.Cluster
}

// take hands over the effects collected so far.
func (n *Node) take() Effects {
	out := n.out
	n.out = Effects{}
	return out
}

// send puts a message on its way; one to this peer itself is dealt with at
// once, which is safe: whatever it makes durable goes before all that is sent.
func (n *Node) send(now time.Time, to peer.Name, m Message) {
	m.Cluster, m.Range, m.Store, m.Term = n.cluster(), n.cfg.Range, n.cfg.Self.Store, n.term()
	if to == n.cfg.Self.Name {
		n.receive(now, to, &m)
		return
	}
	n.out.Send = append(n.out.Send, Envelope{to, m})
}

// SetPeers says who is reachable.
func (n *Node) SetPeers(peers []peer.Name) { n.peers = peers }

// Found begins to found a cluster, or asks others to when this peer may not.
func (n *Node) Found(now time.Time) Effects {
	if n.state == nil && !n.founding {
		n.founding = true
		n.tick(now)
	}
	return n.take()
}

// Adopt replaces whatever this peer has by a register of another cluster.
// The caller knows that it loses nothing.
func (n *Node) Adopt(now time.Time, s *State) Effects {
	n.state = nil
	n.watch.settle(nil)
	clear(n.queue)
	n.learn(now, s)
	return n.take()
}

// Merge takes a state that came by gossip.
func (n *Node) Merge(now time.Time, from peer.Name, s *State) Effects {
	n.merge(now, from, s)
	return n.take()
}

func (n *Node) merge(now time.Time, from peer.Name, s *State) {
	switch {
	case s.Range != n.cfg.Range || n.state != nil && s.Cluster != n.state.Cluster:
		n.out.Foreign = append(n.out.Foreign, Foreign{from, s.Cluster, s.Range, s})
	case n.state == nil || s.Newer(n.state):
		n.learn(now, s)
	}
}

// learn moves on to s: promises about earlier versions are void, a round that
// is under way is over, and whoever waits for an answer gets it.
func (n *Node) learn(now time.Time, s *State) {
	if n.answeredBy(s) {
		n.want.ops, n.want.off = nil, nil
	}
	n.count(now)
	n.state = s
	n.watch.settle(s)
	n.acc = acceptor{version: n.next()}
	n.round, n.founding, n.lost, n.top, n.notNow = nil, false, 0, 0, time.Time{}
	n.out.Dirty, n.out.Learned = true, true
	for _, q := range n.requests() {
		if s.stale(&q) || !s.Keeper(n.cfg.Self) {
			delete(n.queue, q.From.Name)
			n.inform(now, q.From.Name)
		}
	}
	n.wake(now)
	n.startRound(now)
}

// chosen is learn for the one who had s agreed: it tells those concerned.
func (n *Node) chosen(now time.Time, s *State) {
	tell := slices.Clone(n.acceptors())
	for _, k := range s.Keepers {
		if !slices.Contains(tell, k) {
			tell = append(tell, k)
		}
	}
	n.learn(now, s)
	for _, to := range tell {
		n.inform(now, to)
	}
}

// inform sends the newest version to another peer.
func (n *Node) inform(now time.Time, to peer.Name) {
	if to != n.cfg.Self.Name && n.state != nil {
		n.send(now, to, Message{Kind: KindChosen, State: n.state})
	}
}

// Inform sends the newest version to a peer that seems to be behind.
func (n *Node) Inform(now time.Time, to peer.Name) Effects {
	n.inform(now, to)
	return n.take()
}

// Tell sends the newest version to peers and asks for a sign that they have
// it, which comes as Effects.Told.
func (n *Node) Tell(now time.Time, to []peer.Name) Effects {
	for _, p := range to {
		if p != n.cfg.Self.Name && n.state != nil {
			n.send(now, p, Message{Kind: KindChosen, State: n.state, Want: true})
		}
	}
	return n.take()
}

// Receive takes a message from a peer.
func (n *Node) Receive(now time.Time, from peer.Name, m *Message) Effects {
	n.receive(now, from, m)
	return n.take()
}

func (n *Node) receive(now time.Time, from peer.Name, m *Message) {
	if m.Range != n.cfg.Range {
		n.out.Foreign = append(n.out.Foreign, Foreign{from, m.Cluster, m.Range, nil})
		return
	}
	if m.Kind == KindChosen {
		n.receiveChosen(now, from, m)
		return
	}
	if m.Cluster != n.cluster() {
		n.receiveForeign(now, from, m)
		return
	}
	if n.state == nil {
		n.meet(from, m)
	}
	switch m.Kind {
	case KindPrepare, KindAccept:
		n.accept(now, from, m)
	case KindPromise, KindAccepted, KindRefuse, KindBehind, KindAbstain:
		n.answer(now, from, m)
	case KindRequest:
		n.request(now, from, m.Request)
	case KindStart:
		if n.cfg.Quorum > 0 && n.state == nil && !n.founding {
			n.founding = true
			n.startRound(now)
		}
	case KindLearned:
		if n.state != nil && m.Version >= n.state.Version {
			n.out.Told = append(n.out.Told, from)
		}
	case KindRenew:
		n.acknowledge(now, from, m)
	case KindAck, KindFrozen:
		n.out.Answers = append(n.out.Answers, Answer{ID{from, m.Store}, m.Renewal, m.Kind == KindFrozen})
	case KindChosen, kindEnd:
	}
}

func (n *Node) receiveChosen(now time.Time, from peer.Name, m *Message) {
	n.merge(now, from, m.State)
	if n.state == nil || n.state.Cluster != m.State.Cluster {
		return
	}
	if m.State.Term < n.state.Term || m.State.Term == n.state.Term && m.State.Version < n.state.Version {
		n.inform(now, from)
	}
	if m.Want {
		n.send(now, from, Message{Kind: KindLearned, Version: n.state.Version})
	}
}

// receiveForeign deals with a message of a peer that has no cluster yet, or
// another one, or one while we have none.
func (n *Node) receiveForeign(now time.Time, from peer.Name, m *Message) {
	switch {
	case n.state == nil:
		// It will tell us of its register when it hears us: ask.
		n.send(now, from, Message{Kind: KindStart})
	case m.Cluster == Cluster{}:
		n.inform(now, from)
	default:
		n.out.Foreign = append(n.out.Foreign, Foreign{from, m.Cluster, m.Range, m.State})
	}
}

func (n *Node) meet(from peer.Name, m *Message) {
	switch m.Kind {
	case KindPrepare, KindPromise, KindAccept, KindAccepted, KindRefuse:
		if len(n.met) < 1024 {
			n.met[ID{from, m.Store}] = true
		}
	case KindBehind, KindAbstain, KindChosen, KindLearned, KindRequest, KindStart, KindRenew, KindAck, KindFrozen, kindEnd:
	}
}

// accept is the acceptor: promises and acceptances for the version that comes
// next, and for no other.
func (n *Node) accept(now time.Time, from peer.Name, m *Message) {
	switch {
	case m.Term < n.term() || m.Term == n.term() && m.Version < n.next():
		n.inform(now, from)
		return
	case m.Term > n.term() || m.Version > n.next():
		n.send(now, from, Message{Kind: KindBehind, Version: m.Version, Ballot: m.Ballot})
		return
	case n.state == nil && n.cfg.Quorum == 0:
		n.send(now, from, Message{Kind: KindAbstain, Version: m.Version, Ballot: m.Ballot})
		return
	case n.state != nil && !n.state.Keeper(n.cfg.Self):
		return
	}
	if n.acc.version != m.Version {
		n.acc = acceptor{version: m.Version}
	}
	if m.Ballot.less(n.acc.promised) {
		n.send(now, from, Message{Kind: KindRefuse, Version: m.Version, Ballot: m.Ballot, Accepted: n.acc.promised})
		return
	}
	if m.Ballot != n.acc.promised {
		n.acc.promised = m.Ballot
		n.out.Dirty = true
	}
	if m.Kind == KindPrepare {
		n.send(now, from, Message{Kind: KindPromise, Version: m.Version, Ballot: m.Ballot, Accepted: n.acc.accepted, State: n.acc.state, Frozen: n.frozen()})
		return
	}
	if n.acc.accepted != m.Ballot {
		n.acc.accepted, n.acc.state, n.accepted = m.Ballot, m.State, now
		n.out.Dirty = true
	}
	n.send(now, from, Message{Kind: KindAccepted, Version: m.Version, Ballot: m.Ballot})
}

func (a *acceptor) encode() []byte {
	b := binary.AppendUvarint([]byte{Format}, a.version)
	b = appendBallot(b, a.promised)
	b = appendBallot(b, a.accepted)
	if a.state == nil {
		return append(b, 0)
	}
	return a.state.Append(append(b, 1))
}

func parseAcceptor(b []byte) (*acceptor, *watch, error) {
	r := Reader{B: b}
	if f := r.Byte(); f != Format {
		r.Fail(fmt.Errorf("format %d, want %d", f, Format))
	}
	a := &acceptor{version: r.Uvarint(), promised: r.ballot(), accepted: r.ballot()}
	if r.Byte() == 1 {
		a.state = r.state()
	}
	w := &watch{}
	if len(r.B) > 0 {
		w.parse(&r)
	}
	if err := r.Done(); err != nil {
		return nil, nil, fmt.Errorf("acceptor: %w", err)
	}
	if a.state != nil {
		if err := a.state.Validate(); err != nil {
			return nil, nil, fmt.Errorf("acceptor: %w", err)
		}
	}
	return a, w, nil
}
