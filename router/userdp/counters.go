package userdp

import "sync/atomic"

// event is what becomes of a frame.
type event int

const (
	sent event = iota
	sentFlood
	sentUnknown
	received
	receivedFlood
	relayed
	toSleeve
	fromSleeve
	droppedNoPath // the first that tells of a loss
	droppedOwn
	droppedHopLimit
	droppedSpoofed
	droppedIsolated
	droppedUnknownMAC
	droppedLocal
	droppedMalformed
	droppedSend
	droppedFloodLimit
	droppedLease
	events
)

func (e event) dropped() bool { return e >= droppedNoPath }

func (e event) String() string {
	return [events]string{
		"tx", "flooded", "flooded_unknown", "rx", "rx_flooded", "relayed", "to_sleeve", "from_sleeve",
		"dropped_no_path", "dropped_own", "dropped_hop_limit", "dropped_spoofed", "dropped_isolated",
		"dropped_unknown_mac", "dropped_local", "dropped_malformed", "dropped_send", "dropped_flood_limit", "dropped_lease",
	}[e]
}

type counters [events]atomic.Uint64

func (c *counters) add(e event) {
	c[e].Add(1)
	if e == sentUnknown {
		c[sentFlood].Add(1)
	}
}

func (c *counters) snapshot() map[string]uint64 {
	out := make(map[string]uint64, events)
	for e := range events {
		out[e.String()] = c[e].Load()
	}
	return out
}
