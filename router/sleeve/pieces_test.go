package sleeve

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/frame"
)

// wire is a sender and a receiver without a kernel: peer 1 sends to peer 2.
type wire struct {
	s   *sender
	r   *receiver
	to  *neighbour
	out []*packet // frames for the TAP of peer 2
}

func newWire(mtu int) *wire {
	w := &wire{to: &neighbour{id: 2, session: 99, overhead: ipv4Overhead, traffic: new(traffic)}}
	w.to.pathMTU.Store(int32(mtu))
	var at1, at2 atomic.Pointer[table]
	from := &neighbour{id: 1, session: 99, traffic: new(traffic)}
	t1, t2 := &table{self: 1}, &table{self: 2, trees: map[peer.ShortID]leg{1: {parent: from}}}
	t1.neighbours[2], t1.hops[2] = w.to, w.to
	t2.neighbours[1] = from
	at1.Store(t1)
	at2.Store(t2)
	w.s = newSender(&at1, new(counters))
	c := new(counters)
	w.r = &receiver{table: &at2, count: c, out: w, uso: true}
	w.r.frags.count = c
	return w
}

// WriteFrame keeps what would go to the TAP.
func (w *wire) WriteFrame(parts [][]byte) error {
	p := new(packet)
	if b := bytes.Join(parts, nil); !p.parse(b) {
		return fmt.Errorf("not tagged well: % x", b[:min(len(b), 40)])
	}
	w.out = append(w.out, p)
	return nil
}

// datagrams sends a frame and returns what goes over the underlay.
func (w *wire) datagrams(p *packet) [][]byte {
	p.src, p.dst, p.hops = 1, 2, 5
	if err := w.s.frame(tapFrame(p)); err != nil {
		panic(err)
	}
	return w.sent()
}

// sent is what went out since it was last called.
func (w *wire) sent() [][]byte {
	if err := w.s.endRow(); err != nil {
		panic(err)
	}
	var out [][]byte
	for _, m := range w.s.msgs {
		for off := 0; off < m.len; off += m.seg {
			out = append(out, bytes.Clone(w.s.arena[m.at+off:m.at+min(off+m.seg, m.len)]))
		}
	}
	w.s.msgs, w.s.used = w.s.msgs[:0], 0
	return out
}

