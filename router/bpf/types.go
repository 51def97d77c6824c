package bpf

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
)

// Limits of the maps.
const (
	MaxChildren = 512 // children of this peer in one broadcast tree
	MaxSharing  = 7   // neighbours behind one underlay address
	MaxSubnets  = 8   // subnets of one endpoint
	MaxAddrs    = 8   // addresses of one port
)

// MAC is an Ethernet address.
type MAC [6]byte

// Addr is an IPv6 address, or an IPv4 address mapped into IPv6.
type Addr [16]byte

// AddrOf is the form in which the maps hold a.
func AddrOf(a netip.Addr) Addr { return a.As16() }

// Neighbour is the set of neighbours that share an underlay address.
type Neighbour struct {
	N  int // how many of IDs are in use
	ID [MaxSharing]uint16

	// The direct way, IPv4 only: our address that they send to, and the
	// device that they are reached by, 0 when they do not use it.
	Local  netip.Addr
	Uplink uint32
}

// Kinds of Hop.
const (
	KindVXLAN  = iota + 1 // by VXLAN to Remote
	KindSleeve            // through the TAP
)

// Hop says how to reach a peer.
type Hop struct {
	Kind          int
	Via           uint16     // short id of the neighbour that takes the frame
	MTU           int        // largest IP packet proven to get there, in bytes; 0: not known
	Remote, Local netip.Addr // underlay, KindVXLAN only; Local may be invalid: the kernel chooses

	// The direct way, IPv4 and KindVXLAN only: the device that frames leave
	// by, 0 when there is none, and the next hop on it. Local must be valid.
	Uplink  uint32
	Gateway netip.Addr
}

// Tree is this peer's place in the broadcast tree of a source.
type Tree struct {
	Parent   uint16 // 0 when this peer is the source
	N        int    // how many of Children are in use
	Children [MaxChildren]uint16
}

// Subnet is an IP prefix as a number: the same for equal masked prefixes,
// never 0.
type Subnet uint64

// Bits that keep the numbers of IPv6 prefixes, which are hashes, apart from
// those of IPv4, which are the address and the length of the prefix.
const (
	lengthBits        = 8
	ipv6Mark   Subnet = 1 << 63
)

// SubnetOf is the number of p's masked prefix; p must be valid.
func SubnetOf(p netip.Prefix) Subnet {
	p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()).Masked()
	if p.Addr().Is4() {
		a := p.Addr().As4()
		// The length is stored plus one, so that 0.0.0.0/0 is not 0.
		return Subnet(binary.BigEndian.Uint32(a[:]))<<lengthBits | Subnet(p.Bits()+1)
	}
	h := fnv.New64a()
	a := p.Addr().As16()
	_, _ = h.Write(a[:]) // never fails
	_, _ = h.Write([]byte{byte(p.Bits())})
	return Subnet(h.Sum64()) | ipv6Mark
}

// Subnets is a list of subnets that ends at the first 0.
type Subnets [MaxSubnets]Subnet

// SubnetsOf is the set of subnets of addrs. What exceeds MaxSubnets is
// reported by ok being false and left out.
func SubnetsOf(addrs []netip.Prefix) (s Subnets, ok bool) {
	n := 0
next:
	for _, p := range addrs {
		key := SubnetOf(p)
		for _, have := range s[:n] {
			if have == key {
				continue next
			}
		}
		if n == len(s) {
			return s, false
		}
		s[n] = key
		n++
	}
	return s, true
}

// Endpoint is what is known of the holder of an Ethernet address.
type Endpoint struct {
	Peer    uint16 // short id; 0: on this host
	IfIndex uint32 // on this host: the veth that the shortcut leads into; 0: none
	Subnets Subnets
}

// Port is a device of this host with what may be sent from it.
type Port struct {
	MAC MAC
	// AnySource lets the port send from any IP address, and from any MAC that
	// nobody announced.
	AnySource bool

	Moved bool // its MAC lives elsewhere by now: nothing may be sent from it

	Veth    bool // one end of a veth pair: the shortcut may lead into the other
	Subnets Subnets
	N       int // how many of Addrs are in use
	Addrs   [MaxAddrs]Addr
}

