package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"weave.local/peer"
	"weave.local/peer/handshake"
	"weave.local/peer/linkstate"
)

// counters count what happened to messages and streams.
type counters struct {
	relayed    atomic.Uint64
	noRoute    atomic.Uint64
	hopLimit   atomic.Uint64
	queueFull  atomic.Uint64
	offTree    atomic.Uint64
	duplicates atomic.Uint64
	malformed  atomic.Uint64
	unhandled  atomic.Uint64
	streams    atomic.Uint64
	links      atomic.Uint64
	lost       atomic.Uint64
	resyncs    atomic.Uint64
	bytesIn    atomic.Uint64
	bytesOut   atomic.Uint64
}

// Counters returns events counted since the start, under stable names.
func (m *Mesh) Counters() map[string]uint64 {
	c := &m.count
	return map[string]uint64{
		"messages_relayed":         c.relayed.Load(),
		"messages_without_route":   c.noRoute.Load(),
		"messages_over_hop_limit":  c.hopLimit.Load(),
		"messages_dropped_full":    c.queueFull.Load(),
		"broadcasts_off_tree":      c.offTree.Load(),
		"broadcasts_duplicate":     c.duplicates.Load(),
		"frames_malformed":         c.malformed.Load(),
		"messages_of_unknown_kind": c.unhandled.Load(),
		"streams_relayed":          c.streams.Load(),
		"links_established":        c.links.Load(),
		"links_lost":               c.lost.Load(),
		"records_resynchronized":   c.resyncs.Load(),
		"bytes_received":           c.bytesIn.Load(),
		"bytes_sent":               c.bytesOut.Load(),
	}
}

// hopLocked returns the link over which a peer is reached.
func (m *Mesh) hopLocked(to peer.Name) *link {
	if l := m.links[to]; l != nil {
		return l
	}
	if hop, ok := m.viewLocked().NextHop(to); ok {
		return m.links[hop]
	}
	return nil
}

func (m *Mesh) hop(to peer.Name) *link {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.hopLocked(to)
}

// Send hands a message on its way to a peer. It does not wait, and a message
// may be lost on the way without a trace. Errors: ErrNoRoute, ErrTooBig,
// ErrFull.
func (m *Mesh) Send(to peer.Name, kind byte, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("%w: %d bytes, at most %d fit", ErrTooBig, len(payload), MaxPayload)
	}
	l := m.hop(to)
	if l == nil {
		m.count.noRoute.Add(1)
		return fmt.Errorf("%w %s", ErrNoRoute, to)
	}
	d := datagram{ttl: maxTTL, dst: to, src: m.cfg.Self.Name, kind: kind, payload: payload}
	if !l.queue.push(d.frame(), false) {
		m.count.queueFull.Add(1)
		return fmt.Errorf("%w: to %s", ErrFull, l.peer)
	}
	return nil
}

// Broadcast hands a message on its way to all reachable peers but ourselves,
// along our broadcast tree: while routes stand still each gets it once. A
// payload larger than MaxPayload is dropped.
func (m *Mesh) Broadcast(kind byte, payload []byte) {
	if len(payload) > MaxPayload {
		m.count.malformed.Add(1)
		m.log.Warn("broadcast is too large and was dropped", "kind", kind, "bytes", len(payload))
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lastSeq++
	c := broadcast{ttl: maxTTL, src: m.cfg.Self.Name, seq: m.lastSeq, kind: kind, payload: payload}
	_, children, _ := m.viewLocked().Tree(m.cfg.Self.Name)
	m.spreadLocked(c, children)
}

func (m *Mesh) spreadLocked(c broadcast, children []peer.Name) {
	if len(children) == 0 {
		return
	}
	f := c.frame()
	for _, name := range children {
		l := m.links[name]
		if l == nil {
			continue
		}
		if !l.queue.push(f, false) {
			m.count.queueFull.Add(1)
		}
	}
}

// handleFrame handles one control frame. An error ends the link; a body that
// makes no sense is no reason for that.
func (m *Mesh) handleFrame(l *link, typ byte, body []byte) error {
	var err error
	switch typ {
	case typeHello:
		err = m.handleHello(l, body)
	case linkstate.TypeRecords, linkstate.TypeDeltas, linkstate.TypeSummary, linkstate.TypeWant:
		m.mu.Lock()
		err = m.linkStateLocked(l, typ, body)
		m.mu.Unlock()
	case typeDatagram:
		var d datagram
		if d, err = parseDatagram(body); err == nil {
			m.handleDatagram(l, d)
		}
	case typeBroadcast:
		var c broadcast
		if c, err = parseBroadcast(body); err == nil && m.acceptBroadcast(l, c) {
			m.deliver(c.src, c.kind, c.payload)
		}
	case typeBye:
		return errors.New("the other end closed the link: " + handshake.Printable(body))
	}
	if err != nil && !errors.Is(err, peer.ErrVersion) && m.count.malformed.Add(1) == 1 {
		m.log.Warn("malformed frame ignored; further ones are only counted", "peer", l.peer.String(), "type", typ, "err", err)
	}
	return nil
}

// handleHello compares databases. Two mismatches in a row mean that the
// difference is not just a record on its way. The first hello over a link that
// joins two parts tells how the other stood before, and one is enough.
func (m *Mesh) handleHello(l *link, body []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case len(body) >= 8:
		l.heard = binary.BigEndian.Uint64(body)
	case len(body) > 0:
		return errFrame
	}
	theirs := l.heard
	ours, limit := m.viewLocked().Digest(), 2
	if l.joins {
		ours, limit = l.before, 1
	}
	l.joins = false
	if theirs == ours {
		l.mismatches = 0
		return nil
	}
	l.mismatches++
	now := time.Now()
	if l.mismatches < limit || limit > 1 && now.Sub(m.summed) < summaryEvery {
		return nil
	}
	l.mismatches = 0
	if m.self.Name < l.peer.Name { // one of both is enough
		m.summed = now
		m.count.resyncs.Add(1)
		l.sendUrgent(frames(m.topo.Summary()))
	}
	return nil
}

