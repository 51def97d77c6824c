package fastdp

import (
	"net/netip"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

func (h *host) exchanged() map[peer.ShortID]overlay.Traffic {
	h.t.Helper()
	all, err := h.dp.Traffic()
	if err != nil {
		h.t.Fatal(err)
	}
	return all
}

// Each of a thousand questions through a relay, and each answer, is counted
// once at each neighbour on the way.
func TestTraffic(t *testing.T) { eachWay(t, testTraffic) }

func testTraffic(t *testing.T, k kind) {
	const n, size, few = 1000, 400, 50
	l := newLineOf(t, k, 1500, 1500)
	a1, c1 := l[0].container("10.32.0.1/24"), l[2].container("10.32.0.3/24")
	c1.echo()
	l.apply(nil)
	if !a1.reaches(c1.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	var before []map[peer.ShortID]overlay.Traffic
	for _, h := range l {
		before = append(before, h.exchanged())
	}
	f := a1.dial(c1.addr())
	for i := range n {
		if !f.once(size, 5*time.Second) {
			t.Fatalf("no answer to question %d", i)
		}
	}
	check := func(what string, before, after overlay.Flow, relayed bool) {
		t.Helper()
		const frame = 14 + 20 + 8 + size
		packets, volume := after.Packets-before.Packets, after.Bytes-before.Bytes
		if packets < n || packets > n+few || volume < n*frame || volume > (n+few)*frame {
			t.Errorf("%s: %+v, before %+v; %d packets went there", what, after, before, n)
		}
		if r := after.Relayed - before.Relayed; (r >= n) != relayed || r > packets {
			t.Errorf("%s: %d of %d packets relayed", what, r, packets)
		}
	}
	for _, x := range []struct {
		what         string
		host         int
		with         peer.ShortID
		tx, rxRelays bool
	}{
		{"A with B", 0, 2, true, false}, {"B with A", 1, 1, false, true},
		{"B with C", 1, 3, false, true}, {"C with B", 2, 2, true, false},
	} {
		was, now := before[x.host][x.with], l[x.host].exchanged()[x.with]
		check(x.what+", sent", was.Tx, now.Tx, x.tx)
		check(x.what+", received", was.Rx, now.Rx, x.rxRelays)
		if len(now.Dropped) > 0 && k == (kind{}) {
			t.Errorf("%s: dropped %v", x.what, now.Dropped)
		}
	}
	if all := l[1].exchanged(); len(all) != 2 {
		t.Errorf("B knows traffic with %d neighbours", len(all))
	}
	testFlooded(t, l, a1)
}

// testFlooded sends broadcasts, which nobody answers, from A by B to C.
func testFlooded(t *testing.T, l line, a1 *container) {
	const n = 100
	was := l[1].exchanged()
	f := a1.dial(netip.MustParseAddr("10.32.0.255"))
	for range n {
		if _, err := f.conn.Write(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []struct {
		what string
		flow func(map[peer.ShortID]overlay.Traffic) uint64
	}{
		{"from A", func(m map[peer.ShortID]overlay.Traffic) uint64 { return m[1].Rx.Flooded }},
		{"to C", func(m map[peer.ShortID]overlay.Traffic) uint64 { return m[3].Tx.Flooded }},
	} {
		wait(t, "flooded packets "+x.what, func() bool { return x.flow(l[1].exchanged()) >= x.flow(was)+n })
	}
}

// Who is kept apart from whom shows at the peer whose container tried.
func TestTrafficDropped(t *testing.T) { eachWay(t, testTrafficDropped) }

func testTrafficDropped(t *testing.T, k kind) {
	const n = 20
	l := newLineOf(t, k, 1500)
	a1, b1 := l[0].container("10.32.0.1/24"), l[1].container("10.33.0.1/24")
	b1.echo()
	l.apply(nil)
	a1.ip("neigh add " + b1.addr().String() + " lladdr " + b1.port.MAC.String() + " dev eth0")
	before := l[1].exchanged()[1]
	f := a1.dial(b1.addr())
	for range n {
		if _, err := f.conn.Write(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	wait(t, "frames dropped for isolation", func() bool {
		return l[1].exchanged()[1].Dropped["isolated"] >= before.Dropped["isolated"]+n
	})
	// What the kernel of b1 sends to groups is dropped there, too.
	if all := l[0].exchanged()[2]; all.Dropped["isolated"] > all.Rx.Flooded {
		t.Errorf("at the sender %+v", all)
	}
	// A peer to which there is no way any more.
	forwarding := l.forwarding(0, nil)
	delete(forwarding.Hops, 2)
	l[0].must(func() error { return l[0].dp.Apply(forwarding) })
	for range n {
		_, _ = f.conn.Write(make([]byte, 100))
	}
	wait(t, "frames dropped for want of a path", func() bool { return l[0].exchanged()[2].Dropped["no_path"] >= n })
}
