// Package handshake is what two peers say to each other on a new connection
// before there is a link: who they are, whether both know the password, and
// whether they want the link.
//
// Both ends send at once, integers big endian:
//
//	6 bytes  "weave/"
//	1 byte   lowest protocol version spoken
//	1 byte   highest protocol version spoken
//
// The highest version both speak is used (there is version 2 only; peers of
// version 1 told all their links with every change). Then they send frames: 2
// bytes length of what follows, 1 byte type, body.
//
// With a password, the dialling end sends at once, and the other answers with,
// a sealed frame (type 4): a message of the handshake of package seal, whose
// prologue is the 8 bytes above of the dialling end, and whose payload, in the
// answer, those of the other. All that follows goes over a sealed stream. A
// peer without a password never sends that frame, and one with a password takes
// nothing else but refusals: each sees what the other lacks and says so. While
// a password is being changed there are two: the dialling end's frame then holds
// a message made with each, one after the other, and the other answers the one
// that it prefers.
//
// Then each sends an intro (type 1), without a password along with the first
// bytes:
//
//	8 bytes  nonce, random
//	an Info  see package peer; its port is the sender's listening port
//	1 byte   with a password only. Bit 0: the address of the other end is in a
//	         trusted subnet. When both say so, the data path goes in clear.
//
// The exclusive or of both nonces is the session of the link. Then both ends
// give a verdict: welcome (type 2, empty) or refusal (type 3: 1 byte code,
// reason as text). The end with the higher UID (the higher name, should these
// be equal) speaks first, the other, the chair, last, so that of two links that
// the same two peers open at one time the chair keeps the one it welcomed first
// and both ends know which. Longer bodies are accepted and their tails ignored.
package handshake

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"

	"weave.local/peer"
	"weave.local/router/seal"
)

// Range of protocol versions spoken.
const (
	MinVersion = 2
	MaxVersion = 2
)

// MaxKeys is how many passwords may be good at one time.
const MaxKeys = 2

const (
	magic        = "weave/"
	greetingSize = len(magic) + 2
	maxReason    = 500 // bytes

	msgIntro   = 1
	msgWelcome = 2
	msgRefusal = 3
	msgSealed  = 4

	trustBit = 1
)

var errFrame = errors.New("malformed frame")

// Self is what this end brings.
type Self struct {
	Info    peer.Info
	Nonce   uint64
	Keys    []*seal.Key // of the passwords that are good, at most MaxKeys, the preferred one first; none: there is no password
	Trusted bool        // the other end's address is in a subnet we trust
}

// Other is the other end, once both have said who they are.
type Other struct {
	Info     peer.Info
	Nonce    uint64    // theirs
	Session  uint64    // random, known to both ends of this link only
	Outbound bool      // this end dialled
	Chair    bool      // the last word is ours
	Conn     net.Conn  // to go on with; sealed when there is a password
	Key      *seal.Key // that both have; nil without a password
	// Keys are for the data path between the two ends; nil when it goes in
	// clear, for want of a password or because both trust the network.
	Keys    *seal.Session
	Trusted bool // both ends trust the network between them
}

// Greet exchanges greetings and intros. The connection must have a deadline. An
// end whose password is not ours is refused with a *Refusal.
func Greet(conn net.Conn, self Self, outbound bool) (*Other, error) {
	hello := append([]byte(magic), MinVersion, MaxVersion)
	first := bytes.Clone(hello)
	var begun []*seal.Handshake
	switch {
	case len(self.Keys) == 0:
		first = append(first, introFrame(self)...)
	case outbound:
		var msgs []byte
		var err error
		if begun, msgs, err = initiate(self.Keys, hello); err != nil {
			return nil, fmt.Errorf("handshake: %w", err)
		}
		first = append(first, frame(msgSealed, msgs)...)
	}
	if _, err := conn.Write(first); err != nil {
		return nil, fmt.Errorf("handshake: %w", lost(err))
	}
	theirs, err := readGreeting(conn)
	if err != nil {
		return nil, err
	}
	o := &Other{Outbound: outbound, Conn: conn}
	if len(self.Keys) == 0 {
		return o.meet(self, nil)
	}
	var keys *seal.Keys
	if outbound {
		keys, o.Key, err = finish(conn, self.Keys, begun, theirs)
	} else {
		keys, o.Key, err = answer(conn, self.Keys, theirs, hello)
	}
	if err != nil {
		return nil, err
	}
	o.Conn = seal.NewConn(conn, keys)
	if _, err := o.Conn.Write(introFrame(self)); err != nil {
		return nil, fmt.Errorf("handshake: %w", lost(err))
	}
	return o.meet(self, keys)
}

