// Package space keeps account of the addresses this peer owns: which are in
// use and which are free. It is pure, and counts addresses as intervals, so
// that a /12 costs as little as a /28.
package space

import "net/netip"

// Space is the account. Addresses may be in use without being owned (given
// by hand outside the range, or lost to another peer): they are remembered
// and are not free when they come to be owned. The zero Space owns nothing. A
// Space is not safe for concurrent use.
//
// Invariant: free = owned without used.
type Space struct{ owned, used, free Set }

// SetOwned makes owned what this peer owns; what is in use stays in use.
func (s *Space) SetOwned(owned *Set) {
	s.owned = owned.Clone()
	s.free = owned.Clone()
	s.free.RemoveAll(&s.used)
}

// Owns says whether a is owned.
func (s *Space) Owns(a netip.Addr) bool { return s.owned.Has(a) }

// Used says whether a is in use.
func (s *Space) Used(a netip.Addr) bool { return s.used.Has(a) }

// Use marks a as in use; it is false when it was already.
func (s *Space) Use(a netip.Addr) bool {
	if s.used.Has(a) {
		return false
	}
	s.used.Add(Single(a))
	s.free.Remove(Single(a))
	return true
}

// Release ends the use of a; it is free afterwards if it is owned.
func (s *Space) Release(a netip.Addr) {
	if !s.used.Has(a) {
		return
	}
	s.used.Remove(Single(a))
	if s.owned.Has(a) {
		s.free.Add(Single(a))
	}
}

// Lowest is the lowest free address that may be handed out in subnet, which
// is never its first nor its last. The address is not marked.
func (s *Space) Lowest(subnet netip.Prefix) (netip.Addr, bool) {
	hosts, ok := Hosts(subnet)
	if !ok {
		return netip.Addr{}, false
	}
	return s.free.Lowest(hosts)
}

// Free is the set of free addresses; it must not be changed.
func (s *Space) Free() *Set { return &s.free }

// Owned is the set of owned addresses; it must not be changed.
func (s *Space) Owned() *Set { return &s.owned }
