package gossip

import (
	"bytes"
	"io"
	"log/slog"
	"testing"
	"time"

	"weave.local/peer"
)

// FuzzAssemble takes what a peer may answer to a pull: sets in parts, which
// the store takes over. No origin gets more than it may own.
func FuzzAssemble(f *testing.F) {
	frames := func(sets ...set) []byte {
		var b bytes.Buffer
		for _, s := range sets {
			if err := writeFrame(&b, frameSet, appendSet(nil, s)); err != nil {
				f.Fatal(err)
			}
		}
		return b.Bytes()
	}
	s := sample()
	f.Add(frames(s))
	f.Add(frames(s.parts(60)...))
	later := s
	later.base, later.seq, later.complete = s.seq, s.seq+1, false
	later.items = []change{{ident{"t", "k"}, item{seq: s.seq + 1, deleted: true}}}
	f.Add(frames(s, later))
	later.epoch++
	f.Add(frames(s, later))
	f.Fuzz(func(t *testing.T, b []byte) {
		st := newStore(1, 5)
		var parts assembler
		for r := bytes.NewReader(b); ; {
			_, body, err := readFrame(r, maxFrame)
			if err != nil {
				break
			}
			p, err := parseSet(body)
			if err != nil {
				break
			}
			whole, err := parts.add(p)
			if err != nil {
				break
			}
			if whole == nil {
				continue
			}
			if whole.more || parts.open != nil {
				t.Fatal("a set that lacks parts is taken for whole")
			}
			st.apply(*whole)
		}
		for name, r := range st.replicas {
			size, deleted := 0, 0
			for id, it := range r.items {
				size += change{id, it}.size()
				if it.deleted {
					deleted++
				}
				if it.seq > r.seq {
					t.Errorf("%s stands at %d and has a change %d", name, r.seq, it.seq)
				}
			}
			if size != r.size || deleted != r.deleted {
				t.Errorf("%s: counted %d bytes and %d deletions, are %d and %d", name, r.size, r.deleted, size, deleted)
			}
		}
		// Whoever asks gets all of it.
		for name := range st.replicas {
			st.reach[name] = true
		}
		other := newStore(0, 5)
		sets, _ := st.lacking(other.heads())
		for _, s := range sets {
			other.apply(s)
		}
		for name := range st.replicas {
			other.reach[name] = true
		}
		delete(other.replicas, 0)
		if st.root() != other.root() {
			t.Errorf("%+v becomes %+v elsewhere", st.heads(), other.heads())
		}
		st.expire(time.Unix(1, 0), func(peer.Name) bool { return false })
		st.expire(time.Unix(1, 0).Add(2*keepDead), func(peer.Name) bool { return false })
		if len(st.replicas) > 1 {
			t.Errorf("%d origins stay for ever", len(st.replicas)-1)
		}
	})
}

// conversation is a stream whose other end said all it will.
type conversation struct {
	io.Reader
	io.Writer
}

// FuzzServe asks for what a peer lacks, in any words.
func FuzzServe(f *testing.F) {
	ask := func(q request) []byte {
		var b bytes.Buffer
		if err := writeFrame(&b, frameRequest, encodeRequest(q)); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	f.Add(ask(request{}))
	f.Add(ask(request{heads: map[peer.Name]head{1: {5, 0}, 2: {9, 9}}, states: map[string]uint64{"n": 1}}))
	f.Add(ask(request{heads: map[peer.Name]head{1: {maxEpoch, 9}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		g := &Gossip{
			log: slog.New(slog.DiscardHandler), self: 1, store: newStore(1, 5), pulls: newPulls(),
			send: make(chan struct{}, 1), kick: make(chan struct{}, 1), states: map[string]*shared{"n": {State: stubborn(7)}},
		}
		if err := g.store.set(ident{"t", "k"}, []byte("value"), false); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := g.serve(conversation{bytes.NewReader(b), &out}, 2); err != nil {
			if out.Len() > 0 {
				t.Errorf("%d bytes answered before %v", out.Len(), err)
			}
			return
		}
		for {
			typ, body, err := readFrame(&out, maxFrame)
			if err != nil {
				t.Fatalf("answer: %v", err)
			}
			switch typ {
			case frameEnd:
				return
			case frameSet:
				if _, err := parseSet(body); err != nil {
					t.Errorf("answer: %v", err)
				}
			}
		}
	})
}