// PortOf describes a port. It is an error to give more than MaxAddrs
// addresses.
func PortOf(mac MAC, addrs []netip.Prefix) (Port, error) {
	p := Port{MAC: mac}
	if len(addrs) > MaxAddrs {
		return p, fmt.Errorf("%d addresses on one interface: at most %d are possible", len(addrs), MaxAddrs)
	}
	p.Subnets, _ = SubnetsOf(addrs) // no more subnets than addresses
	for _, a := range addrs {
		p.Addrs[p.N] = AddrOf(a.Addr())
		p.N++
	}
	return p, nil
}

// Bits of flags of struct port: PORT_VETH and so on.
const (
	portVeth = 1 << iota
	portAnySource
	portMoved
)

// ipv6Subnet stands for the length of an IPv6 prefix, which is not kept.
const ipv6Subnet = 64

// Prefixes are the subnets of the port's addresses. Those of IPv6 are taken to
// be as large as they usually are.
func (p Port) Prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, s := range p.Subnets {
		if s != 0 && s&ipv6Mark == 0 {
			var a [4]byte
			binary.BigEndian.PutUint32(a[:], uint32(s>>lengthBits))
			out = append(out, netip.PrefixFrom(netip.AddrFrom4(a), int(s&(1<<lengthBits-1))-1))
		}
	}
	for _, a := range p.Addrs[:p.N] {
		if ip := netip.AddrFrom16(a); !ip.Is4In6() {
			out = append(out, netip.PrefixFrom(ip, ipv6Subnet).Masked())
		}
	}
	return out
}

func (o *Objects) bindTables() {
	o.Neighbours = newTable("neighbours", o.objs.Neighbours, encodeNeighbour, decodeNeighbour)
	o.Hops = newTable("hops", o.objs.Hops, encodeHop, decodeHop)
	o.Trees = newTable("trees", o.objs.Trees, encodeTree, decodeTree)
	o.Endpoints = newTable("endpoints", o.objs.Endpoints, encodeEndpoint, decodeEndpoint)
	o.Addresses = newTable("addresses", o.objs.Addresses,
		func(k Addr, v MAC) (weaveAddr, weaveMac) { return weaveAddr{B: k}, weaveMac{B: v} },
		func(k weaveAddr, v weaveMac) (Addr, MAC) { return k.B, v.B })
	o.Ports = newTable("ports", o.objs.Ports, encodePort, decodePort)
	o.Foreign = newTable("foreign", o.objs.Foreign,
		func(k uint16, v Subnets) (uint32, weaveSubnets) { return uint32(k), weaveSubnets{Key: rawSubnets(v)} },
		func(k uint32, v weaveSubnets) (uint16, Subnets) { return uint16(k), subnetsFromRaw(v.Key) })
}

func encodeNeighbour(k Addr, v Neighbour) (weaveAddr, weaveNeighbour) {
	return weaveAddr{B: k}, weaveNeighbour{N: uint16(v.N), Id: v.ID, Local: netOrder(v.Local), Uplink: v.Uplink}
}

func decodeNeighbour(k weaveAddr, v weaveNeighbour) (Addr, Neighbour) {
	return k.B, Neighbour{N: int(v.N), ID: v.Id, Local: fromNetOrder(v.Local), Uplink: v.Uplink}
}

func encodeHop(k uint16, v Hop) (uint32, weaveHop) {
	h := weaveHop{Kind: uint16(weaveHopKindHOP_SLEEVE), Via: v.Via, Mtu: uint32(v.MTU)}
	if v.Kind == KindVXLAN {
		remote, local := v.Remote.Unmap(), v.Local.Unmap()
		h.Kind = uint16(weaveHopKindHOP_VXLAN6)
		if remote.Is4() {
			h.Kind = uint16(weaveHopKindHOP_VXLAN4)
		}
		h.Remote, h.Local = addrWords(remote), addrWords(local)
		h.Uplink, h.Gateway = v.Uplink, netOrder(v.Gateway)
	}
	return uint32(k), h
}