// linkStateLocked takes a message about link state.
func (m *Mesh) linkStateLocked(l *link, typ byte, body []byte) error {
	m.viewLocked() // as it is before
	res, err := m.topo.Receive(typ, body)
	for _, twin := range res.Twins {
		if !m.overtaken {
			m.log.Debug("superseding a record under our name", "uid", twin.UID)
		}
		m.twin.met(twin, time.Now())
		m.overtaken = true
	}
	l.sendUrgent(frames(res.Reply))
	if len(res.Forward) > 0 {
		m.news = m.news.add(l.peer.Name, res.Forward)
		signal(m.kick)
	}
	return err
}

// viewLocked is the link state without the news that wait. Each change costs
// all that follows from it, and while many peers come these are many.
func (m *Mesh) viewLocked() peer.Snapshot {
	if len(m.news) == 0 {
		m.view = m.topo.Snapshot()
	}
	return m.view
}

// newsLocked hands on the news that came, and has routes follow them.
func (m *Mesh) newsLocked() {
	list := m.news
	m.news = nil
	for _, n := range list {
		m.floodLocked(n.list, n.from)
	}
	m.changedLocked()
	m.chooseShortIDLocked()
}

// floodLocked sends news of link state on.
func (m *Mesh) floodLocked(news []linkstate.Message, except peer.Name) {
	list := frames(news)
	for _, name := range m.topo.Flood(slices.Collect(maps.Keys(m.links)), except) {
		m.links[name].sendUrgent(list)
	}
}

func (m *Mesh) handleDatagram(from *link, d datagram) {
	if d.dst == m.cfg.Self.Name {
		m.deliver(d.src, d.kind, d.payload)
		return
	}
	if d.ttl <= 1 {
		m.count.hopLimit.Add(1)
		return
	}
	d.ttl--
	l := m.hop(d.dst)
	if l == nil || l == from { // going back would only make it circle
		m.count.noRoute.Add(1)
		return
	}
	if !l.queue.push(d.frame(), false) {
		m.count.queueFull.Add(1)
		return
	}
	m.count.relayed.Add(1)
}

// acceptBroadcast hands a broadcast on and says whether it is for us, too. It
// accepts it only from our parent in the tree of its source: while routes
// change, peers disagree about trees, and without this check one message
// becomes hundreds.
func (m *Mesh) acceptBroadcast(from *link, c broadcast) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	parent, children, ok := m.viewLocked().Tree(c.src)
	if !ok || parent != from.peer.Name || c.src == m.cfg.Self.Name {
		m.count.offTree.Add(1)
		return false
	}
	w := m.windows[c.src]
	if w == nil {
		w = &window{}
		m.windows[c.src] = w
	}
	if !w.fresh(c.seq) {
		m.count.duplicates.Add(1)
		return false
	}
	if c.ttl <= 1 {
		m.count.hopLimit.Add(1)
		return true
	}
	c.ttl--
	m.spreadLocked(c, children)
	return true
}

func (m *Mesh) deliver(from peer.Name, kind byte, payload []byte) {
	f := m.handlers[kind]
	if f == nil {
		m.count.unhandled.Add(1)
		return
	}
	f(from, payload)
}
