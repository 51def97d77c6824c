package link

import (
	"encoding/binary"
	"errors"

	"weave.local/peer"
	"weave.local/peer/linkstate"
)

// Types of control frames.
const (
	typeHello     = 1
	typeDatagram  = 3
	typeBroadcast = 4
	typeBye       = 5
)

const (
	headSize = 5  // length and type
	msgHead  = 64 // room for the header of a message
	maxBody  = MaxPayload + msgHead
	maxTTL   = 64
)

var errFrame = errors.New("malformed frame")

// frame puts a body behind its head.
func frame(typ byte, body []byte) []byte {
	b := make([]byte, headSize, headSize+len(body))
	b[4] = typ
	return withLength(append(b, body...))
}

// withLength fills in the length of a complete frame.
func withLength(b []byte) []byte {
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

func helloFrame(digest uint64) []byte {
	return frame(typeHello, binary.BigEndian.AppendUint64(nil, digest))
}

// frames puts messages about link state into frames.
func frames(list []linkstate.Message) [][]byte {
	out := make([][]byte, 0, len(list))
	for _, m := range list {
		out = append(out, frame(m.Type, m.Body))
	}
	return out
}

// datagram is a message to one peer.
type datagram struct {
	ttl      byte
	dst, src peer.Name
	kind     byte
	payload  []byte
}

func (d datagram) frame() []byte {
	b := make([]byte, headSize, headSize+msgHead+len(d.payload))
	b[4] = typeDatagram
	b = append(b, d.ttl)
	b = peer.AppendName(b, d.dst)
	b = peer.AppendName(b, d.src)
	b = append(b, d.kind)
	return withLength(append(b, d.payload...))
}

func parseDatagram(b []byte) (d datagram, err error) {
	if len(b) < 2+2*peer.NameSize || len(b)-2-2*peer.NameSize > MaxPayload {
		return d, errFrame
	}
	d.ttl = b[0]
	d.dst = peer.NameFromMAC([peer.NameSize]byte(b[1:]))
	d.src = peer.NameFromMAC([peer.NameSize]byte(b[1+peer.NameSize:]))
	d.kind = b[1+2*peer.NameSize]
	d.payload = b[2+2*peer.NameSize:]
	return d, nil
}

// broadcast is a message to all peers.
type broadcast struct {
	ttl     byte
	src     peer.Name
	seq     uint64
	kind    byte
	payload []byte
}

func (c broadcast) frame() []byte {
	b := make([]byte, headSize, headSize+msgHead+len(c.payload))
	b[4] = typeBroadcast
	b = append(b, c.ttl)
	b = peer.AppendName(b, c.src)
	b = binary.BigEndian.AppendUint64(b, c.seq)
	b = append(b, c.kind)
	return withLength(append(b, c.payload...))
}

func parseBroadcast(b []byte) (c broadcast, err error) {
	const fixed = 1 + peer.NameSize + 8 + 1
	if len(b) < fixed || len(b)-fixed > MaxPayload {
		return c, errFrame
	}
	c.ttl = b[0]
	c.src = peer.NameFromMAC([peer.NameSize]byte(b[1:]))
	c.seq = binary.BigEndian.Uint64(b[1+peer.NameSize:])
	c.kind = b[fixed-1]
	c.payload = b[fixed:]
	return c, nil
}

// window remembers which of the last 64 sequence numbers of a source were
// seen.
type window struct {
	top  uint64 // highest seen
	seen uint64 // bit i: top-i
}

// fresh says whether seq was not seen before, and notes it. Numbers too old to
// tell count as seen.
func (w *window) fresh(seq uint64) bool {
	if seq > w.top {
		shift := seq - w.top
		w.seen <<= min(shift, 64)
		w.seen |= 1
		w.top = seq
		return true
	}
	age := w.top - seq
	if age >= 64 || w.seen&(1<<age) != 0 {
		return false
	}
	w.seen |= 1 << age
	return true
}