// addrWords is an address as bpf_skb_set_tunnel_key wants it: IPv4 in host
// order in the first word, IPv6 as its bytes stand.
func addrWords(a netip.Addr) (w [4]uint32) {
	switch {
	case a.Is4():
		b := a.As4()
		w[0] = binary.BigEndian.Uint32(b[:])
	case a.Is6():
		b := a.As16()
		for i := range w {
			w[i] = binary.NativeEndian.Uint32(b[4*i:])
		}
	}
	return w
}

func addrFromWords(kind uint16, w [4]uint32) netip.Addr {
	if w == [4]uint32{} {
		return netip.Addr{}
	}
	if kind == uint16(weaveHopKindHOP_VXLAN4) {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], w[0])
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	for i := range w {
		binary.NativeEndian.PutUint32(b[4*i:], w[i])
	}
	return netip.AddrFrom16(b)
}

// netOrder is an IPv4 address as it stands in a packet, 0 for any other.
func netOrder(a netip.Addr) uint32 {
	if a = a.Unmap(); !a.Is4() {
		return 0
	}
	b := a.As4()
	return binary.NativeEndian.Uint32(b[:])
}

func fromNetOrder(w uint32) netip.Addr {
	if w == 0 {
		return netip.Addr{}
	}
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], w)
	return netip.AddrFrom4(b)
}

func decodeHop(k uint32, v weaveHop) (uint16, Hop) {
	h := Hop{Kind: KindSleeve, Via: v.Via, MTU: int(v.Mtu)}
	if v.Kind != uint16(weaveHopKindHOP_SLEEVE) {
		h.Kind = KindVXLAN
		h.Remote, h.Local = addrFromWords(v.Kind, v.Remote), addrFromWords(v.Kind, v.Local)
		h.Uplink, h.Gateway = v.Uplink, fromNetOrder(v.Gateway)
	}
	return uint16(k), h
}

func encodeTree(k uint16, v Tree) (uint32, weaveTree) {
	return uint32(k), weaveTree{Parent: v.Parent, N: uint16(v.N), Child: v.Children}
}

func decodeTree(k uint32, v weaveTree) (uint16, Tree) {
	return uint16(k), Tree{Parent: v.Parent, N: int(v.N), Children: v.Child}
}

func rawSubnets(s Subnets) (raw [MaxSubnets]uint64) {
	for i, key := range s {
		raw[i] = uint64(key)
	}
	return raw
}

func subnetsFromRaw(raw [MaxSubnets]uint64) (s Subnets) {
	for i, key := range raw {
		s[i] = Subnet(key)
	}
	return s
}

func encodeEndpoint(k MAC, v Endpoint) (weaveMac, weaveEndpoint) {
	e := weaveEndpoint{Peer: v.Peer, Ifindex: v.IfIndex}
	e.Subnets.Key = rawSubnets(v.Subnets)
	return weaveMac{B: k}, e
}

func decodeEndpoint(k weaveMac, v weaveEndpoint) (MAC, Endpoint) {
	return k.B, Endpoint{Peer: v.Peer, IfIndex: v.Ifindex, Subnets: subnetsFromRaw(v.Subnets.Key)}
}

func encodePort(k uint32, v Port) (uint32, weavePort) {
	p := weavePort{Mac: v.MAC, N_addrs: uint16(v.N)}
	if v.Veth {
		p.Flags |= portVeth
	}
	if v.AnySource {
		p.Flags |= portAnySource
	}
	if v.Moved {
		p.Flags |= portMoved
	}
	p.Subnets.Key = rawSubnets(v.Subnets)
	for i, a := range v.Addrs {
		p.Addrs[i].B = a
	}
	return k, p
}

func decodePort(k uint32, v weavePort) (uint32, Port) {
	p := Port{MAC: v.Mac, N: int(v.N_addrs), Subnets: subnetsFromRaw(v.Subnets.Key)}
	p.Veth, p.AnySource, p.Moved = v.Flags&portVeth != 0, v.Flags&portAnySource != 0, v.Flags&portMoved != 0
	for i, a := range v.Addrs {
		p.Addrs[i] = a.B
	}
	return k, p
}
