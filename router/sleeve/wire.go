package sleeve

import (
	"encoding/binary"
	"errors"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/seal"
)

// The outer and the whole header of a datagram, and what follows the text of a
// sealed one, in bytes.
const (
	version   = 1
	outerLen  = seal.HeaderLen
	headerLen = 28
	tailLen   = 1 + seal.TailLen
)

// SealedOverhead is what the path over IPv4 adds to an IP packet for a neighbour
// with keys, in bytes, Ethernet header of the packet's frame included.
const SealedOverhead = ipv4Overhead + headerLen + frame.EthernetLen + tailLen

// Why a datagram is not taken, besides what package seal says.
var (
	errStranger = errors.New("no neighbour sends with that short id and session")
	errUnsealed = errors.New("datagram is not sealed, although its sender has keys")
)

// errWornOut cannot be met by anybody who hears from the neighbour.
var errWornOut = errors.New("the key is worn out, and the neighbour does not answer")

// Kinds of datagrams.
const (
	kindFrame    = 1
	kindSegment  = 2
	kindFragment = 3
	kindProbe    = 4
)

const (
	// minFragment is the least length of a fragment but the last, so that a
	// frame has no more than maxFragments of them.
	minFragment  = 128
	maxFragments = maxFrame/minFragment + 1
	// maxFrame is the largest frame carried, in bytes without our tags: a
	// super-frame of 64 KiB with Ethernet header and a tag.
	maxFrame = 65536 + frame.EthernetLen + frame.TagLen
	// maxOffset is the largest offset of a piece that the header can say.
	maxOffset = 1<<16 - 1
	// maxDatagram is the largest UDP payload over IPv4.
	maxDatagram = 65507
)

// maxHops is the largest hop limit that the tags and the header can say.
const maxHops = 63

// header is what stands in front of every frame or piece of one.
type header struct {
	kind     uint8
	src, dst peer.ShortID
	hops     uint8
	flood    bool
	group    uint16
	offset   uint16
	headLen  uint8 // segments only
	last     bool
	offload
}

// offload is what the virtio-net header says of a frame, counted in bytes from
// the frame's start without our tags.
type offload struct {
	gsoType   uint8
	gsoSize   uint16
	partial   bool // the checksum holds the pseudo header's sum only
	csumStart uint16
	csumAt    uint8 // from csumStart
}

// seal makes a datagram of d, whose kind and everything after the outer header
// are in place but for the tail: it says who sends it and proves that to n. It
// is false when the key is worn out.
func (n *neighbour) seal(self peer.ShortID, d []byte) bool {
	if n.keys != nil {
		text := d[:len(d)-tailLen+1]
		text[len(text)-1] = d[1]
		return n.keys.Seal(text, uint16(self)) != nil
	}
	d[0] = version
	binary.BigEndian.PutUint16(d[2:], uint16(self))
	binary.BigEndian.PutUint64(d[4:], n.session)
	return true
}

// open finds the neighbour that sent d and returns d as it was before it was
// sealed, in the same memory. The error says why it is not to be taken. Spare is
// memory for a second attempt.
func (t *table) open(d []byte, spare *[]byte) (*neighbour, []byte, error) {
	if len(d) < outerLen {
		return nil, nil, errStranger
	}
	n := t.neighbour(peer.ShortID(binary.BigEndian.Uint16(d[2:])))
	if n == nil {
		return nil, nil, errStranger
	}
	before := n.before.Load()
	if before != nil {
		*spare = append((*spare)[:0], d...)
	}
	text, err := n.open(d)
	if err == nil {
		if !n.heard.Load() {
			n.heard.Store(true)
		}
		return n, text, nil
	}
	if before != nil {
		copy(d, *spare) // what does not open is lost
		if text, err := before.open(d); err == nil {
			return n, text, nil
		}
	}
	return nil, nil, err
}

// open is the same for a datagram that is n's.
func (n *neighbour) open(d []byte) ([]byte, error) {
	switch {
	case n.keys == nil:
		if len(d) < headerLen || d[0] != version || n.session != binary.BigEndian.Uint64(d[4:]) {
			return nil, errStranger
		}
		return d, nil
	case d[0] == version:
		return nil, errUnsealed
	}
	d, err := n.keys.Open(d)
	if err != nil {
		return nil, err
	}
	text := len(d) - 1
	if text < outerLen {
		return nil, seal.ErrForged
	}
	d[1] = d[text]
	return d[:text], nil
}

