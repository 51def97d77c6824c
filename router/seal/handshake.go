package seal

import (
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/flynn/noise"
)

// MaxPayload is how many bytes a caller may add to a message of a handshake.
const MaxPayload = 1024

// MessageLen is the length of the first message of a handshake to which the
// caller adds nothing: the ephemeral key, the ciphers and a tag.
const MessageLen = 32 + 1 + tagLen

var errHandshake = errors.New("malformed handshake")

// Keys is what a finished handshake leaves.
type Keys struct {
	Cipher  Cipher // for datagrams, the same at both ends
	Payload []byte // what the other end added

	secret    Secret
	out, in   *noise.CipherState
	initiator bool
}

// Handshake is the dialling end's, between its message and the answer.
type Handshake struct {
	state *noise.HandshakeState
	offer Cipher
}

func newState(k *Key, prologue []byte, initiator bool, random io.Reader) (*noise.HandshakeState, error) {
	return noise.NewHandshakeState(noise.Config{
		CipherSuite:  noise.NewCipherSuite(noise.DH25519, noise.CipherChaChaPoly, noise.HashSHA256),
		Random:       random,
		Pattern:      noise.HandshakeNN,
		Initiator:    initiator,
		Prologue:     prologue,
		PresharedKey: k.b[:],
	})
}

// Initiate begins a handshake and returns its first message. Both ends must
// give the same prologue: what they sent each other before. Offer is the sum of
// the ciphers this end has.
func Initiate(k *Key, prologue, payload []byte, offer Cipher) (*Handshake, []byte, error) {
	return initiate(k, prologue, payload, offer, rand.Reader)
}

func initiate(k *Key, prologue, payload []byte, offer Cipher, random io.Reader) (*Handshake, []byte, error) {
	state, err := newState(k, prologue, true, random)
	if err != nil {
		return nil, nil, err
	}
	msg, _, _, err := state.WriteMessage(nil, append([]byte{byte(offer)}, payload...))
	if err != nil {
		return nil, nil, err
	}
	return &Handshake{state: state, offer: offer}, msg, nil
}

// Respond takes the first message and returns the second, after which the
// handshake is finished for this end. The error is ErrPassword when the message
// was made with another password.
func Respond(k *Key, prologue, payload []byte, offer Cipher, msg []byte) (*Keys, []byte, error) {
	return respond(k, prologue, payload, offer, msg, rand.Reader)
}

func respond(k *Key, prologue, payload []byte, offer Cipher, msg []byte, random io.Reader) (*Keys, []byte, error) {
	state, err := newState(k, prologue, false, random)
	if err != nil {
		return nil, nil, err
	}
	text, _, _, err := read(state, msg)
	if err != nil {
		return nil, nil, err
	}
	answer, out, in, err := state.WriteMessage(nil, append([]byte{byte(offer)}, payload...))
	if err != nil {
		return nil, nil, fmt.Errorf("handshake: %w", err)
	}
	// Split gives the initiator's direction first.
	keys, err := newKeys(text, offer, out, in, false)
	if err != nil {
		return nil, nil, err
	}
	return keys, answer, nil
}

// Finish takes the answer to the first message. The error is ErrPassword when
// it was made with another password.
func (h *Handshake) Finish(answer []byte) (*Keys, error) {
	text, out, in, err := read(h.state, answer)
	if err != nil {
		return nil, err
	}
	return newKeys(text, h.offer, out, in, true)
}

// read opens a message of the other end.
func read(state *noise.HandshakeState, msg []byte) ([]byte, *noise.CipherState, *noise.CipherState, error) {
	if len(msg) > noise.MaxMsgLen {
		return nil, nil, nil, errHandshake
	}
	text, first, second, err := state.ReadMessage(nil, msg)
	switch {
	case errors.Is(err, noise.ErrShortMessage):
		return nil, nil, nil, errHandshake
	case err != nil:
		return nil, nil, nil, ErrPassword
	case len(text) == 0 || len(text) > 1+MaxPayload:
		return nil, nil, nil, errHandshake
	}
	return text, first, second, nil
}

func newKeys(text []byte, offer Cipher, first, second *noise.CipherState, initiator bool) (*Keys, error) {
	k := &Keys{Cipher: choose(offer, Cipher(text[0])), Payload: text[1:], initiator: initiator}
	if k.Cipher == 0 {
		return nil, errors.New("no cipher in common with the other end: upgrade the older")
	}
	a, b := first.UnsafeKey(), second.UnsafeKey()
	secret, err := hkdf.Key(sha256.New, append(a[:], b[:]...), nil, "weave/secret/1", KeyLen)
	if err != nil {
		return nil, err
	}
	copy(k.secret.b[:], secret)
	first.Rekey()
	second.Rekey()
	k.out, k.in = first, second
	if !initiator {
		k.out, k.in = second, first
	}
	return k, nil
}

// Session returns the keys of the link's datagrams and forgets the secret they
// come from, so that it may be called once.
func (k *Keys) Session() (*Session, error) {
	if k.secret == (Secret{}) {
		return nil, errors.New("the secret of the link is used already")
	}
	defer clear(k.secret.b[:])
	return newSession(&k.secret, k.Cipher, k.initiator)
}
