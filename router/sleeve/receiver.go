package sleeve

import (
	"errors"
	"os"
	"sync/atomic"

	"weave.local/router/frame"
	"weave.local/router/overlay"
)

// frameWriter is where the receiver puts frames: the TAP.
type frameWriter interface {
	// WriteFrame writes one frame that lies in parts, and keeps none of it.
	WriteFrame(parts [][]byte) error
}

// receiver takes datagrams from the socket to the TAP. Pieces of a super-frame
// that come one after the other are joined where they lie in the receive
// buffers, so that flush must be called before these are used again.
type receiver struct {
	table   *atomic.Pointer[table]
	count   *counters
	onProbe overlay.ProbeFunc
	sock    *socket
	out     frameWriter
	moved   func(*neighbour)
	from    *sockaddr // of the datagram at hand
	spare   []byte    // a copy of it
	uso     bool      // out takes UDP super-frames

	run   run
	frags reassembly
	front [tapOverhead + frame.AddrsLen]byte
	parts [2][]byte
}

func (p *Path) newReceiver() *receiver {
	r := &receiver{
		table: &p.table, count: p.count, onProbe: p.onProbe, sock: p.sock, out: p.tap, uso: p.tap.USO(),
		moved: p.moved, from: new(sockaddr),
	}
	r.frags.count = p.count
	return r
}

// serve runs until the socket is closed.
func (r *receiver) serve() error {
	for {
		n, err := r.sock.receive()
		if err != nil {
			return err
		}
		for i := range n {
			var data []byte
			var seg int
			data, seg, r.from = r.sock.message(i)
			for ; len(data) > seg; data = data[seg:] {
				if err := r.datagram(data[:seg]); err != nil {
					return err
				}
			}
			if err := r.datagram(data); err != nil {
				return err
			}
		}
		if err := r.flush(); err != nil {
			return err
		}
	}
}

// datagram takes one datagram. The error is that of a closed TAP; what a
// datagram says wrong is only counted.
func (r *receiver) datagram(d []byte) error {
	r.count.datagramsIn.Add(1)
	t := r.table.Load()
	n, d, err := t.open(d, &r.spare)
	if err != nil {
		r.count.refused(err)
		return nil
	}
	var h header
	if !h.parse(d) {
		r.count.drop(malformed, n.traffic)
		return nil
	}
	if n.came(r.from) {
		r.moved(n)
	}
	if h.kind == kindProbe {
		r.probe(t, n, &h, d)
		return nil
	}
	packets, bytes := h.packets(d[headerLen:])
	if h.kind == kindFragment && !h.last {
		packets = 0
	}
	n.traffic.rx.add(packets, bytes, h.flood, h.dst != t.self)
	if h.src == t.self {
		r.count.drop(own, n.traffic)
		return nil
	}
	if h.flood {
		if t.trees[h.src].parent != n {
			r.count.drop(reversePath, n.traffic)
			return nil
		}
		h.dst = t.self
	}
	return r.piece(n, &h, d[headerLen:])
}

func (r *receiver) piece(n *neighbour, h *header, body []byte) error {
	if h.kind == kindSegment {
		if r.run.takes(n, h) {
			r.run.add(h, body[h.headLen:])
		} else {
			if err := r.flush(); err != nil {
				return err
			}
			r.run.begin(n, h, body[:h.headLen], body[h.headLen:])
		}
		if h.last || h.gsoType == gsoUDP && !r.uso {
			return r.flush()
		}
		return nil
	}
	// What came before goes out before, so that a flow stays in order.
	if err := r.flush(); err != nil {
		return err
	}
	if h.kind == kindFrame {
		return r.whole(n, h, body)
	}
	if s := r.frags.add(n, h, body); s != nil {
		defer s.reset()
		return r.whole(n, &s.header, s.buf[:s.total])
	}
	return nil
}

// whole writes one whole frame.
func (r *receiver) whole(n *neighbour, h *header, data []byte) error {
	if len(data) < frame.EthernetLen || !h.coverageWithin(len(data)) {
		r.count.drop(malformed, n.traffic)
		return nil
	}
	if h.gsoType == gsoUDP && !r.uso && h.segmentable() {
		return r.split(n, h, data)
	}
	putTapHeader(r.front[:], h, data, len(data))
	r.parts[0], r.parts[1] = r.front[:], data[frame.AddrsLen:]
	return r.write(n, r.parts[:])
}

// split writes the packets of a whole UDP super-frame one by one.
func (r *receiver) split(n *neighbour, h *header, data []byte) error {
	headLen := int(h.csumStart) + frame.UDPLen
	if headLen > 0xff || headLen >= len(data) {
		r.count.drop(malformed, n.traffic)
		return nil
	}
	one, payload := *h, data[headLen:]
	one.headLen = uint8(headLen)
	for off := 0; off < len(payload); off += int(h.gsoSize) {
		end := min(off+int(h.gsoSize), len(payload))
		one.offset, one.last = uint16(off), end == len(payload)
		r.run.begin(n, &one, data[:headLen], payload[off:end])
		if err := r.flush(); err != nil {
			return err
		}
	}
	return nil
}

// flush writes the frame that the open run makes.
func (r *receiver) flush() error {
	n := r.run.from
	if n == nil {
		return nil
	}
	parts, ok := r.run.finish()
	if !ok {
		r.count.drop(incomplete, n.traffic)
		return nil
	}
	return r.write(n, parts)
}

// write hands a frame from n to the TAP. The kernel refuses what makes no sense to it,
// as when offsets point outside of the headers they should.
func (r *receiver) write(n *neighbour, parts [][]byte) error {
	err := r.out.WriteFrame(parts)
	switch {
	case err == nil:
		r.count.framesIn.Add(1)
	case errors.Is(err, os.ErrClosed):
		return err
	default:
		r.count.drop(tapRefused, n.traffic)
	}
	return nil
}
