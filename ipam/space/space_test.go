package space

import (
	"math"
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

// slow is a Space as anybody would write it first: one entry per address.
type slow struct{ owned, used map[netip.Addr]bool }

func (s *slow) free(a netip.Addr) bool { return s.owned[a] && !s.used[a] }

func (s *slow) lowest(p netip.Prefix) (netip.Addr, bool) {
	last := p.Addr()
	for p.Contains(last.Next()) {
		last = last.Next()
	}
	for a := p.Addr().Next(); a != last; a = a.Next() {
		if s.free(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// window is the 64 addresses the model plays with, at the low end, in the
// midst and at the high end of both families.
func window(t *rapid.T) netip.Addr {
	return netip.MustParseAddr(rapid.SampledFrom([]string{
		"0.0.0.0", "10.32.1.192", "255.255.255.192", "::", "fd00::ffff:ffff:ffff:ffe0", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffc0",
	}).Draw(t, "window"))
}

func plus(a netip.Addr, n int) netip.Addr {
	return number(a).plus(u128{lo: uint64(n)}).addr(a)
}

func TestSpaceAgainstSlowOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := window(t)
		var fast Space
		model := slow{map[netip.Addr]bool{}, map[netip.Addr]bool{}}
		var owned Set
		addr := func() netip.Addr { return plus(base, rapid.IntRange(0, 63).Draw(t, "addr")) }
		span := func() Range {
			from := rapid.IntRange(0, 63).Draw(t, "from")
			return Range{plus(base, from), plus(base, rapid.IntRange(from, 63).Draw(t, "to"))}
		}
		each := func(r Range, f func(netip.Addr)) {
			for a := r.First; ; a = a.Next() {
				f(a)
				if a == r.Last {
					return
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"grant": func(*rapid.T) {
				r := span()
				owned.Add(r)
				each(r, func(a netip.Addr) { model.owned[a] = true })
				fast.SetOwned(&owned)
			},
			"revoke": func(*rapid.T) {
				r := span()
				owned.Remove(r)
				each(r, func(a netip.Addr) { delete(model.owned, a) })
				fast.SetOwned(&owned)
			},
			"use": func(t *rapid.T) {
				a := addr()
				if got, want := fast.Use(a), !model.used[a]; got != want {
					t.Fatalf("Use(%v) = %v, want %v", a, got, want)
				}
				model.used[a] = true
			},
			"release": func(*rapid.T) {
				a := addr()
				fast.Release(a)
				delete(model.used, a)
			},
			"chunk": func(t *rapid.T) {
				r, limit := span(), uint64(rapid.IntRange(0, 80).Draw(t, "limit"))
				checkChunk(t, &fast, &model, r, limit, each)
			},
			"": func(t *rapid.T) { compare(t, &fast, &model, base) },
		})
	})
}

func checkChunk(t *rapid.T, fast *Space, model *slow, r Range, limit uint64, each func(Range, func(netip.Addr))) {
	got, ok := fast.Free().Chunk(r, limit)
	var want Range
	found := false
	for size := uint64(64); size > 0 && !found; size /= 2 {
		if size > limit {
			continue
		}
		each(r, func(a netip.Addr) {
			block := Range{a, plus(a, int(size-1))}
			if found || number(a).lo%size != 0 || !r.Covers(block) || block.Last.Less(a) {
				return
			}
			all := true
			each(block, func(b netip.Addr) { all = all && model.free(b) })
			if all {
				want, found = block, true
			}
		})
	}
	if ok != found || got != want {
		t.Fatalf("Chunk(%v, %d) = %v %v, want %v %v", r, limit, got, ok, want, found)
	}
}

func compare(t *rapid.T, fast *Space, model *slow, base netip.Addr) {
	var free uint64
	for i := range 64 {
		a := plus(base, i)
		if fast.Owns(a) != model.owned[a] || fast.Used(a) != model.used[a] || fast.Free().Has(a) != model.free(a) {
			t.Fatalf("%v: owns %v used %v free %v, want %v %v %v", a, fast.Owns(a), fast.Used(a), fast.Free().Has(a),
				model.owned[a], model.used[a], model.free(a))
		}
		if model.free(a) {
			free++
		}
	}
	if got := fast.Free().Size(); got != free {
		t.Fatalf("%d free addresses, want %d", got, free)
	}
	ranges := fast.Free().Ranges()
	for i, r := range ranges {
		if !r.Valid() || i > 0 && !ranges[i-1].Last.Next().Less(r.First) {
			t.Fatalf("intervals %v are not sorted and apart", ranges)
		}
	}
	for bits := base.BitLen() - 6; bits <= base.BitLen()-2; bits++ {
		p := netip.PrefixFrom(base, bits).Masked()
		got, ok := fast.Lowest(p)
		want, wantOK := model.lowest(p)
		if got != want || ok != wantOK {
			t.Fatalf("Lowest(%v) = %v %v, want %v %v", p, got, ok, want, wantOK)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, c := range []struct {
		prefix string
		size   uint64
		hosts  string
	}{
		{"10.32.0.0/12", 1 << 20, "10.32.0.1-10.47.255.254"},
		{"10.32.1.77/24", 256, "10.32.1.1-10.32.1.254"},
		{"10.32.1.4/30", 4, "10.32.1.5-10.32.1.6"},
		{"10.32.1.4/31", 2, ""},
		{"10.32.1.4/32", 1, ""},
		{"0.0.0.0/0", 1 << 32, "0.0.0.1-255.255.255.254"},
		{"fd00::/64", math.MaxUint64, "fd00::1-fd00::ffff:ffff:ffff:fffe"},
		{"::/0", math.MaxUint64, "::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe"},
	} {
		p := netip.MustParsePrefix(c.prefix)
		if got := FromPrefix(p).Size(); got != c.size {
			t.Errorf("%s has %d addresses, want %d", p, got, c.size)
		}
		hosts, ok := Hosts(p)
		if ok != (c.hosts != "") || ok && hosts.String() != c.hosts {
			t.Errorf("hosts of %s: %v %v, want %q", p, hosts, ok, c.hosts)
		}
	}
}

func BenchmarkLowestOfManyIntervals(b *testing.B) {
	var s Space
	var owned Set
	owned.Add(FromPrefix(netip.MustParsePrefix("10.32.0.0/12")))
	s.SetOwned(&owned)
	a := netip.MustParseAddr("10.32.0.1")
	for range 10000 {
		s.Use(a)
		a = a.Next().Next()
	}
	p := netip.MustParsePrefix("10.40.0.0/16")
	for b.Loop() {
		got, _ := s.Lowest(p)
		s.Use(got)
		s.Release(got)
	}
}
