package plugin

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

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

// FuzzRequests sends requests of the remote driver protocol that change
// nothing: whatever the body, there is one answer, which is JSON, and a pool
// that is given has the subnet it says.
func FuzzRequests(f *testing.F) {
	methods := []string{
		"Plugin.Activate", "IpamDriver.RequestPool", "IpamDriver.RequestAddress", "IpamDriver.ReleaseAddress",
		"NetworkDriver.CreateNetwork", "NetworkDriver.DeleteNetwork", "NetworkDriver.Leave",
	}
	for i, body := range []string{
		`{}`, `{"Pool":"10.5.0.0/16","SubPool":"10.5.7.0/24"}`, `{"PoolID":"weave-10.5.0.0/16-10.5.0.0/16","Options":{"RequestAddressType":"com.docker.network.gateway"}}`,
		`{"PoolID":"weave-10.5.0.0/16-10.5.0.0/16","Address":"10.5.0.0"}`, `{"Options":{"com.docker.network.generic":{"works.weave.multicast":"x"}},"IPv4Data":[{}]}`,
	} {
		f.Add(byte(i), []byte(body))
	}
	f.Fuzz(func(t *testing.T, method byte, body []byte) {
		p := &Plugin{
			cfg:      Config{Log: slog.New(slog.DiscardHandler)},
			networks: make(map[string]traits), subnets: make(map[netip.Prefix]bool), sandboxes: make(map[string]string), pending: make(map[netip.Addr]time.Time),
		}
		name := methods[int(method)%len(methods)]
		var q addressRequest
		if err := json.Unmarshal(body, &q); err == nil && name == "IpamDriver.RequestAddress" && q.Options[typeOption] != gatewayOption {
			return // what is no gateway is for the allocator and those attached
		}
		w := httptest.NewRecorder()
		p.routes().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/"+name, bytes.NewReader(body)))
		var a struct{ PoolID, Pool, Address, Err string }
		if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil || (w.Code == http.StatusOK) != (a.Err == "") {
			t.Fatalf("%s %q: %d %s, %v", name, body, w.Code, w.Body, err)
		}
		if a.PoolID == "" {
			return
		}
		l, err := parsePool(a.PoolID)
		if err != nil || l.subnet.String() != a.Pool || !l.subnet.Contains(l.part.Addr()) || l.part.Bits() < l.subnet.Bits() {
			t.Errorf("%q gives pool %s in %s, %v", body, a.PoolID, a.Pool, err)
		}
	})
}

func FuzzParseMAC(f *testing.F) {
	f.Add("7a:0b:1c:2d:3e:4f")
	f.Fuzz(func(t *testing.T, s string) {
		if mac, err := parseMAC(s); err == nil && s != "" {
			if again, err := parseMAC(mac.String()); err != nil || again != mac {
				t.Errorf("%q is %s, then %s, %v", s, mac, again, err)
			}
		}
	})
}
