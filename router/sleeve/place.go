package sleeve

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// keepBefore is how long the session of a link that was replaced is good: longer
// than both ends need to hear of the new one.
const keepBefore = 10 * time.Second

// place is where datagrams to a neighbour go.
type place struct {
	addr     netip.AddrPort
	sockaddr sockaddr
}

// succession is what a neighbour takes over from the one before it, when its
// control link was replaced by another: neither end is cut off from the other
// while only one has the new link.
type succession struct {
	heard  atomic.Bool               // the other end uses the new link's session
	before atomic.Pointer[neighbour] // of the old link; nil: forgotten, or there was none
	until  time.Time                 // when that is forgotten
}

// succeed takes over from old what outlives a link between the same two runs of
// two peers: where datagrams of the other end come from, and for a while the
// session.
func (n *neighbour) succeed(old *neighbour, now time.Time) {
	if n.name != old.name || n.uid != old.uid {
		return
	}
	if at := old.place.Load(); at.addr.Addr() == n.home.Addr() {
		n.place.Store(at)
	}
	if (n.keys == nil) != (old.keys == nil) {
		return
	}
	if before := old.before.Load(); before != nil && !old.heard.Load() {
		old = before
	}
	old.before.Store(nil)
	n.until = now.Add(keepBefore)
	n.before.Store(old)
}

// speaking is the neighbour with whose session datagrams are made: that which
// the other end surely has.
func (n *neighbour) speaking() *neighbour {
	if n.heard.Load() {
		return n
	}
	if before := n.before.Load(); before != nil {
		return before
	}
	return n
}

// forgetBefore ends what was before the link.
func (n *neighbour) forgetBefore(now time.Time) {
	if n.before.Load() != nil && now.After(n.until) {
		n.before.Store(nil)
	}
}

// came notes where an authentic datagram of n came from: answers go there. A
// peer may have moved, or be behind something that gives it addresses and ports
// of its own choice. Says whether that is news.
func (n *neighbour) came(from *sockaddr) bool {
	at := n.place.Load()
	if at == nil || from.len == 0 || from.len == at.sockaddr.len && from.raw == at.sockaddr.raw {
		return false
	}
	addr, ok := from.addrPort()
	if !ok {
		return false
	}
	n.place.Store(&place{addr: addr, sockaddr: *from})
	return true
}

// addrPort reads the address; false when the kernel gave none.
func (s *sockaddr) addrPort() (netip.AddrPort, bool) {
	port := binary.BigEndian.Uint16(s.raw[2:])
	switch binary.NativeEndian.Uint16(s.raw[0:]) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(s.raw[4:8])), port), port != 0
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(s.raw[8:24])).Unmap(), port), port != 0
	}
	return netip.AddrPort{}, false
}