// put writes the header into d, but for what seal adds.
func (h *header) put(d []byte) {
	way := uint32(h.src)<<20 | uint32(h.dst)<<8 | uint32(h.hops)<<2
	if h.flood {
		way |= 2
	}
	if h.partial {
		way |= 1
	}
	d[1] = h.kind
	binary.BigEndian.PutUint32(d[12:], way)
	binary.BigEndian.PutUint16(d[16:], h.group)
	binary.BigEndian.PutUint16(d[18:], h.offset)
	binary.BigEndian.PutUint16(d[20:], h.gsoSize)
	binary.BigEndian.PutUint16(d[22:], h.csumStart)
	d[24], d[25], d[26], d[27] = h.csumAt, h.headLen, h.gsoType, 0
	if h.last {
		d[27] = 1
	}
}

// parse reads the header of d and says whether datagram and header are as the
// package comment demands.
func (h *header) parse(d []byte) bool {
	if len(d) < headerLen || len(d) > maxDatagram || d[27]&^1 != 0 {
		return false
	}
	way := binary.BigEndian.Uint32(d[12:])
	*h = header{
		kind:    d[1],
		src:     peer.ShortID(way >> 20),
		dst:     peer.ShortID(way >> 8 & 0xfff),
		hops:    uint8(way >> 2 & maxHops),
		flood:   way&2 != 0,
		group:   binary.BigEndian.Uint16(d[16:]),
		offset:  binary.BigEndian.Uint16(d[18:]),
		headLen: d[25],
		last:    d[27] == 1,
		offload: offload{
			gsoType:   d[26],
			gsoSize:   binary.BigEndian.Uint16(d[20:]),
			partial:   way&1 != 0,
			csumStart: binary.BigEndian.Uint16(d[22:]),
			csumAt:    d[24],
		},
	}
	if h.src == 0 || h.src > peer.MaxShortID || h.dst > peer.MaxShortID || h.hops == 0 || h.flood != (h.dst == 0) {
		return false
	}
	if (h.gsoType == gsoNone) != (h.gsoSize == 0) {
		return false
	}
	return h.fits(len(d) - headerLen)
}

// sameFrame says whether o may be a piece of the same frame as h is.
func (h *header) sameFrame(o *header) bool {
	like := *o
	like.offset, like.last = h.offset, h.last
	return like == *h
}

// fits says whether n bytes after the header make sense.
func (h *header) fits(n int) bool {
	switch h.kind {
	case kindFrame:
		return n >= frame.EthernetLen && h.coverageWithin(n)
	case kindFragment:
		return n > 0 && int(h.offset)+n <= maxFrame && (h.last || n >= minFragment)
	case kindSegment:
		size := n - int(h.headLen)
		return h.segmentable() && h.coverageWithin(int(h.headLen)) &&
			size > 0 && size <= int(h.gsoSize) && (h.last || size == int(h.gsoSize)) &&
			int(h.headLen)+int(h.offset)+size <= maxFrame
	case kindProbe:
		return n >= probeBody
	}
	return false
}

// packets is how many packets the whole frame data stands for, and how many
// bytes these have together, headers in each.
func (h *header) packets(data []byte) (n, bytes int) {
	if h.kind != kindFrame || h.gsoSize == 0 || !h.partial {
		return 1, len(data)
	}
	headLen := int(h.csumStart)
	switch {
	case h.gsoType == gsoUDP:
		headLen += frame.UDPLen
	case headLen+frame.TCPLen <= len(data):
		headLen += frame.TCP(data[headLen:]).HeaderLen()
	}
	if headLen >= len(data) {
		return 1, len(data)
	}
	n = (len(data) - headLen + int(h.gsoSize) - 1) / int(h.gsoSize)
	return n, len(data) + (n-1)*headLen
}

// coverageWithin says whether an incomplete checksum lies in the first n bytes
// of the frame, behind the Ethernet header.
func (o *offload) coverageWithin(n int) bool {
	return !o.partial || o.csumStart >= frame.EthernetLen && int(o.csumStart)+int(o.csumAt)+2 <= n
}

// segmentable says whether the frame is one that we cut in segments.
func (o *offload) segmentable() bool {
	if !o.partial || o.gsoSize == 0 {
		return false
	}
	switch o.gsoType &^ gsoECN {
	case gsoTCP4, gsoTCP6:
		return o.csumAt == frame.TCPChecksum
	case gsoUDP:
		return o.csumAt == frame.UDPChecksum
	}
	return false
}
