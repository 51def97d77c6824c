package router

import (
	"encoding/binary"
	"errors"
	"strings"
	"unicode"

	"weave.local/router/overlay"
)

// Messages between routers of neighbours, carried over the control link
// (message kind MessageKind):
//
//	1 byte  version (1)
//	1 byte  type: 1 answer to a probe, 2 report
//	answer: 1 byte path (1 fastdp, 2 sleeve), 8 bytes token
//	report: 1 byte, bit n set when frames of the sender arrive over path n;
//	        then, of a sender that has no fast path at all, what it lacks: 1 byte
//	        length, text
//
// Longer messages are accepted and their tails ignored, so that fields can be
// added.
const (
	messageVersion = 1
	typeAnswer     = 1
	typeReport     = 2
)

// MessageKind is the kind under which routers exchange messages over links.
const MessageKind = 1

func pathCode(name string) byte {
	switch name {
	case overlay.FastDP:
		return 1
	case overlay.Sleeve:
		return 2
	}
	return 0
}

func pathName(code byte) string {
	switch code {
	case 1:
		return overlay.FastDP
	case 2:
		return overlay.Sleeve
	}
	return ""
}

type message struct {
	typ    byte
	path   string // of an answer
	token  uint64 // of an answer
	health byte   // of a report
	lacks  string // of a report: why the sender has no fast path, "" when it has
}

func answer(path string, token uint64) []byte {
	b := []byte{messageVersion, typeAnswer, pathCode(path)}
	return binary.BigEndian.AppendUint64(b, token)
}

// maxLacks is how much of the text of a report is sent, in bytes.
const maxLacks = 200

func report(health byte, lacks string) []byte {
	n := min(len(lacks), maxLacks)
	return append([]byte{messageVersion, typeReport, health, byte(n)}, lacks[:n]...)
}

// plainText is the text in b behind its length, without what must not be shown
// to a user whoever it came from.
func plainText(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, string(b[1:min(len(b), 1+int(b[0]))]))
}

func parseMessage(b []byte) (message, error) {
	bad := errors.New("malformed router message")
	if len(b) < 3 || b[0] != messageVersion {
		return message{}, bad
	}
	switch m := (message{typ: b[1]}); m.typ {
	case typeAnswer:
		if m.path = pathName(b[2]); m.path == "" || len(b) < 11 {
			return message{}, bad
		}
		m.token = binary.BigEndian.Uint64(b[3:])
		return m, nil
	case typeReport:
		m.health, m.lacks = b[2], plainText(b[3:])
		return m, nil
	}
	return message{}, bad
}
