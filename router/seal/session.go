package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

// Layout of a datagram, in bytes.
const (
	Format    = 2  // the first byte
	HeaderLen = 12 // before the text
	TailLen   = 1 + tagLen
)

const (
	rekeyAfter = 2 * time.Minute
	rekeyCount = 1 << 30
	// lastCounter is where a key ends even though the other end has not
	// confirmed it: far from where AES-256-GCM wears out.
	lastCounter = 1 << 34
	keepOld     = 30 * time.Second
)

// Why a datagram does not open.
var (
	ErrForged = errors.New("datagram is not authentic")
	ErrReplay = errors.New("datagram came before, or far too late")
	ErrOldKey = errors.New("datagram is sealed with a key not in use")
)

// Session seals and opens the datagrams between two peers. Its methods may be
// called from several goroutines.
type Session struct {
	cipher Cipher
	count  uint64 // datagrams after which the key is to change
	send   atomic.Pointer[sendKey]
	heard  atomic.Uint32 // newest epoch in which the other end was heard

	sendMu    sync.Mutex // guards what follows
	sendChain chain
	born      time.Time // when the key in use was first seen by Tick

	recvMu         sync.Mutex // guards what follows
	recvChain      chain      // of the epoch after next
	old, now, next *recvKey   // old is nil after keepOld
	retired        time.Time  // when Tick first saw old
}

// sendKey is the key of one epoch, to send with.
type sendKey struct {
	aead      cipher.AEAD
	epoch     uint32
	counter   atomic.Uint64 // of the next datagram
	confirmed atomic.Bool   // the other end heard us in this epoch
}

// recvKey is the key of one epoch, to receive with.
type recvKey struct {
	aead   cipher.AEAD
	epoch  uint32
	window window
}

// chain is what the keys of one direction come from.
type chain struct {
	cipher Cipher
	epoch  uint32 // of the key that comes next
	b      [KeyLen]byte
}

func newChain(secret *Secret, c Cipher, role string) (chain, error) {
	out := chain{cipher: c}
	b, err := hkdf.Expand(sha256.New, secret.b[:], "weave/datagram/"+role+"/1", KeyLen)
	copy(out.b[:], b)
	return out, err
}

// step returns the next key and forgets how it was made.
func (c *chain) step() (cipher.AEAD, uint32, error) {
	key, err := hkdf.Expand(sha256.New, c.b[:], "key", KeyLen)
	if err != nil {
		return nil, 0, err
	}
	b, err := hkdf.Expand(sha256.New, c.b[:], "chain", KeyLen)
	if err != nil {
		return nil, 0, err
	}
	copy(c.b[:], b)
	clear(b)
	aead, err := newAEAD(c.cipher, key)
	clear(key)
	c.epoch++
	return aead, c.epoch - 1, err
}

func newAEAD(c Cipher, key []byte) (cipher.AEAD, error) {
	switch c {
	case ChaCha20Poly1305:
		return chacha20poly1305.New(key)
	case AES256GCM:
		block, err := aes.NewCipher(key)
		if err != nil {
			return nil, err
		}
		return cipher.NewGCM(block)
	}
	return nil, fmt.Errorf("%s is not known", c)
}

func newSession(secret *Secret, c Cipher, dialler bool) (*Session, error) {
	s := &Session{cipher: c, count: rekeyCount}
	roles := [2]string{"listener", "dialler"}
	if dialler {
		roles[0], roles[1] = roles[1], roles[0]
	}
	var err error
	if s.sendChain, err = newChain(secret, c, roles[0]); err != nil {
		return nil, err
	}
	if s.recvChain, err = newChain(secret, c, roles[1]); err != nil {
		return nil, err
	}
	if err := s.nextSendKey(); err != nil {
		return nil, err
	}
	for range 2 {
		if err := s.nextRecvKey(); err != nil {
			return nil, err
		}
	}
	s.old = nil
	return s, nil
}

// Cipher is what datagrams are sealed with.
func (s *Session) Cipher() Cipher { return s.cipher }

// Epoch is how often the key to send with has changed.
func (s *Session) Epoch() uint32 { return s.send.Load().epoch }

