// Package frame reads and amends the headers of Ethernet frames where they
// lie: a view is a slice of the frame's own bytes, so nothing is copied and
// nothing allocated. A view's methods assume that the slice is at least as
// long as the fixed header (the ...Len constants); Parse checks that, and is
// safe on bytes from anybody.
package frame

import "encoding/binary"

// EtherTypes (IEEE 802 numbers).
const (
	TypeIPv4  = 0x0800
	TypeIPv6  = 0x86dd
	TypeVLAN  = 0x8100 // IEEE 802.1Q customer tag
	TypeSVLAN = 0x88a8 // IEEE 802.1ad service tag
)

// IP protocol numbers.
const (
	ProtoTCP = 6
	ProtoUDP = 17
)

// Lengths of fixed headers in bytes.
const (
	EthernetLen = 14
	TagLen      = 4
	AddrsLen    = 12 // the two MAC addresses, before any tag
	IPv4Len     = 20
	IPv6Len     = 40
	TCPLen      = 20
	UDPLen      = 8
)

// Ethernet is a view of a frame from its destination address on.
type Ethernet []byte

// Dst is the destination address.
func (e Ethernet) Dst() [6]byte { return [6]byte(e[0:6]) }

// Src is the source address.
func (e Ethernet) Src() [6]byte { return [6]byte(e[6:12]) }

// Type is the type field after the addresses: that of a tag if there is one.
func (e Ethernet) Type() uint16 { return binary.BigEndian.Uint16(e[12:]) }

// IPv4 is a view of an IPv4 header (RFC 791) and what follows it.
type IPv4 []byte

// HeaderLen is the length of the header with its options, in bytes.
func (p IPv4) HeaderLen() int { return int(p[0]&0x0f) * 4 }

// TotalLen is the length field: header and payload, in bytes.
func (p IPv4) TotalLen() int { return int(binary.BigEndian.Uint16(p[2:])) }

// SetTotalLen sets the length field; the header checksum is not touched.
func (p IPv4) SetTotalLen(n int) { binary.BigEndian.PutUint16(p[2:], uint16(n)) }

// ID is the identification field.
func (p IPv4) ID() uint16 { return binary.BigEndian.Uint16(p[4:]) }

// SetID sets the identification; the header checksum is not touched.
func (p IPv4) SetID(id uint16) { binary.BigEndian.PutUint16(p[4:], id) }

// IsFragment is true for every piece of a fragmented packet.
func (p IPv4) IsFragment() bool { return binary.BigEndian.Uint16(p[6:])&0x3fff != 0 }

// DontFragment is the DF flag.
func (p IPv4) DontFragment() bool { return p[6]&0x40 != 0 }

// Proto is the protocol of the payload.
func (p IPv4) Proto() uint8 { return p[9] }

// SetChecksum computes the header checksum anew. The view must hold the whole
// header.
func (p IPv4) SetChecksum() {
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], ^Fold(Sum(p[:p.HeaderLen()], 0)))
}

// PseudoSum is the sum of the pseudo header of TCP and UDP over length bytes.
func (p IPv4) PseudoSum(proto uint8, length int) uint64 {
	return Sum(p[12:20], uint64(proto)+uint64(length))
}

// IPv6 is a view of an IPv6 header (RFC 8200) and what follows it.
type IPv6 []byte

// PayloadLen is the length field: all that follows the fixed header, in bytes.
func (p IPv6) PayloadLen() int { return int(binary.BigEndian.Uint16(p[4:])) }

// SetPayloadLen sets the length field.
func (p IPv6) SetPayloadLen(n int) { binary.BigEndian.PutUint16(p[4:], uint16(n)) }

// NextHeader is the type of what follows the fixed header.
func (p IPv6) NextHeader() uint8 { return p[6] }

// PseudoSum is the sum of the pseudo header of TCP and UDP over length bytes
// (RFC 8200 §8.1).
func (p IPv6) PseudoSum(proto uint8, length int) uint64 {
	return Sum(p[8:40], uint64(proto)+uint64(length))
}