// receive takes datagrams as if they came in one go.
func (w *wire) receive(t testing.TB, ds [][]byte) {
	t.Helper()
	for _, d := range ds {
		if err := w.r.datagram(d); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.r.flush(); err != nil {
		t.Fatal(err)
	}
}

// headLen is the length of all headers of a TCP or UDP frame.
func (p *packet) headLen() int {
	l4 := int(p.csumStart)
	if p.csumAt == frame.TCPChecksum {
		return l4 + int(p.data[l4+12]>>4)*4
	}
	return l4 + frame.UDPLen
}

// slowSegments cuts a super-frame into the frames of size bytes of payload
// that it stands for, with complete checksums.
func slowSegments(p *packet, size int) [][]byte {
	l4, headLen := int(p.csumStart), p.headLen()
	tcp := p.csumAt == frame.TCPChecksum
	proto := byte(frame.ProtoUDP)
	if tcp {
		proto = frame.ProtoTCP
	}
	v6 := binary.BigEndian.Uint16(p.data[12:]) == frame.TypeIPv6
	payload := p.data[headLen:]
	if size == 0 {
		size = len(payload)
	}
	var out [][]byte
	for off := 0; off < len(payload); off += size {
		end := min(off+size, len(payload))
		b := append(bytes.Clone(p.data[:headLen]), payload[off:end]...)
		if v6 {
			binary.BigEndian.PutUint16(b[18:], uint16(len(b)-54))
		} else {
			binary.BigEndian.PutUint16(b[16:], uint16(len(b)-14))
			binary.BigEndian.PutUint16(b[18:], binary.BigEndian.Uint16(b[18:])+uint16(off/size))
			b[24], b[25] = 0, 0
			binary.BigEndian.PutUint16(b[24:], ^slowSum(b[14:34]))
		}
		if tcp {
			binary.BigEndian.PutUint32(b[l4+4:], binary.BigEndian.Uint32(b[l4+4:])+uint32(off))
			if end < len(payload) {
				b[l4+13] &^= 0x09
			}
			if off > 0 {
				b[l4+13] &^= 0x80
			}
		} else {
			binary.BigEndian.PutUint16(b[l4+4:], uint16(len(b)-l4))
		}
		at := l4 + int(p.csumAt)
		b[at], b[at+1] = 0, 0
		binary.BigEndian.PutUint16(b[at:], ^slowSum(pseudo(b, proto, len(b)-l4), b[l4:]))
		out = append(out, b)
	}
	return out
}

// TestWhole sends frames of every sort through paths of many sizes.
func TestWhole(t *testing.T) { wholeFrames(t, newWire) }

// TestWholeSealed is the same between peers with keys.
func TestWholeSealed(t *testing.T) {
	session := sessions(t)
	wholeFrames(t, func(mtu int) *wire { return sealedWire(mtu, session) })
}

func wholeFrames(t *testing.T, newWire func(mtu int) *wire) {
	t.Helper()
	for _, mtu := range []int{576, 1280, 1500, 9000, 65535} {
		for _, p := range []*packet{
			testPlain(14), testPlain(60), testPlain(1514), testPlain(65536),
			testTCP(false, 1, 0), testTCP(true, 5000, 0), testTCP(false, 64000, 1448), testTCP(true, 64001, 48),
			testTCP(false, 3000, 500), testUDP(true, 0, 0), testUDP(false, 60000, 0), testUDP(true, 60000, 1),
			testUDP(false, 60000, 1400), testUDP(true, 60000, 5000),
		} {
			w := newWire(mtu)
			ds := w.datagrams(p)
			for _, d := range ds {
				if len(d) > mtu-ipv4Overhead {
					t.Errorf("MTU %d: datagram of %d bytes", mtu, len(d))
				}
			}
			w.receive(t, ds)
			if c := w.r.count; c.dropped[malformed].Load()+c.dropped[forged].Load()+c.dropped[replayed].Load() > 0 {
				t.Errorf("MTU %d: our own datagram is malformed", mtu)
			}
			var got, want [][]byte
			if !p.partial {
				want = [][]byte{p.data}
			}
			for _, o := range w.out {
				if err := checkSums(o); err != nil {
					t.Errorf("MTU %d: %v", mtu, err)
				}
				if !p.partial {
					got = append(got, o.data)
					continue
				}
				// Cut alike, both must be the same frames.
				got = append(got, slowSegments(o, int(o.gsoSize))...)
				want = slowSegments(p, int(w.out[0].gsoSize))
			}
			if p.partial && p.gsoType == gsoUDP {
				want = slowSegments(p, int(p.gsoSize))
			}
			if !slices.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("MTU %d, %d bytes, offload %+v: %d frames come, want %d", mtu, len(p.data), p.offload, len(got), len(want))
			}
		}
	}
}

// TestLoss loses, doubles and swaps segments: what arrives must be exactly
// the frames whose segments arrived.
func TestLoss(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 400 {
		p := testTCP(i%2 == 0, 2000+rnd.IntN(60000), 400+rnd.IntN(800))
		if i%4 > 1 {
			p = testUDP(i%2 == 0, 2000+rnd.IntN(60000), 400+rnd.IntN(800))
		}
		w := newWire(1500)
		ds := w.datagrams(p)
		all := slowSegments(p, int(p.gsoSize))
		if len(ds) != len(all) {
			t.Fatalf("%d datagrams for %d segments", len(ds), len(all))
		}
		var sent, want [][]byte
		for k := 0; k < len(ds); k++ {
			switch j := k; rnd.IntN(8) {
			case 0: // lost
			case 1: // twice
				sent, want = append(sent, ds[j], ds[j]), append(want, all[j], all[j])
			case 2: // after the next
				if k++; k < len(ds) {
					sent, want = append(sent, ds[k]), append(want, all[k])
				}
				fallthrough
			default:
				sent, want = append(sent, ds[j]), append(want, all[j])
			}
		}
		w.receive(t, sent)
		var got [][]byte
		for _, o := range w.out {
			if err := checkSums(o); err != nil {
				t.Fatal(err)
			}
			got = append(got, slowSegments(o, int(p.gsoSize))...)
		}
		if !slices.EqualFunc(got, want, bytes.Equal) {
			t.Fatalf("round %d: %d frames come, want %d", i, len(got), len(want))
		}
	}
}

// TestFragments brings fragments in any order, some twice.
func TestFragments(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		w := newWire(600)
		p := testPlain(1000 + rnd.IntN(64000))
		ds := w.datagrams(p)
		shuffled := slices.Clone(ds)
		shuffled = append(shuffled, ds[rnd.IntN(len(ds))])
		rnd.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		w.receive(t, shuffled)
		if len(w.out) != 1 || !bytes.Equal(w.out[0].data, p.data) {
			t.Fatalf("%d frames come of %d fragments", len(w.out), len(ds))
		}
	}
}

