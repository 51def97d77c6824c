package sleeve

import (
	"errors"
	"sync/atomic"

	"weave.local/peer"
	"weave.local/router/overlay"
	"weave.local/router/seal"
)

// reason says why a frame or a piece of one was dropped.
type reason int

const (
	badTags reason = iota
	noPath
	tooBig
	sendFailed
	unknownSender
	unsealed
	forged
	replayed
	oldKey
	malformed
	reversePath
	own
	incomplete
	tapRefused
	reasons // how many there are
)

func (r reason) String() string {
	return [reasons]string{
		"bad_tags", "no_path", "too_big", "send", "unknown_sender", "unsealed", "forged", "replayed", "old_key",
		"malformed", "reverse_path", "own", "incomplete", "tap_refused",
	}[r]
}

// counters are read at any time and written by whoever meets the event.
type counters struct {
	framesOut, framesIn       atomic.Uint64 // from and to the TAP; a super-frame is one
	datagramsOut, datagramsIn atomic.Uint64
	probesOut, probesIn       atomic.Uint64
	dropped                   [reasons]atomic.Uint64
}

// traffic is what was exchanged with the peer of a short id.
type traffic struct {
	tx      flow
	_       [64]byte // the sender and the receiver do not share a cache line
	rx      flow
	dropped [reasons]atomic.Uint64
}

// flow is written by one goroutine. A frame that goes in segments counts as
// that many packets, and headers count in each; one in fragments is one packet.
type flow struct{ packets, bytes, flooded, relayed atomic.Uint64 }

// add counts packets of bytes in all; relayed says that whoever receives them
// is not the one they are for.
func (f *flow) add(packets, bytes int, flooded, relayed bool) {
	n := uint64(packets)
	f.packets.Add(n)
	f.bytes.Add(uint64(bytes))
	if flooded {
		f.flooded.Add(n)
	} else if relayed {
		f.relayed.Add(n)
	}
}

func (f *flow) snapshot() overlay.Flow {
	return overlay.Flow{
		Packets: f.packets.Load(), Bytes: f.bytes.Load(), Flooded: f.flooded.Load(), Relayed: f.relayed.Load(),
	}
}

// drop counts a frame or piece dropped, by peer if that is known.
func (c *counters) drop(why reason, of *traffic) {
	c.dropped[why].Add(1)
	if of != nil {
		of.dropped[why].Add(1)
	}
}

// refused counts a datagram that does not open. Who sent it is not proven.
func (c *counters) refused(err error) {
	switch {
	case errors.Is(err, errUnsealed):
		c.drop(unsealed, nil)
	case errors.Is(err, seal.ErrForged):
		c.drop(forged, nil)
	case errors.Is(err, seal.ErrReplay):
		c.drop(replayed, nil)
	case errors.Is(err, seal.ErrOldKey):
		c.drop(oldKey, nil)
	default:
		c.drop(unknownSender, nil)
	}
}

func (c *counters) snapshot() map[string]uint64 {
	out := map[string]uint64{
		"frames_from_tap":    c.framesOut.Load(),
		"frames_to_tap":      c.framesIn.Load(),
		"datagrams_sent":     c.datagramsOut.Load(),
		"datagrams_received": c.datagramsIn.Load(),
		"probes_sent":        c.probesOut.Load(),
		"probes_received":    c.probesIn.Load(),
	}
	for r := range reasons {
		out["dropped_"+r.String()] = c.dropped[r].Load()
	}
	return out
}

// Traffic is what was exchanged with each neighbour on this path, and what was
// dropped by peer, since New.
func (p *Path) Traffic() (map[peer.ShortID]overlay.Traffic, error) {
	out := make(map[peer.ShortID]overlay.Traffic)
	for id, t := range p.table.Load().traffic {
		if t == nil {
			continue
		}
		all := overlay.Traffic{Tx: t.tx.snapshot(), Rx: t.rx.snapshot(), Dropped: make(map[string]uint64)}
		for r := range reasons {
			if n := t.dropped[r].Load(); n > 0 {
				all.Dropped[r.String()] = n
			}
		}
		out[peer.ShortID(id)] = all
	}
	return out, nil
}
