package sleeve

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/overlay"
)

// probeBody is the least length of a probe after the header: token and size,
// padded to an Ethernet header.
const probeBody = frame.EthernetLen

// Probe sends one datagram as large as one that carries a frame with an IP
// packet of size bytes, 0 to 65535. The error is a *overlay.TooBigError when
// it does not fit the path as the kernel knows it.
func (p *Path) Probe(to peer.ShortID, token uint64, size int) error {
	t := p.table.Load()
	n := t.neighbour(to)
	if n == nil {
		return errUnknown(to)
	}
	if size < 0 || size > 0xffff {
		return fmt.Errorf("probe of %d bytes: no IP packet has that size", size)
	}
	if headerLen+probeBody+size+n.tail() > maxDatagram {
		return &overlay.TooBigError{MTU: p.MTU(to)}
	}
	d := make([]byte, headerLen+probeBody+size+n.tail())
	h := header{kind: kindProbe, src: t.self, dst: to, hops: 1, last: true}
	h.put(d)
	binary.BigEndian.PutUint64(d[headerLen:], token)
	binary.BigEndian.PutUint16(d[headerLen+8:], uint16(size))
	if !n.seal(t.self, d) {
		return fmt.Errorf("probe to peer %s: %w", n.name, errWornOut)
	}
	err := p.sock.sendOne(n, d)
	if errors.Is(err, unix.EMSGSIZE) {
		p.refreshMTU(n)
		return &overlay.TooBigError{MTU: n.maxPacket()}
	}
	if err != nil {
		return fmt.Errorf("probe to peer %s at %s: %w", n.name, n.place.Load().addr, err)
	}
	p.count.probesOut.Add(1)
	return nil
}

// probe takes a probe that arrived from n.
func (r *receiver) probe(t *table, n *neighbour, h *header, d []byte) {
	size := int(binary.BigEndian.Uint16(d[headerLen+8:]))
	if h.src != n.id || h.dst != t.self || len(d) != headerLen+probeBody+size {
		r.count.drop(malformed, n.traffic)
		return
	}
	r.count.probesIn.Add(1)
	if r.onProbe != nil {
		r.onProbe(overlay.Sleeve, n.id, binary.BigEndian.Uint64(d[headerLen:]), size)
	}
}