// TestFragmentsLost leaves frames unfinished: the memory for them is bounded,
// and the numbering coming round again finds none of them.
func TestFragmentsLost(t *testing.T) {
	w := newWire(600)
	w.receive(t, w.datagrams(testPlain(3000))[1:])
	for range 200 {
		w.receive(t, w.datagrams(testPlain(2000)))
		ds := w.datagrams(testPlain(2000))
		w.receive(t, ds[:len(ds)-1])
	}
	if len(w.out) != 200 {
		t.Errorf("%d of 200 whole frames come", len(w.out))
	}
	open := 0
	for i := range w.r.frags.slots {
		if w.r.frags.slots[i].from != nil {
			open++
		}
	}
	if lost := w.r.count.dropped[incomplete].Load(); int(lost)+open != 201 {
		t.Errorf("of 201 unfinished frames %d are counted and %d open", lost, open)
	}
}

// TestFragmentNumbersComeAgain has 65536 frames between two of one number.
func TestFragmentNumbersComeAgain(t *testing.T) {
	w := newWire(600)
	w.receive(t, w.datagrams(testPlain(3000))[1:])
	for range 2 * groupWindow {
		w.receive(t, w.datagrams(testPlain(2000)))
	}
	for w.to.fragmented != 0 {
		w.datagrams(testPlain(2000))
	}
	w.out = nil
	p := testPlain(3000)
	p.data[100]++
	ds := w.datagrams(p)
	w.receive(t, ds[:1])
	if len(w.out) != 0 {
		t.Error("a frame is made of two frames' fragments")
	}
	w.receive(t, ds[1:])
	if len(w.out) != 1 || !bytes.Equal(w.out[0].data, p.data) {
		t.Error("a frame under a number used before does not come")
	}
}

// TestTooSmall has a path that cannot carry anything.
func TestTooSmall(t *testing.T) {
	w := newWire(100)
	if ds := w.datagrams(testPlain(1500)); len(ds) != 0 || w.s.count.dropped[tooBig].Load() != 1 {
		t.Errorf("%d datagrams", len(ds))
	}
}

// TestRefused tells a kernel that cannot cut messages from a path that shrank.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		errno         unix.Errno
		mtu           int // as the kernel says after the refusal
		again         bool
		tooBig, other uint64
	}{
		{unix.EIO, 1500, true, 0, 0},
		{unix.EINVAL, 1500, true, 0, 0},
		{unix.EINVAL, 1300, false, 1, 0},
		{unix.EMSGSIZE, 1300, false, 1, 0},
		{unix.ENETUNREACH, 1500, false, 0, 1},
	} {
		w := newWire(1500)
		w.s.refreshMTU = func(n *neighbour) { n.pathMTU.Store(int32(c.mtu)) }
		w.s.msgs = append(w.s.msgs, message{to: w.to, len: 30000, seg: 1472})
		next := w.s.refused(0, c.errno)
		if (next == 0) != c.again || w.to.plain != c.again || w.s.count.dropped[tooBig].Load() != c.tooBig || w.s.count.dropped[sendFailed].Load() != c.other {
			t.Errorf("%v, MTU %d: next %d, plain %v, %v", c.errno, c.mtu, next, w.to.plain, w.s.count.snapshot())
		}
		if c.again && w.s.refused(0, c.errno) != 1 {
			t.Errorf("%v: tried for ever", c.errno)
		}
	}
}

// TestAllocations holds the packet path to no allocation at all.
func TestAllocations(t *testing.T) {
	for _, p := range []*packet{testPlain(60), testTCP(false, 60000, 1400), testTCP(true, 5000, 0), testUDP(false, 60000, 3000)} {
		w := newWire(1500)
		w.r.out = discard{}
		ds := w.datagrams(p)
		if n := testing.AllocsPerRun(100, func() { w.receive(t, ds) }); n != 0 {
			t.Errorf("%d bytes: receiving allocates %v times", len(p.data), n)
		}
		b, raw := tapFrame(p), make([]byte, len(tapFrame(p)))
		if n := testing.AllocsPerRun(100, func() {
			copy(raw, b)
			if err := w.s.frame(raw); err != nil || len(w.s.msgs) == 0 {
				t.Fatal("nothing to send", err)
			}
			w.s.msgs, w.s.used = w.s.msgs[:0], 0
		}); n != 0 {
			t.Errorf("%d bytes: sending allocates %v times", len(p.data), n)
		}
	}
}

type discard struct{}

