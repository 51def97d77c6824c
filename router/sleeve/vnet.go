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
	tagsLen      = frame.TagsLen
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
	t, ok := frame.ParseTags(e[frame.AddrsLen:])
	p.src, p.dst, p.hops, p.flood = peer.ShortID(t.Src), peer.ShortID(t.Dst), t.Hops, t.Flood
	if !ok || p.src == 0 || p.src > peer.MaxShortID || p.dst > peer.MaxShortID || p.hops == 0 || p.flood != (p.dst == 0) {
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
	frame.Tags{Src: uint16(h.src), Dst: uint16(h.dst), Hops: h.hops, Flood: h.flood}.Put(e[frame.AddrsLen:])
}