// initiate begins a handshake with each key and returns their messages in a row.
func initiate(keys []*seal.Key, hello []byte) ([]*seal.Handshake, []byte, error) {
	var begun []*seal.Handshake
	var msgs []byte
	for _, key := range keys {
		h, msg, err := seal.Initiate(key, hello, nil, seal.Ciphers())
		if err != nil {
			return nil, nil, err
		}
		begun, msgs = append(begun, h), append(msgs, msg...)
	}
	return begun, msgs, nil
}

// finish takes the answer to one of the handshakes we began, and says with which
// key.
func finish(conn net.Conn, keys []*seal.Key, begun []*seal.Handshake, theirs []byte) (*seal.Keys, *seal.Key, error) {
	typ, body, err := read(conn)
	if err != nil {
		return nil, nil, err
	}
	switch typ {
	case msgSealed:
		for i, h := range begun {
			got, err := h.Finish(body)
			switch {
			case errors.Is(err, seal.ErrPassword):
				continue
			case err == nil && string(got.Payload) != string(theirs):
				return nil, nil, differ()
			}
			return got, keys[i], err
		}
		return nil, nil, differ()
	case msgIntro:
		return nil, nil, lacksPassword()
	case msgRefusal:
		r := parseRefusal(body)
		if r.Code == RefusePassword {
			r = differ()
		}
		return nil, nil, r
	}
	return nil, nil, fmt.Errorf("handshake: frame of type %d, want a sealed one", typ)
}

// answer takes the dialling end's messages of the sealed handshake and sends
// ours, with the first of our keys that one of them was made with.
func answer(conn net.Conn, keys []*seal.Key, theirs, hello []byte) (*seal.Keys, *seal.Key, error) {
	typ, body, err := read(conn)
	if err != nil {
		return nil, nil, err
	}
	if typ == msgIntro {
		_ = give(conn, &Refusal{Code: RefusePassword, Reason: "this peer has a password"})
		return nil, nil, lacksPassword()
	}
	if typ != msgSealed || len(body) > MaxKeys*seal.MessageLen {
		return nil, nil, fmt.Errorf("handshake: frame of type %d and %d bytes, want a sealed one", typ, len(body))
	}
	for _, key := range keys {
		for offered := range slices.Chunk(body, seal.MessageLen) {
			got, msg, err := seal.Respond(key, theirs, hello, seal.Ciphers(), offered)
			if errors.Is(err, seal.ErrPassword) {
				continue
			}
			if err != nil {
				return nil, nil, err
			}
			if _, err := conn.Write(frame(msgSealed, msg)); err != nil {
				return nil, nil, fmt.Errorf("handshake: %w", lost(err))
			}
			return got, key, nil
		}
	}
	_ = give(conn, &Refusal{Code: RefusePassword, Reason: "this peer has another password"})
	return nil, nil, differ()
}

func introFrame(self Self) []byte {
	body := peer.AppendInfo(binary.BigEndian.AppendUint64(nil, self.Nonce), self.Info)
	if len(self.Keys) > 0 {
		flags := byte(0)
		if self.Trusted {
			flags = trustBit
		}
		body = append(body, flags)
	}
	return frame(msgIntro, body)
}

