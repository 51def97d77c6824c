package sleeve

import (
	"bytes"
	"slices"
	"testing"

	"weave.local/peer"
	"weave.local/router/overlay"
)

func (h *host) exchanged(t *testing.T, with peer.ShortID) overlay.Traffic {
	t.Helper()
	all, err := h.path.Traffic()
	if err != nil {
		t.Fatal(err)
	}
	return all[with]
}

// Of n datagrams sent, n frames are counted at the neighbour they went to, and
// no more than these and a few of address resolution.
func TestPeerTraffic(t *testing.T) {
	const n, size, few = 1000, 500, 50
	a, b := running(t, 1500, 1426)
	datagrams(t, a, b, b.addr4, 1) // addresses are resolved
	before, beforeB := a.host.exchanged(t, 2), b.host.exchanged(t, 1)
	datagrams(t, a, b, b.addr4, slices.Repeat([]int{size}, n)...)
	check := func(what string, before, after overlay.Flow) {
		t.Helper()
		packets, volume := after.Packets-before.Packets, after.Bytes-before.Bytes
		const frame = 14 + 20 + 8 + size
		if packets < n || packets > n+few || volume < n*frame || volume > (n+few)*frame || after.Relayed > 0 {
			t.Errorf("%s: %+v, before %+v; %d datagrams were sent", what, after, before, n)
		}
	}
	check("a sent", before.Tx, a.host.exchanged(t, 2).Tx)
	check("b received", beforeB.Rx, b.host.exchanged(t, 1).Rx)
	if back := a.host.exchanged(t, 2).Rx.Packets; back > few {
		t.Errorf("a received %d packets, nobody answered", back)
	}
	// A stream in super-frames counts as the packets that went over the wire.
	before = a.host.exchanged(t, 2)
	stream(t, a, b, b.addr4, 4<<20)
	after := a.host.exchanged(t, 2)
	if volume := after.Tx.Bytes - before.Tx.Bytes; volume < 4<<20 || volume/(after.Tx.Packets-before.Tx.Packets) > 1500 {
		t.Errorf("4 MiB of TCP: %+v, before %+v", after.Tx, before.Tx)
	}
}

// What goes through a neighbour, to all, or nowhere is told apart, and outlives
// the neighbour's link.
func TestPeerTrafficKinds(t *testing.T) {
	a, b := pair(t, 1500)
	f := forwarding(1, addr4, 2)
	f.Hops[3] = overlay.Hop{Via: 2, Path: overlay.Sleeve}
	f.Trees[1] = overlay.Tree{Children: []peer.ShortID{2}}
	a.apply(t, f)
	g := forwarding(2, addr4, 1)
	g.Trees[1] = overlay.Tree{Parent: 1}
	b.apply(t, g)
	stop, stopB := a.serve(t), b.serve(t)
	out, in := a.packetSocket(t), b.packetSocket(t)
	send := func(p *packet) {
		t.Helper()
		p.src, p.hops = 1, 5
		inject(t, out, p)
		if got := arrival(t, in); !bytes.Equal(got.data, p.data) {
			t.Errorf("arrived % x", got.data)
		}
	}
	p := testPlain(60)
	p.dst = 2
	send(p)
	p.dst = 3
	send(p)
	p.dst, p.flood = 0, true
	send(p)
	large := testPlain(4000)
	large.dst = 2
	send(large)
	p.dst, p.flood = 2, false
	p.src, p.hops = 2, 5
	inject(t, out, p) // its own frame comes back to 2
	p.src, p.dst = 1, 2
	send(p)
	stop()
	stopB()
	length := uint64(len(p.data))
	sum := 4*length + uint64(len(large.data))
	if got, want := a.exchanged(t, 2).Tx, (overlay.Flow{Packets: 6, Bytes: sum + length, Flooded: 1, Relayed: 1}); got != want {
		t.Errorf("sent %+v, want %+v", got, want)
	}
	got := b.exchanged(t, 1)
	if want := (overlay.Flow{Packets: 6, Bytes: sum + length, Flooded: 1, Relayed: 1}); got.Rx != want {
		t.Errorf("received %+v, want %+v", got.Rx, want)
	}
	if got.Dropped["own"] != 1 || len(got.Dropped) != 1 {
		t.Errorf("dropped %v", got.Dropped)
	}
	g.Neighbours = nil
	b.apply(t, g)
	if now := b.exchanged(t, 1); now.Rx != got.Rx {
		t.Errorf("without the neighbour %+v", now)
	}
}
