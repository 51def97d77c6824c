package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Delta is what changed from one record of a peer to its next: a link that
// comes or goes is some fifty bytes, however many links there are.
type Delta struct {
	Name Name
	UID  UID
	Base uint64      // sequence number of the record it builds on
	Seq  uint64      // and of the one it makes of it
	Put  []Adjacency // new or changed, sorted by name
	Gone []Name      // sorted
}

// The wire format of a delta, version 1; integers are big endian:
//
//	2 bytes  length of all that follows
//	1 byte   version (1)
//	6 bytes  name
//	8 bytes  UID
//	8 bytes  sequence number
//	2 bytes  sequence number less that of the base, not 0
//	1 byte   number of neighbours that are new or changed
//	each     as in a record
//	1 byte   number of neighbours that are none any more
//	each     6 bytes name
//
// What follows belongs to later revisions and is ignored.
const (
	deltaVersion = 1
	deltaFixed   = 1 + NameSize + 8 + 8 + 2 + 1
	maxChanges   = 255
)

// Diff returns the delta that makes a record of its predecessor; false when
// there is none, and the record has to be told as a whole.
func Diff(before, after Record) (Delta, bool) {
	step := after.Seq - before.Seq
	if before.Info != after.Info || step == 0 || step > 1<<16-1 || !slices.Equal(before.tail, after.tail) {
		return Delta{}, false
	}
	d := Delta{Name: after.Name, UID: after.UID, Base: before.Seq, Seq: after.Seq}
	old := before.Neighbours
	for _, a := range after.Neighbours {
		for len(old) > 0 && old[0].Name < a.Name {
			d.Gone = append(d.Gone, old[0].Name)
			old = old[1:]
		}
		same := false
		if len(old) > 0 && old[0].Name == a.Name {
			same = old[0] == a
			old = old[1:]
		}
		if !same {
			d.Put = append(d.Put, a)
		}
	}
	for _, a := range old {
		d.Gone = append(d.Gone, a.Name)
	}
	return d, len(d.Put) <= maxChanges && len(d.Gone) <= maxChanges
}

// apply returns the neighbours of the next record; before is left as it is.
func (d Delta) apply(before []Adjacency) []Adjacency {
	out := make([]Adjacency, 0, len(before)+len(d.Put))
	put, gone := d.Put, d.Gone
	for _, a := range before {
		for len(put) > 0 && put[0].Name < a.Name {
			out = append(out, put[0])
			put = put[1:]
		}
		for len(gone) > 0 && gone[0] < a.Name {
			gone = gone[1:]
		}
		switch {
		case len(put) > 0 && put[0].Name == a.Name:
			out = append(out, put[0])
			put = put[1:]
		case len(gone) > 0 && gone[0] == a.Name:
		default:
			out = append(out, a)
		}
	}
	return append(out, put...)
}

// AppendDelta appends the wire form of d.
func AppendDelta(b []byte, d Delta) []byte {
	start := len(b)
	b = append(b, 0, 0, deltaVersion)
	b = AppendName(b, d.Name)
	b = binary.BigEndian.AppendUint64(b, uint64(d.UID))
	b = binary.BigEndian.AppendUint64(b, d.Seq)
	b = binary.BigEndian.AppendUint16(b, uint16(d.Seq-d.Base))
	b = append(b, byte(len(d.Put)))
	for _, a := range d.Put {
		b = appendAdjacency(b, a)
	}
	b = append(b, byte(len(d.Gone)))
	for _, n := range d.Gone {
		b = AppendName(b, n)
	}
	binary.BigEndian.PutUint16(b[start:], uint16(len(b)-start-2))
	return b
}

// ParseDelta reads a delta from the front of b and returns what follows it.
// When rest is not nil, reading can go on there even after an error.
func ParseDelta(b []byte) (d Delta, rest []byte, err error) {
	if len(b) < 2 {
		return d, nil, fmt.Errorf("delta: %w", errShort)
	}
	n := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	if n > len(b) {
		return d, nil, fmt.Errorf("delta: %w", errShort)
	}
	d, err = parseDelta(b[:n:n])
	return d, b[n:], err
}

func parseDelta(b []byte) (d Delta, err error) {
	if len(b) < deltaFixed {
		return d, fmt.Errorf("delta: %w", errShort)
	}
	if b[0] != deltaVersion {
		return d, fmt.Errorf("%w: %d", ErrVersion, b[0])
	}
	d.Name, b = cutName(b[1:])
	d.UID = UID(binary.BigEndian.Uint64(b))
	d.Seq = binary.BigEndian.Uint64(b[8:])
	step := uint64(binary.BigEndian.Uint16(b[16:]))
	d.Base = d.Seq - step
	if d.Name == 0 || d.UID == 0 || step == 0 || step > d.Seq {
		return d, errors.New("delta: without name, UID or base")
	}
	puts := int(b[18])
	b = b[19:]
	d.Put = make([]Adjacency, 0, min(puts, len(b)/adjFixed))
	for range puts {
		var a Adjacency
		if a, b, err = parseAdjacency(b); err != nil {
			return d, err
		}
		d.Put = append(d.Put, a)
	}
	if len(b) < 1 || len(b)-1 < int(b[0])*NameSize {
		return d, fmt.Errorf("delta: %w", errShort)
	}
	gone := int(b[0])
	b = b[1:]
	for range gone {
		var n Name
		n, b = cutName(b)
		d.Gone = append(d.Gone, n)
	}
	return d, d.check()
}

func (d Delta) check() error {
	for i, a := range d.Put {
		if a.Name == d.Name || i > 0 && a.Name <= d.Put[i-1].Name {
			return errors.New("delta: neighbours out of order")
		}
	}
	for i, n := range d.Gone {
		if i > 0 && n <= d.Gone[i-1] {
			return errors.New("delta: former neighbours out of order")
		}
	}
	return nil
}
