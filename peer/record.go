package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Adjacency is one live control link as one of its ends announces it.
type Adjacency struct {
	Name     Name           // the other end
	Outbound bool           // dialled by the announcing end
	NoData   bool           // no data path works over it: messages pass, frames do not
	Addr     netip.AddrPort // underlay address of the other end as seen from here; when Outbound, one where it listens

	spare byte // flags of a later revision, handed on unread
}

// Record is what one peer announces to all: who it is and to whom it has live
// links.
type Record struct {
	Info
	// Seq orders the records of one name: the higher replaces the lower,
	// and of two with one Seq that of the higher UID stands. A run starts
	// at the Unix time in nanoseconds, so that a restart supersedes.
	Seq uint64
	// Neighbours is sorted by name, without repetition and without the
	// peer itself.
	Neighbours []Adjacency

	tail []byte // fields of a later version, handed on unread
}

// The wire format of a record, version 1; integers are big endian:
//
//	4 bytes  length of all that follows
//	1 byte   version (1)
//	         an Info:
//	  6 bytes  name
//	  8 bytes  UID
//	  2 bytes  short id, 0 when there is none yet
//	  2 bytes  control port
//	  1 byte   length of the nickname, at most MaxNickName
//	  n bytes  nickname, printable UTF-8
//	8 bytes  sequence number
//	2 bytes  number of neighbours, at most MaxShortID
//	each     6 bytes name, 1 byte flags (bit 0: outbound, bit 1: no data path
//	         works over the link), 1 byte length of the underlay address
//	         (0, 4 or 16), the address, 2 bytes port
//
// Other flags belong to later revisions of version 1, and so does what follows
// after the last neighbour; both are kept and handed on.
const (
	recordVersion = 1
	flagOutbound  = 1
	flagNoData    = 2
	infoFixed     = NameSize + 8 + 2 + 2 + 1
	adjFixed      = NameSize + 1 + 1 + 2

	// MaxNickName is the longest nickname in bytes.
	MaxNickName = 64
	// MaxRecord is the longest encoded record in bytes.
	MaxRecord = 128 << 10
)

var (
	errShort = errors.New("cut short")
	// ErrVersion says that a record is of a version this program does not
	// know; the records after it can still be read.
	ErrVersion = errors.New("record of an unknown version")
)

// CleanNickName makes a nickname fit for the wire and for terminals: what is
// not printable becomes "?", what is too long is cut.
func CleanNickName(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	for len(s) > MaxNickName {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return s
}

// AppendInfo appends the wire form of i, whose nickname must be clean.
func AppendInfo(b []byte, i Info) []byte {
	b = AppendName(b, i.Name)
	b = binary.BigEndian.AppendUint64(b, uint64(i.UID))
	b = binary.BigEndian.AppendUint16(b, uint16(i.ShortID))
	b = binary.BigEndian.AppendUint16(b, i.Port)
	b = append(b, byte(len(i.NickName)))
	return append(b, i.NickName...)
}

// ParseInfo reads an Info from the front of b and returns what follows it.
func ParseInfo(b []byte) (i Info, rest []byte, err error) {
	if len(b) < infoFixed {
		return i, nil, fmt.Errorf("peer info: %w", errShort)
	}
	i.Name, b = cutName(b)
	i.UID = UID(binary.BigEndian.Uint64(b))
	i.ShortID = ShortID(binary.BigEndian.Uint16(b[8:]))
	i.Port = binary.BigEndian.Uint16(b[10:])
	n := int(b[12])
	b = b[13:]
	if n > len(b) {
		return i, nil, fmt.Errorf("peer info: %w", errShort)
	}
	i.NickName = string(b[:n])
	switch {
	case i.Name == 0 || i.UID == 0:
		return i, nil, errors.New("peer info: without name or UID")
	case i.ShortID > MaxShortID:
		return i, nil, fmt.Errorf("peer info: short id %d, want at most %d", i.ShortID, MaxShortID)
	case i.NickName != CleanNickName(i.NickName):
		return i, nil, fmt.Errorf("peer info: nickname %q, want at most %d printable bytes", i.NickName, MaxNickName)
	}
	return i, b[n:], nil
}

// AppendRecord appends the wire form of r.
func AppendRecord(b []byte, r Record) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, recordVersion)
	b = AppendInfo(b, r.Info)
	b = binary.BigEndian.AppendUint64(b, r.Seq)
	b = binary.BigEndian.AppendUint16(b, uint16(len(r.Neighbours)))
	for _, a := range r.Neighbours {
		b = appendAdjacency(b, a)
	}
	b = append(b, r.tail...)
	binary.BigEndian.PutUint32(b[start:], uint32(len(b)-start-4))
	return b
}

