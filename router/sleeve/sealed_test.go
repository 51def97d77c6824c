package sleeve

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"weave.local/router/overlay"
	"weave.local/router/seal"
)

// sessions makes the keys of links, each those of both its ends.
func sessions(t testing.TB) func() (dialler, listener *seal.Session) {
	t.Helper()
	key, err := seal.NewKey("password", "")
	if err != nil {
		t.Fatal(err)
	}
	return func() (*seal.Session, *seal.Session) {
		h, msg, err := seal.Initiate(key, nil, nil, seal.Ciphers())
		if err != nil {
			t.Fatal(err)
		}
		listener, answer, err := seal.Respond(key, nil, nil, seal.Ciphers(), msg)
		if err != nil {
			t.Fatal(err)
		}
		dialler, err := h.Finish(answer)
		if err != nil {
			t.Fatal(err)
		}
		var out [2]*seal.Session
		for i, k := range []*seal.Keys{dialler, listener} {
			if out[i], err = k.Session(); err != nil {
				t.Fatal(err)
			}
		}
		return out[0], out[1]
	}
}

// sealedWire is a wire on which everything is sealed.
func sealedWire(mtu int, session func() (a, b *seal.Session)) *wire {
	w := newWire(mtu)
	w.to.keys, w.r.table.Load().neighbours[1].keys = session()
	return w
}

// Nothing of a frame shows, and nothing opens twice, changed, or in clear.
func TestSealed(t *testing.T) {
	session := sessions(t)
	for _, p := range []*packet{testPlain(1000), testPlain(9000), testTCP(false, 60000, 1400), testUDP(true, 60000, 1200)} {
		w := sealedWire(1500, session)
		ds := w.datagrams(p)
		text := p.data[len(p.data)-400:]
		for _, d := range ds {
			if d[0] != seal.Format {
				t.Errorf("datagram of format %d", d[0])
			}
			for at := 0; at+8 <= len(text); at++ {
				if bytes.Contains(d, text[at:at+8]) {
					t.Fatal("the frame shows in the datagram")
				}
			}
		}
		again := make([][]byte, len(ds))
		for i, d := range ds {
			again[i] = bytes.Clone(d)
			bad := bytes.Clone(d)
			bad[1+rand.N(len(d)-1)] ^= 1 << rand.N(8)
			w.receive(t, [][]byte{bad})
		}
		c := w.r.count
		if n := c.dropped[forged].Load() + c.dropped[oldKey].Load() + c.dropped[unknownSender].Load() + c.dropped[replayed].Load(); n != uint64(len(ds)) || len(w.out) > 0 {
			t.Errorf("%d of %d changed datagrams refused, %d frames arrive", n, len(ds), len(w.out))
		}
		w.receive(t, ds)
		if len(w.out) == 0 || c.dropped[malformed].Load()+c.dropped[incomplete].Load() > 0 {
			t.Errorf("%d frames arrive, %v", len(w.out), c.snapshot())
		}
		n, before := len(w.out), c.dropped[replayed].Load()
		w.receive(t, again)
		if len(w.out) > n || c.dropped[replayed].Load()-before != uint64(len(again)) {
			t.Errorf("%d frames arrive again, %v", len(w.out)-n, c.snapshot())
		}
		clear := newWire(1500).datagrams(p)
		w.receive(t, clear)
		if len(w.out) > n || c.dropped[unsealed].Load() != uint64(len(clear)) {
			t.Errorf("%d frames arrive in clear, %v", len(w.out)-n, c.snapshot())
		}
	}
}

// A neighbour without keys has no use for sealed datagrams.
func TestSealedForNobody(t *testing.T) {
	ds := sealedWire(1500, sessions(t)).datagrams(testPlain(100))
	w := newWire(1500)
	w.receive(t, ds)
	if len(w.out) > 0 || w.r.count.dropped[unknownSender].Load() != 1 {
		t.Errorf("%d frames arrive, %v", len(w.out), w.r.count.snapshot())
	}
}

func TestSealedAllocations(t *testing.T) {
	session := sessions(t)
	for _, p := range []*packet{testPlain(60), testTCP(false, 60000, 1400), testUDP(false, 60000, 3000)} {
		w := sealedWire(1500, session)
		w.r.out = discard{}
		raw := tapFrame(p)
		b := make([]byte, len(raw))
		if n := testing.AllocsPerRun(100, func() {
			p.src, p.dst, p.hops = 1, 2, 5
			copy(b, raw)
			if err := w.s.frame(b); err != nil {
				t.Fatal(err)
			}
			for _, m := range w.s.msgs {
				for off := 0; off < m.len; off += m.seg {
					if err := w.r.datagram(w.s.arena[m.at+off : m.at+min(off+m.seg, m.len)]); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := w.r.flush(); err != nil {
				t.Fatal(err)
			}
			w.s.msgs, w.s.used = w.s.msgs[:0], 0
		}); n != 0 {
			t.Errorf("%d bytes: %v allocations", len(p.data), n)
		}
		if c := w.r.count; c.dropped[forged].Load()+c.dropped[replayed].Load()+c.dropped[malformed].Load() > 0 {
			t.Errorf("counters %v", c.snapshot())
		}
	}
}

// sealTo applies f with the keys of the only link.
func (h *host) sealTo(t *testing.T, f overlay.Forwarding, keys *seal.Session) {
	t.Helper()
	for i := range f.Neighbours {
		f.Neighbours[i].Keys = keys
	}
	h.apply(t, f)
}

func TestSealedTraffic(t *testing.T) {
	a, b := runningWith(t, 1500, 1412, func(*host) {})
	first, second := sessions(t)()
	a.host.sealTo(t, forwarding(1, addr4, 2), first)
	b.host.sealTo(t, forwarding(2, addr4, 1), second)
	if mtu, want := a.host.path.MTU(2), 1500-SealedOverhead; mtu != want {
		t.Errorf("MTU is %d, want %d", mtu, want)
	}
	if err := a.host.path.Probe(2, 7, a.host.path.MTU(2)); err != nil {
		t.Error(err)
	}
	for _, to := range []netip.Addr{b.addr4, b.addr6} {
		stream(t, a, b, to, 8<<20)
		datagrams(t, a, b, to, 0, 1, 100, 1300, 1472, 8000, 60000)
		// New keys in the middle of it cost nothing.
		for _, s := range []*seal.Session{first, second} {
			s.Tick(time.Now())
			s.Tick(time.Now().Add(time.Hour))
		}
	}
	stream(t, a, b, b.addr4, 1<<20)
	if first.Epoch() == 0 || second.Epoch() == 0 {
		t.Errorf("epochs %d and %d: keys never changed", first.Epoch(), second.Epoch())
	}
	a.quiet(t)
	b.quiet(t)
	if n := b.host.path.Counters()["probes_received"]; n != 1 {
		t.Errorf("%d probes received", n)
	}
}

func BenchmarkSealedSend(b *testing.B) {
	w := sealedWire(1500, sessions(b))
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

// FuzzOpen gives the receiver what a stranger may send to a peer with keys.
func FuzzOpen(f *testing.F) {
	session := sessions(f)
	for _, p := range []*packet{testPlain(60), testTCP(false, 3000, 500)} {
		f.Add(sealedWire(600, session).datagrams(p)[0])
		f.Add(newWire(600).datagrams(p)[0])
	}
	w := sealedWire(1500, session)
	f.Fuzz(func(t *testing.T, d []byte) {
		w.receive(t, [][]byte{d})
		if len(w.out) > 0 {
			t.Fatalf("% x is taken", d)
		}
	})
}