// TCP is a view of a TCP header (RFC 9293) and what follows it.
type TCP []byte

// Flags of TCP that belong to one segment of several.
const (
	FlagFIN = 0x01
	FlagPSH = 0x08
	FlagCWR = 0x80
)

// Where the checksum field lies in the header, in bytes.
const (
	TCPChecksum = 16
	UDPChecksum = 6
)

// Seq is the sequence number.
func (t TCP) Seq() uint32 { return binary.BigEndian.Uint32(t[4:]) }

// SetSeq sets the sequence number; the checksum is not touched.
func (t TCP) SetSeq(n uint32) { binary.BigEndian.PutUint32(t[4:], n) }

// HeaderLen is the length of the header with its options, in bytes.
func (t TCP) HeaderLen() int { return int(t[12]>>4) * 4 }

// ClearFlags takes the given flags away; the checksum is not touched.
func (t TCP) ClearFlags(flags uint8) { t[13] &^= flags }

// UDP is a view of a UDP header (RFC 768) and what follows it.
type UDP []byte

// Len is the length field: header and payload, in bytes.
func (u UDP) Len() int { return int(binary.BigEndian.Uint16(u[4:])) }

// SetLen sets the length field: header and payload, in bytes.
func (u UDP) SetLen(n int) { binary.BigEndian.PutUint16(u[4:], uint16(n)) }

// Layers says where the headers of a frame lie.
type Layers struct {
	Type  uint16 // EtherType behind the tags
	L3    int    // offset of the network header
	L4    int    // offset of the transport header; 0 when there is none to be read
	Proto uint8  // of the transport header
}

// maxTags bounds the run of VLAN tags Parse looks behind.
const maxTags = 4

// Parse finds the headers of the frame b, behind up to four VLAN tags. It is
// false when b is too short for the headers it announces. For what is neither
// IPv4 nor IPv6, for fragments and for IPv6 with extension headers L4 is 0.
// When L4 is set and Proto is TCP or UDP, the whole transport header is in b.
func Parse(b []byte) (Layers, bool) {
	if len(b) < EthernetLen {
		return Layers{}, false
	}
	l := Layers{Type: Ethernet(b).Type(), L3: EthernetLen}
	for n := 0; l.Type == TypeVLAN || l.Type == TypeSVLAN; n++ {
		if n == maxTags || len(b) < l.L3+TagLen {
			return Layers{}, false
		}
		l.Type = binary.BigEndian.Uint16(b[l.L3+2:])
		l.L3 += TagLen
	}
	ok := true
	switch l.Type {
	case TypeIPv4:
		ok = l.parseIPv4(b[l.L3:])
	case TypeIPv6:
		ok = l.parseIPv6(b[l.L3:])
	}
	return l, ok
}

func (l *Layers) parseIPv4(b []byte) bool {
	p := IPv4(b)
	if len(b) < IPv4Len || b[0]>>4 != 4 || p.HeaderLen() < IPv4Len || len(b) < p.HeaderLen() {
		return false
	}
	if p.IsFragment() {
		return true
	}
	return l.parseL4(p.Proto(), b[p.HeaderLen():], l.L3+p.HeaderLen())
}

func (l *Layers) parseIPv6(b []byte) bool {
	p := IPv6(b)
	if len(b) < IPv6Len || b[0]>>4 != 6 {
		return false
	}
	return l.parseL4(p.NextHeader(), b[IPv6Len:], l.L3+IPv6Len)
}

func (l *Layers) parseL4(proto uint8, b []byte, at int) bool {
	switch proto {
	case ProtoTCP:
		if len(b) < TCPLen || TCP(b).HeaderLen() < TCPLen || len(b) < TCP(b).HeaderLen() {
			return false
		}
	case ProtoUDP:
		if len(b) < UDPLen {
			return false
		}
	default:
		return true
	}
	l.Proto, l.L4 = proto, at
	return true
}
