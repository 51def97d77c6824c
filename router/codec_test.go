package router

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"weave.local/router/overlay"
)

func TestEndpointRoundTrip(t *testing.T) {
	mac := overlay.MAC{2, 0, 0, 0, 0, 9}
	addrs := []netip.Prefix{netip.MustParsePrefix("10.32.0.1/12"), netip.MustParsePrefix("fd00::1/64")}
	for _, anySource := range []bool{false, true} {
		b := encodeEndpoint(77, overlay.Endpoint{Addrs: addrs, AnySource: anySource})
		for _, b := range [][]byte{b, append(b, 0xff)} { // a flag of ours, or a field of a later version
			ep, seq, err := parseEndpoint(string(mac[:]), b)
			if err != nil || seq != 77 || ep.MAC != mac || !slices.Equal(ep.Addrs, addrs) {
				t.Errorf("got %v %d %v", ep, seq, err)
			}
		}
		if ep, _, _ := parseEndpoint(string(mac[:]), b); ep.AnySource != anySource {
			t.Errorf("any source %t came out as %t", anySource, ep.AnySource)
		}
	}
}

func FuzzParseEndpoint(f *testing.F) {
	f.Add("\x02\x00\x00\x00\x00\x09", encodeEndpoint(1, overlay.Endpoint{Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}}))
	f.Fuzz(func(t *testing.T, key string, b []byte) {
		ep, seq, err := parseEndpoint(key, b)
		if err != nil {
			return
		}
		again, seq2, err := parseEndpoint(key, encodeEndpoint(seq, ep))
		if err != nil || seq2 != seq || !slices.Equal(again.Addrs, ep.Addrs) || again.AnySource != ep.AnySource {
			t.Errorf("%x: %v %d, again %v %d %v", b, ep, seq, again, seq2, err)
		}
	})
}

func TestMessageRoundTrip(t *testing.T) {
	m, err := parseMessage(answer(overlay.Sleeve, 0x1122334455667788))
	if err != nil || m.typ != typeAnswer || m.path != overlay.Sleeve || m.token != 0x1122334455667788 {
		t.Errorf("answer: %+v %v", m, err)
	}
	m, err = parseMessage(append(report(6, "no BPF\x1b"), "a later field"...))
	if err != nil || m.typ != typeReport || m.health != 6 || m.lacks != "no BPF" {
		t.Errorf("report: %+v %v", m, err)
	}
	m, err = parseMessage(report(6, "")[:3]) // of a peer that knows of no more
	if err != nil || m.health != 6 || m.lacks != "" {
		t.Errorf("short report: %+v %v", m, err)
	}
	long := strings.Repeat("x", 1000)
	if m, err = parseMessage(report(6, long)); err != nil || m.lacks != long[:maxLacks] {
		t.Errorf("long report: %+v %v", m, err)
	}
}

func FuzzParseMessage(f *testing.F) {
	f.Add(answer(overlay.FastDP, 1))
	f.Add(report(2, "words"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMessage(b)
		if err == nil && m.typ == typeAnswer && m.path == "" {
			t.Errorf("%x: answer for no path", b)
		}
	})
}
