package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"weave.local/peer"
)

const (
	handshakeWait = 5 * time.Second
	magic         = "weave/"
	greetingSize  = len(magic) + 2
	maxReason     = 500 // bytes

	msgIntro   = 1
	msgWelcome = 2
	msgRefusal = 3
)

// Codes of refusals.
const (
	refuseOther     = 0
	refuseDuplicate = 1 // there is a link already
	refuseSelf      = 2 // both ends are one and the same
	refuseCollision = 3 // the name belongs to another live peer
	refuseLimit     = 4
)

// refusal is the reason why one end does not want a link.
type refusal struct {
	code   byte
	reason string
	remote bool // said by the other end
}

// Error is the reason, and who gave it.
func (r *refusal) Error() string {
	if r.remote {
		return "refused by the other end: " + r.reason
	}
	return r.reason
}

// handshake is what two ends know of each other once both have said hello.
type handshake struct {
	peer     peer.Info
	session  uint64
	outbound bool
	chair    bool // the last word is ours
}

// greet exchanges versions and intros. The connection must have a deadline.
func greet(conn net.Conn, self peer.Info, nonce uint64, outbound bool) (*handshake, error) {
	hello := append([]byte(magic), MinVersion, MaxVersion)
	intro := peer.AppendInfo(binary.BigEndian.AppendUint64(nil, nonce), self)
	if _, err := conn.Write(append(hello, handshakeFrame(msgIntro, intro)...)); err != nil {
		return nil, fmt.Errorf("handshake: %w", lost(err))
	}
	var theirs [greetingSize]byte
	if _, err := io.ReadFull(conn, theirs[:]); err != nil {
		return nil, fmt.Errorf("handshake: %w", lost(err))
	}
	if err := checkGreeting(theirs[:]); err != nil {
		return nil, err
	}
	typ, body, err := readHandshake(conn)
	if err != nil {
		return nil, err
	}
	if typ != msgIntro || len(body) < 8 {
		return nil, errors.New("handshake: the other end did not introduce itself")
	}
	h := &handshake{outbound: outbound, session: nonce ^ binary.BigEndian.Uint64(body)}
	if h.peer, _, err = peer.ParseInfo(body[8:]); err != nil {
		return nil, fmt.Errorf("handshake: %w", err)
	}
	h.chair = self.UID < h.peer.UID || self.UID == h.peer.UID && self.Name < h.peer.Name
	return h, nil
}

func checkGreeting(b []byte) error {
	if string(b[:len(magic)]) != magic {
		return errors.New("what answers there is not weave: check address and port")
	}
	lo, hi := b[len(magic)], b[len(magic)+1]
	if lo > MaxVersion || hi < MinVersion {
		return fmt.Errorf("the other end speaks protocol versions %d to %d, this one %d to %d: upgrade the older",
			lo, hi, MinVersion, MaxVersion)
	}
	return nil
}

// conclude exchanges verdicts. Admit decides whether we want the link; as chair
// it must also register it. It is not called when the other end refuses first.
func conclude(conn net.Conn, h *handshake, admit func() *refusal) error {
	if h.chair {
		if err := readVerdict(conn); err != nil {
			return err
		}
		return giveVerdict(conn, admit())
	}
	if err := giveVerdict(conn, admit()); err != nil {
		return err
	}
	return readVerdict(conn)
}

func giveVerdict(conn net.Conn, r *refusal) error {
	if r == nil {
		_, err := conn.Write(handshakeFrame(msgWelcome, nil))
		if err != nil {
			return fmt.Errorf("handshake: %w", lost(err))
		}
		return nil
	}
	_, _ = conn.Write(handshakeFrame(msgRefusal, append([]byte{r.code}, r.reason...))) // the refusal stands anyhow
	return r
}

func readVerdict(conn net.Conn) error {
	typ, body, err := readHandshake(conn)
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

func parseRefusal(body []byte) *refusal {
	r := &refusal{remote: true, reason: "no reason given"}
	if len(body) > 0 {
		r.code = body[0]
	}
	if len(body) > 1 {
		r.reason = printable(body[1:])
	}
	return r
}

func handshakeFrame(typ byte, body []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(len(body)+1))
	return append(append(b, typ), body...)
}

func readHandshake(r io.Reader) (typ byte, body []byte, err error) {
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

// printable makes text of another peer fit for a terminal.
func printable(b []byte) string {
	out := make([]rune, 0, len(b))
	for _, r := range string(b[:min(len(b), maxReason)]) {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			r = '?'
		}
		out = append(out, r)
	}
	return string(out)
}
