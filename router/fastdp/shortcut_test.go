package fastdp

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"weave.local/router/bpf"
	"weave.local/router/overlay"
)

// recheck looks as if what is known of rules had grown old.
func (l line) recheck(i int) string {
	l[i].t.Helper()
	d := l[i].dp
	d.mu.Lock()
	d.checked = time.Time{}
	d.mu.Unlock()
	l[i].must(d.refreshRules)
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.barred
}

// Rules for bridged frames are obeyed: while there are any, frames take the
// bridge, and they change over without loss.
func TestRulesBarTheShortcut(t *testing.T) {
	l := newLine(t, 1500)
	a := l[0]
	a1, b1 := a.container("10.32.0.1/24"), l[1].container("10.32.0.2/24")
	b1.echo()
	l.apply(nil)
	if !a1.reaches(b1.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	run := func(commands ...string) {
		t.Helper()
		for _, c := range commands {
			if _, err := a.output(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	run("sysctl -qw net.bridge.bridge-nf-call-iptables=1", "iptables -N WEAVE-X", "iptables -A WEAVE-X -i weave -o weave -j ACCEPT",
		"iptables -A FORWARD -j WEAVE-X", "iptables -A FORWARD -s 172.17.0.0/16 -j ACCEPT")
	if why := l.recheck(0); why != "" {
		t.Fatalf("barred by nothing: %s", why)
	}
	for _, c := range []struct{ name, set, drop, clear string }{
		{"physdev", "", "iptables -I FORWARD -m physdev --physdev-in c1 -j DROP", "iptables -D FORWARD 1"},
		{"address", "", "iptables -I FORWARD -d 10.32.0.2 -j DROP", "iptables -D FORWARD 1"},
		{"nft", "nft add table bridge x; nft add chain bridge x f {type_filter}",
			"nft add rule bridge x f ip daddr 10.32.0.2 drop", "nft delete table bridge x"},
		{"policy", "nft add table bridge y", "nft add chain bridge y f {type_drop}", "nft delete table bridge y"},
	} {
		expand := strings.NewReplacer("{type_filter}", "{ type filter hook forward priority 0 ; }",
			"{type_drop}", "{ type filter hook forward priority 0 ; policy drop ; }")
		if c.set != "" {
			for _, s := range strings.Split(c.set, "; ") {
				run(expand.Replace(s))
			}
		}
		before := a.counter("shortcut")
		if !a1.reaches(b1.addr(), 100) || a.counter("shortcut") == before {
			t.Errorf("%s: frames do not go past the bridge at first", c.name)
		}
		run(expand.Replace(c.drop))
		if why := l.recheck(0); why == "" {
			t.Errorf("%s: not barred", c.name)
		}
		if !a1.silent(b1.addr()) {
			t.Errorf("%s: the rule is passed by", c.name)
		}
		run(c.clear)
		if why := l.recheck(0); why != "" {
			t.Errorf("%s: still barred: %s", c.name, why)
		}
	}
	run("tc qdisc add dev c1 root pfifo")
	if why := l.recheck(0); !strings.Contains(why, "pfifo") {
		t.Errorf("traffic control: barred by %q", why)
	}
	run("tc qdisc del dev c1 root")
	l.recheck(0)
	sent, back := a1.during(b1.addr(), func() {
		for range 5 { // a rule that does nothing
			run("nft add table bridge z", "nft add chain bridge z f", "nft add rule bridge z f accept")
			l.recheck(0)
			run("nft delete table bridge z")
			l.recheck(0)
		}
	})
	if sent != back {
		t.Errorf("of %d datagrams %d came back while the way changed", sent, back)
	}
}

func TestRuleAbout(t *testing.T) {
	subnets := []netip.Prefix{netip.MustParsePrefix("10.32.0.0/24"), netip.MustParsePrefix("fd00::/64")}
	for text, want := range map[string]bool{
		"-P FORWARD DROP":                                   false,
		"-A FORWARD -o docker0 -j DOCKER":                   false,
		"-A FORWARD -j DOCKER-USER":                         false,
		"-A WEAVE-FORWARD -i weave -o weave -j ACCEPT":      false,
		"-A DOCKER -d 172.17.0.2/32 -p tcp -j ACCEPT":       false,
		"-A FORWARD -m physdev --physdev-is-bridged":        true,
		"-A FORWARD -o weave -j DROP":                       true,
		"-A FORWARD -o wea+ -j DROP":                        true,
		"-A FORWARD -s 10.0.0.0/8 -j DROP":                  true,
		"-A X -j DNAT --to-destination 10.32.0.5:80":        true,
		"-A X -j DNAT --to-destination 10.31.0.5-10.32.0.9": true,
		"-A X -m set --match-set blocked src -j DROP":       true,
		"-A X -d fd00::7/128 -j DROP":                       true,
		"-A X -d fd00:1::7/128 -j DROP":                     false,
		"chain WEAVE-FORWARD {\nip saddr 10.32.0.1 drop":    false,
		"chain other {\nip saddr 10.32.0.1 drop":            true,
		"chain other {\noifname \"weave\" drop":             true,
		"chain other {\nmeta ibrname \"br7\" drop":          true,
		"chain other {\nip saddr @blocked drop":             true,
		"chain WEAVE {\n}\nchain x {\nip daddr 10.32.0.1,":  true,
	} {
		if got := ruleAbout(text, "weave", subnets); (got != "") != want {
			t.Errorf("%q: found %q, want %v", text, got, want)
		}
	}
}

// arp is a broadcast request for the holder of an address.
func (c *container) arp(target netip.Addr) []byte {
	f := append([]byte{255, 255, 255, 255, 255, 255}, c.port.MAC[:]...)
	f = append(f, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	f = append(append(f, c.port.MAC[:]...), c.addr().AsSlice()...)
	return append(append(f, 0, 0, 0, 0, 0, 0), target.AsSlice()...)
}

// Requests for announced addresses stay on the host, however many there are.
func TestARPStaysLocal(t *testing.T) {
	const storm = 500
	l := newLine(t, 1500)
	a, b := l[0], l[1]
	a1, a2, b1 := a.container("10.32.0.1/24"), a.container("10.32.0.2/24"), b.container("10.32.0.3/24")
	a2.echo()
	b1.echo()
	l.apply(nil)
	for _, x := range []*container{a2, b1} {
		answered, flooded := a.counter("arp_answered"), a.counter("flooded")
		if !a1.reaches(x.addr(), 100) {
			t.Errorf("%s is not reached", x.addr())
		}
		for range storm {
			a1.raw(a1.arp(x.addr()))
		}
		if n := a.counter("arp_answered") - answered; n < storm {
			t.Errorf("%s: %d requests of %d were answered", x.addr(), n, storm)
		}
		if n := a.counter("flooded") - flooded; n > storm/10 {
			t.Errorf("%s: %d frames were flooded", x.addr(), n)
		}
	}
	// The address moves to another container of the same host.
	a.must(func() error { return a.dp.RemovePort(a2.port.IfIndex) })
	before := a.counter("arp_answered")
	a1.raw(a1.arp(a2.addr()))
	if a.counter("arp_answered") != before {
		t.Error("answered for a container that is gone")
	}
	a3 := a.attach("10.32.0.2/24")
	a3.echo()
	a.must(func() error { return a.dp.SetPort(a3.port) })
	a1.ip("neigh flush all")
	if !a1.reaches(a3.addr(), 100) {
		t.Error("the address is not reached where it is now")
	}
}

func TestDisputedAddress(t *testing.T) {
	list := []overlay.Endpoint{
		{MAC: overlay.MAC{2, 1}, Peer: 2, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.1/24"), netip.MustParsePrefix("10.32.0.2/24")}},
		{MAC: overlay.MAC{2, 2}, Peer: 3, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.2/24")}},
		{MAC: overlay.MAC{2, 1}, Peer: 2, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.2/24")}},
	}
	got := addressesOf(list)
	if len(got) != 1 || got[bpf.AddrOf(netip.MustParseAddr("10.32.0.1"))] != (bpf.MAC{2, 1}) {
		t.Errorf("holders %v", got)
	}
}
