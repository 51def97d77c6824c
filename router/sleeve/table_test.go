package sleeve

import (
	"strings"
	"testing"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/overlay"
)

// A neighbour keeps what is known of its path as long as it is the same run of
// the same peer at the same address.
func TestNeighbourKept(t *testing.T) {
	f := forwarding(1, addr4, 2, 3)
	first, err := new(table).next(f, true)
	if err != nil {
		t.Fatal(err)
	}
	same, err := first.next(f, true)
	if err != nil {
		t.Fatal(err)
	}
	if same.neighbours[2] != first.neighbours[2] || same.hops[3] != first.neighbours[3] {
		t.Error("the same forwarding makes other neighbours")
	}
	for name, change := range map[string]func(*overlay.Neighbour){
		"session": func(n *overlay.Neighbour) { n.Session++ },
		"address": func(n *overlay.Neighbour) { n.Remote = addr4(9) },
		"port":    func(n *overlay.Neighbour) { n.Port++ },
		"name":    func(n *overlay.Neighbour) { n.Name++ },
	} {
		f := forwarding(1, addr4, 2, 3)
		change(&f.Neighbours[0])
		next, err := first.next(f, true)
		if err != nil {
			t.Fatal(err)
		}
		if next.neighbours[2] == first.neighbours[2] || next.hops[2] != next.neighbours[2] {
			t.Errorf("another %s: the neighbour is as before", name)
		}
		if next.neighbours[3] != first.neighbours[3] {
			t.Errorf("another %s of peer 2: peer 3 is not as before", name)
		}
	}
}

// What the underlay does not carry although the kernel believes so is not sent.
func TestProvenSizeBoundsDatagrams(t *testing.T) {
	const proven = 1300
	w := newWire(1500)
	largest := func(p *packet) (most int) {
		for _, d := range w.datagrams(p) {
			most = max(most, len(d))
		}
		return most
	}
	frames := map[string]*packet{"plain": testPlain(1450), "TCP": testTCP(false, 20000, 1400), "UDP": testUDP(true, 20000, 1380)}
	for name, p := range frames {
		if most := largest(p); most <= headerLen+frame.EthernetLen+proven {
			t.Errorf("%s: datagrams of %d bytes at most: the test is none", name, most)
		}
	}
	f := forwarding(1, addr4, 2)
	f.Hops[2] = overlay.Hop{Via: 2, Path: overlay.Sleeve, MTU: proven}
	got, err := w.s.table.Load().next(f, true)
	if err != nil {
		t.Fatal(err)
	}
	got.neighbours[2].pathMTU.Store(1500)
	w.s.table.Store(got)
	limit := got.neighbours[2].maxPacket()
	for name, p := range frames {
		if most := largest(p); most > headerLen+frame.EthernetLen+proven {
			t.Errorf("%s: datagrams of %d bytes", name, most)
		}
	}
	if want := 1500 - ipv4Overhead - headerLen - frame.EthernetLen; limit != want {
		t.Errorf("%d bytes are thought to fit, want %d: a larger size would never be tried", limit, want)
	}
}

// What cannot be is left out and named; the rest holds.
func TestForwardingRejects(t *testing.T) {
	f := forwarding(1, addr4, 2, peer.MaxShortID+1, 0)
	f.Hops[5] = overlay.Hop{Via: 4, Path: overlay.Sleeve} // by way of nobody
	f.Hops[6] = overlay.Hop{Via: 2, Path: overlay.Sleeve}
	f.Hops[7] = overlay.Hop{Via: 2, Path: overlay.FastDP}
	got, err := new(table).next(f, true)
	if err == nil || !strings.Contains(err.Error(), "4095") {
		t.Errorf("short ids out of range: %v", err)
	}
	if n := got.neighbours[2]; n == nil || got.hops[6] != n || got.hops[5] != nil || got.hops[7] != n {
		t.Errorf("next hops %v %v %v, neighbour %v", got.hops[5], got.hops[6], got.hops[7], n)
	}
}
