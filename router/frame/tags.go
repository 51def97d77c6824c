package frame

import "encoding/binary"

// TagsLen is the length of Tags, in bytes.
const TagsLen = 2 * TagLen

const tagFlooded = 1 << 15 // of the customer tag

// Tags say whom a frame on the TAP of a data path is from and for: a service tag
// (IEEE 802.1ad) and a customer tag (IEEE 802.1Q), behind the Ethernet addresses.
// The service tag holds the source in bits 0-11 and bits 2-5 of the hop limit in
// bits 12-15, the customer tag the destination in bits 0-11, bits 0-1 of the hop
// limit in bits 12-13, and in bit 15 whether the frame is flooded.
type Tags struct {
	Src, Dst uint16 // short ids of peers, 12 bits
	Hops     uint8  // how often the frame may go on, 6 bits
	Flood    bool   // it is for all
}

// Put writes the tags to b.
func (t Tags) Put(b []byte) {
	c := t.Dst | uint16(t.Hops)&3<<12
	if t.Flood {
		c |= tagFlooded
	}
	binary.BigEndian.PutUint16(b, TypeSVLAN)
	binary.BigEndian.PutUint16(b[2:], t.Src|uint16(t.Hops)>>2<<12)
	binary.BigEndian.PutUint16(b[4:], TypeVLAN)
	binary.BigEndian.PutUint16(b[6:], c)
}

// ParseTags reads tags from b, which must hold TagsLen bytes. It is false when they
// are none of these two kinds.
func ParseTags(b []byte) (Tags, bool) {
	s, c := binary.BigEndian.Uint16(b[2:]), binary.BigEndian.Uint16(b[6:])
	t := Tags{Src: s & 0xfff, Dst: c & 0xfff, Hops: uint8(s>>12<<2 | c>>12&3), Flood: c&tagFlooded != 0}
	return t, binary.BigEndian.Uint16(b) == TypeSVLAN && binary.BigEndian.Uint16(b[4:]) == TypeVLAN
}
