package gossip

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"weave.local/peer"
)

func sample() set {
	return set{origin: 0x7a0b1c2d3e4f, epoch: 0x1122, base: 3, seq: 7, items: []change{
		{ident{"endpoints", "k"}, item{seq: 5, value: []byte("value")}},
		{ident{"endpoints", ""}, item{seq: 6, deleted: true}},
		{ident{"dns", "x"}, item{seq: 7, value: []byte{}}},
	}}
}

func TestSetOnTheWire(t *testing.T) {
	t.Parallel()
	b := appendSet(nil, sample())
	want := "7a0b1c2d3e4f" + "0000000000001122" + "03" + "07" + "00" + "03" +
		"02" + "00" + "09656e64706f696e7473" + "016b" + "0576616c7565" +
		"01" + "01" + "09656e64706f696e7473" + "00" + "00" +
		"00" + "00" + "03646e73" + "0178" + "00"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	s, err := parseSet(append(b, "of a later version"...))
	if err != nil || !reflect.DeepEqual(s, sample()) {
		t.Errorf("got %+v, %v", s, err)
	}
	for n := range b {
		if s, err := parseSet(b[:n]); !errors.Is(err, errWire) {
			t.Errorf("%d of %d bytes were read as %+v, %v", n, len(b), s, err)
		}
	}
}

func TestSetLimits(t *testing.T) {
	t.Parallel()
	cases := map[string]func(*set){
		"no origin":              func(s *set) { s.origin = 0 },
		"no epoch":               func(s *set) { s.epoch = 0 },
		"epoch too large":        func(s *set) { s.epoch = 1 << 63 },
		"base behind end":        func(s *set) { s.base = 8 },
		"complete with base":     func(s *set) { s.complete = true },
		"item not after base":    func(s *set) { s.items[0].seq = 3 },
		"table without name":     func(s *set) { s.items[0].table = "" },
		"long table":             func(s *set) { s.items[0].table = strings.Repeat("t", 33) },
		"long key":               func(s *set) { s.items[0].key = strings.Repeat("k", 129) },
		"long value":             func(s *set) { s.items[0].value = make([]byte, 4097) },
		"deletion with value":    func(s *set) { s.items[1].value = []byte("v") },
		"deletion in a full set": func(s *set) { s.complete, s.base = true, 0 },
	}
	for what, spoil := range cases {
		s := sample()
		spoil(&s)
		if _, err := parseSet(appendSet(nil, s)); !errors.Is(err, errWire) {
			t.Errorf("%s: got %v", what, err)
		}
	}
}

func TestRequestAndPushOnTheWire(t *testing.T) {
	t.Parallel()
	q := request{
		answer: true, root: 99,
		heads:  map[peer.Name]head{1: {5, 6}, 2: {1 << 40, 1 << 50}},
		states: map[string]uint64{"ipam": 1 << 60},
	}
	got, err := parseRequest(encodeRequest(q))
	if err != nil || !reflect.DeepEqual(got, q) {
		t.Errorf("got %+v, %v, want %+v", got, err, q)
	}
	p := push{"ipam", 7, []byte("state")}
	gotPush, err := parsePush(appendPush(nil, p))
	if err != nil || !reflect.DeepEqual(gotPush, p) {
		t.Errorf("got %+v, %v, want %+v", gotPush, err, p)
	}
}

func TestFrames(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	if err := writeFrame(&b, frameState, []byte("body")); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	typ, body, err := readFrame(bytes.NewReader(whole), 4)
	if typ != frameState || string(body) != "body" || err != nil {
		t.Errorf("got %d, %q, %v", typ, body, err)
	}
	if _, _, err := readFrame(bytes.NewReader(whole), 3); !errors.Is(err, errWire) {
		t.Errorf("too long a frame: %v", err)
	}
	for n := range whole {
		if _, _, err := readFrame(bytes.NewReader(whole[:n]), 100); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d of %d bytes: %v", n, len(whole), err)
		}
	}
}

func TestPartsAndAssembler(t *testing.T) {
	t.Parallel()
	s := set{origin: 1, epoch: 2, seq: 1000, complete: true}
	for i := range uint64(1000) {
		s.items = append(s.items, change{ident{"t", strings.Repeat("k", int(i%100))}, item{seq: i + 1, value: make([]byte, i)}})
	}
	parts := s.parts(10_000)
	if len(parts) < 50 {
		t.Errorf("%d parts", len(parts))
	}
	var a assembler
	for i, p := range parts {
		if n := len(appendSet(nil, p)); n > 10_000 {
			t.Errorf("part of %d bytes", n)
		}
		whole, err := a.add(p)
		if err != nil || (whole != nil) != (i == len(parts)-1) {
			t.Fatalf("part %d of %d: %v, %v", i, len(parts), whole, err)
		}
		if whole != nil && !reflect.DeepEqual(*whole, s) {
			t.Error("the whole differs")
		}
	}
	if _, err := a.add(parts[0]); err != nil {
		t.Fatal(err)
	}
	other := parts[1]
	other.seq++
	if _, err := a.add(other); !errors.Is(err, errWire) {
		t.Errorf("parts of two sets: %v", err)
	}
}

func FuzzParseSet(f *testing.F) {
	f.Add(appendSet(nil, sample()))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSet(b)
		if err != nil {
			return
		}
		again, err := parseSet(appendSet(nil, s))
		if err != nil || len(again.items) != len(s.items) || again.seq != s.seq || again.base != s.base {
			t.Fatalf("%+v became %+v, %v", s, again, err)
		}
		for i := range s.items {
			if !reflect.DeepEqual(again.items[i], s.items[i]) {
				t.Fatalf("%+v became %+v", s.items[i], again.items[i])
			}
		}
		st := newStore(1, 5)
		st.apply(s)
		st.apply(again)
		st.all("t")
	})
}

func FuzzParseRequest(f *testing.F) {
	f.Add(encodeRequest(request{root: 1, heads: map[peer.Name]head{1: {5, 6}}, states: map[string]uint64{"a": 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseRequest(b)
		if err != nil {
			return
		}
		if again, err := parseRequest(encodeRequest(q)); err != nil || !reflect.DeepEqual(again, q) {
			t.Fatalf("%+v became %+v, %v", q, again, err)
		}
	})
}

func FuzzParsePush(f *testing.F) {
	f.Add(appendPush(nil, push{"ipam", 7, []byte("state")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePush(b)
		if err != nil {
			return
		}
		if got := appendPush(nil, p); !bytes.Equal(got, b) {
			t.Fatalf("%x became %x", b, got)
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 1, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, body, err := readFrame(bytes.NewReader(b), 1000)
		if err == nil && (len(body) > 1000 || len(body)+5 > len(b)) {
			t.Fatalf("body of %d bytes from %d", len(body), len(b))
		}
	})
}
