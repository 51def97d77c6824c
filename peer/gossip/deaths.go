package gossip

import (
	"bytes"
	"encoding/binary"

	"weave.local/peer"
)

// Types of memberlist's packets, as far as they are looked into here.
const (
	packetSuspect  = 3
	packetDead     = 5
	packetCompound = 7
	packetCRC      = 12
	packetLabel    = 244

	crcSize = 5
)

// doubtDeaths makes suspicions of the deaths that a packet tells of peers which
// can be reached, and returns the packet, which it may change. Both messages
// have the same fields. A peer that was cut off gives all others up; when it is
// back, its word must not make them dead to everybody, if only until they hear
// of it and deny.
func doubtDeaths(b []byte, reaches func(peer.Name) bool) []byte {
	label, rest := cutLabel(b)
	if len(rest) > crcSize && rest[0] == packetCRC {
		plain := rest[crcSize:]
		if doubtDeath(plain, reaches) {
			return append(bytes.Clone(label), plain...) // the checksum does not fit any more
		}
		return b
	}
	doubtDeath(rest, reaches)
	return b
}

func cutLabel(b []byte) (label, rest []byte) {
	if len(b) < 2 || b[0] != packetLabel || len(b) < 2+int(b[1]) {
		return nil, b
	}
	return b[:2+int(b[1])], b[2+int(b[1]):]
}

// doubtDeath changes one message, or those in a compound one, in place.
func doubtDeath(b []byte, reaches func(peer.Name) bool) (changed bool) {
	switch {
	case len(b) < 2:
	case b[0] == packetDead:
		if name, ok := subject(b); ok && reaches(name) {
			b[0] = packetSuspect
			return true
		}
	case b[0] == packetCompound:
		sizes := b[2:]
		parts := 2 * int(b[1])
		if parts > len(sizes) {
			return false
		}
		body := sizes[parts:]
		for ; parts > 0; parts, sizes = parts-2, sizes[2:] {
			n := int(binary.BigEndian.Uint16(sizes))
			if n > len(body) {
				return changed
			}
			if n > 0 && body[0] == packetDead && doubtDeath(body[:n], reaches) {
				changed = true
			}
			body = body[n:]
		}
	}
	return changed
}

// subject is the peer that a message of death is about: a text of 17 bytes
// after its key, in MessagePack.
func subject(b []byte) (peer.Name, bool) {
	const length = 17
	_, rest, found := bytes.Cut(b, []byte{0xa4, 'N', 'o', 'd', 'e', 0xa0 | length})
	if !found || len(rest) < length {
		return 0, false
	}
	name, err := peer.ParseName(string(rest[:length]))
	return name, err == nil
}