func (s *Session) nextSendKey() error {
	aead, epoch, err := s.sendChain.step()
	if err != nil {
		return err
	}
	s.send.Store(&sendKey{aead: aead, epoch: epoch})
	s.born = time.Time{}
	return nil
}

// nextRecvKey moves on by one epoch: old, now and next are replaced.
func (s *Session) nextRecvKey() error {
	aead, epoch, err := s.recvChain.step()
	if err != nil {
		return err
	}
	s.old, s.now, s.next = s.now, s.next, &recvKey{aead: aead, epoch: epoch}
	s.retired = time.Time{}
	return nil
}

// rotate replaces k if it is still in use and the other end can follow.
func (s *Session) rotate(k *sendKey) {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	s.rotateLocked(k)
}

func (s *Session) rotateLocked(k *sendKey) {
	if s.send.Load() == k && k.confirmed.Load() {
		_ = s.nextSendKey() // cannot fail: it made the keys before; else the old one goes on
	}
}

// Tick lets time pass; it is to be called every few seconds.
func (s *Session) Tick(now time.Time) {
	s.sendMu.Lock()
	if s.born.IsZero() {
		s.born = now
	} else if now.Sub(s.born) >= rekeyAfter {
		s.rotateLocked(s.send.Load())
	}
	s.sendMu.Unlock()

	s.recvMu.Lock()
	defer s.recvMu.Unlock()
	switch {
	case s.old == nil:
	case s.retired.IsZero():
		s.retired = now
	case now.Sub(s.retired) >= keepOld:
		s.old = nil
	}
}

// Seal makes a datagram of d: the text stands at HeaderLen, and there is room
// for TailLen bytes behind it in d's capacity. It returns the whole datagram,
// in d's memory; nil when the key is worn out because the other end has not
// answered for 2^34 datagrams.
func (s *Session) Seal(d []byte, label uint16) []byte {
	k := s.send.Load()
	counter := k.counter.Add(1) - 1
	if counter >= s.count {
		if counter >= lastCounter {
			return nil
		}
		s.rotate(k)
	}
	d[0], d[1] = Format, byte(k.epoch)
	binary.BigEndian.PutUint16(d[2:], label)
	binary.BigEndian.PutUint64(d[4:], counter)
	d = append(d, byte(s.heard.Load()))
	return k.aead.Seal(d[:HeaderLen], d[:HeaderLen], d[HeaderLen:], nil)
}

// Label returns the label of a datagram; false for what cannot be one.
func Label(d []byte) (uint16, bool) {
	if len(d) < HeaderLen+TailLen || d[0] != Format {
		return 0, false
	}
	return binary.BigEndian.Uint16(d[2:]), true
}

// Open opens a datagram in its own memory and returns it without its tail: the
// text begins at HeaderLen. On error d is spoilt, and nothing else happened.
func (s *Session) Open(d []byte) ([]byte, error) {
	if _, ok := Label(d); !ok {
		return nil, ErrForged
	}
	counter := binary.BigEndian.Uint64(d[4:])
	s.recvMu.Lock()
	defer s.recvMu.Unlock()
	k := s.key(d[1])
	if k == nil {
		return nil, ErrOldKey
	}
	if counter >= lastCounter {
		return nil, ErrForged
	}
	if !k.window.fresh(counter) {
		return nil, ErrReplay
	}
	text, err := k.aead.Open(d[HeaderLen:HeaderLen], d[:HeaderLen], d[HeaderLen:], nil)
	if err != nil {
		return nil, ErrForged
	}
	k.window.note(counter)
	if k == s.next {
		if err := s.nextRecvKey(); err != nil {
			return nil, err
		}
		s.heard.Store(k.epoch)
	}
	end := len(text) - 1
	if out := s.send.Load(); text[end] == byte(out.epoch) && !out.confirmed.Load() {
		out.confirmed.Store(true)
	}
	return d[:HeaderLen+end], nil
}

// key returns the key of an epoch by its low byte.
func (s *Session) key(epoch byte) *recvKey {
	for _, k := range [...]*recvKey{s.now, s.next, s.old} {
		if k != nil && byte(k.epoch) == epoch {
			return k
		}
	}
	return nil
}
