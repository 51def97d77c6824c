package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"weave.local/peer"
)

// Limits of what a table holds.
const (
	MaxKey   = 128  // bytes
	MaxValue = 4096 // bytes

	maxName    = 32       // of tables and states, in bytes
	maxItems   = 1 << 17  // of one origin
	maxOwned   = 32 << 20 // bytes of these
	maxOrigins = 16384
	maxStates  = 64
	maxEpoch   = 1<<63 - 1
)

const (
	wireVersion = 1

	castSet   = 1
	castState = 2

	streamMembers = 1
	streamPull    = 2

	frameRequest = 1
	frameSet     = 2
	frameState   = 3
	frameEnd     = 4

	flagComplete = 1
	flagMore     = 2
	flagDeleted  = 1
	flagAnswer   = 1

	setFixed   = peer.NameSize + 8 + 3*binary.MaxVarintLen64 + 1
	itemFixed  = 2*binary.MaxVarintLen64 + 3
	setLimit   = 60_000   // bytes of one set in a broadcast or frame
	stateLimit = 200_000  // bytes of a state in a broadcast
	maxFrame   = 16 << 20 // bytes
)

var errWire = errors.New("malformed")

// ident names an entry among all that one origin owns.
type ident struct{ table, key string }

// item is the last change of an entry.
type item struct {
	seq     uint64
	value   []byte // never modified
	deleted bool
}

type change struct {
	ident
	item
}

func (c change) size() int { return itemFixed + len(c.table) + len(c.key) + len(c.value) }

// set is some or all of what an origin owns: all changes from base on up to
// seq that still matter or, when complete, all that exists.
type set struct {
	origin   peer.Name
	epoch    uint64
	base     uint64
	seq      uint64
	complete bool
	more     bool // it is a part, and not the last one
	items    []change
}

// parts cuts a set into such of at most limit bytes.
func (s set) parts(limit int) []set {
	var out []set
	rest := s.items
	for {
		n, size := 0, setFixed
		for n < len(rest) && (n == 0 || size+rest[n].size() <= limit) {
			size += rest[n].size()
			n++
		}
		p := s
		p.items, rest = rest[:n], rest[n:]
		p.more = len(rest) > 0
		out = append(out, p)
		if !p.more {
			return out
		}
	}
}

func appendSet(b []byte, s set) []byte {
	b = peer.AppendName(b, s.origin)
	b = binary.BigEndian.AppendUint64(b, s.epoch)
	b = binary.AppendUvarint(b, s.base)
	b = binary.AppendUvarint(b, s.seq)
	var flags byte
	if s.complete {
		flags |= flagComplete
	}
	if s.more {
		flags |= flagMore
	}
	b = append(b, flags)
	b = binary.AppendUvarint(b, uint64(len(s.items)))
	for _, c := range s.items {
		b = binary.AppendUvarint(b, s.seq-c.seq)
		if c.deleted {
			b = append(b, flagDeleted)
		} else {
			b = append(b, 0)
		}
		b = appendShort(b, c.table)
		b = appendShort(b, c.key)
		b = binary.AppendUvarint(b, uint64(len(c.value)))
		b = append(b, c.value...)
	}
	return b
}

func parseSet(b []byte) (set, error) {
	r := reader{b: b}
	s := set{origin: r.peer(), epoch: r.uint64(), base: r.uvarint(), seq: r.uvarint()}
	flags := r.byte()
	s.complete, s.more = flags&flagComplete != 0, flags&flagMore != 0
	n := r.uvarint()
	switch {
	case r.bad || n > maxItems || n > uint64(len(r.b)):
		return set{}, fmt.Errorf("set: %w", errWire)
	case s.origin == 0 || s.epoch == 0 || s.epoch > maxEpoch:
		return set{}, fmt.Errorf("set: %w: origin %s at epoch %d", errWire, s.origin, s.epoch)
	case s.base > s.seq || s.complete && s.base != 0:
		return set{}, fmt.Errorf("set: %w: from %d to %d", errWire, s.base, s.seq)
	}
	if n > 0 {
		s.items = make([]change, 0, min(n, uint64(len(r.b)/6)+1))
	}
	table := ""
	for range n {
		c, err := parseItem(&r, s, table)
		if err != nil {
			return set{}, err
		}
		table = c.table
		s.items = append(s.items, c)
	}
	return s, nil
}

