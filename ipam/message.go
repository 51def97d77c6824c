package ipam

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"weave.local/ipam/register"
	"weave.local/ipam/space"
	"weave.local/peer"
)

// First octets of messages.
const (
	msgRegister = 1 + iota
	msgAsk
	msgAnswer
	msgMeet
)

// maxText bounds the text of an answer, in octets.
const maxText = 256

// ask is a peer's wish for addresses that are another's.
type ask struct {
	cluster       register.Cluster
	id            uint64
	term, version uint64 // of the register that the sender knows
	want          netip.Prefix
}

// code is the sort of an answer.
type code byte

// Answers to an ask.
const (
	answerGiven code = 1 + iota
	answerNone
	answerHeld
	answerLater
)

type answer struct {
	cluster       register.Cluster
	id            uint64
	term, version uint64
	code          code
	text          string
}

// meeting is what peers of two clusters tell each other.
type meeting struct {
	cluster register.Cluster
	rng     netip.Prefix
	empty   bool // only member, no address in use: it may go over
}

func (q *ask) append() []byte {
	b := append([]byte{msgAsk, register.Format}, q.cluster[:]...)
	b = binary.BigEndian.AppendUint64(b, q.id)
	b = binary.AppendUvarint(b, q.term)
	b = binary.AppendUvarint(b, q.version)
	return register.AppendPrefix(b, q.want)
}

// reader starts behind the first octet, and checks the format.
func reader(b []byte) register.Reader {
	r := register.Reader{B: b}
	if f := r.Byte(); f != register.Format {
		r.Fail(fmt.Errorf("format %d, want %d", f, register.Format))
	}
	return r
}

func parseAsk(b []byte) (ask, error) {
	r := reader(b)
	var q ask
	copy(q.cluster[:], r.Bytes(len(q.cluster)))
	q.id, q.term, q.version, q.want = r.Uint64(), r.Uvarint(), r.Uvarint(), r.Prefix()
	if _, hosts := space.Hosts(q.want); q.want.IsValid() && !hosts && !q.want.IsSingleIP() {
		r.Fail(fmt.Errorf("subnet %v", q.want))
	}
	return q, r.Done()
}

func (n *answer) append() []byte {
	b := append([]byte{msgAnswer, register.Format}, n.cluster[:]...)
	b = binary.BigEndian.AppendUint64(b, n.id)
	b = binary.AppendUvarint(b, n.term)
	b = binary.AppendUvarint(b, n.version)
	text := n.text[:min(len(n.text), maxText)]
	b = binary.AppendUvarint(append(b, byte(n.code)), uint64(len(text)))
	return append(b, text...)
}

func parseAnswer(b []byte) (answer, error) {
	r := reader(b)
	var n answer
	copy(n.cluster[:], r.Bytes(len(n.cluster)))
	n.id, n.term, n.version, n.code = r.Uint64(), r.Uvarint(), r.Uvarint(), code(r.Byte())
	n.text = printable(r.Bytes(min(r.Count(1), maxText)))
	if n.code < answerGiven || n.code > answerLater {
		r.Fail(fmt.Errorf("answer %d", n.code))
	}
	return n, r.Done()
}

// printable keeps a peer's text from doing tricks on a terminal.
func printable(b []byte) string {
	out := make([]byte, 0, len(b))
	for _, c := range b {
		if c < ' ' || c > '~' {
			c = '?'
		}
		out = append(out, c)
	}
	return string(out)
}

func (m *meeting) append() []byte {
	b := append([]byte{msgMeet, register.Format}, m.cluster[:]...)
	b = register.AppendPrefix(b, m.rng)
	if m.empty {
		return append(b, 1)
	}
	return append(b, 0)
}

func parseMeeting(b []byte) (meeting, error) {
	r := reader(b)
	var m meeting
	copy(m.cluster[:], r.Bytes(len(m.cluster)))
	m.rng = r.Prefix()
	m.empty = r.Byte() == 1
	return m, r.Done()
}

// nick is how people know a peer.
func (a *Allocator) nick(name peer.Name) string {
	if name == a.self.Name && a.cfg.Self.NickName != "" {
		return a.cfg.Self.NickName
	}
	if a.cfg.Nick != nil {
		if s := a.cfg.Nick(name); s != "" {
			return s
		}
	}
	return name.String()
}
