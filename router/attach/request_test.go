package attach

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParseRequest(t *testing.T) {
	p := netip.MustParsePrefix
	for in, want := range map[string]Request{
		"net:default":      {},
		"net:10.32.1.0/24": {Net: p("10.32.1.0/24")},
		"net:10.32.1.4/30": {Net: p("10.32.1.4/30")},
		"ip:10.32.2.9/24":  {IP: p("10.32.2.9/24")},
		"10.32.2.9/24":     {IP: p("10.32.2.9/24")},
	} {
		got, err := ParseRequest(in)
		if err != nil || got != want {
			t.Errorf("ParseRequest(%q) = %v, %v", in, got, err)
		}
		if again, err := ParseRequest(got.String()); err != nil || again != got {
			t.Errorf("ParseRequest(%q) = %v, %v", got.String(), again, err)
		}
	}
	for in, want := range map[string]string{
		"":                    "is no address",
		"none":                "is no address",
		"net:":                "is no address",
		"net:none":            "is no address",
		"10.32.2.9":           "is no address",
		"ip:10.32.2.9/33":     "is no address",
		"net:10.32.1.1/24":    "want net:10.32.1.0/24",
		"net:10.32.1.0/31":    "fewer than four addresses",
		"ip:10.32.1.0/32":     "fewer than four addresses",
		"ip:10.32.1.0/24":     "want a host in it such as 10.32.1.1/24, or net:10.32.1.0/24",
		"fd00::1/64":          "only IPv4",
		"::ffff:10.0.0.1/100": "only IPv4",
	} {
		_, err := ParseRequest(in)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), in) {
			t.Errorf("ParseRequest(%q): error %v, want one with %q and the text itself", in, err, want)
		}
	}
	reqs, err := ParseRequests(" net:default\t net:10.2.2.0/24 ip:10.3.9.1/24 ")
	if err != nil || len(reqs) != 3 || reqs[2].IP != p("10.3.9.1/24") {
		t.Errorf("ParseRequests = %v, %v", reqs, err)
	}
	if reqs, err := ParseRequests("  "); err != nil || len(reqs) != 1 || reqs[0] != (Request{}) {
		t.Errorf("ParseRequests of nothing = %v, %v", reqs, err)
	}
	if _, err := ParseRequests("net:default none"); err == nil {
		t.Error("none among others is accepted")
	}
}

// FuzzParseRequests reads what stands in WEAVE_CIDR, labels and options.
func FuzzParseRequests(f *testing.F) {
	f.Add("net:default net:10.2.2.0/24 ip:10.3.9.1/24 10.3.9.2/24")
	f.Add("ip:fd00::1%eth0/64")
	f.Fuzz(func(t *testing.T, s string) {
		reqs, err := ParseRequests(s)
		if err != nil {
			return
		}
		words := make([]string, len(reqs))
		for i, r := range reqs {
			words[i] = r.String()
			if r.Net.IsValid() && r.IP.IsValid() || r.IP.IsValid() && (!r.IP.Addr().Is4() || r.IP == r.IP.Masked()) ||
				r.Net.IsValid() && (!r.Net.Addr().Is4() || r.Net != r.Net.Masked()) || max(r.Net.Bits(), r.IP.Bits()) > 30 {
				t.Errorf("%q: %+v", s, r)
			}
		}
		again, err := ParseRequests(strings.Join(words, " "))
		if err != nil || !slices.Equal(again, reqs) {
			t.Errorf("%v is read back as %v, %v", reqs, again, err)
		}
	})
}
