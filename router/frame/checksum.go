package frame

import (
	"encoding/binary"
	"math/bits"
)

// Sum adds b to the one's complement sum s, as big-endian 16-bit words (RFC
// 1071); an odd last byte counts as a word's upper half. Only the last piece
// of a longer run may be of odd length.
func Sum(b []byte, s uint64) uint64 {
	var carry uint64
	for len(b) >= 8 {
		s, carry = bits.Add64(s, binary.BigEndian.Uint64(b), carry)
		b = b[8:]
	}
	// Brought to 33 bits, so that the few words left cannot overflow.
	s = s>>32 + s&0xffffffff + carry
	for len(b) >= 2 {
		s += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

// Fold brings a sum to 16 bits. The checksum a header carries is its
// complement.
func Fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// Replace is the folded sum after a word of what it covers changed from
// before to after (RFC 1624, eqn. 3 without its complements).
func Replace(sum, before, after uint16) uint16 {
	return Fold(uint64(sum) + uint64(^before) + uint64(after))
}

// AmendSum replaces the word before by after in the sum that a checksum field
// holds while the checksum is not complete, the pseudo header's.
func AmendSum(field []byte, before, after uint16) {
	binary.BigEndian.PutUint16(field, Replace(binary.BigEndian.Uint16(field), before, after))
}
