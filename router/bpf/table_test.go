package bpf

import (
	"maps"
	"net/netip"
	"testing"
)

func TestTablesKeepWhatTheyAreGiven(t *testing.T) {
	b := newBench(t)
	a := netip.MustParseAddr
	hops := map[uint16]Hop{
		7:  {Kind: KindVXLAN, Via: 7, Remote: a("192.0.2.7"), Local: a("192.0.2.1")},
		8:  {Kind: KindVXLAN, Via: 7, Remote: a("192.0.2.7")},
		9:  {Kind: KindVXLAN, Via: 9, Remote: a("2001:db8::9"), Local: a("2001:db8::1")},
		10: {Kind: KindSleeve, Via: 10},
	}
	change, err := b.Hops.Towards(hops, nil)
	b.must(err, change.Grow())
	all, err := b.Hops.All()
	b.must(err)
	for k, v := range hops {
		if all[k] != v {
			t.Errorf("hop %d: %+v, want %+v", k, all[k], v)
		}
	}
	if _, ok := all[left]; !ok {
		t.Error("growing took something away")
	}
	b.must(change.Shrink())
	all, err = b.Hops.All()
	b.must(err)
	if !maps.Equal(all, hops) {
		t.Errorf("hops %+v, want %+v", all, hops)
	}

	ports, err := b.Ports.All()
	b.must(err)
	want, err := PortOf(localMAC(), []netip.Prefix{netip.MustParsePrefix("10.32.0.1/24"), netip.MustParsePrefix("fd00::1/64")})
	b.must(err)
	if len(ports) != 1 || ports[1] != want {
		t.Errorf("ports %+v", ports)
	}
	endpoints, err := b.Endpoints.All()
	b.must(err)
	if e := endpoints[foreignMAC()]; e.Peer != beyond || e.Subnets != subnets(t, "10.32.1.0/24", "fd00:1::/64") {
		t.Errorf("endpoint %+v", e)
	}
	trees, err := b.Trees.All()
	b.must(err)
	if tr := trees[beyond]; tr.Parent != left || tr.N != 2 || tr.Children[1] != right {
		t.Errorf("tree %+v", tr.Parent)
	}

	keep := func(k uint16, _ Hop) bool { return k == 10 }
	change, err = b.Hops.Towards(nil, keep)
	b.must(err, change.Grow(), change.Shrink())
	all, err = b.Hops.All()
	b.must(err)
	if len(all) != 1 || all[10].Kind != KindSleeve {
		t.Errorf("kept %+v", all)
	}
	b.must(b.Hops.Delete(10), b.Hops.Delete(10))
}

// However a map is read, all of it is.
func TestTablesAreReadWhole(t *testing.T) {
	const n = 3*batchLen + 7
	b := newBench(t)
	for i := range n {
		b.must(b.Endpoints.Put(MAC{4, 0, 0, 0, byte(i >> 8), byte(i)}, Endpoint{Peer: uint16(i%4000 + 1)}))
	}
	batches, err := inBatches(b.objs.Endpoints, decodeEndpoint)
	b.must(err)
	single, err := oneByOne(b.objs.Endpoints, decodeEndpoint)
	b.must(err)
	if len(single) < n || !maps.Equal(batches, single) {
		t.Errorf("%d entries in batches, %d one by one, %d and some more were put", len(batches), len(single), n)
	}
}
