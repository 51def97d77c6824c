package sleeve

import (
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/tap"
)

const (
	// arenaLen is room for the datagrams of one system call.
	arenaLen = 256 << 10
	// drainLen is how many frames at most are read before they are sent, and
	// drainBytes how many bytes of datagrams.
	drainLen   = 256
	drainBytes = 64 << 10
)

// message is a run of datagrams to one neighbour in the arena, each seg bytes
// long but for the last, which may be shorter.
type message struct {
	to      *neighbour
	at, len int
	seg     int
}

// sender takes frames from the TAP to the socket.
type sender struct {
	table      *atomic.Pointer[table]
	count      *counters
	refreshMTU func(*neighbour)
	tap        *tap.Conn
	sock       *socket

	in    []byte // one frame
	pkt   packet
	row   row
	arena []byte
	used  int
	msgs  []message
	part  [batchLen]int // index in msgs of each message of the system call
}

func (p *Path) newSender() *sender {
	s := newSender(&p.table, p.count)
	s.tap, s.sock, s.refreshMTU = p.tap, p.sock, p.refreshMTU
	return s
}

func newSender(t *atomic.Pointer[table], c *counters) *sender {
	return &sender{
		table: t,
		count: c,
		in:    make([]byte, maxFrame+tapOverhead+1),
		arena: make([]byte, arenaLen),
		msgs:  make([]message, 0, batchLen),
	}
}

// serve runs until the TAP is closed.
func (s *sender) serve() error {
	for {
		n, err := s.tap.Read(s.in, true)
		for i := 0; err == nil && n > 0; i++ {
			if err = s.frame(s.in[:n]); err != nil {
				return err
			}
			if i == drainLen || s.used >= drainBytes {
				break
			}
			n, err = s.tap.Read(s.in, false)
		}
		if err != nil {
			return err
		}
		if err := s.endRow(); err != nil {
			return err
		}
		if err := s.flush(); err != nil {
			return err
		}
	}
}

// frame takes one frame as read from the TAP and lays out its datagrams, or
// those of the frames before it if it may go together with what follows. The
// error is the socket's.
func (s *sender) frame(b []byte) error {
	s.count.framesOut.Add(1)
	p := &s.pkt
	if !p.parse(b) {
		s.count.drop(badTags, nil)
		return nil
	}
	if s.row.add(p) {
		return nil
	}
	if err := s.endRow(); err != nil {
		return err
	}
	if n := s.table.Load().hops[p.dst]; n != nil && s.row.begin(p, n.room()) {
		return nil
	}
	return s.route(p)
}

// endRow lays out the datagrams of the row, if there is one.
func (s *sender) endRow() error {
	if s.row.n == 0 {
		return nil
	}
	return s.route(s.row.finish())
}

// route lays out the datagrams of p for each neighbour that it goes to.
func (s *sender) route(p *packet) error {
	t := s.table.Load()
	if !p.flood {
		n := t.hops[p.dst]
		if n == nil {
			s.count.drop(noPath, t.traffic[p.dst])
			return nil
		}
		return s.emit(t.self, n, p)
	}
	for _, n := range t.trees[p.src].children {
		if err := s.emit(t.self, n, p); err != nil {
			return err
		}
	}
	return nil
}

// emit lays out p for the neighbour n: in one datagram if it fits, else in
// segments, else in fragments.
func (s *sender) emit(self peer.ShortID, n *neighbour, p *packet) error {
	room := n.room()
	h := header{src: p.src, dst: p.dst, hops: p.hops, flood: p.flood, offload: p.offload}
	if len(p.data) <= room {
		h.kind, h.last = kindFrame, true
		return s.pieces(self, n, p, h, 0, len(p.data))
	}
	if headLen, size := p.cut(room); size > 0 {
		h.kind, h.headLen, h.gsoSize = kindSegment, uint8(headLen), uint16(size)
		if h.gsoType == gsoNone {
			h.gsoType = p.tcpType()
		}
		if s.need(n, &h, len(p.data), size) <= len(s.arena) {
			n.segmented++
			h.group = n.segmented
			return s.pieces(self, n, p, h, headLen, size)
		}
		h = header{src: p.src, dst: p.dst, hops: p.hops, flood: p.flood, offload: p.offload}
	}
	if room < minFragment || (len(p.data)-1)/room*room > maxOffset {
		s.count.drop(tooBig, n.traffic)
		return nil
	}
	n.fragmented++
	h.kind, h.group = kindFragment, n.fragmented
	return s.pieces(self, n, p, h, 0, room)
}

// need is the room in the arena for total bytes of frame in pieces of size.
func (s *sender) need(n *neighbour, h *header, total, size int) int {
	pieces := (total - int(h.headLen) + size - 1) / size
	return total + pieces*(headerLen+int(h.headLen)+n.tail())
}

// pieces writes the datagrams of p: each has h, the first headLen bytes of the
// frame and size bytes of what follows them.
func (s *sender) pieces(self peer.ShortID, n *neighbour, p *packet, h header, headLen, size int) error {
	data := p.data
	if s.used+s.need(n, &h, len(data), size) > len(s.arena) {
		if err := s.flush(); err != nil {
			return err
		}
	}
	head, body := data[:headLen], data[headLen:]
	packets, bytes := h.packets(data)
	if h.kind == kindSegment {
		packets = (len(body) + size - 1) / size
		bytes = len(body) + packets*headLen
	}
	n.traffic.tx.add(packets, bytes, h.flood, h.dst != n.id)
	for off := 0; off < len(body); off += size {
		piece := body[off:min(off+size, len(body))]
		h.offset, h.last = uint16(off), off+size >= len(body)
		d := s.arena[s.used : s.used+headerLen+headLen+len(piece)+n.tail()]
		h.put(d)
		copy(d[headerLen:], head)
		copy(d[headerLen+headLen:], piece)
		if !n.speaking().seal(self, d) {
			s.count.drop(sendFailed, n.traffic)
			continue
		}
		if err := s.push(n, len(d)); err != nil {
			return err
		}
	}
	return nil
}

