package link

import (
	"bytes"
	"encoding/hex"
	"testing"
)

// The layouts are a promise to peers of other versions.
func TestFrameLayouts(t *testing.T) {
	for what, c := range map[string]struct {
		got  []byte
		want string
	}{
		"hello":     {helloFrame(0x0102030405060708), "00000009" + "01" + "0102030405060708"},
		"datagram":  {datagram{64, 0xa1, 0xb2, 9, []byte("hi")}.frame(), "00000011" + "03" + "40" + "0000000000a1" + "0000000000b2" + "09" + "6869"},
		"broadcast": {broadcast{63, 0xb2, 5, 9, []byte("hi")}.frame(), "00000013" + "04" + "3f" + "0000000000b2" + "0000000000000005" + "09" + "6869"},
		"bye":       {frame(typeBye, []byte("x")), "00000002" + "05" + "78"},
		"stream":    {streamTo{64, 0xa1, 0xb2}.head(), "01" + "40" + "0000000000a1" + "0000000000b2"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s: %s, want %s", what, got, c.want)
		}
	}
}

func FuzzParseFrames(f *testing.F) {
	f.Add(datagram{64, 1, 2, 9, []byte("hi")}.frame()[headSize:])
	f.Add(broadcast{64, 2, 5, 9, []byte("hi")}.frame()[headSize:])
	f.Add(streamTo{64, 1, 2}.head())
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := parseDatagram(b); err == nil && !bytes.Equal(d.frame()[headSize:], b) {
			t.Errorf("datagram %+v", d)
		}
		if c, err := parseBroadcast(b); err == nil && !bytes.Equal(c.frame()[headSize:], b) {
			t.Errorf("broadcast %+v", c)
		}
		if s, err := parseStreamTo(b); err == nil && !bytes.Equal(s.head(), b) {
			t.Errorf("stream %+v", s)
		}
	})
}

func TestWindow(t *testing.T) {
	w := &window{}
	for i, step := range []struct {
		seq   uint64
		fresh bool
	}{
		{100, true}, {100, false}, {102, true}, {101, true}, {101, false}, {100, false},
		{38, false}, {39, true}, {1000, true}, {937, true}, {936, false}, {102, false}, {1000, false},
	} {
		if got := w.fresh(step.seq); got != step.fresh {
			t.Errorf("step %d: %d fresh %v", i, step.seq, got)
		}
	}
}

func TestQueue(t *testing.T) {
	q := newQueue()
	q.push([]byte("later"), false)
	q.push([]byte("first"), true)
	for _, want := range []string{"first", "later"} {
		if f, ok := q.pop(); !ok || string(f) != want {
			t.Errorf("got %q %v, want %q", f, ok, want)
		}
	}
	for range queueFrames {
		if !q.push([]byte("x"), false) {
			t.Fatal("full too early")
		}
	}
	if q.push([]byte("x"), false) {
		t.Error("no bound on frames")
	}
	if !q.push([]byte("x"), true) {
		t.Error("ordinary frames keep out urgent ones")
	}
	q.end([]byte("bye"))
	if f, ok := q.pop(); !ok || string(f) != "bye" {
		t.Errorf("last words %q %v", f, ok)
	}
	if f, ok := q.pop(); ok {
		t.Errorf("after the last words %q", f)
	}
	if q.push([]byte("x"), true) {
		t.Error("took a frame after the end")
	}

	q = newQueue()
	big := make([]byte, MaxPayload)
	n := 0
	for q.push(big, false) {
		n++
	}
	if n*MaxPayload > queueBytes || n < 2 {
		t.Errorf("%d large frames held", n)
	}
}
