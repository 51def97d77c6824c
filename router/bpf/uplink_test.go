package bpf

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	vxlanPort = 6784
	// outerLen is what a frame travels in: Ethernet, IPv4, UDP and VXLAN.
	outerLen = 14 + 20 + 8 + 8
	uplink   = 1 // interface index: the device that test runs take place on
)

func localAddr() netip.Addr { return netip.MustParseAddr("192.0.2.1") }

// withDirect lets frames go past the VXLAN device to and from both neighbours.
func (b *bench) withDirect() {
	b.t.Helper()
	b.withShortcut()
	c, err := b.Config()
	b.must(err)
	c.Port, c.DirectUntil = vxlanPort, monotonic(b.t)+time.Minute
	b.must(b.SetConfig(c))
	for id, remote := range map[uint16]netip.Addr{left: leftAddr(), beyond: leftAddr(), right: rightAddr()} {
		via := min(id, left)
		if id == right {
			via = right
		}
		h := Hop{Kind: KindVXLAN, Via: via, MTU: 1450, Remote: remote, Local: localAddr(), Uplink: uplink, Gateway: remote}
		b.must(b.Hops.Put(id, h))
		b.must(b.Neighbours.Put(AddrOf(remote), Neighbour{N: 1, ID: [MaxSharing]uint16{via}, Local: localAddr(), Uplink: uplink}))
	}
}

func monotonic(t testing.TB) time.Duration {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}

// vxlan is a frame as it travels.
func vxlan(from, to netip.Addr, src, dst uint32, ttl byte, frame []byte) []byte {
	p := make([]byte, outerLen, outerLen+len(frame))
	p[12] = 8
	h := p[14:]
	h[0], h[8], h[9] = 0x45, ttl, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(h[2:], uint16(outerLen-14+len(frame)))
	h[6] = 0x40 // DF
	copy(h[12:], from.AsSlice())
	copy(h[16:], to.AsSlice())
	binary.BigEndian.PutUint16(h[10:], ^sum16(h[:20]))
	binary.BigEndian.PutUint16(h[20:], 40000)
	binary.BigEndian.PutUint16(h[22:], vxlanPort)
	binary.BigEndian.PutUint16(h[24:], uint16(outerLen-14-20+len(frame)))
	h[28] = 8
	binary.BigEndian.PutUint32(h[32:], (src|dst<<12)<<8)
	return append(p, frame...)
}

