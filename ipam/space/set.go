package space

import (
	"math"
	"math/bits"
	"net/netip"
	"slices"
)

// Set is a set of addresses of one family, kept as intervals: sorted,
// disjoint, and never two that touch. The zero Set is empty. A Set is not
// safe for concurrent use.
type Set struct{ ranges []Range }

// Ranges are the intervals of the set, by address. The caller must not
// change them.
func (s *Set) Ranges() []Range { return s.ranges }

// Empty says whether the set holds nothing.
func (s *Set) Empty() bool { return len(s.ranges) == 0 }

// Clone is a copy that shares nothing with s.
func (s *Set) Clone() Set { return Set{slices.Clone(s.ranges)} }

// after is the index of the first interval that ends at a or later.
func (s *Set) after(a netip.Addr) int {
	i, _ := slices.BinarySearchFunc(s.ranges, a, func(r Range, a netip.Addr) int { return r.Last.Compare(a) })
	return i
}

// Has says whether a is in the set.
func (s *Set) Has(a netip.Addr) bool {
	i := s.after(a)
	return i < len(s.ranges) && s.ranges[i].Contains(a)
}

// Covers says whether all of r is in the set.
func (s *Set) Covers(r Range) bool {
	i := s.after(r.First)
	return i < len(s.ranges) && s.ranges[i].Covers(r)
}

// Add puts every address of r into the set; r must be valid.
func (s *Set) Add(r Range) {
	from := s.after(r.First)
	if from > 0 && s.ranges[from-1].Last.Next() == r.First {
		from--
	}
	to := from
	for to < len(s.ranges) {
		at := s.ranges[to]
		if r.Last.Less(at.First) && r.Last.Next() != at.First {
			break
		}
		if at.First.Less(r.First) {
			r.First = at.First
		}
		if r.Last.Less(at.Last) {
			r.Last = at.Last
		}
		to++
	}
	s.ranges = slices.Replace(s.ranges, from, to, r)
}

// Remove takes every address of r out of the set; r must be valid.
func (s *Set) Remove(r Range) {
	from := s.after(r.First)
	to := from
	var rest []Range
	for to < len(s.ranges) && !r.Last.Less(s.ranges[to].First) {
		at := s.ranges[to]
		if at.First.Less(r.First) {
			rest = append(rest, Range{at.First, r.First.Prev()})
		}
		if r.Last.Less(at.Last) {
			rest = append(rest, Range{r.Last.Next(), at.Last})
		}
		to++
	}
	if from != to {
		s.ranges = slices.Replace(s.ranges, from, to, rest...)
	}
}

// RemoveAll takes every address of o out of the set.
func (s *Set) RemoveAll(o *Set) {
	for _, r := range o.ranges {
		s.Remove(r)
	}
}

// In are the intervals of the set clipped to r.
func (s *Set) In(r Range) []Range {
	var out []Range
	for i := s.after(r.First); i < len(s.ranges); i++ {
		part, ok := s.ranges[i].Intersect(r)
		if !ok {
			break
		}
		out = append(out, part)
	}
	return out
}

// Lowest is the lowest address of the set within r.
func (s *Set) Lowest(r Range) (netip.Addr, bool) {
	if i := s.after(r.First); i < len(s.ranges) {
		if part, ok := s.ranges[i].Intersect(r); ok {
			return part.First, true
		}
	}
	return netip.Addr{}, false
}

// Size is the number of addresses in the set, at most math.MaxUint64.
func (s *Set) Size() uint64 { return total(s.ranges) }

// SizeIn is the number of addresses of the set within r.
func (s *Set) SizeIn(r Range) uint64 { return total(s.In(r)) }

func total(ranges []Range) uint64 {
	var sum uint64
	for _, r := range ranges {
		n := r.Size()
		if sum > math.MaxUint64-n {
			return math.MaxUint64
		}
		sum += n
	}
	return sum
}

// Chunk is the largest block of the set within r that is a power of two in
// size, at most limit, and starts at a multiple of its size; of several the
// lowest. It is false when the set holds nothing in r or limit is 0.
func (s *Set) Chunk(r Range, limit uint64) (Range, bool) {
	if limit == 0 {
		return Range{}, false
	}
	parts := s.In(r)
	for k := bits.Len64(limit) - 1; k >= 0; k-- {
		for _, part := range parts {
			if block, ok := part.aligned(uint(k)); ok {
				return block, true
			}
		}
	}
	return Range{}, false
}
