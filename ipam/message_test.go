package ipam

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"weave.local/ipam/register"
)

func FuzzParseAsk(f *testing.F) {
	f.Add((&ask{register.Cluster{1}, 2, 3, 4, netip.MustParsePrefix("10.32.1.0/24")}).append()[1:])
	f.Add((&ask{register.Cluster{1}, 2, 3, 4, netip.MustParsePrefix("fd00::1/128")}).append()[1:])
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseAsk(b)
		if err != nil {
			return
		}
		if again, err := parseAsk(q.append()[1:]); err != nil || again != q {
			t.Fatalf("%+v comes back as %+v, %v", q, again, err)
		}
	})
}

func FuzzParseAnswer(f *testing.F) {
	f.Add((&answer{register.Cluster{1}, 2, 3, 4, answerHeld, "container 3f2a"}).append()[1:])
	f.Add((&answer{register.Cluster{1}, 2, 3, 4, answerNone, strings.Repeat("x", 300)}).append()[1:])
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parseAnswer(b)
		if err != nil {
			return
		}
		for _, c := range n.text {
			if c < ' ' || c > '~' {
				t.Fatalf("text %q", n.text)
			}
		}
		if again, err := parseAnswer(n.append()[1:]); err != nil || again != n {
			t.Fatalf("%+v comes back as %+v, %v", n, again, err)
		}
	})
}

func FuzzParseMeeting(f *testing.F) {
	f.Add((&meeting{register.Cluster{1}, netip.MustParsePrefix("10.32.0.0/12"), true}).append()[1:])
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMeeting(b)
		if err != nil {
			return
		}
		if again, err := parseMeeting(m.append()[1:]); err != nil || again != m {
			t.Fatalf("%+v comes back as %+v, %v", m, again, err)
		}
	})
}

func FuzzParseRecords(f *testing.F) {
	f.Add("own/10.32.0.1", []byte{1, 24, 'c'})
	f.Add("give/10.32.0.0-10.32.0.15", []byte{1, 0, 0, 0, 0, 0, 2})
	f.Fuzz(func(t *testing.T, key string, b []byte) {
		if r, err := parseRecord(key, b); err == nil {
			if !r.prefix.IsValid() || !bytes.Equal(r.encode(), b) {
				t.Fatalf("%q is %+v, written %q", b, r, r.encode())
			}
		}
		if r, _, err := parseGive(key, b); err == nil && !r.Valid() {
			t.Fatalf("range %v", r)
		}
	})
}
