package sleeve

import (
	"bytes"
	"encoding/binary"

	"weave.local/router/frame"
)

const (
	// maxRow is how many datagrams a row has at most: as many as the kernel
	// takes from a program in one go (UDP_MAX_SEGMENTS before Linux 6.9).
	maxRow = 64
	// rowLen is the longest row in bytes. Longer than one datagram to the
	// neighbour it never gets.
	rowLen = 9216
)

// row gathers UDP packets of one flow, equally long, that come out of the TAP
// one after the other, as the super-frame that they would be if their sender had
// sent them in one go. As long as that fits one datagram to the neighbour, it
// costs as much on its way, up to the receiver's socket, as a single packet.
//
// Nothing waits for more to come: a row lasts while the TAP has frames.
type row struct {
	pkt     packet // of the first packet; data is all of them, gathered in buf
	buf     [rowLen]byte
	n       int // packets; 0: there is no row
	room    int // for data
	headLen int
	size    int  // of each packet's payload
	anyID   bool // IPv4 identifications need not be in order: there is none, or it tells nothing
}

// begin makes p the first of a row if more like it may follow within room bytes.
func (r *row) begin(p *packet, room int) bool {
	room = min(room, rowLen)
	if !p.partial || p.gsoType != gsoNone || p.csumAt != frame.UDPChecksum || 2*len(p.data) > room {
		return false
	}
	l, ok := frame.Parse(p.data)
	headLen := l.L4 + frame.UDPLen
	if !ok || l.Proto != frame.ProtoUDP || l.L3 != frame.EthernetLen || l.L4 != int(p.csumStart) || len(p.data) <= headLen ||
		frame.UDP(p.data[l.L4:]).Len() != len(p.data)-l.L4 {
		return false
	}
	r.anyID = true
	if l.Type == frame.TypeIPv4 {
		ip := frame.IPv4(p.data[l.L3:])
		if ip.HeaderLen() != frame.IPv4Len || ip.TotalLen() != len(p.data)-l.L3 {
			return false
		}
		r.anyID = ip.DontFragment()
	} else if frame.IPv6(p.data[l.L3:]).PayloadLen() != len(p.data)-l.L4 {
		return false
	}
	r.pkt, r.n, r.room, r.headLen, r.size = *p, 1, room, headLen, len(p.data)-headLen
	r.pkt.data = r.buf[:copy(r.buf[:], p.data)]
	return true
}

// add takes p to the row; false when it is not of it.
func (r *row) add(p *packet) bool {
	if r.n == 0 || r.n == maxRow || len(r.pkt.data)+r.size > r.room || len(p.data) != r.headLen+r.size ||
		p.src != r.pkt.src || p.dst != r.pkt.dst || p.hops != r.pkt.hops || p.flood != r.pkt.flood || p.offload != r.pkt.offload {
		return false
	}
	if !r.follows(p.data[:r.headLen]) {
		return false
	}
	r.pkt.data = append(r.pkt.data, p.data[r.headLen:]...)
	r.n++
	return true
}

// follows says whether a packet with these headers, alike in length, may stand
// behind those in the row.
func (r *row) follows(headers []byte) bool {
	const id, checksum = frame.EthernetLen + 4, frame.EthernetLen + 10 // in IPv4, two bytes each
	mine := r.pkt.data
	if binary.BigEndian.Uint16(headers[frame.EthernetLen-2:]) != frame.TypeIPv4 {
		return bytes.Equal(headers, mine[:r.headLen])
	}
	// The kernel counts up from the first packet's identification when it
	// takes the super-frame apart.
	next := binary.BigEndian.Uint16(mine[id:]) + uint16(r.n)
	return bytes.Equal(headers[:id], mine[:id]) &&
		bytes.Equal(headers[id+2:checksum], mine[id+2:checksum]) &&
		bytes.Equal(headers[checksum+2:], mine[checksum+2:r.headLen]) &&
		(r.anyID || binary.BigEndian.Uint16(headers[id:]) == next)
}

// finish ends the row and returns its frame, which is valid until the next begin.
func (r *row) finish() *packet {
	p := &r.pkt
	if r.n > 1 {
		l4 := r.headLen - frame.UDPLen
		before, after := frame.UDPLen+r.size, len(p.data)-l4
		if frame.Ethernet(p.data).Type() == frame.TypeIPv4 {
			ip := frame.IPv4(p.data[frame.EthernetLen:])
			ip.SetTotalLen(frame.IPv4Len + after)
			ip.SetChecksum()
		} else {
			frame.IPv6(p.data[frame.EthernetLen:]).SetPayloadLen(after)
		}
		frame.UDP(p.data[l4:]).SetLen(after)
		frame.AmendSum(p.data[l4+frame.UDPChecksum:], uint16(before), uint16(after))
		p.gsoType, p.gsoSize = gsoUDP, uint16(r.size)
	}
	r.n = 0
	return p
}
