package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
	"pgregory.net/rapid"
)

func ciphers() []Cipher { return []Cipher{AES256GCM, ChaCha20Poly1305} }

// pair is both ends of a link's datagrams.
func pair(t testing.TB, c Cipher) (dialler, listener *Session) {
	t.Helper()
	secret := Secret{b: [KeyLen]byte{7, 7, 7}}
	d, err := newSession(&secret, c, true)
	if err != nil {
		t.Fatal(err)
	}
	l, err := newSession(&secret, c, false)
	if err != nil {
		t.Fatal(err)
	}
	return d, l
}

func seal(s *Session, label uint16, text string) []byte {
	d := make([]byte, HeaderLen, HeaderLen+len(text)+TailLen)
	return s.Seal(append(d, text...), label)
}

func open(t *rapid.T, s *Session, d []byte, want string) {
	t.Helper()
	got, err := s.Open(bytes.Clone(d))
	if err != nil || string(got[HeaderLen:]) != want {
		t.Fatalf("%q, %v; want %q", got, err, want)
	}
}

// The format is what the package comment says, computed anew here.
func TestDatagramFormat(t *testing.T) {
	for _, c := range ciphers() {
		for _, dialler := range []bool{true, false} {
			d, l := pair(t, c)
			s, role := l, "listener"
			if dialler {
				s, role = d, "dialler"
			}
			for range 3 {
				seal(s, 1, "before")
			}
			got := seal(s, 0xabc, "the text")
			secret := Secret{b: [KeyLen]byte{7, 7, 7}}
			chain, err := hkdf.Expand(sha256.New, secret.b[:], "weave/datagram/"+role+"/1", 32)
			if err != nil {
				t.Fatal(err)
			}
			key, err := hkdf.Expand(sha256.New, chain, "key", 32)
			if err != nil {
				t.Fatal(err)
			}
			want := []byte{2, 0, 0x0a, 0xbc, 0, 0, 0, 0, 0, 0, 0, 3}
			want = oracle(t, c, key).Seal(want, want, []byte("the text\x00"), nil)
			if !bytes.Equal(got, want) {
				t.Errorf("%s %s:\n got %x\nwant %x", c, role, got, want)
			}
		}
	}
}

func oracle(t *testing.T, c Cipher, key []byte) cipher.AEAD {
	t.Helper()
	if c == ChaCha20Poly1305 {
		a, err := chacha20poly1305.New(key)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	b, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestDatagramTamper(t *testing.T) {
	for _, c := range ciphers() {
		d, l := pair(t, c)
		good := seal(d, 5, "text")
		for i := range good {
			for bit := range 8 {
				bad := bytes.Clone(good)
				bad[i] ^= 1 << bit
				if got, err := l.Open(bad); err == nil {
					t.Errorf("%s: byte %d bit %d changed: opens as %q", c, i, bit, got)
				}
			}
		}
		for n := range good {
			if _, err := l.Open(bytes.Clone(good[:n])); err == nil {
				t.Errorf("%s: first %d bytes open", c, n)
			}
		}
		if _, err := d.Open(bytes.Clone(good)); err == nil {
			t.Error("a reflected datagram opens")
		}
		if _, err := l.Open(bytes.Clone(good)); err != nil {
			t.Errorf("%s: after all that the good one: %v", c, err)
		}
		if _, err := l.Open(bytes.Clone(good)); !errors.Is(err, ErrReplay) {
			t.Errorf("%s: replayed: %v", c, err)
		}
	}
}

func TestReplayWindowAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w window
		seen := map[uint64]bool{}
		top := uint64(0) // one above the highest seen
		for range 200 {
			var c uint64
			switch rapid.IntRange(0, 3).Draw(t, "how") {
			case 0:
				c = top + rapid.Uint64Range(0, 3).Draw(t, "ahead")
			case 1:
				c = top + rapid.Uint64Range(0, 40000).Draw(t, "far ahead")
			default:
				c = top - min(top, rapid.Uint64Range(0, WindowLen+70).Draw(t, "behind"))
			}
			want := c >= top || top-c <= WindowLen && !seen[c]
			if got := w.fresh(c); got != want {
				t.Fatalf("fresh(%d) with top %d is %v", c, top, got)
			}
			if want {
				w.note(c)
				seen[c] = true
				top = max(top, c+1)
			}
		}
	})
	if WindowLen < 8192 {
		t.Errorf("window of %d", WindowLen)
	}
}

func TestReorderedWithinTheWindow(t *testing.T) {
	d, l := pair(t, AES256GCM)
	var all [][]byte
	for i := range WindowLen {
		all = append(all, seal(d, 1, fmt.Sprint(i)))
	}
	slices.Reverse(all)
	for i, b := range all {
		if _, err := l.Open(bytes.Clone(b)); err != nil {
			t.Fatalf("%d before the newest: %v", i, err)
		}
	}
	for _, b := range all {
		if _, err := l.Open(b); !errors.Is(err, ErrReplay) {
			t.Fatalf("again: %v", err)
		}
	}
}

