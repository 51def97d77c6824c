package bpf

import "testing"

func TestSpoofing(t *testing.T) {
	b := newBench(t)
	const ipv4Type, ipv6Type, arpType = 0x0800, 0x86dd, 0x0806
	me, other := localMAC(), remoteMAC()
	cases := []struct {
		name  string
		frame []byte
		ok    bool
	}{
		{"own IPv4", ethernet(other, me, ipv4Type, ipv4("10.32.0.1")), true},
		{"DHCP", ethernet(broadcast(), me, ipv4Type, ipv4("0.0.0.0")), true},
		{"own IPv6", ethernet(other, me, ipv6Type, ipv6("fd00::1")), true},
		{"link-local", ethernet(other, me, ipv6Type, ipv6("fe80::1")), true},
		{"duplicate address detection", ethernet(other, me, ipv6Type, ipv6("::")), true},
		{"ARP", ethernet(broadcast(), me, arpType, arp(me, "10.32.0.1")), true},
		{"ARP probe", ethernet(broadcast(), me, arpType, arp(me, "0.0.0.0")), true},
		{"other protocol", ethernet(other, me, 0x88b6), true},
		{"another's MAC", ethernet(other, other, ipv4Type, ipv4("10.32.0.1")), false},
		{"another's IPv4", ethernet(other, me, ipv4Type, ipv4("10.32.0.2")), false},
		{"another's IPv6", ethernet(other, me, ipv6Type, ipv6("fd00::2")), false},
		{"mapped IPv6", ethernet(other, me, ipv6Type, ipv6("::1")), false},
		{"ARP for another", ethernet(broadcast(), me, arpType, arp(me, "10.32.0.2")), false},
		{"ARP with another's MAC", ethernet(broadcast(), me, arpType, arp(other, "10.32.0.1")), false},
		{"VLAN 0", ethernet(other, me, 0x8100, []byte{0, 0, 8, 0}, ipv4("10.32.0.1")), false},
	}
	for _, c := range cases {
		verdict := b.plain(PortIn, c.frame)
		if c.ok {
			b.want(c.name, outcome{Verdict: verdict}, verdictPass)
		} else {
			b.want(c.name, outcome{Verdict: verdict}, verdictDrop, "dropped_spoofed")
		}
	}
	// A port of any source may lie about IP, and about its MAC as long as it
	// takes nobody's that was announced.
	ports, err := b.Ports.All()
	p := ports[1]
	p.AnySource = true
	b.must(err, b.Ports.Put(1, p))
	for _, c := range cases {
		verdict, name := b.plain(PortIn, c.frame), c.name+" by a port of any source"
		switch c.name {
		case "another's MAC", "VLAN 0":
			b.want(name, outcome{Verdict: verdict}, verdictDrop, "dropped_spoofed")
		default:
			b.want(name, outcome{Verdict: verdict}, verdictPass)
		}
	}
	p = ports[1]
	p.Moved = true
	b.must(b.Ports.Put(1, p))
	b.want("moved on", outcome{Verdict: b.plain(PortIn, cases[0].frame)}, verdictDrop, "dropped_spoofed")
	b.must(b.Ports.Delete(1))
	verdict := b.plain(PortIn, cases[0].frame)
	b.want("unknown port", outcome{Verdict: verdict}, verdictDrop, "dropped_unknown_port")
}

func TestIsolation(t *testing.T) {
	b := newBench(t)
	to := func(src MAC) []byte { return ethernet(localMAC(), src, 0x0800, ipv4("10.32.0.4")) }
	cases := []struct {
		name    string
		frame   []byte
		verdict uint32
		counted []string
	}{
		{"same subnet", to(remoteMAC()), verdictPass, nil},
		{"other subnet", to(foreignMAC()), verdictDrop, []string{"dropped_isolated"}},
		{"unknown sender", to(unknownMAC()), verdictDrop, []string{"dropped_unknown_mac"}},
		{"broadcast from another subnet", ethernet(broadcast(), foreignMAC(), 0x0806, arp(foreignMAC(), "10.32.0.4")),
			verdictDrop, []string{"dropped_isolated"}},
	}
	for _, c := range cases {
		b.want(c.name, outcome{Verdict: b.plain(PortOut, c.frame)}, c.verdict, c.counted...)
	}
	// Endpoints in as many subnets as possible meet in the last one.
	many := subnets(t, "10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24", "10.4.0.0/24", "10.5.0.0/24", "10.6.0.0/24", "10.7.0.0/24", "10.8.0.0/24")
	other := subnets(t, "10.9.0.0/24", "10.10.0.0/24", "10.11.0.0/24", "10.12.0.0/24", "10.13.0.0/24", "10.14.0.0/24", "10.15.0.0/24", "10.8.0.0/24")
	b.must(b.Ports.Put(1, Port{MAC: localMAC(), Subnets: many}), b.Endpoints.Put(remoteMAC(), Endpoint{Peer: beyond, Subnets: other}))
	b.want("last of eight", outcome{Verdict: b.plain(PortOut, to(remoteMAC()))}, verdictPass)
	other[7] = 0
	b.must(b.Endpoints.Put(remoteMAC(), Endpoint{Peer: beyond, Subnets: other}))
	b.want("none of eight", outcome{Verdict: b.plain(PortOut, to(remoteMAC()))}, verdictDrop, "dropped_isolated")
	b.must(b.Endpoints.Put(remoteMAC(), Endpoint{Peer: beyond}), b.Ports.Put(1, Port{MAC: localMAC()}))
	b.want("no subnets at all", outcome{Verdict: b.plain(PortOut, to(remoteMAC()))}, verdictDrop, "dropped_isolated")
}