// meet reads who is at the other end. Keys are nil without a password.
func (o *Other) meet(self Self, keys *seal.Keys) (*Other, error) {
	typ, body, err := read(o.Conn)
	if err != nil {
		return nil, err
	}
	switch {
	case typ == msgRefusal:
		r := parseRefusal(body)
		if r.Code == RefusePassword {
			r = hasPassword()
		}
		return nil, r
	case typ == msgSealed && keys == nil:
		return nil, hasPassword()
	case typ != msgIntro || len(body) < 8:
		return nil, errors.New("handshake: the other end did not introduce itself")
	}
	o.Nonce = binary.BigEndian.Uint64(body)
	o.Session = self.Nonce ^ o.Nonce
	var rest []byte
	if o.Info, rest, err = peer.ParseInfo(body[8:]); err != nil {
		return nil, fmt.Errorf("handshake: %w", err)
	}
	o.Chair = self.Info.UID < o.Info.UID || self.Info.UID == o.Info.UID && self.Info.Name < o.Info.Name
	if keys == nil {
		return o, nil
	}
	if o.Trusted = self.Trusted && len(rest) > 0 && rest[0]&trustBit != 0; o.Trusted {
		return o, nil
	}
	if o.Keys, err = keys.Session(); err != nil {
		return nil, fmt.Errorf("handshake: %w", err)
	}
	return o, nil
}

func readGreeting(conn net.Conn) ([]byte, error) {
	b := make([]byte, greetingSize)
	if _, err := io.ReadFull(conn, b); err != nil {
		return nil, fmt.Errorf("handshake: %w", lost(err))
	}
	if string(b[:len(magic)]) != magic {
		return nil, errors.New("what answers there is not weave: check address and port")
	}
	lo, hi := b[len(magic)], b[len(magic)+1]
	if lo > MaxVersion || hi < MinVersion {
		return nil, fmt.Errorf("the other end speaks protocol versions %d to %d, this one %d to %d: upgrade the older",
			lo, hi, MinVersion, MaxVersion)
	}
	return b, nil
}

// Conclude exchanges verdicts. Admit decides whether we want the link; as chair
// it must also register it. It is not called when the other end refuses first.
func (o *Other) Conclude(admit func() *Refusal) error {
	if o.Chair {
		if err := o.readVerdict(); err != nil {
			return err
		}
		return give(o.Conn, admit())
	}
	if err := give(o.Conn, admit()); err != nil {
		return err
	}
	return o.readVerdict()
}

func give(conn net.Conn, r *Refusal) error {
	if r == nil {
		_, err := conn.Write(frame(msgWelcome, nil))
		if err != nil {
			return fmt.Errorf("handshake: %w", lost(err))
		}
		return nil
	}
	_, _ = conn.Write(frame(msgRefusal, append([]byte{r.Code}, r.Reason...))) // the refusal stands anyhow
	return r
}

func (o *Other) readVerdict() error {
	typ, body, err := read(o.Conn)
	if err != nil {
		return err
	}
	switch typ {
	case msgWelcome:
		return nil
	case msgRefusal:
		return parseRefusal(body)
	}
	return fmt.Errorf("handshake: frame of type %d, want a verdict", typ)
}

func frame(typ byte, body []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(len(body)+1))
	return append(append(b, typ), body...)
}

func read(r io.Reader) (typ byte, body []byte, err error) {
	var head [3]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, fmt.Errorf("handshake: %w", lost(err))
	}
	n := binary.BigEndian.Uint16(head[:])
	if n == 0 {
		return 0, nil, fmt.Errorf("handshake: %w", errFrame)
	}
	body = make([]byte, n-1)
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, nil, fmt.Errorf("handshake: %w", lost(err))
	}
	return head[2], body, nil
}

func lost(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("closed by the other end")
	}
	return err
}
