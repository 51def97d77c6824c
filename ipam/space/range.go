package space

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
)

// Range is the addresses from First to Last, both included, of one family.
type Range struct{ First, Last netip.Addr }

// Single is the range that holds a alone.
func Single(a netip.Addr) Range { return Range{a, a} }

// FromPrefix is every address of p, host bits of p ignored.
func FromPrefix(p netip.Prefix) Range {
	first := p.Masked().Addr()
	host := uint(first.BitLen() - p.Bits())
	return Range{first, number(first).plus(power(host)).minus(power(0)).addr(first)}
}

// Hosts is what may be handed out in subnet p: every address but the first
// and the last. It is false when p has fewer than four addresses.
func Hosts(p netip.Prefix) (Range, bool) {
	if p.Addr().BitLen()-p.Bits() < 2 {
		return Range{}, false
	}
	all := FromPrefix(p)
	return Range{all.First.Next(), all.Last.Prev()}, true
}

// Valid says whether both ends are addresses of one family, in order and
// without a zone.
func (r Range) Valid() bool {
	return r.First.IsValid() && r.Last.IsValid() && r.First.BitLen() == r.Last.BitLen() &&
		r.First.Zone() == "" && r.Last.Zone() == "" && !r.Last.Less(r.First)
}

// Contains says whether a is in the range.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && !a.Less(r.First) && !r.Last.Less(a)
}

// Covers says whether all of o is in the range.
func (r Range) Covers(o Range) bool { return r.Contains(o.First) && r.Contains(o.Last) }

// Intersect is what both ranges hold; it is false when that is nothing.
func (r Range) Intersect(o Range) (Range, bool) {
	if r.First.BitLen() != o.First.BitLen() {
		return Range{}, false
	}
	if r.First.Less(o.First) {
		r.First = o.First
	}
	if o.Last.Less(r.Last) {
		r.Last = o.Last
	}
	return r, !r.Last.Less(r.First)
}

// Size is the number of addresses, at most math.MaxUint64.
func (r Range) Size() uint64 {
	d := number(r.Last).minus(number(r.First))
	if d.hi != 0 || d.lo == math.MaxUint64 {
		return math.MaxUint64
	}
	return d.lo + 1
}

// String writes first-last, or the one address.
func (r Range) String() string {
	if r.First == r.Last {
		return r.First.String()
	}
	return fmt.Sprintf("%s-%s", r.First, r.Last)
}

// aligned is the lowest block of 2^k addresses that starts at a multiple of
// its size and lies within r.
func (r Range) aligned(k uint) (Range, bool) {
	if k >= uint(r.First.BitLen()) {
		return Range{}, false
	}
	size := power(k)
	first, last := number(r.First), number(r.Last)
	rest := first.and(size.minus(power(0)))
	if rest != (u128{}) {
		up := first.plus(size.minus(rest))
		if up.less(first) { // past the end of all addresses
			return Range{}, false
		}
		first = up
	}
	end := first.plus(size.minus(power(0)))
	if end.less(first) || last.less(end) {
		return Range{}, false
	}
	return Range{first.addr(r.First), end.addr(r.First)}, true
}

// u128 is an address as a number; IPv4 addresses use the low 32 bits.
type u128 struct{ hi, lo uint64 }

func number(a netip.Addr) u128 {
	if a.Is4() {
		b := a.As4()
		return u128{lo: uint64(binary.BigEndian.Uint32(b[:]))}
	}
	b := a.As16()
	return u128{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

// addr is the number as an address of the family of like.
func (u u128) addr(like netip.Addr) netip.Addr {
	if like.Is4() {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(u.lo))
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], u.hi)
	binary.BigEndian.PutUint64(b[8:], u.lo)
	return netip.AddrFrom16(b)
}

// power is 2^k for k < 128, and 0, its value modulo 2^128, above.
func power(k uint) u128 {
	if k < 64 {
		return u128{lo: 1 << k}
	}
	return u128{hi: 1 << (k - 64)}
}

func (u u128) plus(v u128) u128 {
	lo, carry := bits.Add64(u.lo, v.lo, 0)
	hi, _ := bits.Add64(u.hi, v.hi, carry)
	return u128{hi, lo}
}

func (u u128) minus(v u128) u128 {
	lo, borrow := bits.Sub64(u.lo, v.lo, 0)
	hi, _ := bits.Sub64(u.hi, v.hi, borrow)
	return u128{hi, lo}
}

func (u u128) and(v u128) u128 { return u128{u.hi & v.hi, u.lo & v.lo} }

func (u u128) less(v u128) bool { return u.hi < v.hi || u.hi == v.hi && u.lo < v.lo }
