package sleeve

import "math/bits"

const (
	// reassemblies bounds the frames put together at a time.
	reassemblies = 16
	// groupWindow is how many groups behind a neighbour's newest one a frame
	// is still waited for: the numbers come again after 65536.
	groupWindow = 64
)

// reassembly puts fragments together, in whatever order they come. Its memory
// is bounded; the frame that waits longest makes room.
type reassembly struct {
	slots [reassemblies]slot
	clock uint64 // counts frames begun
	count *counters
}

// slot is one frame in the making.
type slot struct {
	from   *neighbour // nil: free
	header            // of the fragment that came first
	born   uint64
	size   int // of each fragment but the last; 0 until one has come
	total  int // of the frame; 0 until the last fragment has come
	lastAt int // where the last fragment lies
	have   [(maxFragments + 63) / 64]uint64
	buf    []byte
}

func (s *slot) reset() { s.from = nil }

// add takes a fragment. It returns the slot of the frame that is whole with
// it; the caller resets it.
func (r *reassembly) add(n *neighbour, h *header, body []byte) *slot {
	s := r.find(n, h)
	if s == nil {
		s = r.begin(n, h)
	}
	if !s.add(h, body) {
		s.reset()
		r.count.drop(incomplete, n.traffic)
		return nil
	}
	if s.whole() {
		return s
	}
	return nil
}

func (r *reassembly) find(n *neighbour, h *header) *slot {
	for i := range r.slots {
		s := &r.slots[i]
		if s.from == n && s.group == h.group {
			return s
		}
	}
	return nil
}

// begin finds room for a new frame: first the frames of n are given up that
// its numbering has left behind.
func (r *reassembly) begin(n *neighbour, h *header) *slot {
	best := &r.slots[0]
	for i := range r.slots {
		s := &r.slots[i]
		if s.from == n && h.group-s.group > groupWindow && h.group-s.group < 1<<15 {
			s.reset()
			r.count.drop(incomplete, n.traffic)
		}
		if best.from != nil && (s.from == nil || s.born < best.born) {
			best = s
		}
	}
	if best.from != nil {
		r.count.drop(incomplete, best.from.traffic)
	}
	if best.buf == nil {
		best.buf = make([]byte, maxFrame)
	}
	r.clock++
	*best = slot{from: n, header: *h, born: r.clock, buf: best.buf}
	return best
}

// add puts a fragment in its place; false when it contradicts the others.
func (s *slot) add(h *header, body []byte) bool {
	at := int(h.offset)
	if !s.sameFrame(h) {
		return false
	}
	if h.last {
		if s.total != 0 && s.total != at+len(body) {
			return false
		}
		s.total, s.lastAt = at+len(body), at
		copy(s.buf[at:], body)
		return true
	}
	if s.size == 0 {
		s.size = len(body)
	}
	if len(body) != s.size || at%s.size != 0 {
		return false
	}
	i := at / s.size
	s.have[i/64] |= 1 << (i % 64)
	copy(s.buf[at:], body)
	return true
}

// whole says whether every fragment is there: the last one starts where as
// many full ones end.
func (s *slot) whole() bool {
	if s.total == 0 || s.size == 0 {
		return false
	}
	n := 0
	for _, w := range s.have {
		n += bits.OnesCount64(w)
	}
	return s.lastAt == n*s.size
}
