package attach

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"weave.local/router/firewall"
	"weave.local/router/netdev"
	"weave.local/router/netdev/netdevtest"
)

// outside makes a machine behind the host that routes the given ranges through
// it; the host forwards nothing by itself:
//
//	outside 192.0.2.2 --- 192.0.2.1 host === weave
func outside(t *testing.T, ranges ...string) string {
	t.Helper()
	ns := netdevtest.Namespace(t)
	netdevtest.In(t, "", "ip", "link", "add", "lan", "type", "veth", "peer", "name", "eth0", "netns", ns)
	if err := netdev.SetSysctl("ipv6/conf/lan/disable_ipv6", "1"); err != nil { // it would find itself addresses
		t.Fatal(err)
	}
	netdevtest.In(t, "", "ip", "addr", "add", "192.0.2.1/24", "dev", "lan")
	netdevtest.In(t, "", "ip", "link", "set", "lan", "up")
	netdevtest.In(t, ns, "ip", "addr", "add", "192.0.2.2/24", "dev", "eth0")
	netdevtest.In(t, ns, "ip", "link", "set", "eth0", "up")
	for _, r := range ranges {
		netdevtest.In(t, ns, "ip", "route", "add", r, "via", "192.0.2.1")
	}
	netdevtest.In(t, "", "iptables", "-P", "FORWARD", "DROP")
	if err := netdev.SetSysctl("ipv4/ip_forward", "0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		netdevtest.In(t, "", "ip", "link", "del", "lan")
		netdevtest.In(t, "", "iptables", "-P", "FORWARD", "ACCEPT")
	})
	return ns
}

func (h *host) expose(o ExposeOptions, reqs []Request) {
	h.t.Helper()
	if _, err := h.Expose(h.t.Context(), reqs, o); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) hide(want int, reqs []Request) {
	h.t.Helper()
	got, err := h.Hide(h.t.Context(), reqs)
	if err != nil || len(got) != want {
		h.t.Fatalf("Hide = %v, %v, want %d", got, err, want)
	}
}

func TestExpose(t *testing.T) {
	netdevtest.Need(t)
	behind := outside(t, "10.2.0.0/16", "10.3.0.0/16")
	before := netdevtest.Host(t)
	h := newHost(t)
	red, blue, pink := netdevtest.Namespace(t), netdevtest.Namespace(t), netdevtest.Namespace(t)
	h.attach("red", red, ip("10.2.0.5/16"))
	h.attach("pink", pink, ip("10.2.0.6/16"))
	h.attach("blue", blue, ip("10.3.0.5/16"))
	// A container that uses the host as its router, to wherever that leads.
	netdevtest.In(t, red, "ip", "route", "add", "default", "via", "10.2.0.1")
	netdevtest.In(t, blue, "ip", "route", "add", "default", "via", "10.3.0.1")

	mustReach(t, pink, red, "10.2.0.5", "10.2.0.6") // though the host forwards nothing by default
	mustNotReach(t, "", red, "10.2.0.5")
	launched := netdevtest.Host(t)
	h.expose(ExposeOptions{}, ip("10.2.0.1/16"))
	h.expose(ExposeOptions{}, ip("10.2.0.1/16"))
	h.wantAddrs(HostID, "", testBridge, "10.2.0.1/16")
	if r := netdevtest.In(t, "", "ip", "route"); !strings.Contains(r, "10.2.0.0/16 dev weave proto kernel scope link src 10.2.0.1") {
		t.Errorf("routes: %s", r)
	}
	mustReach(t, "", red, "10.2.0.5", "10.2.0.1")
	mustReach(t, red, "", "10.2.0.1", "10.2.0.5")
	mustReach(t, behind, red, "10.2.0.5", "10.2.0.1")
	mustReach(t, red, behind, "192.0.2.2", "192.0.2.1")
	mustNotReach(t, behind, blue, "10.3.0.5")

	// A second subnet; the host is no way from one to the other.
	h.expose(ExposeOptions{NoMasquerade: true}, ip("10.3.0.1/16"))
	h.wantAddrs(HostID, "", testBridge, "10.2.0.1/16", "10.3.0.1/16")
	mustReach(t, pink, red, "10.2.0.5", "10.2.0.6")
	mustReach(t, behind, blue, "10.3.0.5", "192.0.2.2")
	mustReach(t, blue, behind, "192.0.2.2", "10.3.0.5")
	mustReach(t, behind, red, "10.2.0.5", "10.2.0.1")
	mustNotReach(t, red, blue, "10.3.0.5")
	mustNotReach(t, blue, red, "10.2.0.5")

	h.hide(1, ip("10.3.0.1/16"))
	h.wantAddrs(HostID, "", testBridge, "10.2.0.1/16")
	mustNotReach(t, behind, blue, "10.3.0.5")
	mustReach(t, behind, red, "10.2.0.5", "10.2.0.1")
	h.hide(1, []Request{{Net: p("10.2.0.0/16")}})
	h.hide(0, []Request{{Net: p("10.2.0.0/16")}})
	h.wantAddrs(HostID, "", testBridge)
	mustNotReach(t, "", red, "10.2.0.5")
	mustNotReach(t, behind, red, "10.2.0.5")
	if d := netdevtest.Changes(withoutForwarding(launched), withoutForwarding(netdevtest.Host(t))); d != "" {
		t.Errorf("hide leaves:\n%s", d)
	}
	if err := h.RemoveAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := netdevtest.Changes(before, netdevtest.Host(t)); d != "" {
		t.Errorf("the host has changed:\n%s", d)
	}
}

