package gossip

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"weave.local/peer"
)

// told is a message of memberlist about a peer, as its encoder writes it.
func told(typ byte, name peer.Name) []byte {
	b := append([]byte{typ, 0x83, 0xa4}, "From\xb100:00:00:00:00:09\xab"...)
	b = append(b, "Incarnation\x01\xa4Node\xb1"...)
	return append(b, name.String()...)
}

func compound(parts ...[]byte) []byte {
	b := []byte{packetCompound, byte(len(parts))}
	for _, p := range parts {
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
	}
	return append(b, bytes.Join(parts, nil)...)
}

func labelled(b []byte) []byte { return append([]byte{packetLabel, 5, 'w', 'e', 'a', 'v', 'e'}, b...) }

func summed(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{packetCRC}, crc32.ChecksumIEEE(b)), b...)
}

// Deaths of peers with a route become suspicions, wherever in a packet they
// are; all else stays as it is.
func TestDeathsAreDoubted(t *testing.T) {
	reaches := func(n peer.Name) bool { return n < 5 }
	const ping = 0
	mixed := func(dead byte) []byte {
		return compound(told(ping, 1), told(dead, 2), told(packetDead, 7), told(dead, 3))
	}
	for what, c := range map[string]struct{ in, want []byte }{
		"alone":          {told(packetDead, 1), told(packetSuspect, 1)},
		"without route":  {labelled(summed(told(packetDead, 7))), labelled(summed(told(packetDead, 7)))},
		"labelled":       {labelled(told(packetDead, 1)), labelled(told(packetSuspect, 1))},
		"with sum":       {labelled(summed(told(packetDead, 1))), labelled(told(packetSuspect, 1))},
		"in a compound":  {labelled(summed(mixed(packetDead))), labelled(mixed(packetSuspect))},
		"another":        {labelled(summed(told(ping, 1))), labelled(summed(told(ping, 1)))},
		"nothing":        {nil, nil},
		"label cut":      {[]byte{packetLabel, 9, 'w'}, []byte{packetLabel, 9, 'w'}},
		"compound cut":   {[]byte{packetCompound, 3, 0}, []byte{packetCompound, 3, 0}},
		"death cut":      {told(packetDead, 1)[:30], told(packetDead, 1)[:30]},
		"part too large": {[]byte{packetCompound, 1, 0xff, 0xff, packetDead}, []byte{packetCompound, 1, 0xff, 0xff, packetDead}},
	} {
		if got := doubtDeaths(bytes.Clone(c.in), reaches); !bytes.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
	}
}

func FuzzDoubtDeaths(f *testing.F) {
	f.Add(labelled(summed(compound(told(packetDead, 1), told(packetDead, 2)))))
	f.Fuzz(func(t *testing.T, b []byte) {
		got := doubtDeaths(bytes.Clone(b), func(peer.Name) bool { return false })
		if !bytes.Equal(got, b) {
			t.Error("changed although nobody can be reached")
		}
		_ = doubtDeaths(b, func(peer.Name) bool { return true })
	})
}
