package target

import (
	"strings"
	"testing"
)

func TestSplit(t *testing.T) {
	for in, want := range map[string]struct {
		host string
		port uint16
	}{
		"192.0.2.1":         {"192.0.2.1", 6783},
		"192.0.2.1:99":      {"192.0.2.1", 99},
		"2001:db8::1":       {"2001:db8::1", 6783},
		"[2001:db8::1]":     {"2001:db8::1", 6783},
		"[2001:db8::1]:99":  {"2001:db8::1", 99},
		"host.example":      {"host.example", 6783},
		"host.example:6784": {"host.example", 6784},
	} {
		host, port, err := Split(in, 6783)
		if err != nil || host != want.host || port != want.port {
			t.Errorf("%s: %s %d %v", in, host, port, err)
		}
	}
	for _, in := range []string{"", ":99", "a:b", "a:0", "a:65536", "a b", "http://a", "a,b", "[::1", "[a]", "::1]:3"} {
		if host, port, err := Split(in, 6783); err == nil {
			t.Errorf("%q: accepted as %s %d", in, host, port)
		} else if !strings.Contains(err.Error(), "peer ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func FuzzSplit(f *testing.F) {
	f.Add("[2001:db8::1]:99")
	f.Fuzz(func(t *testing.T, s string) {
		if host, port, err := Split(s, 6783); err == nil && (host == "" || port == 0) {
			t.Errorf("%q: %q %d", s, host, port)
		}
	})
}

func TestResolve(t *testing.T) {
	if err := Resolve(t.Context(), []string{"192.0.2.1", "localhost", "[::1]:5"}, 6783); err != nil {
		t.Error(err)
	}
	if err := Resolve(t.Context(), []string{"192.0.2.1", "nowhere.invalid"}, 6783); err != nil {
		t.Errorf("one that may resolve later: %v", err)
	}
	if err := Resolve(t.Context(), []string{"nowhere.invalid"}, 6783); err == nil {
		t.Error("none resolves, and that is all right")
	}
	err := Resolve(t.Context(), []string{"192.0.2.1", "nowhere.invalid", "a:b"}, 6783)
	if err == nil || !strings.Contains(err.Error(), "nowhere.invalid") || !strings.Contains(err.Error(), `"a:b"`) || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}