// withoutForwarding leaves out what stays switched on until the end, and the
// nat table, which the kernel shows once it was used.
func withoutForwarding(host string) string {
	lines := slices.DeleteFunc(strings.Split(host, "\n"), func(l string) bool {
		return strings.Contains(l, "/forwarding") || strings.Contains(l, "ip_forward") || strings.Contains(l, "redirects")
	})
	return strings.Join(lines, "\n")
}

func TestExposureComesBack(t *testing.T) {
	behind := outside(t, "10.2.0.0/16")
	h := newHost(t)
	red := netdevtest.Namespace(t)
	h.attach("red", red, ip("10.2.0.5/16"))
	netdevtest.In(t, red, "ip", "route", "add", "default", "via", "10.2.0.1")
	h.expose(ExposeOptions{NoMasquerade: true}, ip("10.2.0.1/16"))
	mustReach(t, behind, red, "10.2.0.5", "192.0.2.2")

	// The daemon comes back, and once the whole machine does.
	h.restart()
	h.wantAddrs(HostID, "", testBridge, "10.2.0.1/16")
	mustReach(t, behind, red, "10.2.0.5", "192.0.2.2")
	for _, harm := range []string{"ip link del weave", "iptables -F FORWARD", "iptables -F WEAVE-FORWARD"} {
		netdevtest.In(t, "", strings.Fields(harm)...)
	}
	if err := netdev.SetSysctl("ipv4/ip_forward", "0"); err != nil {
		t.Fatal(err)
	}
	h.restart()
	h.wantAddrs(HostID, "", testBridge, "10.2.0.1/16")
	h.wantAddrs("red", red, "ethwe", "10.2.0.5/16")
	mustReach(t, behind, red, "10.2.0.5", "192.0.2.2")

	// Without a journal the address on the bridge speaks for itself.
	for key := range h.store.All() {
		if strings.HasPrefix(key, keyHost) {
			if err := h.store.Delete(key); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.restart()
	h.wantAddrs(HostID, "", testBridge, "10.2.0.1/16")
}

func TestExposeNeedsIPTables(t *testing.T) {
	h := newHost(t)
	before := netdevtest.Host(t)
	path := t.TempDir()
	t.Run("without", func(t *testing.T) {
		t.Setenv("PATH", path)
		if _, err := h.Expose(t.Context(), ip("10.2.0.1/16"), ExposeOptions{}); !errors.Is(err, firewall.ErrNoIPTables) {
			t.Errorf("error %v", err)
		}
	})
	h.wantAddrs(HostID, "", testBridge)
	if d := netdevtest.Changes(before, netdevtest.Host(t)); d != "" || len(h.store.All()) != 0 {
		t.Errorf("left over: journal %v, host:\n%s", h.store.All(), d)
	}
}

func TestExposedAddressIsTaken(t *testing.T) {
	h := newHost(t)
	h.expose(ExposeOptions{}, ip("10.2.0.1/16"))
	red := netdevtest.Namespace(t)
	_, err := h.Attach(t.Context(), Target{ID: "red", NetNS: red}, ip("10.2.0.1/16"))
	if err == nil || !strings.Contains(err.Error(), "10.2.0.1 is held by the host itself") {
		t.Errorf("error %v", err)
	}
	if _, err := h.Expose(t.Context(), nil, ExposeOptions{}); err == nil || !strings.Contains(err.Error(), "allocation is switched off") {
		t.Errorf("error %v", err)
	}
}
