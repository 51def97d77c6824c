// Package seal keeps what travels between two peers that share a password
// private and unaltered: a handshake, a sealed stream for their control link,
// and sealed datagrams for the data path. It does no I/O but on the connection
// it is given, and knows no peer.
//
// # Password
//
// A Key is Argon2id (RFC 9106) of the password: version 0x13, 4 passes, 32 MiB,
// 2 lanes, 32 bytes, with salt "weave/password/1" followed by whatever the
// cluster adds. It is computed once for each start of a daemon: what an
// attacker can try costs as much for every guess.
//
// # Handshake
//
// Noise_NNpsk0_25519_ChaChaPoly_SHA256 (Noise revision 34) with the Key as
// pre-shared key: two messages, the dialling end first. There are no static
// keys, because nobody would vouch for them: whoever knows the password is a
// peer, and peers are told apart by what they say inside. The ephemeral
// exchange gives each link keys of its own, which nobody learns later from the
// password. The key is mixed in first (psk0, not psk2), so that an end that
// accepts connections gives away nothing computed from the password, and
// computes no Diffie-Hellman, before the other has proven that it knows it:
// guessing needs a handshake seen on the wire or lured to oneself. Payloads:
//
//	u8 ciphers of datagrams the sender has, bit 0 ChaCha20-Poly1305, bit 1 AES-256-GCM
//	   what the caller adds
//
// The first payload is protected by the password only, the second also by the
// ephemeral keys.
//
// # Stream
//
// Records of u16 length, then as many bytes: ChaCha20-Poly1305 with the keys of
// Noise's Split, after one Rekey of each, and Rekey again after every 65536
// records. A record holds 1 to 16384 bytes of the stream; one that holds none
// is its end. A connection that ends without it was cut.
//
// # Datagrams
//
// The secret of a link is HKDF-SHA256 of both keys of Split before their first
// Rekey, so that it says nothing about the stream's keys. Each direction has a
// chain of keys, one for each epoch:
//
//	chain(0)   = HKDF-Expand(secret, "weave/datagram/" + ("dialler"|"listener") + "/1", 32)
//	key(e)     = HKDF-Expand(chain(e), "key", 32)
//	chain(e+1) = HKDF-Expand(chain(e), "chain", 32)
//
// Chains and keys of the past are forgotten, so that what was sent with them
// stays sealed. A datagram, integers big endian:
//
//	 0  u8   format, 2
//	 1  u8   low byte of the epoch
//	 2  u16  label, by which the receiver finds the session
//	 4  u64  counter, from 0 in each epoch
//	12  AES-256-GCM, or ChaCha20-Poly1305 where one end computes AES in software,
//	    with the 12 bytes before as nonce, of
//	         the text
//	         u8 low byte of the newest epoch in which the sender heard the other end
//	    and its tag of 16 bytes
//
// The header is not given as additional data: as the nonce it is authenticated
// already. The sender goes to the next epoch after two minutes or 2^30
// datagrams, once the other end said that it heard this one. The receiver
// always has the keys of its newest epoch, of the next, and for 30 s of the one
// before, so that no datagram is lost by a change of keys, however many are
// lost or late otherwise. A datagram that is not authentic costs one lookup and
// one attempt to open it; nothing is kept of it and nobody is told.
package seal

import (
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"

	"golang.org/x/crypto/argon2"
	"golang.org/x/sys/cpu"
)

// Cost of Argon2id. OWASP wants 19 MiB and two passes at least; the memory is
// the daemon's for a moment at each start.
const (
	argonPasses = 4
	argonMemory = 32 << 10 // KiB
	argonLanes  = 2
)

// KeyLen is the length of keys, in bytes.
const KeyLen = 32

// ErrPassword says that two peers do not have the same password, or that
// somebody tampered with their handshake.
var ErrPassword = errors.New("passwords differ")

// Key is made of a password and opens the door to all who have it.
type Key struct{ b [KeyLen]byte }

// NewKey derives the key of a password that is not empty. Cluster is mixed into
// the salt and may be empty. It takes about a tenth of a second and 32 MiB.
func NewKey(password, cluster string) (*Key, error) {
	if password == "" {
		return nil, errors.New("the password is empty: give one, or none at all to send everything in clear")
	}
	salt := []byte("weave/password/1" + cluster)
	k := new(Key)
	copy(k.b[:], argon2.IDKey([]byte(password), salt, argonPasses, argonMemory, argonLanes, KeyLen))
	return k, nil
}

// Fingerprint tells keys apart without giving them away: passwords tried on it
// cost an Argon2id each, as those tried on a handshake do.
func (k *Key) Fingerprint() [16]byte {
	b, err := hkdf.Expand(sha256.New, k.b[:], "weave/fingerprint/1", 16)
	if err != nil {
		panic(err) // only for lengths that SHA-256 cannot give
	}
	return [16]byte(b)
}

// String hides the key.
func (k *Key) String() string { return "(key)" }

// GoString hides the key.
func (k *Key) GoString() string { return k.String() }

// LogValue hides the key.
func (k *Key) LogValue() slog.Value { return slog.StringValue(k.String()) }

// Secret is what only the two ends of one link know. Who has made the Session
// of it should forget it: with it all keys of the link's datagrams are found.
type Secret struct{ b [KeyLen]byte }

// String hides the secret.
func (s *Secret) String() string { return "(secret)" }

// GoString hides the secret.
func (s *Secret) GoString() string { return s.String() }

// LogValue hides the secret.
func (s *Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Cipher is an AEAD for datagrams. As a number it is its bit in a handshake.
type Cipher uint8

// Ciphers; a set of them is their sum.
const (
	ChaCha20Poly1305 Cipher = 1 << iota
	AES256GCM
)

// String is the name of the cipher.
func (c Cipher) String() string {
	switch c {
	case ChaCha20Poly1305:
		return "ChaCha20-Poly1305"
	case AES256GCM:
		return "AES-256-GCM"
	}
	return fmt.Sprintf("cipher %d", uint8(c))
}

// Ciphers returns those to offer: AES-256-GCM only where the CPU computes it,
// elsewhere it is slow and its time tells of the key.
func Ciphers() Cipher {
	if cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ || cpu.ARM64.HasAES && cpu.ARM64.HasPMULL || cpu.S390X.HasAESGCM {
		return ChaCha20Poly1305 | AES256GCM
	}
	return ChaCha20Poly1305
}

// choose returns the best cipher of two offers; 0 when they share none.
func choose(a, b Cipher) Cipher {
	switch both := a & b; {
	case both&AES256GCM != 0:
		return AES256GCM
	default:
		return both & ChaCha20Poly1305
	}
}
