// Package message is what allocators tell each other beside the register:
// questions for addresses that are another's, answers, and what peers of two
// clusters say of themselves.
//
// The first octet says what a message is; all are best effort, may be lost,
// doubled or late, and do no harm then. Numbers are as in package register.
//
//	1 register message, see package register
//	2 ask     format=1 · cluster[16] · id[8] · term · version · prefix
//	          for one address (a prefix of full length) or any of a subnet
//	3 answer  format=1 · cluster[16] · id[8] · term · version · u8 code · n, text
//	          code 1 given, 2 none free (text: how many are in use),
//	          3 held (text says by whom), 4 ask later
//	4 meet    format=1 · cluster[16] · range prefix · u8 (1: only member, nothing
//	          in use), between peers of two clusters
package message

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"weave.local/ipam/register"
	"weave.local/ipam/space"
)

// First octets of messages, see the package comment.
const (
	KindRegister = 1 + iota
	KindAsk
	KindAnswer
	KindMeet
)

// maxText bounds the text of an answer, in octets.
const maxText = 256

// Ask is a peer's wish for addresses that are another's.
type Ask struct {
	Cluster       register.Cluster
	ID            uint64 // the same when it is asked again
	Term, Version uint64 // of the register that the sender knows
	Want          netip.Prefix
}

// Code is the sort of an answer.
type Code byte

// Answers to an ask.
const (
	Given Code = 1 + iota // the register will soon say so
	None                  // none is free; the text is how many are in use
	Held                  // the one address is in use; the text is by whom
	Later                 // ask again soon
)

// Answer is what the owner says to an Ask.
type Answer struct {
	Cluster       register.Cluster
	ID            uint64 // of the Ask
	Term, Version uint64 // of the register that the sender knows
	Code          Code
	Text          string // at most maxText octets are sent
}

// Meeting is what peers of two clusters tell each other.
type Meeting struct {
	Cluster register.Cluster
	Range   netip.Prefix
	Empty   bool // only member, no address in use: it may go over
}

// Append is the message, first octet included.
func (q *Ask) Append() []byte {
	b := append([]byte{KindAsk, register.Format}, q.Cluster[:]...)
	b = binary.BigEndian.AppendUint64(b, q.ID)
	b = binary.AppendUvarint(b, q.Term)
	b = binary.AppendUvarint(b, q.Version)
	return register.AppendPrefix(b, q.Want)
}

// reader starts behind the first octet, and checks the format.
func reader(b []byte) register.Reader {
	r := register.Reader{B: b}
	if f := r.Byte(); f != register.Format {
		r.Fail(fmt.Errorf("format %d, want %d", f, register.Format))
	}
	return r
}

// ParseAsk reads what follows the first octet.
func ParseAsk(b []byte) (Ask, error) {
	r := reader(b)
	var q Ask
	copy(q.Cluster[:], r.Bytes(len(q.Cluster)))
	q.ID, q.Term, q.Version, q.Want = r.Uint64(), r.Uvarint(), r.Uvarint(), r.Prefix()
	if _, hosts := space.Hosts(q.Want); q.Want.IsValid() && !hosts && !q.Want.IsSingleIP() {
		r.Fail(fmt.Errorf("subnet %v", q.Want))
	}
	return q, r.Done()
}

// Append is the message, first octet included.
func (n *Answer) Append() []byte {
	b := append([]byte{KindAnswer, register.Format}, n.Cluster[:]...)
	b = binary.BigEndian.AppendUint64(b, n.ID)
	b = binary.AppendUvarint(b, n.Term)
	b = binary.AppendUvarint(b, n.Version)
	text := n.Text[:min(len(n.Text), maxText)]
	b = binary.AppendUvarint(append(b, byte(n.Code)), uint64(len(text)))
	return append(b, text...)
}

// ParseAnswer reads what follows the first octet. The text is printable ASCII.
func ParseAnswer(b []byte) (Answer, error) {
	r := reader(b)
	var n Answer
	copy(n.Cluster[:], r.Bytes(len(n.Cluster)))
	n.ID, n.Term, n.Version, n.Code = r.Uint64(), r.Uvarint(), r.Uvarint(), Code(r.Byte())
	n.Text = printable(r.Bytes(min(r.Count(1), maxText)))
	if n.Code < Given || n.Code > Later {
		r.Fail(fmt.Errorf("answer %d", n.Code))
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

// Append is the message, first octet included.
func (m *Meeting) Append() []byte {
	b := append([]byte{KindMeet, register.Format}, m.Cluster[:]...)
	b = register.AppendPrefix(b, m.Range)
	if m.Empty {
		return append(b, 1)
	}
	return append(b, 0)
}

// ParseMeeting reads what follows the first octet.
func ParseMeeting(b []byte) (Meeting, error) {
	r := reader(b)
	var m Meeting
	copy(m.Cluster[:], r.Bytes(len(m.Cluster)))
	m.Range = r.Prefix()
	m.Empty = r.Byte() == 1
	return m, r.Done()
}
