package message

import (
	"net/netip"
	"strings"
	"testing"

	"weave.local/ipam/register"
)

func FuzzParseAsk(f *testing.F) {
	f.Add((&Ask{register.Cluster{1}, 2, 3, 4, netip.MustParsePrefix("10.32.1.0/24")}).Append()[1:])
	f.Add((&Ask{register.Cluster{1}, 2, 3, 4, netip.MustParsePrefix("fd00::1/128")}).Append()[1:])
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := ParseAsk(b)
		if err != nil {
			return
		}
		if again, err := ParseAsk(q.Append()[1:]); err != nil || again != q {
			t.Fatalf("%+v comes back as %+v, %v", q, again, err)
		}
	})
}

func FuzzParseAnswer(f *testing.F) {
	f.Add((&Answer{register.Cluster{1}, 2, 3, 4, Held, "container 3f2a"}).Append()[1:])
	f.Add((&Answer{register.Cluster{1}, 2, 3, 4, None, strings.Repeat("x", 300)}).Append()[1:])
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := ParseAnswer(b)
		if err != nil {
			return
		}
		for _, c := range n.Text {
			if c < ' ' || c > '~' {
				t.Fatalf("text %q", n.Text)
			}
		}
		if again, err := ParseAnswer(n.Append()[1:]); err != nil || again != n {
			t.Fatalf("%+v comes back as %+v, %v", n, again, err)
		}
	})
}

func FuzzParseMeeting(f *testing.F) {
	f.Add((&Meeting{register.Cluster{1}, netip.MustParsePrefix("10.32.0.0/12"), true}).Append()[1:])
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseMeeting(b)
		if err != nil {
			return
		}
		if again, err := ParseMeeting(m.Append()[1:]); err != nil || again != m {
			t.Fatalf("%+v comes back as %+v, %v", m, again, err)
		}
	})
}
