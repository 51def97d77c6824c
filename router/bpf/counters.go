package bpf

import (
	"fmt"
	"strings"
)

// counterNames are the enumerators of enum counter, in order.
var counterNames = [...]string{ //nolint:gochecknoglobals // a table, never written
	"tx", "rx", "relayed", "flooded", "flooded_unknown", "rx_flooded", "to_sleeve", "from_sleeve", "probes", "pmtu", "too_big", "shortcut",
	"direct_tx", "direct_rx", "direct_relayed", "arp_answered", "nd_answered", "learnt",
	"dropped_no_path", "dropped_not_neighbour", "dropped_own", "dropped_hop_limit", "dropped_reverse_path",
	"dropped_backwards", "dropped_spoofed", "dropped_isolated", "dropped_unknown_mac", "dropped_unknown_port",
	"dropped_local", "dropped_malformed", "dropped_send", "dropped_probes", "dropped_flood_limit", "dropped_lease",
}

// Counters returns the number of frames by event since the maps were made:
//
//	tx                     to a known address on another peer
//	rx                     for this host, from another peer
//	relayed                between two other peers
//	flooded                to all peers, sent from here
//	flooded_unknown        of those, unicast to an address nobody announced
//	rx_flooded             accepted along a broadcast tree
//	to_sleeve, from_sleeve handed to and taken from the user-space path
//	probes                 probes taken from neighbours
//	pmtu                   "too big" errors that the kernel made for senders
//	too_big                the same, made by the programs
//	shortcut               past the bridge, from or to a container here
//	direct_tx              sent past this host's IP stack
//	direct_rx              received past it
//	direct_relayed         relayed past it
//	arp_answered           ARP requests of containers, answered on this host
//	nd_answered            neighbour solicitations of containers, likewise
//	learnt                 the first of a foreign address, or the first from where it is now
//	dropped_no_path        no way to the destination peer is known
//	dropped_not_neighbour  from an underlay address that is no neighbour's
//	dropped_own            claiming to come from this very peer
//	dropped_hop_limit      relayed too often
//	dropped_reverse_path   flooded, but not by the parent in the source's tree
//	dropped_backwards      would go back to where it came from
//	dropped_spoofed        a container used an address that is not its own, or not any more
//	dropped_isolated       sender and receiver share no subnet
//	dropped_unknown_mac    sender is not announced, nor behind a port of any source
//	dropped_unknown_port   a device that was attached but not described
//	dropped_local          flooded by the bridge though the receiver is local
//	dropped_malformed      cannot be a frame of the overlay
//	dropped_send           the kernel refused to send
//	dropped_probes         probes from strangers, or while the daemon is behind
//	dropped_flood_limit    more of a kind to be flooded than one device may send
//	dropped_lease          from or to a port here while the lease of its address is over
func (o *Objects) Counters() (map[string]uint64, error) {
	out := make(map[string]uint64, len(counterNames))
	for i, name := range counterNames {
		var perCPU []uint64
		if err := o.objs.Counters.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("counter %s: %w", name, err)
		}
		out[name] = total(perCPU)
	}
	return out, nil
}

func total(perCPU []uint64) (n uint64) {
	for _, v := range perCPU {
		n += v
	}
	return n
}

// Flow is what went one way between this host and a neighbour.
type Flow struct {
	Packets, Bytes uint64
	Flooded        uint64 // packets of these that were flooded
	Relayed        uint64 // packets of these that whoever received them was to pass on
}

// Traffic is what was exchanged with a neighbour by VXLAN. A super-frame counts
// as the packets it stands for; bytes are those of the frames inside.
type Traffic struct{ Tx, Rx Flow }

// Traffic returns what was exchanged with the neighbour of a short id since the
// maps were made.
func (o *Objects) Traffic(neighbour uint16) (t Traffic, err error) {
	var perCPU []weaveTraffic
	if err := o.objs.Traffics.Lookup(uint32(neighbour), &perCPU); err != nil {
		return t, fmt.Errorf("traffic of neighbour %d: %w", neighbour, err)
	}
	for _, c := range perCPU {
		t.Tx.add(Flow{Packets: c.Tx.Packets, Bytes: c.Tx.Bytes, Flooded: c.Tx.Flooded, Relayed: c.Tx.Relayed})
		t.Rx.add(Flow{Packets: c.Rx.Packets, Bytes: c.Rx.Bytes, Flooded: c.Rx.Flooded, Relayed: c.Rx.Relayed})
	}
	return t, nil
}

func (f *Flow) add(g Flow) {
	f.Packets += g.Packets
	f.Bytes += g.Bytes
	f.Flooded += g.Flooded
	f.Relayed += g.Relayed
}

// lossPrefix begins the names of counters of dropped frames.
const lossPrefix = "dropped_"

// Losses returns by short id the frames that were dropped where a peer is known,
// with the reasons of Counters without their prefix: the neighbour a frame came
// from or would have gone to; for no_path the destination; for isolated and for
// what came from the user-space path the source.
func (o *Objects) Losses() (map[uint16]map[string]uint64, error) {
	out := make(map[uint16]map[string]uint64)
	var key weaveLoss
	var perCPU []uint64
	it := o.objs.Losses.Iterate()
	for it.Next(&key, &perCPU) {
		if int(key.Why) >= len(counterNames) {
			continue // left by another version
		}
		if out[key.Peer] == nil {
			out[key.Peer] = make(map[string]uint64)
		}
		out[key.Peer][strings.TrimPrefix(counterNames[key.Why], lossPrefix)] += total(perCPU)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("frames dropped by peer: %w", err)
	}
	return out, nil
}
