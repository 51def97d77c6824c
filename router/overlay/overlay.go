// Package overlay is the contract between the router, which decides over
// which path each peer is reached, and the data paths that carry the frames.
package overlay

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"weave.local/peer"
	"weave.local/router/seal"
)

// Names of the data paths, as status shows them.
const (
	FastDP = "fastdp"
	Sleeve = "sleeve"
)

// MaxAddrs is how many IP addresses a local port may have.
const MaxAddrs = 8

// MAC is an Ethernet address.
type MAC [6]byte

// String writes the address as six lower-case octets.
func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// Endpoint is an Ethernet address on the overlay with its IP addresses. Each
// address carries the length of its subnet; two endpoints may exchange frames
// only if they have a subnet (the masked prefix) in common.
type Endpoint struct {
	MAC   MAC
	Addrs []netip.Prefix
	Peer  peer.ShortID // the peer it is on

	// AnySource says that its port may also send from IP addresses that are
	// not its own, and from Ethernet addresses that no endpoint has, as the
	// port of a router, of a virtual machine or of a virtual address does.
	AnySource bool
}

// Port is a local endpoint: the host side of a container's veth pair or, for
// the exposed host, the bridge itself.
type Port struct {
	IfIndex int    // of the host-side device, in the daemon's namespace
	IfName  string // for messages
	// Since is when it was attached: of two ports with one MAC, the later one
	// is where that lives. Zero: now.
	Since time.Time
	Endpoint
}

// Neighbour is a peer to which there is a live control link, and so a peer to
// which a datagram may be sent directly.
type Neighbour struct {
	peer.Info
	Local   netip.Addr // underlay address of this end of the link
	Remote  netip.Addr // underlay address of the other end
	Session uint64     // random, known to both ends of the link only

	// Keys seal what goes to this neighbour directly. A data path that does
	// not use them must not carry frames to it, nor take any from it. Nil:
	// both ends agreed to send in clear.
	Keys *seal.Session
}

// Hop says how to reach a destination: hand the frame to neighbour Via on the
// named path.
type Hop struct {
	Via  peer.ShortID
	Path string // FastDP or Sleeve
	MTU  int    // largest IP packet, in bytes, proven to reach Via on the path; 0: not known
}

// Tree is this peer's place in the broadcast tree of one source.
type Tree struct {
	Parent   peer.ShortID   // the only neighbour a flooded frame is accepted from; 0 when this peer is the source
	Children []peer.ShortID // neighbours a flooded frame goes on to
}

// Forwarding is the whole desired state of the data paths. It is applied as
// one value: what it does not name is removed.
type Forwarding struct {
	// Partial says that this is not all yet: what is named is added or
	// replaced and nothing is removed. A restarted daemon applies partial
	// states while it gathers what it knew before.
	Partial bool
	// Inherit says that what an earlier daemon left forwarding for peers that
	// no state has named since the data path was opened stays as well.
	Inherit    bool
	Self       peer.ShortID
	Neighbours []Neighbour
	Hops       map[peer.ShortID]Hop  // by destination; also holds each neighbour itself
	Trees      map[peer.ShortID]Tree // by source, Self included
	Endpoints  []Endpoint            // announced by other peers; they go before local ports with the same MAC
}

// Flow is what went one way between this peer and a neighbour on one path. A
// super-frame counts as the packets it stands for.
type Flow struct {
	Packets, Bytes uint64
	Flooded        uint64 // packets of these that were flooded
	Relayed        uint64 // packets of these that whoever received them was to pass on
}

// Traffic is what a data path exchanged with one peer, and what it dropped on
// the way from or to it, by reason.
type Traffic struct {
	Tx, Rx  Flow
	Dropped map[string]uint64 // frames
}

// ProbeFunc is told of each probe that arrives over a data path: the path's
// name, the neighbour it came from, the sender's token and the frame size it
// proves. It must not block.
type ProbeFunc func(path string, from peer.ShortID, token uint64, size int)

// Overlay is a data path. Its methods may be called from several goroutines.
type Overlay interface {
	// Name is FastDP or Sleeve.
	Name() string
	// Apply makes the path carry frames as f says. On error the path keeps
	// what it could do and Apply may be called again.
	Apply(f Forwarding) error
	// MTU is the largest IP packet, in bytes, that the path could carry to
	// a neighbour judging by the underlay device it leaves through; 0 when
	// the neighbour is unknown.
	MTU(to peer.ShortID) int
	// Probe sends one probe over the very path that frames take: a frame as
	// large as one that carries an IP packet of size bytes, never
	// fragmented on the way. A path that knows it to be too large returns a
	// *TooBigError.
	Probe(to peer.ShortID, token uint64, size int) error
	// Traffic counts by peer what the path carried and dropped, as far as a
	// peer is known.
	Traffic() (map[peer.ShortID]Traffic, error)
	// Run serves until ctx ends. State in the kernel outlives it.
	Run(ctx context.Context) error
}

// Switch is the data path that also owns the bridge's ports and enforces
// isolation on them.
type Switch interface {
	Overlay
	// SetPort adds a local port or replaces what is known of it.
	SetPort(p Port) error
	// RemovePort forgets a port; a device that is gone already is no error.
	RemovePort(ifIndex int) error
	// SetLease cuts the ports here off from other peers from until on, a time
	// since boot on the clock that counts sleep (CLOCK_BOOTTIME), even if this
	// program is dead by then; 0: never. What is relayed for others goes on.
	SetLease(until time.Duration) error
	// Counters returns frames counted by event, under stable names.
	Counters() (map[string]uint64, error)
}

// Examiner is a data path that also sends probes of its own.
type Examiner interface {
	// Answered tells of an answer to a probe that Probe did not send.
	Answered(from peer.ShortID, token uint64)
	// Remark says, in words for users, what is to be known of the path to a
	// neighbour though frames pass; "" when nothing is.
	Remark(to peer.ShortID) string
}

// TooBigError says that a probe exceeds what the underlay carries.
type TooBigError struct {
	MTU int // largest IP packet inside that would fit, in bytes; 0 if not known
}

// Error names the size that would fit.
func (e *TooBigError) Error() string {
	return fmt.Sprintf("larger than the path carries (%d bytes fit)", e.MTU)
}

// AbsentError says that the path does not exist on this host.
type AbsentError struct {
	Why error // what is lacking
}

// Error says what is lacking.
func (e *AbsentError) Error() string { return "no fast path on this host: " + e.Why.Error() }
