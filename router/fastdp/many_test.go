package fastdp

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// crowd is what the router wants of a host among many peers, each a neighbour
// of it, and with many endpoints.
func crowd(self peer.ShortID, peers, endpoints int) overlay.Forwarding {
	f := overlay.Forwarding{
		Self: self, Hops: map[peer.ShortID]overlay.Hop{}, Trees: map[peer.ShortID]overlay.Tree{self: {}},
	}
	at := func(net byte, i int) netip.Addr {
		a := [4]byte{net}
		binary.BigEndian.PutUint16(a[2:], uint16(i))
		return netip.AddrFrom4(a)
	}
	id := func(i int) peer.ShortID { return peer.ShortID(100 + i%peers) }
	for i := range peers {
		f.Neighbours = append(f.Neighbours, overlay.Neighbour{
			Info: peer.Info{Name: peer.Name(id(i)), ShortID: id(i)}, Local: at(172, 60000), Remote: at(172, i),
		})
		f.Hops[id(i)] = overlay.Hop{Via: id(i), Path: overlay.FastDP}
		f.Trees[id(i)] = overlay.Tree{Parent: id(i)}
	}
	for i := range endpoints {
		e := overlay.Endpoint{MAC: overlay.MAC{2, 9}, Addrs: []netip.Prefix{netip.PrefixFrom(at(10, i), 8)}, Peer: id(i)}
		binary.BigEndian.PutUint32(e.MAC[2:], uint32(i))
		f.Endpoints = append(f.Endpoints, e)
	}
	return f
}

// Among 500 neighbours and 10,000 endpoints it costs little to find that
// nothing has changed, to add an endpoint, and to take it away again.
func TestApplyToMany(t *testing.T) {
	const peers, endpoints, rounds = 500, 10000, 5
	// Many times what it takes on a machine with nothing else to do.
	const bar = time.Second
	h := started(t, 1)
	full := crowd(1, peers, endpoints)
	less := full
	less.Endpoints = full.Endpoints[1:]
	apply := func(f overlay.Forwarding) time.Duration {
		t.Helper()
		begin := time.Now()
		h.must(func() error { return h.dp.Apply(f) })
		return time.Since(begin)
	}
	t.Logf("all %d endpoints at once: %s", endpoints, apply(full))
	for _, c := range []struct {
		what string
		f    []overlay.Forwarding
	}{{"no change", []overlay.Forwarding{full}}, {"one endpoint less, one more", []overlay.Forwarding{less, full}}} {
		var all []time.Duration
		for range rounds {
			for _, f := range c.f {
				all = append(all, apply(f))
			}
		}
		slices.Sort(all)
		t.Logf("%s: median %s, longest %s", c.what, all[len(all)/2], all[len(all)-1])
		if median := all[len(all)/2]; median > bar {
			t.Errorf("%s takes %s", c.what, median)
		}
	}
	have, err := h.dp.objs.Endpoints.All()
	if err != nil || len(have) != endpoints {
		t.Errorf("%d endpoints in the table (%v)", len(have), err)
	}
}
