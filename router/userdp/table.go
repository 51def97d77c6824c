package userdp

import (
	"bytes"
	"net/netip"
	"slices"
	"time"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/overlay"
)

// table is what frames are judged by; it never changes once it is stored.
type table struct {
	self      peer.ShortID
	bridge    int
	endpoints map[overlay.MAC]endpoint
	subnets   map[netip.Prefix]bool // in which there is a local port
}

type endpoint struct {
	peer    peer.ShortID // 0: on this host
	subnets []netip.Prefix
	port    overlay.Port // on this host only
}

func newTable(self peer.ShortID, bridge int, announced []overlay.Endpoint, ports map[int]overlay.Port) *table {
	t := &table{
		self: self, bridge: bridge,
		endpoints: make(map[overlay.MAC]endpoint, len(announced)+len(ports)), subnets: make(map[netip.Prefix]bool),
	}
	for _, e := range announced {
		t.endpoints[e.MAC] = endpoint{peer: e.Peer, subnets: masked(e.Addrs)}
	}
	for _, p := range ports {
		e := endpoint{subnets: masked(p.Addrs), port: p}
		// What is announced of a local port's MAC is that it has moved on.
		if old, announced := t.endpoints[p.MAC]; !announced || old.peer == 0 {
			t.endpoints[p.MAC] = e
		}
		for _, s := range e.subnets {
			t.subnets[s] = true
		}
	}
	return t
}

func masked(addrs []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, len(addrs))
	for i, a := range addrs {
		out[i] = a.Masked()
	}
	return out
}

func (e *endpoint) shares(other *endpoint) bool {
	return slices.ContainsFunc(e.subnets, func(s netip.Prefix) bool { return slices.Contains(other.subnets, s) })
}

// fromBridge says where a frame goes that the bridge sends into the overlay,
// and as what it counts.
func (t *table) fromBridge(b []byte, packets int, l limits) (way, event) {
	dst, src := overlay.MAC(b[:6]), overlay.MAC(b[6:12])
	from, known := t.endpoints[src]
	switch {
	case t.self == 0:
		return way{}, droppedNoPath
	case dst == overlay.MAC{} || isLinkLocal(dst):
		return way{}, droppedLocal
	case !known:
		return way{}, droppedUnknownMAC
	case from.peer != 0 || from.port.IfIndex != t.bridge && !honest(b, &from.port):
		return way{}, droppedSpoofed
	}
	w := way{src: t.self, hops: hopLimit, flood: true}
	if dst[0]&1 != 0 {
		return w, sentFlood
	}
	to, known := t.endpoints[dst]
	switch {
	case !known && l.exceeded(src, packets, time.Now()):
		return way{}, droppedFloodLimit
	case !known:
		return w, sentUnknown
	case to.peer == 0: // the bridge floods what it has not learnt yet
		return way{}, droppedLocal
	case !from.shares(&to):
		return way{}, droppedIsolated
	}
	w.dst, w.flood = to.peer, false
	return w, sent
}

// fate is what becomes of a frame that came from a peer.
type fate struct {
	deliver bool // to the bridge
	onward  bool // to other peers
	event   event
}

// fromPeer judges a frame that the sleeve received, by its way and its two
// Ethernet addresses. The sleeve has seen to it that a flooded one came from
// where it should.
func (t *table) fromPeer(w way, addrs []byte) fate {
	dst, src := overlay.MAC(addrs[:6]), overlay.MAC(addrs[6:12])
	from, known := t.endpoints[src]
	switch {
	case w.src == 0 || w.hops == 0:
		return fate{event: droppedMalformed}
	case w.src == t.self:
		return fate{event: droppedOwn}
	case w.flood: // goes on whatever is thought of it here
		f := fate{onward: w.hops > 1, event: receivedFlood}
		f.deliver = known && slices.ContainsFunc(from.subnets, func(s netip.Prefix) bool { return t.subnets[s] })
		if to, here := t.endpoints[dst]; here && dst[0]&1 == 0 {
			f.deliver = f.deliver && to.peer == 0 && from.shares(&to)
		}
		return f
	case w.dst != t.self && w.hops == 1:
		return fate{event: droppedHopLimit}
	case w.dst != t.self:
		return fate{onward: true, event: relayed}
	case !known:
		return fate{event: droppedUnknownMAC}
	}
	if to, known := t.endpoints[dst]; known && !from.shares(&to) {
		return fate{event: droppedIsolated}
	}
	return fate{deliver: true, event: received}
}

func isLinkLocal(m overlay.MAC) bool {
	return bytes.Equal(m[:5], []byte{0x01, 0x80, 0xc2, 0, 0}) && m[5] < 16
}

// Places of addresses behind the Ethernet header.
const (
	typeARP   = 0x0806
	ipv4Src   = frame.EthernetLen + 12
	ipv6Src   = frame.EthernetLen + 8
	arpSender = frame.EthernetLen + 8 // hardware address, then that of IPv4
	arpLen    = frame.EthernetLen + 28
)

// honest says whether a frame with the port's own Ethernet address claims no
// IP address that is another's. A tagged frame does not: a receiver may take
// VLAN 0 for none.
func honest(b []byte, p *overlay.Port) bool {
	switch frame.Ethernet(b).Type() {
	case frame.TypeIPv4:
		return len(b) >= frame.EthernetLen+frame.IPv4Len && maySend(p, netip.AddrFrom4([4]byte(b[ipv4Src:])))
	case frame.TypeIPv6:
		return len(b) >= frame.EthernetLen+frame.IPv6Len && maySend(p, netip.AddrFrom16([16]byte(b[ipv6Src:])))
	case typeARP:
		return len(b) >= arpLen && overlay.MAC(b[arpSender:arpSender+6]) == p.MAC &&
			maySend(p, netip.AddrFrom4([4]byte(b[arpSender+6:])))
	case frame.TypeVLAN, frame.TypeSVLAN:
		return false
	}
	return true
}

// maySend says whether the port may send from an address. Unspecified ones and
// those of IPv6 that are link-local serve to find addresses, and are anybody's.
func maySend(p *overlay.Port, a netip.Addr) bool {
	return p.AnySource || a.IsUnspecified() || a.Is6() && a.IsLinkLocalUnicast() ||
		slices.ContainsFunc(p.Addrs, func(own netip.Prefix) bool { return own.Addr() == a })
}

// Unknown unicast that one endpoint may cause to be flooded, as in the programs.
const (
	floodInterval = time.Millisecond
	floodBurst    = 200
)

// limits holds for each sender when its tokens will be full again. It grows
// with the endpoints of this host.
type limits map[overlay.MAC]time.Time

func (l limits) exceeded(src overlay.MAC, packets int, now time.Time) bool {
	full := l[src]
	if full.Before(now) {
		full = now
	}
	if full.Sub(now) > floodBurst*floodInterval {
		return true
	}
	l[src] = full.Add(time.Duration(packets) * floodInterval)
	return false
}