// parseItem reads one item of s. What is read lives long, so it does not share
// memory with the message; the name of the table is usually that of the item
// before.
func parseItem(r *reader, s set, table string) (c change, err error) {
	age := r.uvarint()
	c.deleted = r.byte()&flagDeleted != 0
	if name := r.short(); string(name) == table {
		c.table = table
	} else {
		c.table = string(name)
	}
	c.key = string(r.short())
	value := r.take(r.uvarint())
	switch {
	case r.bad:
		return c, fmt.Errorf("item: %w", errWire)
	case age > s.seq || s.seq-age <= s.base:
		return c, fmt.Errorf("item: %w: number %d before %d", errWire, age, s.seq)
	case c.table == "" || len(c.table) > maxName || len(c.key) > MaxKey || len(value) > MaxValue:
		return c, fmt.Errorf("item: %w: lengths of table %d, key %d, value %d", errWire, len(c.table), len(c.key), len(value))
	case c.deleted && (s.complete || len(value) > 0):
		return c, fmt.Errorf("item: %w: deletion", errWire)
	}
	c.seq = s.seq - age
	if !c.deleted {
		c.value = append([]byte{}, value...)
	}
	return c, nil
}

// push is a state as it is broadcast.
type push struct {
	name   string
	digest uint64
	state  []byte
}

func appendPush(b []byte, p push) []byte {
	b = appendShort(b, p.name)
	b = binary.BigEndian.AppendUint64(b, p.digest)
	return append(b, p.state...)
}

func parsePush(b []byte) (push, error) {
	r := reader{b: b}
	p := push{name: string(r.short()), digest: r.uint64()}
	if r.bad || p.name == "" || len(p.name) > maxName {
		return push{}, fmt.Errorf("state: %w", errWire)
	}
	p.state = r.b
	return p, nil
}

// head is how far an origin is known.
type head struct {
	epoch, seq uint64
}

// request asks for what the sender lacks.
type request struct {
	answer bool
	root   uint64
	heads  map[peer.Name]head
	states map[string]uint64 // digests
}

func encodeRequest(q request) []byte {
	b := []byte{wireVersion, 0}
	if q.answer {
		b[1] |= flagAnswer
	}
	b = binary.BigEndian.AppendUint64(b, q.root)
	b = binary.AppendUvarint(b, uint64(len(q.heads)))
	for name, h := range q.heads {
		b = peer.AppendName(b, name)
		b = binary.BigEndian.AppendUint64(b, h.epoch)
		b = binary.AppendUvarint(b, h.seq)
	}
	b = binary.AppendUvarint(b, uint64(len(q.states)))
	for name, digest := range q.states {
		b = appendShort(b, name)
		b = binary.BigEndian.AppendUint64(b, digest)
	}
	return b
}

func parseRequest(b []byte) (request, error) {
	r := reader{b: b}
	if v := r.byte(); v != wireVersion {
		return request{}, fmt.Errorf("request: %w: version %d", errWire, v)
	}
	q := request{answer: r.byte()&flagAnswer != 0, root: r.uint64()}
	n := r.uvarint()
	if r.bad || n > maxOrigins {
		return request{}, fmt.Errorf("request: %w", errWire)
	}
	q.heads = make(map[peer.Name]head)
	for range n {
		name, h := r.peer(), head{r.uint64(), r.uvarint()}
		if r.bad || name == 0 || h.epoch == 0 || h.epoch > maxEpoch {
			return request{}, fmt.Errorf("request: %w: origin %s", errWire, name)
		}
		q.heads[name] = h
	}
	n = r.uvarint()
	if r.bad || n > maxStates {
		return request{}, fmt.Errorf("request: %w", errWire)
	}
	q.states = make(map[string]uint64)
	for range n {
		name, digest := string(r.short()), r.uint64()
		if r.bad || name == "" || len(name) > maxName {
			return request{}, fmt.Errorf("request: %w: states", errWire)
		}
		q.states[name] = digest
	}
	return q, nil
}

// writeFrame writes one frame of a pull.
func writeFrame(w io.Writer, typ byte, body []byte) error {
	b := make([]byte, 0, 5+len(body))
	b = binary.BigEndian.AppendUint32(b, uint32(1+len(body)))
	b = append(b, typ)
	_, err := w.Write(append(b, body...))
	return err
}

// readFrame reads one frame whose body has at most limit bytes. Memory is taken
// as bytes arrive, not as the length promises.
func readFrame(r io.Reader, limit int64) (typ byte, body []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	n := int64(binary.BigEndian.Uint32(h[:])) - 1
	if n < 0 || n > limit {
		return 0, nil, fmt.Errorf("frame: %w: %d bytes, want at most %d", errWire, n, limit)
	}
	body, err = io.ReadAll(io.LimitReader(r, n))
	if err == nil && int64(len(body)) < n {
		err = io.ErrUnexpectedEOF
	}
	return h[4], body, err
}

func appendShort(b []byte, s string) []byte {
	b = append(b, byte(len(s)))
	return append(b, s...)
}

// reader cuts fields from the front of b. After one that was not there all is
// zero and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n uint64) []byte {
	if r.bad || n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return nil
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) short() []byte { return r.take(uint64(r.byte())) }

func (r *reader) peer() peer.Name {
	if b := r.take(peer.NameSize); b != nil {
		return peer.NameFromMAC([peer.NameSize]byte(b))
	}
	return 0
}