// Two ends talk through a network that loses, delays and doubles datagrams,
// while time goes by: whatever arrives, and is not too late, opens once.
func TestRekeyUnderLoss(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		loss := rapid.Float64Range(0, 0.9).Draw(t, "loss")
		seed := rapid.Uint64().Draw(t, "seed")
		r := rand.New(rand.NewPCG(seed, 1))
		secret := Secret{b: [KeyLen]byte{byte(seed)}}
		var ends [2]*Session
		var err error
		for i := range ends {
			if ends[i], err = newSession(&secret, AES256GCM, i == 0); err != nil {
				t.Fatal(err)
			}
		}
		type flight struct {
			to   int
			text string
			at   time.Time
			b    []byte
		}
		var air []flight
		now := time.Unix(1e9, 0)
		for i := range 4000 {
			now = now.Add(time.Duration(r.IntN(2000)) * time.Millisecond)
			ends[0].Tick(now)
			ends[1].Tick(now)
			from := r.IntN(2)
			text := fmt.Sprint("datagram ", i)
			if b := seal(ends[from], 1, text); r.Float64() >= loss {
				air = append(air, flight{to: 1 - from, text: text, at: now, b: b})
			}
			for len(air) > 0 && (r.IntN(3) > 0 || now.Sub(air[0].at) > 20*time.Second) {
				k := 0
				if now.Sub(air[0].at) < 20*time.Second {
					k = r.IntN(len(air))
				}
				open(t, ends[air[k].to], air[k].b, air[k].text)
				if _, err := ends[air[k].to].Open(air[k].b); err == nil {
					t.Fatal("opens twice")
				}
				air = slices.Delete(air, k, k+1)
			}
		}
		if e := ends[0].Epoch(); e < 10 {
			t.Fatalf("only %d new keys in %s", e, now.Sub(time.Unix(1e9, 0)))
		}
	})
}

func TestRekeyWaitsForTheOtherEnd(t *testing.T) {
	d, l := pair(t, AES256GCM)
	now := time.Unix(1e9, 0)
	pass := func(s *Session, span time.Duration) {
		s.Tick(now)
		now = now.Add(span)
		s.Tick(now)
	}
	pass(d, time.Hour)
	if d.Epoch() != 0 {
		t.Fatal("new key though the other end was never heard")
	}
	mustOpen(t, d, seal(l, 1, "x"))
	pass(d, time.Second)
	if d.Epoch() != 1 {
		t.Fatalf("epoch %d, want 1", d.Epoch())
	}
	for range 5 { // all of them lost
		seal(d, 1, "lost")
		mustOpen(t, d, seal(l, 1, "x"))
		pass(d, time.Hour)
	}
	if d.Epoch() != 1 {
		t.Fatalf("epoch %d though the other end cannot know", d.Epoch())
	}
	mustOpen(t, l, seal(d, 1, "at last"))
	mustOpen(t, d, seal(l, 1, "heard"))
	pass(d, time.Hour)
	if d.Epoch() != 2 {
		t.Fatalf("epoch %d, want 2", d.Epoch())
	}
	mustOpen(t, l, seal(d, 1, "next"))
}

func mustOpen(t *testing.T, s *Session, d []byte) {
	t.Helper()
	if _, err := s.Open(d); err != nil {
		t.Fatal(err)
	}
}

func TestOldKeyIsForgotten(t *testing.T) {
	d, l := pair(t, ChaCha20Poly1305)
	now := time.Unix(1e9, 0)
	var late [][]byte
	for range 3 {
		late = append(late, seal(d, 1, "late"))
	}
	mustOpen(t, d, seal(l, 1, "x"))
	d.Tick(now)
	d.Tick(now.Add(rekeyAfter))
	mustOpen(t, l, seal(d, 1, "new key"))
	mustOpen(t, l, late[0])
	l.Tick(now)
	l.Tick(now.Add(keepOld - time.Second))
	mustOpen(t, l, late[1])
	l.Tick(now.Add(keepOld))
	if _, err := l.Open(late[2]); !errors.Is(err, ErrOldKey) {
		t.Errorf("with a key that is gone: %v", err)
	}
}

func TestRekeyByCount(t *testing.T) {
	d, l := pair(t, AES256GCM)
	d.send.Load().counter.Store(rekeyCount - 1)
	mustOpen(t, l, seal(d, 1, "last but one"))
	mustOpen(t, d, seal(l, 1, "x"))
	mustOpen(t, l, seal(d, 1, "last"))
	if d.Epoch() != 1 {
		t.Fatalf("epoch %d, want 1", d.Epoch())
	}
	mustOpen(t, l, seal(d, 1, "first"))
	k := d.send.Load()
	k.counter.Store(lastCounter)
	if b := seal(d, 1, "never"); b != nil {
		t.Error("a worn out key still seals")
	}
}