// sum16 is the sum of RFC 1071.
func sum16(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

func (b *bench) test(p Program, frame []byte) (outcome, []byte) {
	b.t.Helper()
	b.before = b.counters()
	verdict, after, err := b.program(p).Test(frame)
	b.must(err)
	return outcome{Verdict: verdict}, after
}

func udpOver(ip []byte) []byte {
	ip = bytes.Clone(ip)
	ip[9] = unix.IPPROTO_UDP
	return ip
}

func TestDirectOut(t *testing.T) {
	b := newBench(t)
	b.withDirect()
	packet := udpOver(ipv4("10.32.0.1"))
	packet[1] = 1 // ECN: the transport can be told of congestion
	frame := ethernet(remoteMAC(), localMAC(), 0x0800, packet)
	o, got := b.test(PortIn, frame)
	b.want("to an endpoint behind a neighbour", o, verdictRedirect, "tx", "shortcut", "direct_tx")
	want := vxlan(localAddr(), leftAddr(), self, beyond, 63, frame)
	want[15] = 1
	binary.BigEndian.PutUint16(want[24:], 0)
	binary.BigEndian.PutUint16(want[24:], ^sum16(want[14:34]))
	if len(got) != len(want) || !bytes.Equal(got[14:34], want[14:34]) || !bytes.Equal(got[36:], want[36:]) {
		t.Errorf("sent as\n%x, want\n%x", got, want)
	}
	if port := binary.BigEndian.Uint16(got[34:]); port < 32768 {
		t.Errorf("source port %d is no ephemeral one", port)
	}

	c, err := b.Config()
	b.must(err)
	for name, spoil := range map[string]func(){
		"nobody watches":           func() { c.DirectUntil = monotonic(t) - 1; b.must(b.SetConfig(c)) },
		"no MTU is proven":         func() { b.changeHop(beyond, func(h *Hop) { h.MTU = 0 }) },
		"there is no known uplink": func() { b.changeHop(beyond, func(h *Hop) { h.Uplink = 0 }) },
	} {
		b.withDirect()
		spoil()
		o := b.run("scene_port_in", sceneScene{}, frame)
		b.want(name, o, verdictRedirect, "tx", "shortcut")
		b.wantKey(name, o, localAddr(), self, beyond, 63) // see fill
	}
	b.withDirect()
	arp := ethernet(remoteMAC(), localMAC(), 0x0806, arp(localMAC(), "10.32.0.1"))
	o = b.run("scene_port_in", sceneScene{}, arp)
	b.want("what is no IP packet", o, verdictRedirect, "tx", "shortcut")
	b.wantKey("what is no IP packet", o, localAddr(), self, beyond, 63)
}

func (b *bench) changeHop(dst uint16, f func(*Hop)) {
	b.t.Helper()
	all, err := b.Hops.All()
	b.must(err)
	h := all[dst]
	f(&h)
	b.must(b.Hops.Put(dst, h))
}

func TestDirectIn(t *testing.T) {
	b := newBench(t)
	b.withDirect()
	inner := ethernet(localMAC(), remoteMAC(), 0x0800, udpOver(ipv4("10.32.0.4")))
	good := vxlan(leftAddr(), localAddr(), beyond, self, 60, inner)
	o, got := b.test(UplinkIn, good)
	b.want("for a container", o, verdictRedirect, "rx", "direct_rx", "shortcut")
	if !bytes.Equal(got, inner) {
		t.Errorf("the container gets\n%x, want\n%x", got, inner)
	}
	six := ethernet(localMAC(), remoteMAC(), 0x86dd, ipv6("fd00::4"))
	six[14+6] = unix.IPPROTO_ICMPV6
	b.must(b.Endpoints.Put(remoteMAC(), Endpoint{Peer: beyond, Subnets: subnets(t, "fd00::4/64", "10.32.0.4/24")}))
	o, got = b.test(UplinkIn, vxlan(leftAddr(), localAddr(), beyond, self, 60, six))
	b.want("an IPv6 packet", o, verdictRedirect, "rx", "direct_rx", "shortcut")
	if !bytes.Equal(got, six) {
		t.Errorf("the container gets\n%x, want\n%x", got, six)
	}
	foreign := ethernet(localMAC(), foreignMAC(), 0x0800, udpOver(ipv4("10.32.1.4")))
	o, _ = b.test(UplinkIn, vxlan(leftAddr(), localAddr(), beyond, self, 60, foreign))
	b.want("from another subnet", o, verdictDrop, "rx", "direct_rx", "dropped_isolated")

	tcp := bytes.Clone(inner)
	tcp[14+9] = unix.IPPROTO_TCP
	for name, frame := range map[string][]byte{
		"TCP with nobody to join it": vxlan(leftAddr(), localAddr(), beyond, self, 60, tcp),
		"flooded":                    vxlan(leftAddr(), localAddr(), beyond, 0, 60, inner),
		"of ourselves":               vxlan(leftAddr(), localAddr(), self, self, 60, inner),
		"of nobody":                  vxlan(leftAddr(), localAddr(), 0, self, 60, inner),
		"from a stranger":            vxlan(netip.MustParseAddr("192.0.2.9"), localAddr(), beyond, self, 60, inner),
		"for another address":        vxlan(leftAddr(), netip.MustParseAddr("192.0.2.9"), beyond, self, 60, inner),
		"a probe":                    vxlan(leftAddr(), localAddr(), left, self, 60, make([]byte, 60)),
		"for nobody here":            vxlan(leftAddr(), localAddr(), beyond, self, 60, ethernet(unknownMAC(), remoteMAC(), 0x0800, udpOver(ipv4("10.32.0.4")))),
		"from nobody announced":      vxlan(leftAddr(), localAddr(), beyond, self, 60, ethernet(localMAC(), unknownMAC(), 0x0800, udpOver(ipv4("10.32.0.4")))),
		"with options":               changed(good, 14, 0x46),
		"with congestion":            changed(good, 15, 3),
		"a fragment":                 changed(good, 20, 0x20),
		"a later fragment":           changed(good, 21, 1),
		"for another port":           changed(good, 37, 1),
		"with UDP checksum":          changed(good, 40, 1),
		"not TCP or UDP outside":     changed(good, 23, 50),
		"with other VXLAN flags":     changed(good, 42, 0x0c),
		"for another station":        changed(good, 0, 2),
		"cut short":                  good[:60],
		"something other than IP":    vxlan(leftAddr(), localAddr(), beyond, self, 60, ethernet(localMAC(), remoteMAC(), 0x0806)),
		"not IP at all":              ethernet(MAC{}, remoteMAC(), 0x0806),
	} {
		o, after := b.test(UplinkIn, frame)
		b.want(name, o, verdictPass)
		if !bytes.Equal(after, frame) {
			t.Errorf("%s: was changed to\n%x from\n%x", name, after, frame)
		}
	}
	c, err := b.Config()
	b.must(err)
	c.DirectUntil = monotonic(t) - 1
	b.must(b.SetConfig(c))
	o, _ = b.test(UplinkIn, good)
	b.want("when nobody watches", o, verdictPass)
}

func changed(frame []byte, at int, value byte) []byte {
	frame = bytes.Clone(frame)
	frame[at] = value
	return frame
}

func TestDirectRelay(t *testing.T) {
	b := newBench(t)
	b.withDirect()
	inner := ethernet(localMAC(), remoteMAC(), 0x0800, udpOver(ipv4("10.32.0.4")))
	frame := vxlan(leftAddr(), localAddr(), beyond, right, 60, inner)
	o, got := b.test(UplinkIn, frame)
	b.want("to a neighbour", o, verdictRedirect, "relayed", "direct_relayed")
	if want := vxlan(localAddr(), rightAddr(), beyond, right, 59, inner); !bytes.Equal(got, want) {
		t.Errorf("goes on as\n%x, want\n%x", got, want)
	}
	for name, frame := range map[string][]byte{
		"at the hop limit":    vxlan(leftAddr(), localAddr(), beyond, right, 1, inner),
		"back to its source":  vxlan(leftAddr(), localAddr(), right, beyond, 60, inner),
		"to the user's path":  vxlan(leftAddr(), localAddr(), beyond, slow, 60, inner),
		"to nobody":           vxlan(leftAddr(), localAddr(), beyond, 77, 60, inner),
		"larger than the hop": vxlan(leftAddr(), localAddr(), beyond, right, 60, append(inner, make([]byte, 1450-64+1)...)),
	} {
		o, after := b.test(UplinkIn, frame)
		b.want(name, o, verdictPass)
		if !bytes.Equal(after, frame) {
			t.Errorf("%s: was changed to\n%x", name, after)
		}
	}
	fits := vxlan(leftAddr(), localAddr(), beyond, right, 60, append(inner, make([]byte, 1450-64)...))
	o, _ = b.test(UplinkIn, fits)
	b.want("as large as the hop", o, verdictRedirect, "relayed", "direct_relayed")
}
