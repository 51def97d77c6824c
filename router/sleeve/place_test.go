package sleeve

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/seal"
)

// sealing is the sleeve of each of two peers without a kernel, over a link with
// the keys given.
type sealing struct{ t [2]*table }

func linked(t *testing.T, was *sealing, uid peer.UID, a, b *seal.Session) *sealing {
	t.Helper()
	out := &sealing{}
	for i, keys := range []*seal.Session{a, b} {
		out.t[i] = was.relinked(t, i, uid, keys)
	}
	return out
}

// relinked is the table of one end over a new link.
func (s *sealing) relinked(t *testing.T, end int, uid peer.UID, keys *seal.Session) *table {
	t.Helper()
	f := forwarding(peer.ShortID(end+1), addr4, peer.ShortID(2-end))
	f.Neighbours[0].UID, f.Neighbours[0].Keys = uid, keys
	old := new(table)
	if s != nil && s.t[end] != nil {
		old = s.t[end]
	}
	out, err := old.next(f, true)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// passes says whether a frame from one end opens at the other.
func (s *sealing) passes(t *testing.T, from int) bool {
	t.Helper()
	n := s.t[from].hops[2-from]
	return s.opens(t, from, n.speaking())
}

// proves does the same with a probe.
func (s *sealing) proves(t *testing.T, from int) bool {
	t.Helper()
	return s.opens(t, from, s.t[from].neighbours[2-from])
}

func (s *sealing) opens(t *testing.T, from int, by *neighbour) bool {
	t.Helper()
	d := make([]byte, headerLen+60+by.tail())
	h := header{kind: kindFrame, src: peer.ShortID(from + 1), dst: peer.ShortID(2 - from), hops: 1, last: true}
	h.put(d)
	want := bytes.Clone(d[outerLen : headerLen+60])
	if !by.seal(s.t[from].self, d) {
		t.Fatal("not sealed")
	}
	var spare []byte
	n, got, err := s.t[1-from].open(d, &spare)
	return err == nil && n == s.t[1-from].neighbours[from+1] && bytes.Equal(got[outerLen:], want)
}

// A link that replaces another makes new keys, which one end has before the
// other: no frame is lost meanwhile, whoever is first.
func TestLinkReplaced(t *testing.T) {
	session := sessions(t)
	for first := range 2 {
		a, b := session()
		s := linked(t, nil, 7, a, b)
		both := func(when string) {
			t.Helper()
			for from := range 2 {
				if !s.passes(t, from) {
					t.Errorf("end %d first, %s: a frame from %d is lost", first, when, from)
				}
			}
		}
		both("at first")
		keys := [2]*seal.Session{}
		keys[0], keys[1] = session()
		s.t[first] = s.relinked(t, first, 7, keys[first])
		both("while one end has the new link")
		if s.proves(t, first) {
			t.Error("a probe goes with the old keys")
		}
		s.t[1-first] = s.relinked(t, 1-first, 7, keys[1-first])
		both("when both have it")
		for from := range 2 {
			if !s.proves(t, from) {
				t.Error("a probe is lost")
			}
		}
		both("when both were heard")
		for i, table := range s.t {
			n := table.neighbours[2-i]
			if n.speaking() != n {
				t.Errorf("end %d goes on with the old keys", i)
			}
			n.forgetBefore(time.Now().Add(keepBefore - time.Second))
			if n.before.Load() == nil {
				t.Errorf("end %d has forgotten the old keys too soon", i)
			}
			n.forgetBefore(time.Now().Add(keepBefore + time.Second))
			if n.before.Load() != nil {
				t.Errorf("end %d has the old keys for ever", i)
			}
		}
		both("when the old ones are forgotten")
	}
}

// What a peer had before it was started again says nothing: answers with an old
// key are refused, and ours go with the new one at once.
func TestRestartedPeerHasNoOldKeys(t *testing.T) {
	session := sessions(t)
	a, b := session()
	s := linked(t, nil, 7, a, b)
	if !s.passes(t, 0) || !s.passes(t, 1) {
		t.Fatal("frames are lost")
	}
	old := s.t[1]
	a, b = session()
	s.t[0] = s.relinked(t, 0, 8, a)
	s.t[1] = (&sealing{}).relinked(t, 1, 7, b)
	if !s.passes(t, 0) {
		t.Error("a frame to a peer that was started again is lost")
	}
	s.t[1] = old
	if s.passes(t, 1) {
		t.Error("a key of the run before is good")
	}
}

// Answers go where the last authentic datagram came from, and not where any
// other did.
func TestAnswersFollowThePeer(t *testing.T) {
	w := sealedWire(1500, sessions(t))
	from := w.r.table.Load().neighbours[1]
	at := func(ap string) *sockaddr {
		s, err := newSockaddr(netip.MustParseAddrPort(ap), true)
		if err != nil {
			t.Fatal(err)
		}
		return &s
	}
	home := netip.MustParseAddrPort("192.0.2.1:6783")
	from.home = home
	from.place.Store(&place{addr: home, sockaddr: *at("192.0.2.1:6783")})
	moves := 0
	w.r.moved = func(*neighbour) { moves++ }
	where := func(what, want string, times int) {
		t.Helper()
		if got := from.place.Load().addr.String(); got != want || moves != times {
			t.Errorf("%s: at %s after %d moves, want %s after %d", what, got, moves, want, times)
		}
	}
	d := w.datagrams(testPlain(100))[0]
	again := bytes.Clone(d)
	w.r.from = at("198.51.100.9:4242")
	bad := bytes.Clone(d)
	bad[len(bad)-1] ^= 1
	w.receive(t, [][]byte{bad})
	where("forged", "192.0.2.1:6783", 0)
	w.receive(t, [][]byte{d})
	where("authentic", "198.51.100.9:4242", 1)
	w.receive(t, w.datagrams(testPlain(100)))
	where("once more", "198.51.100.9:4242", 1)
	w.r.from = at("203.0.113.5:1")
	w.receive(t, [][]byte{again})
	where("replayed", "198.51.100.9:4242", 1)
	// A new link from the address where datagrams come from does not undo it.
	next := &neighbour{home: netip.MustParseAddrPort("198.51.100.9:6783"), keys: from.keys}
	next.place.Store(&place{addr: next.home})
	next.succeed(from, time.Now())
	if got := next.place.Load().addr.String(); got != "198.51.100.9:4242" {
		t.Errorf("after a new link: %s", got)
	}
}

// junk is how many datagrams of strangers a peer looks at in TestSealedJunk.
const junk = 500_000

// Datagrams of strangers to a peer with keys change a counter and nothing else:
// no memory, no goroutine, no answer, no session, no path, and who is at home
// goes on.
func TestSealedJunk(t *testing.T) {
	a, b := runningWith(t, 1500, 1412, func(*host) {})
	first, second := sessions(t)()
	a.host.sealTo(t, forwarding(1, addr4, 2), first)
	b.host.sealTo(t, forwarding(2, addr4, 1), second)
	stream(t, a, b, b.addr4, 1<<20)
	conn, bad := strangers(t, a, first)
	before := b.host.path.table.Load()
	was := *before.neighbours[1].place.Load()
	heap, routines := inUse(), runtime.NumGoroutine()
	counted := func() (n uint64) {
		c := b.host.path.Counters()
		for _, why := range []reason{unknownSender, forged, replayed, oldKey, unsealed, malformed} {
			n += c["dropped_"+why.String()]
		}
		return n
	}
	begun := counted()
	var sending sync.WaitGroup
	sending.Go(func() {
		for i := 0; t.Context().Err() == nil; i++ {
			if i&0xff == 0 && counted()-begun >= junk { // the socket does not hold all
				return
			}
			_, _ = conn.Write(bad[i%len(bad)])
		}
	})
	stream(t, a, b, b.addr4, 4<<20)
	sending.Wait()
	stream(t, a, b, b.addr4, 1<<20)
	if more := int64(inUse()) - int64(heap); more > 1<<20 {
		t.Errorf("%d bytes more in use", more)
	}
	if n := runtime.NumGoroutine(); n > routines {
		t.Errorf("%d goroutines, %d before", n, routines)
	}
	if after := b.host.path.table.Load(); after != before || *before.neighbours[1].place.Load() != was || before.neighbours[1].before.Load() != nil {
		t.Error("the peer is thought to be elsewhere, or somebody else")
	}
	_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := conn.Read(make([]byte, 100)); err == nil {
		t.Errorf("an answer of %d bytes", n)
	}
	b.quiet(t, "dropped_unknown_sender", "dropped_forged", "dropped_replayed", "dropped_old_key", "dropped_unsealed", "dropped_malformed")
}

// strangers is a socket on a's host, and what is sent from it to the other one.
func strangers(t *testing.T, a *container, keys *seal.Session) (*net.UDPConn, [][]byte) {
	t.Helper()
	var conn *net.UDPConn
	var err error
	a.host.space.do(func() {
		conn, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr4(2), testPort)))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	good := make([]byte, headerLen+1000+tailLen)
	h := header{kind: kindProbe, src: 1, dst: 2, hops: 1, last: true}
	h.put(good)
	binary.BigEndian.PutUint16(good[headerLen+8:], 1000-probeBody)
	n := &neighbour{keys: keys}
	if !n.seal(1, good) {
		t.Fatal("not sealed")
	}
	to := a.host.path.table.Load().neighbours[2]
	if err := a.host.path.sock.sendOne(to, good); err != nil { // from where it should come, once
		t.Fatal(err)
	}
	source := rand.NewChaCha8([32]byte{9})
	random := func(n int) []byte {
		b := make([]byte, n)
		_, _ = source.Read(b)
		return b
	}
	forge := bytes.Clone(good)
	forge[len(forge)-1] ^= 1
	binary.BigEndian.PutUint64(forge[4:], 1<<20) // not seen yet
	late := bytes.Clone(good)
	late[1] = 99
	clear := make([]byte, headerLen+60)
	h.kind = kindFrame
	h.put(clear)
	(&neighbour{session: 1}).seal(1, clear)
	return conn, [][]byte{random(1), random(11), random(1400), good, good[:40], good[:13], forge, late, clear}
}

// inUse is the memory in use, in bytes.
func inUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
