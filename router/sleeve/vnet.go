package sleeve

import (
	"encoding/binary"

	"weave.local/peer"
	"weave.local/router/frame"
)

// The kinds of super-frames are in datagrams as they are at the TAP.
const (
	gsoNone      = frame.GSONone
	gsoTCP4      = frame.GSOTCP4
	gsoTCP6      = frame.GSOTCP6
	gsoUDP       = frame.GSOUDP
	gsoECN       = frame.GSOECN
	vnetLen      = frame.VirtioNetLen
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
	v := frame.VirtioNet(b)
	p.offload = offload{}
	p.gsoType, p.gsoSize = v.GSO()
	if p.gsoType == gsoNone {
		p.gsoSize = 0
	} else if p.gsoSize == 0 {
		return false
	}
	from, field, left := v.ChecksumLeft()
	if !left {
		return true
	}
	start, at := int(from)-tagsLen, int(field)
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
	v := frame.VirtioNet(b)
	clear(v[:vnetLen])
	v.SetGSO(h.gsoType, h.gsoSize)
	linear := min(length+tagsLen, linearHeader)
	if h.partial {
		start, at := h.csumStart+tagsLen, uint16(h.csumAt)
		v.LeaveChecksum(start, at)
		linear = max(linear, int(start+at)+2)
	}
	v.SetHeaderLen(uint16(linear))
	e := b[vnetLen:]
	copy(e, addrs[:frame.AddrsLen])
	s, c := tags(h.src, h.dst, h.hops, h.flood)
	binary.BigEndian.PutUint16(e[12:], frame.TypeSVLAN)
	binary.BigEndian.PutUint16(e[14:], s)
	binary.BigEndian.PutUint16(e[16:], frame.TypeVLAN)
	binary.BigEndian.PutUint16(e[18:], c)
}
