package sleeve

import (
	"errors"
	"sync/atomic"

	"weave.local/router/seal"
)

// counters are read at any time and written by whoever meets the event.
type counters struct {
	framesOut, framesIn       atomic.Uint64 // from and to the TAP; a super-frame is one
	datagramsOut, datagramsIn atomic.Uint64
	probesOut, probesIn       atomic.Uint64
	badTags                   atomic.Uint64
	noRoute                   atomic.Uint64
	tooBig                    atomic.Uint64
	sendFailed                atomic.Uint64
	unknownSender             atomic.Uint64
	unsealed                  atomic.Uint64
	forged                    atomic.Uint64
	replayed                  atomic.Uint64
	oldKey                    atomic.Uint64
	malformed                 atomic.Uint64
	wrongParent               atomic.Uint64
	ownFrame                  atomic.Uint64
	incomplete                atomic.Uint64
	tapRefused                atomic.Uint64
}

// refused counts a datagram that does not open.
func (c *counters) refused(err error) {
	switch {
	case errors.Is(err, errUnsealed):
		c.unsealed.Add(1)
	case errors.Is(err, seal.ErrForged):
		c.forged.Add(1)
	case errors.Is(err, seal.ErrReplay):
		c.replayed.Add(1)
	case errors.Is(err, seal.ErrOldKey):
		c.oldKey.Add(1)
	default:
		c.unknownSender.Add(1)
	}
}

func (c *counters) snapshot() map[string]uint64 {
	return map[string]uint64{
		"frames_from_tap":     c.framesOut.Load(),
		"frames_to_tap":       c.framesIn.Load(),
		"datagrams_sent":      c.datagramsOut.Load(),
		"datagrams_received":  c.datagramsIn.Load(),
		"probes_sent":         c.probesOut.Load(),
		"probes_received":     c.probesIn.Load(),
		"drop_bad_tags":       c.badTags.Load(),
		"drop_no_route":       c.noRoute.Load(),
		"drop_too_big":        c.tooBig.Load(),
		"drop_send_failed":    c.sendFailed.Load(),
		"drop_unknown_sender": c.unknownSender.Load(),
		"drop_unsealed":       c.unsealed.Load(),
		"drop_forged":         c.forged.Load(),
		"drop_replayed":       c.replayed.Load(),
		"drop_old_key":        c.oldKey.Load(),
		"drop_malformed":      c.malformed.Load(),
		"drop_wrong_parent":   c.wrongParent.Load(),
		"drop_own_frame":      c.ownFrame.Load(),
		"drop_incomplete":     c.incomplete.Load(),
		"drop_tap_refused":    c.tapRefused.Load(),
	}
}
