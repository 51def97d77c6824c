package sleeve

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/overlay"
	"weave.local/router/seal"
)

// fallbackMTU is taken for the path while no route to a neighbour is known:
// what every IPv6 link carries.
const fallbackMTU = 1280

// neighbour is a peer datagrams are exchanged with. Its identity stays as
// made; plain and the numbers of groups belong to the sender's goroutine.
type neighbour struct {
	id       peer.ShortID
	name     peer.Name
	uid      peer.UID
	session  uint64
	home     netip.AddrPort // where its control link says that it is
	place    atomic.Pointer[place]
	overhead int           // of IP and UDP header, in bytes
	keys     *seal.Session // nil: datagrams go in clear
	traffic  *traffic
	succession

	pathMTU atomic.Int32 // of the underlay, in bytes; 0 not known yet
	proven  atomic.Int32 // largest IP packet whose frame arrived in one datagram; 0 not known
	plain   bool         // the kernel refuses to cut messages to it (UDP_SEGMENT)
	// Fragmented frames are counted by themselves: the receiver tells by the
	// numbers which ones are overdue.
	segmented, fragmented uint16
}

// maxDatagram is the largest payload of a datagram that the path carries.
func (n *neighbour) maxDatagram() int {
	mtu := int(n.pathMTU.Load())
	if mtu == 0 {
		mtu = fallbackMTU
	}
	return min(mtu-n.overhead, maxDatagram)
}

// tail is what sealing adds behind a datagram, in bytes.
func (n *neighbour) tail() int {
	if n.keys == nil {
		return 0
	}
	return tailLen
}

// maxRoom is how many bytes of a frame fit in a datagram as far as the kernel
// knows.
func (n *neighbour) maxRoom() int { return n.maxDatagram() - headerLen - n.tail() }

// room is how many bytes of a frame go into a datagram: what fits and, where
// the underlay says nothing of what does not, is proven.
func (n *neighbour) room() int {
	if proven := int(n.proven.Load()); proven > 0 {
		return min(n.maxRoom(), frame.EthernetLen+proven)
	}
	return n.maxRoom()
}

// maxPacket is the largest IP packet whose frame fits one datagram.
func (n *neighbour) maxPacket() int { return max(n.maxRoom()-frame.EthernetLen, 0) }

// ids is one more than the largest short id, for arrays indexed by it.
const ids = int(peer.MaxShortID) + 1

// table is what the two goroutines go by; it never changes once it is stored.
type table struct {
	self       peer.ShortID
	neighbours [ids]*neighbour
	hops       [ids]*neighbour      // next hop by destination, of what the kernel hands over
	trees      map[peer.ShortID]leg // by source
	traffic    [ids]*traffic        // with each that ever was a neighbour; outlives the table
}

// leg is our place in the broadcast tree of a source.
type leg struct {
	parent   *neighbour
	children []*neighbour // only those reached by sleeve
}

func (t *table) neighbour(id peer.ShortID) *neighbour {
	if int(id) >= ids {
		return nil
	}
	return t.neighbours[id]
}

// Apply makes f the state of the path. A neighbour that cannot be served is
// named in the error; the rest is applied all the same.
func (p *Path) Apply(f overlay.Forwarding) error {
	p.applyMu.Lock()
	t, err := p.table.Load().next(f, p.sock.ipv4)
	p.table.Store(t)
	p.applyMu.Unlock()
	for i := range f.Neighbours {
		if n := t.neighbour(f.Neighbours[i].ShortID); n != nil {
			p.refreshMTU(n)
		}
	}
	return err
}

// next builds the table for f, keeping the neighbours of t that are still the
// same.
func (t *table) next(f overlay.Forwarding, ipv4 bool) (*table, error) {
	out := &table{self: f.Self, trees: make(map[peer.ShortID]leg, len(f.Trees)), traffic: t.traffic}
	var errs []error
	for i := range f.Neighbours {
		id := f.Neighbours[i].ShortID
		if id == 0 || id > peer.MaxShortID {
			errs = append(errs, fmt.Errorf("peer %s: short id %d is not in 1 to %d", f.Neighbours[i].Info, id, peer.MaxShortID))
			continue
		}
		n, err := newNeighbour(&f.Neighbours[i], ipv4)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if out.traffic[id] == nil {
			out.traffic[id] = new(traffic)
		}
		n.traffic = out.traffic[id]
		switch old := t.neighbours[id]; {
		case old == nil:
		case old.same(n):
			n = old
		default:
			n.succeed(old, time.Now())
		}
		out.neighbours[id] = n
	}
	for dst, hop := range f.Hops {
		// Whatever the path is by now: the kernel hands over what it met
		// before it knew.
		if dst <= peer.MaxShortID {
			out.hops[dst] = out.neighbour(hop.Via)
			if n := out.hops[dst]; n != nil && hop.Path == overlay.Sleeve {
				n.proven.Store(int32(hop.MTU))
			}
		}
	}
	for src, tree := range f.Trees {
		l := leg{parent: out.neighbour(tree.Parent)}
		for _, child := range tree.Children {
			if n := out.neighbour(child); n != nil && f.Hops[child].Path == overlay.Sleeve {
				l.children = append(l.children, n)
			}
		}
		out.trees[src] = l
	}
	return out, errors.Join(errs...)
}

func newNeighbour(from *overlay.Neighbour, ipv4 bool) (*neighbour, error) {
	addr := from.Remote.Unmap()
	n := &neighbour{
		id:       from.ShortID,
		name:     from.Name,
		uid:      from.UID,
		session:  from.Session,
		keys:     from.Keys,
		home:     netip.AddrPortFrom(addr, from.Port),
		overhead: ipv4Overhead,
	}
	if addr.Is6() {
		n.overhead = ipv6Overhead
	}
	to, err := newSockaddr(n.home, ipv4)
	if err != nil {
		return nil, fmt.Errorf("peer %s: %w", from.Info, err)
	}
	n.place.Store(&place{addr: n.home, sockaddr: to})
	return n, nil
}

// same says whether o stands for the same run of the same peer.
func (n *neighbour) same(o *neighbour) bool {
	return n.id == o.id && n.name == o.name && n.uid == o.uid && n.session == o.session && n.home == o.home && n.keys == o.keys
}