func (discard) WriteFrame([][]byte) error { return nil }

func BenchmarkSend(b *testing.B) {
	w := newWire(1500)
	p := testTCP(false, 64000, 1386)
	p.src, p.dst, p.hops = 1, 2, 3
	src := tapFrame(p)
	raw := make([]byte, len(src))
	b.SetBytes(int64(len(p.data)))
	for b.Loop() {
		copy(raw, src)
		if err := w.s.frame(raw); err != nil {
			b.Fatal(err)
		}
		w.s.msgs, w.s.used = w.s.msgs[:0], 0
	}
}

func BenchmarkReceive(b *testing.B) {
	w := newWire(1500)
	w.r.out = discard{}
	p := testTCP(false, 64000, 1386)
	ds := w.datagrams(p)
	b.SetBytes(int64(len(p.data)))
	for b.Loop() {
		w.receive(b, ds)
	}
}

// FuzzReceive gives the receiver whatever a neighbour may send: the input is a
// row of datagrams, each behind its length in two bytes.
func FuzzReceive(f *testing.F) {
	pack := func(ds [][]byte) (b []byte) {
		for _, d := range ds {
			b = binary.BigEndian.AppendUint16(b, uint16(len(d)))
			b = append(b, d...)
		}
		return b
	}
	for _, p := range []*packet{
		testPlain(60), testPlain(700), testTCP(false, 3000, 500), testTCP(true, 3000, 0),
		testUDP(true, 2000, 400), testUDP(false, 2000, 1000),
	} {
		ds := newWire(600).datagrams(p)
		f.Add(pack(ds))
		f.Add(pack(ds[1:]))
		f.Add(pack(ds[:1]))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		w := newWire(1500)
		for len(b) >= 2 {
			n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
			d := bytes.Clone(b[2 : 2+n])
			b = b[2+n:]
			if n >= outerLen {
				w.r.table.Load().neighbours[1].seal(1, d)
			}
			if err := w.r.datagram(d); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.r.flush(); err != nil {
			t.Fatal(err)
		}
		for _, o := range w.out {
			if len(o.data) < frame.EthernetLen || len(o.data) > maxFrame || !o.coverageWithin(len(o.data)) {
				t.Errorf("frame of %d bytes, %+v", len(o.data), o.offload)
			}
		}
		if w.r.count.dropped[tapRefused].Load() > 0 {
			t.Error("a frame that is not tagged well")
		}
	})
}

// FuzzSend gives the sender whatever the TAP may hold; what it sends must be
// good to the receiver.
func FuzzSend(f *testing.F) {
	short := testTCP(false, 3000, 500) // says that its header has 8 bytes
	short.data[short.csumStart+12] = 0x20
	for _, p := range []*packet{testPlain(60), testTCP(false, 3000, 500), testTCP(true, 3000, 0), testUDP(true, 2000, 400), short} {
		p.src, p.dst, p.hops = 1, 2, 1
		f.Add(tapFrame(p), uint16(600))
	}
	f.Fuzz(func(t *testing.T, b []byte, mtu uint16) {
		w := newWire(int(mtu))
		w.r.out = discard{}
		if err := errors.Join(w.s.frame(b), w.s.endRow()); err != nil {
			t.Fatal(err)
		}
		for _, m := range w.s.msgs {
			for off := 0; off < m.len; off += m.seg {
				if err := w.r.datagram(w.s.arena[m.at+off : m.at+min(off+m.seg, m.len)]); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n := w.r.count.dropped[malformed].Load() + w.r.count.dropped[unknownSender].Load(); n > 0 {
			t.Errorf("%d of our own datagrams are malformed", n)
		}
	})
}

// TestHeader pins the layout.
func TestHeader(t *testing.T) {
	h := header{
		kind: kindSegment, src: 0xabc, dst: 0x123, hops: 0x2a, group: 0x0102, offset: 0x0304, headLen: 66, last: true,
		offload: offload{gsoType: gsoTCP4, gsoSize: 0x0506, partial: true, csumStart: 34, csumAt: 16},
	}
	d := make([]byte, headerLen)
	h.put(d)
	(&neighbour{session: 0x1122334455667788}).seal(0x0987, d)
	const want = "01020987" + "1122334455667788" + "abc123a9" + "010203040506002210420101"
	if got := fmt.Sprintf("%x", d); got != want {
		t.Errorf("header\n%s, want\n%s", got, want)
	}
	var back header
	if !back.parse(append(d, make([]byte, 100)...)) || back != h {
		t.Errorf("read back %+v", back)
	}
}
