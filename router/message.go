package router

import (
	"encoding/binary"
	"errors"

	"weave.local/router/overlay"
)

// Messages between routers of neighbours, carried over the control link
// (message kind MessageKind):
//
//	1 byte  version (1)
//	1 byte  type: 1 answer to a probe, 2 report
//	answer: 1 byte path (1 fastdp, 2 sleeve), 8 bytes token
//	report: 1 byte, bit n set when frames of the sender arrive over path n
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
}

func answer(path string, token uint64) []byte {
	b := []byte{messageVersion, typeAnswer, pathCode(path)}
	return binary.BigEndian.AppendUint64(b, token)
}

func report(health byte) []byte { return []byte{messageVersion, typeReport, health} }

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
		m.health = b[2]
		return m, nil
	}
	return message{}, bad
}
