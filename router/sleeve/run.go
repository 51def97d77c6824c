package sleeve

import (
	"weave.local/router/frame"
	"weave.local/router/tap"
)

// run is a row of segments of one super-frame, in order and without a gap,
// that is written to the TAP as one frame.
type run struct {
	from   *neighbour // nil: no run is open
	header            // of the first segment
	next   int        // payload offset of the segment that would go on
	ended  bool       // has the last segment
	head   [tapOverhead + 0xff]byte
	parts  [tap.MaxParts][]byte
	used   int
}

// takes says whether the segment goes on where the run ends.
func (r *run) takes(n *neighbour, h *header) bool {
	return r.from == n && r.sameFrame(h) && int(h.offset) == r.next && !r.ended && r.used < tap.MaxParts
}

// begin opens the run with a segment: its headers are copied, its payload is
// not.
func (r *run) begin(n *neighbour, h *header, head, payload []byte) {
	r.from, r.header, r.next, r.ended, r.used = n, *h, int(h.offset), false, 1
	copy(r.head[tapOverhead:], head)
	r.add(h, payload)
}

func (r *run) add(h *header, payload []byte) {
	r.parts[r.used] = payload
	r.used++
	r.next += len(payload)
	r.ended = h.last
}

// finish closes the run and returns its frame for the TAP, valid until the next
// begin. It is false when segments are missing and the headers are not such
// that the rest can stand for itself.
func (r *run) finish() ([][]byte, bool) {
	r.from = nil
	headers := r.head[tapOverhead : tapOverhead+int(r.headLen)]
	payload := r.next - int(r.offset)
	if (r.offset != 0 || !r.ended) && !r.mend(headers, payload) {
		return nil, false
	}
	h := r.header
	if payload <= int(h.gsoSize) {
		h.gsoType, h.gsoSize = gsoNone, 0
	}
	// The addresses move to the front, the tags go between them and the type.
	var addrs [frame.AddrsLen]byte
	copy(addrs[:], headers)
	putTapHeader(r.head[:], &h, addrs[:], len(headers)+payload)
	r.parts[0] = r.head[:tapOverhead+len(headers)]
	return r.parts[:r.used], true
}

// mend makes the headers of the super-frame fit the payload of this run alone:
// lengths, IPv4 identification, TCP sequence number and flags, and the pseudo
// header's sum.
func (r *run) mend(headers []byte, payload int) bool {
	l, ok := frame.Parse(headers)
	if !ok || l.L4 == 0 || l.L4 != int(r.csumStart) || l.L4-l.L3 > len(headers) {
		return false
	}
	var before int // length of the transport header and its payload
	after := len(headers) - l.L4 + payload
	switch l.Type {
	case frame.TypeIPv4:
		ip := frame.IPv4(headers[l.L3:])
		before = ip.TotalLen() - ip.HeaderLen()
		ip.SetTotalLen(ip.HeaderLen() + after)
		ip.SetID(ip.ID() + r.offset/r.gsoSize)
		ip.SetChecksum()
	case frame.TypeIPv6:
		ip := frame.IPv6(headers[l.L3:])
		before = ip.PayloadLen()
		ip.SetPayloadLen(after)
	default:
		return false
	}
	switch {
	case l.Proto == frame.ProtoTCP && r.gsoType != gsoUDP:
		r.mendTCP(frame.TCP(headers[l.L4:]))
	case l.Proto == frame.ProtoUDP && r.gsoType == gsoUDP:
		frame.UDP(headers[l.L4:]).SetLen(after)
	default:
		return false
	}
	frame.AmendSum(headers[l.L4+int(r.csumAt):], uint16(before), uint16(after))
	return true
}

func (r *run) mendTCP(t frame.TCP) {
	t.SetSeq(t.Seq() + uint32(r.offset))
	if !r.ended {
		t.ClearFlags(frame.FlagFIN | frame.FlagPSH)
	}
	if r.offset > 0 {
		t.ClearFlags(frame.FlagCWR)
	}
}