// push adds the datagram of size bytes that was just written to the arena to
// the last message when the kernel can cut it off again, or makes it one.
func (s *sender) push(n *neighbour, size int) error {
	at := s.used
	s.used += size
	if k := len(s.msgs); k > 0 {
		m := &s.msgs[k-1]
		if m.to == n && m.len%m.seg == 0 && size <= m.seg && m.len/m.seg < batchLen && m.len+size <= maxDatagram {
			m.len += size
			return nil
		}
	}
	if len(s.msgs) < cap(s.msgs) {
		s.msgs = append(s.msgs, message{to: n, at: at, len: size, seg: size})
		return nil
	}
	// No place left: send the others, and keep this one.
	s.used = at
	if err := s.flush(); err != nil {
		return err
	}
	copy(s.arena, s.arena[at:at+size])
	s.used = size
	s.msgs = append(s.msgs, message{to: n, len: size, seg: size})
	return nil
}

// flush sends what the arena holds and empties it. What the kernel refuses is
// dropped and counted; the error is that of a closed socket.
func (s *sender) flush() error {
	for i := range s.msgs {
		s.count.datagramsOut.Add(uint64((s.msgs[i].len + s.msgs[i].seg - 1) / s.msgs[i].seg))
	}
	defer func() { s.msgs, s.used = s.msgs[:0], 0 }()
	for next := 0; next < len(s.msgs); {
		k := s.load(next)
		sent, err := s.sock.send(lane(s.msgs[next].to), k)
		for i := range sent {
			next = s.took(i)
		}
		if err == nil {
			continue
		}
		var errno unix.Errno
		if !errors.As(err, &errno) {
			return err
		}
		next = s.refused(s.part[sent], errno)
	}
	return nil
}

// load fills the socket's batch with messages from index next on, as far as they
// go in the same lane. A message that the kernel shall not cut goes in as its
// datagrams.
func (s *sender) load(next int) int {
	k := 0
	for i := next; i < len(s.msgs) && k < batchLen; i++ {
		m := &s.msgs[i]
		if lane(m.to) != lane(s.msgs[next].to) {
			break
		}
		step := m.len
		if m.to.plain {
			step = m.seg
		}
		for off := 0; off < m.len && k < batchLen; off += step {
			end := min(off+step, m.len)
			s.sock.out.load(k, m.to, s.arena[m.at+off:m.at+end], m.seg)
			s.part[k] = i
			k++
		}
	}
	return k
}

// took notes that the i-th loaded message is sent and returns the index in
// msgs to go on from.
func (s *sender) took(i int) int {
	m := &s.msgs[s.part[i]]
	if !m.to.plain {
		return s.part[i] + 1
	}
	size := min(m.seg, m.len)
	m.at, m.len = m.at+size, m.len-size
	if m.len == 0 {
		return s.part[i] + 1
	}
	return s.part[i]
}

// refused decides on message i after the kernel returned errno for it, and
// returns the index to go on from. A device or kernel that cannot cut messages
// says EIO or EINVAL; EINVAL may also be a path MTU that shrank.
func (s *sender) refused(i int, errno unix.Errno) int {
	m := &s.msgs[i]
	if errno == unix.EIO || errno == unix.EINVAL || errno == unix.EMSGSIZE {
		s.refreshMTU(m.to)
		if m.seg > m.to.maxDatagram() || errno == unix.EMSGSIZE {
			s.count.drop(tooBig, m.to.traffic)
			return i + 1
		}
		if m.len > m.seg && !m.to.plain {
			m.to.plain = true
			return i
		}
	}
	s.count.drop(sendFailed, m.to.traffic)
	return i + 1
}

// cut says how a frame that is too large for one datagram with room bytes
// behind the header is cut: each segment has the first headLen bytes and size
// bytes of payload. size is 0 when it must be fragmented.
func (p *packet) cut(room int) (headLen, size int) {
	if !p.partial {
		return 0, 0
	}
	l4 := int(p.csumStart)
	size = int(p.gsoSize)
	switch {
	case p.gsoType == gsoUDP && p.csumAt == frame.UDPChecksum:
		if headLen = l4 + frame.UDPLen; headLen+size > room {
			return 0, 0 // the datagrams inside keep their size
		}
	case p.csumAt == frame.TCPChecksum && p.tcpType() != gsoNone && len(p.data) >= l4+frame.TCPLen:
		// TCP is a stream of bytes: cut as the path needs it.
		headLen = l4 + frame.TCP(p.data[l4:]).HeaderLen()
		if size == 0 || headLen+size > room {
			size = room - headLen
		}
	default:
		return 0, 0
	}
	if headLen > 0xff || headLen >= len(p.data) || !p.coverageWithin(headLen) || size <= 0 || (len(p.data)-headLen-1)/size*size > maxOffset {
		return 0, 0
	}
	return headLen, size
}

// tcpType is the GSO type of a TCP frame, also of one that is no super-frame;
// gsoNone for others.
func (p *packet) tcpType() uint8 {
	switch p.gsoType &^ gsoECN {
	case gsoTCP4, gsoTCP6:
		return p.gsoType
	case gsoNone:
	default:
		return gsoNone
	}
	l, ok := frame.Parse(p.data)
	if !ok || l.L4 != int(p.csumStart) || l.Proto != frame.ProtoTCP {
		return gsoNone
	}
	if l.Type == frame.TypeIPv4 {
		return gsoTCP4
	}
	return gsoTCP6
}