// Keys change all the time while both ends send and datagrams overtake each
// other: every one opens.
func TestRekeyUnderLoad(t *testing.T) {
	const total, perKey, late = 100_000, 2000, 64
	d, l := pair(t, AES256GCM)
	d.count, l.count = perKey, perKey
	var tasks sync.WaitGroup
	defer tasks.Wait()
	for _, way := range [][2]*Session{{d, l}, {l, d}} {
		wire := make(chan []byte, 4*late)
		tasks.Go(func() {
			defer close(wire)
			row := make([][]byte, 0, late)
			for range total / late {
				for row = row[:0]; len(row) < late; {
					row = append(row, seal(way[0], 1, "x"))
				}
				rand.Shuffle(late, func(i, j int) { row[i], row[j] = row[j], row[i] })
				for _, b := range row {
					wire <- b
				}
			}
			if n := way[0].Epoch(); n < 5 {
				t.Errorf("%d changes of the key in %d datagrams", n, total)
			}
		})
		tasks.Go(func() {
			lost := 0
			for b := range wire {
				if _, err := way[1].Open(b); err != nil {
					lost++
				}
			}
			if lost > 0 {
				t.Errorf("%d datagrams lost", lost)
			}
		})
	}
}

// The low byte of the epoch comes round.
func TestManyEpochs(t *testing.T) {
	d, l := pair(t, AES256GCM)
	now := time.Unix(1e9, 0)
	for i := range 1000 {
		mustOpen(t, l, seal(d, 1, "x"))
		mustOpen(t, d, seal(l, 1, "x"))
		d.Tick(now)
		now = now.Add(rekeyAfter)
		d.Tick(now)
		if d.Epoch() != uint32(i+1) {
			t.Fatalf("epoch %d after %d changes", d.Epoch(), i+1)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	d, l := pair(t, AES256GCM)
	var tasks sync.WaitGroup
	out := make(chan []byte, 64)
	for range 4 {
		tasks.Go(func() {
			for range 500 {
				out <- seal(d, 1, "x")
			}
		})
	}
	go func() { tasks.Wait(); close(out) }()
	now := time.Unix(1e9, 0)
	seen := map[string]bool{}
	for b := range out {
		if id := string(b[:HeaderLen]); seen[id] {
			t.Fatal("a nonce is used twice")
		} else {
			seen[id] = true
		}
		mustOpen(t, l, b)
		mustOpen(t, d, seal(l, 1, "y"))
		now = now.Add(100 * time.Millisecond) // so that the key changes once, in the middle
		d.Tick(now)
	}
	if d.Epoch() != 1 {
		t.Errorf("epoch %d, want 1", d.Epoch())
	}
}

func TestNoAllocation(t *testing.T) {
	for _, c := range ciphers() {
		d, l := pair(t, c)
		b := make([]byte, HeaderLen+1400, HeaderLen+1400+TailLen)
		if n := testing.AllocsPerRun(1000, func() {
			if _, err := l.Open(d.Seal(b, 1)); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations for each datagram", c, n)
		}
		junk := make([]byte, 1400)
		junk[0] = Format
		if n := testing.AllocsPerRun(1000, func() {
			binary.BigEndian.PutUint64(junk[4:], 1<<33)
			if _, err := l.Open(junk); !errors.Is(err, ErrForged) {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations for each forged datagram", c, n)
		}
	}
}

func FuzzOpen(f *testing.F) {
	d, l := pair(f, AES256GCM)
	f.Add(seal(d, 1, "hello"))
	f.Add([]byte{2, 1})
	f.Add(make([]byte, HeaderLen+TailLen))
	text := "genuine"
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := l.Open(b); err == nil && string(got[HeaderLen:]) != "hello" {
			t.Fatalf("%x opens", b)
		}
		if _, err := l.Open(seal(d, 1, text)); err != nil {
			t.Fatalf("after junk a genuine one: %v", err)
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	for _, c := range ciphers() {
		b.Run(c.String(), func(b *testing.B) {
			d, _ := pair(b, c)
			buf := make([]byte, HeaderLen+1400, HeaderLen+1400+TailLen)
			b.SetBytes(1400)
			for b.Loop() {
				d.Seal(buf, 1)
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, c := range ciphers() {
		b.Run(c.String(), func(b *testing.B) {
			d, l := pair(b, c)
			master := make([]byte, HeaderLen+1400, HeaderLen+1400+TailLen)
			buf := make([]byte, len(master)+TailLen)
			b.SetBytes(1400)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				copy(buf, d.Seal(master, 1))
				b.StartTimer()
				if _, err := l.Open(buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkForged(b *testing.B) {
	_, l := pair(b, AES256GCM)
	junk := make([]byte, 1400)
	junk[0] = Format
	b.ReportAllocs()
	for b.Loop() {
		_, _ = l.Open(junk)
	}
}

func BenchmarkNewKey(b *testing.B) {
	for b.Loop() {
		if _, err := NewKey("password", ""); err != nil {
			b.Fatal(err)
		}
	}
}
