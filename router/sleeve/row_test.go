package sleeve

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"weave.local/router/frame"
)

// numbered is n UDP packets of one flow with payload bytes each. Their IPv4
// identifications are step apart, and DF is set or not.
func numbered(v6 bool, n, payload, step int, df bool) []*packet {
	var out []*packet
	for i := range n {
		p := testUDP(v6, payload, 0)
		if payload > 0 {
			p.data[len(p.data)-1] = byte(i)
		}
		if !v6 {
			ip := frame.IPv4(p.data[frame.EthernetLen:])
			ip.SetID(ip.ID() + uint16(i*step))
			if !df {
				ip[6] = 0
			}
			ip.SetChecksum()
		}
		out = append(out, p)
	}
	return out
}

// withoutID is a frame as it would be with the identification 0.
func withoutID(b []byte) []byte {
	b = bytes.Clone(b)
	if binary.BigEndian.Uint16(b[12:]) == frame.TypeIPv4 {
		frame.IPv4(b[frame.EthernetLen:]).SetID(0)
		frame.IPv4(b[frame.EthernetLen:]).SetChecksum()
	}
	return b
}

// TestRow sends packets that may go together and such that may not: what comes
// is the same packets in the same order, whether or not the kernel at the other
// end takes UDP super-frames.
func TestRow(t *testing.T) {
	other := numbered(false, 1, 64, 0, true)[0]
	other.data[other.csumStart]++ // of another port
	hop := numbered(false, 1, 64, 0, true)[0]
	hop.data[frame.EthernetLen+8]-- // with another TTL
	frame.IPv4(hop.data[frame.EthernetLen:]).SetChecksum()
	complete := numbered(false, 1, 64, 0, true)[0]
	complete.offload = offload{}
	same := numbered(false, 2, 64, 0, true)
	for name, c := range map[string]struct {
		mtu       int
		packets   []*packet
		datagrams int
	}{
		"alike":             {1500, numbered(false, 20, 64, 1, true), 1},
		"IPv6":              {1500, numbered(true, 20, 64, 1, true), 1},
		"more than fit":     {1500, numbered(false, 50, 64, 1, true), 3},
		"more than 64":      {9000, numbered(false, 100, 16, 1, true), 2},
		"in order, no DF":   {1500, numbered(false, 10, 64, 1, false), 1},
		"same ID, DF":       {1500, numbered(false, 10, 64, 0, true), 1},
		"same ID, no DF":    {1500, numbered(false, 10, 64, 0, false), 10},
		"two of half":       {1500, numbered(false, 4, 680, 1, true), 2},
		"too large for two": {1500, numbered(false, 4, 1300, 1, true), 4},
		"other sizes":       {1500, slices.Concat(numbered(false, 2, 64, 1, true), numbered(false, 2, 65, 1, true)), 2},
		"another port":      {1500, []*packet{same[0], other, same[1]}, 3},
		"another TTL":       {1500, []*packet{same[0], hop, same[1]}, 3},
		"TCP between":       {1500, []*packet{same[0], testTCP(false, 10, 0), same[1]}, 3},
		"too narrow":        {120, numbered(false, 3, 9, 1, true), 3},
		"checksum complete": {1500, []*packet{same[0], complete, same[1]}, 3},
	} {
		for _, uso := range []bool{true, false} {
			w := newWire(c.mtu)
			w.r.uso = uso
			var want [][]byte
			for _, p := range c.packets {
				p.src, p.dst, p.hops = 1, 2, 5
				if err := w.s.frame(tapFrame(p)); err != nil {
					t.Fatal(err)
				}
				if p.partial {
					want = append(want, withoutID(slowSegments(p, 0)[0]))
				} else {
					want = append(want, withoutID(p.data))
				}
			}
			ds := w.sent()
			if len(ds) != c.datagrams {
				t.Errorf("%s: %d datagrams, want %d", name, len(ds), c.datagrams)
			}
			w.receive(t, ds)
			var got [][]byte
			for _, o := range w.out {
				if err := checkSums(o); err != nil && o.partial {
					t.Errorf("%s: %v", name, err)
				}
				switch {
				case !uso && o.gsoType == gsoUDP:
					t.Errorf("%s: a super-frame to a kernel that takes none", name)
				case o.partial:
					for _, s := range slowSegments(o, int(o.gsoSize)) {
						got = append(got, withoutID(s))
					}
				default:
					got = append(got, withoutID(o.data))
				}
			}
			if !slices.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("%s, super-frames %v: %d packets come of %d, or other ones", name, uso, len(got), len(want))
			}
			if tx, rx := w.to.traffic.tx.snapshot(), w.r.table.Load().neighbours[1].traffic.rx.snapshot(); tx != rx || int(tx.Packets) != len(want) {
				t.Errorf("%s: %+v sent, %+v received; %d packets", name, tx, rx, len(want))
			}
		}
	}
}

// TestNoRow: what has no payload, and what is no UDP packet after all.
func TestNoRow(t *testing.T) {
	odd := testUDP(false, 20, 0)
	frame.UDP(odd.data[odd.csumStart:]).SetLen(20)
	for _, p := range []*packet{testUDP(false, 0, 0), testTCP(false, 20, 0), testPlain(60), testUDP(false, 100, 50), odd} {
		if new(row).begin(p, 1400) {
			t.Errorf("a row begins with %d bytes, offload %+v", len(p.data), p.offload)
		}
	}
}

// TestRowAllocations holds rows to no allocation.
func TestRowAllocations(t *testing.T) {
	w := newWire(1500)
	w.r.out = discard{}
	p := numbered(false, 1, 64, 0, true)[0]
	p.src, p.dst, p.hops = 1, 2, 5
	f := tapFrame(p)
	b := make([]byte, len(f))
	if n := testing.AllocsPerRun(100, func() {
		for range 30 {
			copy(b, f)
			if err := w.s.frame(b); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.s.endRow(); err != nil || len(w.s.msgs) == 0 {
			t.Fatal("nothing to send", err)
		}
		w.s.msgs, w.s.used = w.s.msgs[:0], 0
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestRowKeepsIDs: where identifications count, they come as they were sent.
func TestRowKeepsIDs(t *testing.T) {
	w := newWire(1500)
	w.r.uso = false
	in := numbered(false, 8, 64, 1, false)
	for _, p := range in {
		p.src, p.dst, p.hops = 1, 2, 5
		if err := w.s.frame(tapFrame(p)); err != nil {
			t.Fatal(err)
		}
	}
	w.receive(t, w.sent())
	for i, o := range w.out {
		if got, want := frame.IPv4(o.data[14:]).ID(), frame.IPv4(in[i].data[14:]).ID(); got != want {
			t.Errorf("packet %d: identification %#x, want %#x", i, got, want)
		}
	}
	if len(w.out) != len(in) {
		t.Errorf("%d of %d", len(w.out), len(in))
	}
}

// TestOldKernel: UDP super-frames in segments also reach a kernel that takes none.
func TestOldKernel(t *testing.T) {
	w := newWire(1500)
	w.r.uso = false
	p := testUDP(true, 20000, 700)
	w.receive(t, w.datagrams(p))
	var got [][]byte
	for _, o := range w.out {
		got = append(got, slowSegments(o, 0)...)
	}
	if !slices.EqualFunc(got, slowSegments(p, 700), bytes.Equal) {
		t.Errorf("%d packets come, or other ones", len(got))
	}
}
