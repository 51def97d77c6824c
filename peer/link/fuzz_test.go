package link

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/peer/linkstate"
)

// fuzzed is a mesh without network at the middle of a line 2 ─ 1 ─ 3: peer 2
// is the one whose frames are made up.
func fuzzed() (m *Mesh, from, other *link) {
	self := peer.Info{Name: 1, UID: 1, ShortID: 1}
	m = &Mesh{
		cfg: Config{Self: self}, log: slog.New(slog.DiscardHandler), self: self,
		topo: linkstate.New(self, 1), links: make(map[peer.Name]*link),
		kick: make(chan struct{}, 1), readers: make(map[chan struct{}]struct{}),
		windows: make(map[peer.Name]*window), handlers: make(map[byte]HandleFunc),
	}
	for n := range peer.Name(2) {
		name := n + 2
		l := &link{peer: peer.Info{Name: name, UID: 1}, queue: newQueue(), done: make(chan struct{})}
		m.links[name] = l
		m.topo.Merge(peer.Record{Info: l.peer, Seq: 1, Neighbours: []peer.Adjacency{{Name: 1}}})
	}
	m.originateLocked()
	return m, m.links[2], m.links[3]
}

// FuzzReceive lets the other end of a link send whatever it likes: the link
// ends or goes on, nothing grows without bound, and what is passed on is whole
// frames with fewer hops left than it came with.
func FuzzReceive(f *testing.F) {
	record := func(r peer.Record) []byte { return frame(linkstate.TypeRecords, peer.AppendRecord(nil, r)) }
	far := peer.Record{Info: peer.Info{Name: 4, UID: 1, ShortID: 9}, Seq: 7, Neighbours: []peer.Adjacency{{Name: 2}}}
	near := peer.Record{Info: peer.Info{Name: 2, UID: 1}, Seq: 2, Neighbours: []peer.Adjacency{{Name: 1, NoData: true}, {Name: 4}}}
	twin := peer.Record{Info: peer.Info{Name: 1, UID: 2, ShortID: 1}, Seq: 1<<64 - 1}
	for _, seed := range [][][]byte{
		{helloFrame(1), helloFrame(1)},
		{record(far), record(near), datagram{9, 1, 4, testKind, []byte("x")}.frame()},
		{record(near), record(far), broadcast{64, 4, 5, testKind, []byte("x")}.frame()},
		{record(twin)},
		{record(far), frame(linkstate.TypeDeltas, peer.AppendDelta(nil, peer.Delta{Name: 4, UID: 1, Base: 7, Seq: 8, Gone: []peer.Name{2}}))},
		{frame(linkstate.TypeWant, []byte{0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 3}), frame(linkstate.TypeSummary, make([]byte, 22))},
		{datagram{2, 3, 2, testKind, []byte("x")}.frame(), datagram{1, 3, 2, testKind, nil}.frame()},
		{broadcast{2, 2, 5, testKind, nil}.frame(), broadcast{2, 2, 5, testKind, nil}.frame()},
		{frame(typeBye, []byte("\x1b[2J"))},
	} {
		f.Add(slices.Concat(seed...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, from, other := fuzzed()
		delivered := 0
		m.handlers[testKind] = func(_ peer.Name, payload []byte) { delivered += headSize + len(payload) }
		if err := from.receive(m, bytes.NewReader(b)); err == nil {
			t.Fatal("a link goes on after its end")
		}
		if delivered > len(b) {
			t.Errorf("%d bytes delivered of %d", delivered, len(b))
		}
		for _, l := range []*link{from, other} {
			for _, frames := range [][][]byte{l.queue.urgent.frames, l.queue.ordinary.frames} {
				if len(frames) > queueFrames {
					t.Errorf("%d frames wait", len(frames))
				}
				for _, out := range frames {
					checkPassedOn(t, out)
				}
			}
		}
		m.topo.Expire(time.Unix(1, 0), keepRecords)
		for _, r := range m.topo.Snapshot().Records() {
			m.topo.Snapshot().FrameTree(r.Name)
			if hop, ok := m.topo.Snapshot().FrameHop(r.Name); ok && hop != 2 && hop != 3 {
				t.Errorf("%s is reached through %s, to which there is no link", r.Name, hop)
			}
		}
	})
}

func checkPassedOn(t *testing.T, out []byte) {
	t.Helper()
	if int(binary.BigEndian.Uint32(out)) != len(out)-4 {
		t.Fatalf("frame % x", out)
	}
	body := out[headSize:]
	switch out[4] {
	case linkstate.TypeRecords, linkstate.TypeDeltas, linkstate.TypeSummary, linkstate.TypeWant:
		if _, err := linkstate.New(peer.Info{Name: 9, UID: 9}, 1).Receive(out[4], body); err != nil {
			t.Errorf("link state passed on: %v", err)
		}
	case typeDatagram:
		if d, err := parseDatagram(body); err != nil || d.ttl == 0 || d.ttl == 255 {
			t.Errorf("datagram passed on: %+v, %v", d, err)
		}
	case typeBroadcast:
		if c, err := parseBroadcast(body); err != nil || c.ttl == 0 || c.ttl == 255 {
			t.Errorf("broadcast passed on: %+v, %v", c, err)
		}
	}
}
