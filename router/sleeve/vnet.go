package sleeve

import (
	"encoding/binary"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/tap"
)

// The legacy virtio-net header (struct virtio_net_hdr), in host byte order:
// flags u8, GSO type u8, header length u16, GSO size u16, checksum start u16,
// checksum offset u16.
const (
	vnetLen      = tap.HeaderLen
	needsCsum    = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoNone      = 0
	gsoTCP4      = 1
	gsoTCP6      = 4
	gsoUDP       = 5 // VIRTIO_NET_HDR_GSO_UDP_L4
	gsoECN       = 0x80
	tagsLen      = 2 * frame.TagLen
	tapOverhead  = vnetLen + tagsLen
	minTapFrame  = tapOverhead + frame.EthernetLen
	linearHeader = 128 // bytes of a frame that the kernel shall hold in one piece
)

// packet is a frame read from the TAP, without its tags.
type packet struct {
	src, dst peer.ShortID
	hops     uint8
	flood    bool
	data     []byte
	offload
}

// parse takes b, as read from the TAP, apart. It moves the addresses in b over
// the tags, and completes a checksum that datagrams cannot describe. It is
// false when the frame is not tagged as it should.
func (p *packet) parse(b []byte) bool {
	if len(b) < minTapFrame || len(b) > maxFrame+tapOverhead {
		return false
	}
	e := b[vnetLen:]
	if binary.BigEndian.Uint16(e[12:]) != frame.TypeSVLAN || binary.BigEndian.Uint16(e[16:]) != frame.TypeVLAN {
		return false
	}
	p.setTags(binary.BigEndian.Uint16(e[14:]), binary.BigEndian.Uint16(e[18:]))
	if p.src == 0 || p.src > peer.MaxShortID || p.dst > peer.MaxShortID || p.hops == 0 || p.flood != (p.dst == 0) {
		return false
	}
	copy(e[tagsLen:], e[:frame.AddrsLen])
	p.data = e[tagsLen:]
	p.offload = offload{gsoType: b[1], gsoSize: binary.NativeEndian.Uint16(b[4:])}
	if p.gsoType == gsoNone {
		p.gsoSize = 0
	} else if p.gsoSize == 0 {
		return false
	}
	if b[0]&needsCsum == 0 {
		return true
	}
	start := int(binary.NativeEndian.Uint16(b[6:])) - tagsLen
	at := int(binary.NativeEndian.Uint16(b[8:]))
	if start < frame.EthernetLen || start+at+2 > len(p.data) {
		return false
	}
	if at > 0xff {
		sum := ^frame.Fold(frame.Sum(p.data[start:], 0))
		binary.BigEndian.PutUint16(p.data[start+at:], sum)
		return true
	}
	p.partial, p.csumStart, p.csumAt = true, uint16(start), uint8(at)
	return true
}

func (p *packet) setTags(s, c uint16) {
	p.src, p.dst = peer.ShortID(s&0xfff), peer.ShortID(c&0xfff)
	p.hops = uint8(s>>12<<2 | c>>12&3)
	p.flood = c>>15 == 1
}

// tags are the control information of the service and the customer tag.
func tags(src, dst peer.ShortID, hops uint8, flood bool) (s, c uint16) {
	s = uint16(src) | uint16(hops)>>2<<12
	c = uint16(dst) | uint16(hops)&3<<12
	if flood {
		c |= 1 << 15
	}
	return s, c
}

// putTapHeader writes what goes before the type of a frame into the TAP to b:
// virtio-net header, the addresses and both tags. length is that of the frame
// without the tags.
func putTapHeader(b []byte, h *header, addrs []byte, length int) {
	b[0], b[1] = 0, h.gsoType
	linear := min(length+tagsLen, linearHeader)
	var start, at uint16
	if h.partial {
		b[0] = needsCsum
		start, at = h.csumStart+tagsLen, uint16(h.csumAt)
		linear = max(linear, int(start+at)+2)
	}
	binary.NativeEndian.PutUint16(b[2:], uint16(linear))
	binary.NativeEndian.PutUint16(b[4:], h.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], start)
	binary.NativeEndian.PutUint16(b[8:], at)
	e := b[vnetLen:]
	copy(e, addrs[:frame.AddrsLen])
	s, c := tags(h.src, h.dst, h.hops, h.flood)
	binary.BigEndian.PutUint16(e[12:], frame.TypeSVLAN)
	binary.BigEndian.PutUint16(e[14:], s)
	binary.BigEndian.PutUint16(e[16:], frame.TypeVLAN)
	binary.BigEndian.PutUint16(e[18:], c)
}