func appendAdjacency(b []byte, a Adjacency) []byte {
	b = AppendName(b, a.Name)
	flags := a.spare
	if a.Outbound {
		flags |= flagOutbound
	}
	if a.NoData {
		flags |= flagNoData
	}
	raw := a.Addr.Addr().Unmap().WithZone("").AsSlice()
	b = append(b, flags, byte(len(raw)))
	b = append(b, raw...)
	return binary.BigEndian.AppendUint16(b, a.Addr.Port())
}

// ParseRecord reads a record from the front of b and returns what follows it.
// When rest is not nil, reading can go on there even after an error.
func ParseRecord(b []byte) (r Record, rest []byte, err error) {
	if len(b) < 4 {
		return r, nil, fmt.Errorf("record: %w", errShort)
	}
	n := int64(binary.BigEndian.Uint32(b))
	b = b[4:]
	if n > MaxRecord || n > int64(len(b)) {
		return r, nil, fmt.Errorf("record: %w", errShort)
	}
	r, err = parseBody(b[:n:n])
	return r, b[n:], err
}

func parseBody(b []byte) (r Record, err error) {
	if len(b) < 1 {
		return r, fmt.Errorf("record: %w", errShort)
	}
	if b[0] != recordVersion {
		return r, fmt.Errorf("%w: %d", ErrVersion, b[0])
	}
	if r.Info, b, err = ParseInfo(b[1:]); err != nil {
		return r, err
	}
	if len(b) < 10 {
		return r, fmt.Errorf("record: %w", errShort)
	}
	r.Seq = binary.BigEndian.Uint64(b)
	n := int(binary.BigEndian.Uint16(b[8:]))
	b = b[10:]
	if n > int(MaxShortID) || n*adjFixed > len(b) {
		return r, fmt.Errorf("record: %w", errShort)
	}
	if n > 0 {
		r.Neighbours = make([]Adjacency, n)
	}
	for i := range r.Neighbours {
		if r.Neighbours[i], b, err = parseAdjacency(b); err != nil {
			return r, err
		}
		a := r.Neighbours[i].Name
		if a == r.Name || i > 0 && a <= r.Neighbours[i-1].Name {
			return r, errors.New("record: neighbours out of order")
		}
	}
	if len(b) > 0 {
		r.tail = slices.Clone(b)
	}
	return r, nil
}

func parseAdjacency(b []byte) (a Adjacency, rest []byte, err error) {
	if len(b) < adjFixed {
		return a, nil, fmt.Errorf("neighbour: %w", errShort)
	}
	a.Name, b = cutName(b)
	a.Outbound, a.NoData = b[0]&flagOutbound != 0, b[0]&flagNoData != 0
	a.spare = b[0] &^ (flagOutbound | flagNoData)
	l := int(b[1])
	b = b[2:]
	if len(b) < l+2 {
		return a, nil, fmt.Errorf("neighbour: %w", errShort)
	}
	var addr netip.Addr
	if l != 0 {
		var ok bool
		if addr, ok = netip.AddrFromSlice(b[:l]); !ok {
			return a, nil, fmt.Errorf("neighbour: address of %d bytes", l)
		}
	}
	a.Addr = netip.AddrPortFrom(addr.Unmap(), binary.BigEndian.Uint16(b[l:]))
	if a.Name == 0 {
		return a, nil, errors.New("neighbour: without name")
	}
	return a, b[l+2:], nil
}

// AppendName appends the wire form of n: its MAC.
func AppendName(b []byte, n Name) []byte {
	mac := n.MAC()
	return append(b, mac[:]...)
}

func cutName(b []byte) (Name, []byte) {
	return NameFromMAC([NameSize]byte(b)), b[NameSize:]
}
