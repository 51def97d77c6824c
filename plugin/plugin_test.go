package plugin

import (
	"net/netip"
	"strings"
	"testing"

	"weave.local/proxy/docker"
)

func TestPoolIdentifiersCarryThePool(t *testing.T) {
	for _, l := range []pool{
		{netip.MustParsePrefix("10.32.0.0/12"), netip.MustParsePrefix("10.32.0.0/12")},
		{netip.MustParsePrefix("192.168.7.0/24"), netip.MustParsePrefix("192.168.7.128/25")},
	} {
		if got, err := parsePool(l.id()); err != nil || got != l {
			t.Errorf("%s: got %v, %v", l.id(), got, err)
		}
	}
	for _, id := range []string{"", "weave-", "weave-10.0.0.0/8", "weave-a-b", "other-10.0.0.0/8-10.0.0.0/8", "weave-10.0.0.0/8-x"} {
		if _, err := parsePool(id); err == nil || !strings.Contains(err.Error(), "want") {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func FuzzParsePool(f *testing.F) {
	f.Add("weave-10.32.0.0/12-10.32.0.0/16")
	f.Fuzz(func(t *testing.T, id string) {
		if l, err := parsePool(id); err == nil {
			if again, err := parsePool(l.id()); err != nil || again != l {
				t.Errorf("%q became %q: %v", id, l.id(), err)
			}
		}
	})
}

func TestPoolsWithoutAllocator(t *testing.T) {
	p := &Plugin{}
	cases := []struct {
		q    poolRequest
		want string // pool identifier, or a word of the error
	}{
		{poolRequest{Pool: "10.5.0.0/16"}, "weave-10.5.0.0/16-10.5.0.0/16"},
		{poolRequest{Pool: "10.5.0.0/16", SubPool: "10.5.7.0/24"}, "weave-10.5.0.0/16-10.5.7.0/24"},
		{poolRequest{Pool: "10.5.0.0/16", SubPool: "10.6.7.0/24"}, "outside"},
		{poolRequest{Pool: "10.5.7.0/24", SubPool: "10.5.0.0/16"}, "outside"},
		{poolRequest{Pool: "10.5.0.1/16"}, "host bits"},
		{poolRequest{Pool: "10.5.0.0/31"}, "too small"},
		{poolRequest{Pool: "fd00::/64"}, "IPv4"},
		{poolRequest{Pool: "x"}, "x"},
		{poolRequest{V6: true}, "IPv4"},
		{poolRequest{}, "switched off"},
	}
	for _, c := range cases {
		a, err := p.requestPool(t.Context(), c.q)
		if got := a.PoolID; err == nil && got != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %q, %v; want %q", c.q, got, err, c.want)
		}
		if err == nil && a.Data[gatewayOption] != a.Pool {
			t.Errorf("%+v: gateway %q, want %q", c.q, a.Data[gatewayOption], a.Pool)
		}
	}
}

func TestGatewaysCostNothing(t *testing.T) {
	l := pool{subnet: netip.MustParsePrefix("10.5.0.0/16")}
	for want, ok := range map[string]bool{"": true, "10.5.0.0": true, "10.5.0.1": false, "10.6.0.1": false, "x": false} {
		a, err := requestGateway(l, want)
		if (err == nil) != ok || ok && a.Address != "10.5.0.0/16" {
			t.Errorf("gateway %q: %+v, %v", want, a, err)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, c := range []struct {
		value    any
		want, ok bool
	}{{"", true, true}, {"true", true, true}, {"0", false, true}, {false, false, true}, {"maybe", false, false}, {7.0, false, false}} {
		if got, err := boolOption(docker.OptionMulticast, c.value); got != c.want || (err == nil) != c.ok {
			t.Errorf("%v: %v, %v", c.value, got, err)
		}
	}
	for s, ok := range map[string]bool{"": true, "7a:0b:1c:2d:3e:4f": true, "7a0b": false, "zz:0b:1c:2d:3e:4f": false} {
		if mac, err := parseMAC(s); (err == nil) != ok || ok && s != "" && mac.String() != s {
			t.Errorf("%q: %v, %v", s, mac, err)
		}
	}
}

// Only one endpoint of a container gets the multicast route.
func TestOneMulticastRoutePerContainer(t *testing.T) {
	p := &Plugin{sandboxes: make(map[string]string)}
	if !p.enterSandbox("s1", "e1") || p.enterSandbox("s1", "e2") || !p.enterSandbox("s2", "e3") {
		t.Error("the first endpoint of each container, and it alone, gets the route")
	}
	p.leaveSandbox("e1")
	if !p.enterSandbox("s1", "e2") {
		t.Error("the route is not free again")
	}
}
