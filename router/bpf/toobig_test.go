package bpf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
)

const (
	tcp, udp, icmp4, icmp6 = 6, 17, 1, 58

	hopMTU = 1400 // to all but slow
	quoted = 128  // bytes that an error has of the packet
)

// packet is what a frame is made of.
type packet struct {
	src, dst  string // IP addresses
	proto     byte
	mayCut    bool   // IPv4 without DF
	fragment  uint16 // IPv4: offset in units of 8 bytes
	options   int    // bytes between IP header and transport: IPv4 options, IPv6 destination options
	transport []byte // its first bytes
}

func (p packet) isIPv6() bool { return netip.MustParseAddr(p.src).Is6() }

// header is the IP header of a packet of size bytes.
func (p packet) header(size int) []byte {
	if p.isIPv6() {
		h := ipv6(p.src)
		binary.BigEndian.PutUint16(h[4:], uint16(size-len(h)))
		a := netip.MustParseAddr(p.dst).As16()
		copy(h[24:], a[:])
		h[6] = p.proto
		if p.options > 0 {
			h[6] = 60
			h = append(h, make([]byte, p.options)...)
			h[40], h[41] = p.proto, byte(p.options/8-1)
		}
		return h
	}
	h := append(ipv4(p.src), make([]byte, p.options)...)
	h[0] = byte(0x40 + len(h)/4)
	binary.BigEndian.PutUint16(h[2:], uint16(size))
	binary.BigEndian.PutUint16(h[6:], p.fragment)
	if !p.mayCut {
		h[6] |= 0x40
	}
	h[9] = p.proto
	a := netip.MustParseAddr(p.dst).As4()
	copy(h[16:], a[:])
	binary.BigEndian.PutUint16(h[10:], ^sum(h))
	return h
}

// frame is the packet as a frame from src to dst, size bytes after the
// Ethernet header.
func (p packet) frame(dst, src MAC, size int) []byte {
	etherType := uint16(0x0800)
	if p.isIPv6() {
		etherType = 0x86dd
	}
	f := ethernet(dst, src, etherType)[:14]
	f = append(f, p.header(size)...)
	at := len(f)
	for len(f) < 14+size {
		f = append(f, byte(len(f)*7))
	}
	copy(f[at:], p.transport)
	if p.proto == tcp {
		f[at+12] = 0x80 // 12 bytes of options
	}
	return f
}

// sum adds up 16-bit words as checksums do (RFC 1071).
func sum(parts ...[]byte) uint16 {
	var s uint32
	for _, b := range parts {
		for i := 0; i+1 < len(b); i += 2 {
			s += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// kernelContext is struct __sk_buff as far as a test run reads it.
type kernelContext struct {
	_       [176]byte
	GSOSize uint32
	_       [12]byte
}

// way is how a frame gets to where it is sent into the overlay, and what is
// seen when it is answered or goes on.
type way struct {
	prog     string
	scene    sceneScene
	src, dst MAC
	answered uint32 // verdict
	passed   uint32
	counted  []string
	mark     uint32 // of the error
}

func ways() map[string]way {
	return map[string]way{
		"past the bridge":    {prog: "scene_port_in", src: localMAC(), dst: remoteMAC(), answered: verdictRedirect, passed: verdictRedirect, counted: []string{"shortcut", "tx"}},
		"through the bridge": {prog: "scene_vxlan_out", src: localMAC(), dst: remoteMAC(), answered: verdictRedirect, passed: verdictPass, counted: []string{"tx"}, mark: markDeliver},
		"relayed": {prog: "scene_vxlan_in", scene: fromVXLAN(rightAddr(), right, beyond, 9), src: MAC{2, 7}, dst: MAC{2, 8},
			answered: verdictRedirect, passed: verdictRedirect, counted: []string{"relayed"}, mark: markSent},
		"relayed from the user-space path": {prog: "scene_tap_in", scene: fromTAP(slow, beyond, 9), src: MAC{2, 7}, dst: MAC{2, 8},
			answered: verdictRedirect, passed: verdictRedirect, counted: []string{"from_sleeve", "relayed"}},
	}
}

// withMTU sets what is proven of the hops by VXLAN.
func (b *bench) withMTU(mtu int) {
	b.t.Helper()
	hops, err := b.Hops.All()
	b.must(err)
	for id, h := range hops {
		if h.Kind == KindVXLAN {
			h.MTU = mtu
			b.must(b.Hops.Put(id, h))
		}
	}
}

// try runs a frame and returns it as it came out. gso is the payload of each
// packet when it is a super-frame, else 0.
func (b *bench) try(w way, frame []byte, gso int) (outcome, []byte) {
	b.t.Helper()
	b.must(b.scene.Maps["scenes"].Put(uint32(0), w.scene), b.scene.Maps["outcomes"].Put(uint32(0), outcome{}))
	b.before = b.counters()
	opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, 65536), Context: kernelContext{GSOSize: uint32(gso)}}
	_, err := b.scene.Programs[w.prog].Run(opts)
	b.must(err)
	var o outcome
	b.must(b.scene.Maps["outcomes"].Lookup(uint32(0), &o))
	return o, opts.DataOut
}

// wantSent wants the frame to go on, whole or in fragments.
func (b *bench) wantSent(what string, w way, o outcome, whole bool) {
	b.t.Helper()
	b.want(what, o, w.passed, w.counted...)
	if b.Features()&FeatureTunnelFlags != 0 && (o.Whole != 0) != whole {
		b.t.Errorf("%s: sent with fragments forbidden: %v, want %v", what, o.Whole != 0, whole)
	}
}

// wantError wants an error about the frame, naming mtu.
func (b *bench) wantError(what string, w way, p packet, frame []byte, o outcome, got []byte, mtu int) {
	b.t.Helper()
	counted := append(slices.Clone(w.counted), "too_big")
	if w.prog == "scene_tap_in" { // and goes back there
		counted = append(counted, "to_sleeve")
		b.wantTags(what, o, beyond, slow, 63)
		got = append(got[:12:12], got[16:]...) // one tag is beside the frame
	}
	if w.prog == "scene_vxlan_in" {
		b.wantKey(what, o, rightAddr(), beyond, right, 63)
	}
	b.want(what, o, w.answered, counted...)
	if o.Mark != w.mark {
		b.t.Errorf("%s: mark %#x, want %#x", what, o.Mark, w.mark)
	}
	if err := checkError(p, frame, got, mtu); err != nil {
		b.t.Errorf("%s: %v", what, err)
	}
}

// checkError reads an error about a frame as its receiver would.
func checkError(p packet, frame, got []byte, mtu int) error {
	ipLen, kind := 20, []byte{3, 4}
	if p.isIPv6() {
		ipLen, kind = 40, []byte{2, 0}
	}
	if len(got) != 14+ipLen+8+quoted {
		return fmt.Errorf("%d bytes long", len(got))
	}
	if !bytes.Equal(got[:6], frame[6:12]) || !bytes.Equal(got[6:12], frame[:6]) || !bytes.Equal(got[12:14], frame[12:14]) {
		return fmt.Errorf("Ethernet header %x about one of %x", got[:14], frame[:14])
	}
	ip, icmp, quote := got[14:14+ipLen], got[14+ipLen:], got[14+ipLen+8:]
	from, to := ip[12:16], ip[16:20]
	sent := frame[14:]
	wasFrom, wasTo := sent[12:16], sent[16:20]
	if p.isIPv6() {
		from, to, wasFrom, wasTo = ip[8:24], ip[24:40], sent[8:24], sent[24:40]
		pseudo := []byte{0, 0, 0, icmp6, 0, 0, 0, byte(len(icmp))}
		if s := sum(from, to, pseudo, icmp); s != 0xffff {
			return fmt.Errorf("ICMP checksum is wrong by %#x", ^s)
		}
		if ip[0]>>4 != 6 || int(binary.BigEndian.Uint16(ip[4:])) != len(icmp) || ip[6] != icmp6 || ip[7] == 0 {
			return fmt.Errorf("IP header %x", ip)
		}
	} else {
		if sum(icmp) != 0xffff || sum(ip) != 0xffff {
			return fmt.Errorf("checksums are wrong by %#x (IP) and %#x (ICMP)", ^sum(ip), ^sum(icmp))
		}
		if ip[0] != 0x45 || int(binary.BigEndian.Uint16(ip[2:])) != len(ip)+len(icmp) || ip[9] != icmp4 || ip[8] == 0 {
			return fmt.Errorf("IP header %x", ip)
		}
	}
	if !bytes.Equal(from, wasTo) || !bytes.Equal(to, wasFrom) {
		return fmt.Errorf("from %x to %x about a packet from %x to %x", from, to, wasFrom, wasTo)
	}
	if !bytes.Equal(icmp[:2], kind) || int(binary.BigEndian.Uint32(icmp[4:])) != mtu {
		return fmt.Errorf("ICMP %x, want an MTU of %d", icmp[:8], mtu)
	}
	return checkQuote(p, quote, sent[:quoted])
}

// checkQuote wants the packet as it was, but for a transport checksum that
// stays what it is when it is completed over and over.
func checkQuote(p packet, quote, sent []byte) error {
	l4 := len(p.header(0))
	field := 0
	switch p.proto {
	case tcp:
		field = l4 + 16
	case udp:
		field = l4 + 6
	case 44: // our fragments are of UDP
		l4 += 8
		field = l4 + 6
	}
	if field > 0 {
		if now, done := binary.BigEndian.Uint16(quote[field:]), ^sum(quote[l4:]); now != done && now+done != 0xffff {
			return fmt.Errorf("transport checksum %#x would be completed to %#x", now, done)
		}
		copy(quote[field:field+2], sent[field:])
	}
	if !bytes.Equal(quote, sent) {
		return fmt.Errorf("quotes\n%x of\n%x", quote, sent)
	}
	return nil
}

func answerable() map[string]packet {
	return map[string]packet{
		"IPv4 TCP":              {src: "10.32.0.1", dst: "10.32.0.4", proto: tcp},
		"IPv4 UDP":              {src: "10.32.0.1", dst: "10.32.0.4", proto: udp},
		"IPv4 UDP with options": {src: "10.32.0.1", dst: "10.32.0.4", proto: udp, options: 40},
		"IPv4 ping":             {src: "10.32.0.1", dst: "10.32.0.4", proto: icmp4, transport: []byte{8, 0}},
		"IPv4 other":            {src: "10.32.0.1", dst: "10.32.0.4", proto: 50},
		"IPv6 TCP":              {src: "fd00::1", dst: "fd00::4", proto: tcp},
		"IPv6 UDP":              {src: "fd00::1", dst: "fd00::4", proto: udp},
		"IPv6 TCP with options": {src: "fd00::1", dst: "fd00::4", proto: tcp, options: 16},
		"IPv6 ping":             {src: "fe80::1", dst: "fe80::4", proto: icmp6, transport: []byte{128, 0}},
		"IPv6 from far":         {src: "fd00::1", dst: "2001:db8::4", proto: tcp},
		"IPv4 to far away":      {src: "10.32.0.1", dst: "8.8.8.8", proto: udp},
	}
}

// In steps of one byte: what fits goes on, what does not is answered.
func TestTooBig(t *testing.T) {
	b := newBench(t)
	b.withShortcut()
	b.withMTU(hopMTU)
	for name, w := range ways() {
		for kind, p := range answerable() {
			for size := hopMTU - 3; size <= hopMTU+3; size++ {
				what := fmt.Sprintf("%s, %s, %d bytes", kind, name, size)
				frame := p.frame(w.dst, w.src, size)
				o, got := b.try(w, frame, 0)
				if size <= hopMTU {
					b.wantSent(what, w, o, true)
				} else {
					b.wantError(what, w, p, frame, o, got, hopMTU)
				}
			}
		}
	}
}

// A super-frame is measured by the packets it stands for.
func TestTooBigSuperFrame(t *testing.T) {
	b := newBench(t)
	b.withShortcut()
	b.withMTU(hopMTU)
	const frameSize = 2900 // two of them and a bit
	for name, w := range ways() {
		for kind, p := range answerable() {
			if p.proto != tcp && p.proto != udp {
				continue
			}
			headers := len(p.header(0)) + 8
			if p.proto == tcp {
				headers += 24
			}
			for size := hopMTU - 3; size <= hopMTU+3; size++ {
				what := fmt.Sprintf("%s, %s, super-frame of %d bytes", kind, name, size)
				frame := p.frame(w.dst, w.src, frameSize)
				o, got := b.try(w, frame, size-headers)
				if size <= hopMTU {
					b.wantSent(what, w, o, true)
				} else {
					b.wantError(what, w, p, frame, o, got, hopMTU)
				}
			}
		}
	}
}

// Nobody may be told of these, or would listen: they are left to be fragmented
// outside.
func TestTooBigUnanswered(t *testing.T) {
	b := newBench(t)
	b.withShortcut()
	b.withMTU(hopMTU)
	ports, err := b.Ports.All()
	b.must(err)
	lax := ports[1]
	lax.AnySource = true
	b.must(b.Ports.Put(1, lax))
	cases := map[string]packet{
		"without DF":               {src: "10.32.0.1", dst: "10.32.0.4", proto: udp, mayCut: true},
		"ICMP error":               {src: "10.32.0.1", dst: "10.32.0.4", proto: icmp4, transport: []byte{3, 4}},
		"ICMP time exceeded":       {src: "10.32.0.1", dst: "10.32.0.4", proto: icmp4, transport: []byte{11, 0}},
		"ICMPv6 error":             {src: "fd00::1", dst: "fd00::4", proto: icmp6, transport: []byte{2, 0}},
		"ICMPv6 redirect":          {src: "fd00::1", dst: "fd00::4", proto: icmp6, transport: []byte{137, 0}},
		"later fragment":           {src: "10.32.0.1", dst: "10.32.0.4", proto: udp, fragment: 100},
		"later IPv6 fragment":      {src: "fd00::1", dst: "fd00::4", proto: 44, transport: []byte{udp, 0, 8, 1}},
		"to a group":               {src: "10.32.0.1", dst: "224.0.0.9", proto: udp},
		"to an IPv6 group":         {src: "fd00::1", dst: "ff02::9", proto: udp},
		"from nobody":              {src: "0.0.0.0", dst: "10.32.0.4", proto: udp},
		"from a group":             {src: "224.0.0.9", dst: "10.32.0.4", proto: udp},
		"from all":                 {src: "255.255.255.255", dst: "10.32.0.4", proto: udp},
		"from loopback":            {src: "127.0.0.1", dst: "10.32.0.4", proto: udp},
		"from IPv6 nobody":         {src: "::", dst: "fd00::4", proto: udp},
		"from IPv6 loopback":       {src: "::1", dst: "fd00::4", proto: udp},
		"from an IPv6 group":       {src: "ff02::1", dst: "fd00::4", proto: udp},
		"IPv6 without end of them": {src: "fd00::1", dst: "fd00::4", proto: 60, transport: []byte{60, 255}},
	}
	for name, w := range ways() {
		for kind, p := range cases {
			o, _ := b.try(w, p.frame(w.dst, w.src, hopMTU+1), 0)
			b.wantSent(kind+", "+name, w, o, false)
		}
		other := ethernet(w.dst, w.src, 0x88b6, make([]byte, 64))
		other = append(other, make([]byte, hopMTU)...)
		o, _ := b.try(w, other, 0)
		b.wantSent("not IP, "+name, w, o, false)
	}
	first := packet{src: "fd00::1", dst: "fd00::4", proto: 44, transport: []byte{udp, 0, 0, 1}}
	w := ways()["relayed"]
	frame := first.frame(w.dst, w.src, hopMTU+1)
	o, got := b.try(w, frame, 0)
	b.wantError("first IPv6 fragment", w, first, frame, o, got, hopMTU)
}

// Below what senders believe, the way has to fragment.
func TestTooBigLeast(t *testing.T) {
	b := newBench(t)
	w := ways()["relayed"]
	least := map[string]int{"IPv6 TCP": 1280, "IPv4 UDP": 576}
	for kind, size := range least {
		p := answerable()[kind]
		b.withMTU(500)
		for _, n := range []int{500, 501, size} {
			o, _ := b.try(w, p.frame(w.dst, w.src, n), 0)
			b.wantSent(fmt.Sprintf("%s of %d bytes", kind, n), w, o, n <= 500)
		}
		frame := p.frame(w.dst, w.src, size+1)
		o, got := b.try(w, frame, 0)
		b.wantError(fmt.Sprintf("%s of %d bytes", kind, size+1), w, p, frame, o, got, size)
	}
}

// Without a proven size, and on the user-space path, all passes as it is.
func TestTooBigUnknown(t *testing.T) {
	b := newBench(t)
	b.withShortcut()
	for name, w := range ways() {
		for kind, p := range answerable() {
			o, _ := b.try(w, p.frame(w.dst, w.src, 3000), 0)
			b.wantSent(kind+", "+name, w, o, true)
		}
	}
	b.must(b.Hops.Put(slow, Hop{Kind: KindSleeve, Via: slow, MTU: hopMTU}))
	big := answerable()["IPv4 TCP"].frame(slowMAC(), localMAC(), 3000)
	b.want("to the user-space path", b.run("scene_vxlan_out", sceneScene{}, big), verdictRedirect, "to_sleeve", "tx")
	b.withMTU(hopMTU)
	large := answerable()["IPv4 TCP"].frame(broadcast(), localMAC(), hopMTU+1)
	vxlan, tap := b.copies(func() { b.run("scene_vxlan_out", sceneScene{}, large) })
	if vxlan != 2 || tap != 1 {
		t.Errorf("large broadcast: %d copies by VXLAN and %d by TAP, want 2 and 1", vxlan, tap)
	}
}

// Over IPv6, which is not fragmented on the way, a packet without DF leaves as
// well as it can and its sender is told besides.
func TestTooBigOverIPv6(t *testing.T) {
	b := newBench(t)
	w := ways()["relayed"]
	p := answerable()["IPv4 UDP"]
	p.mayCut = true
	b.must(b.Hops.Put(beyond, Hop{Kind: KindVXLAN, Via: left, Remote: netip.MustParseAddr("2001:db8::2"), MTU: hopMTU}))
	for size, copies := range map[int]int{hopMTU: 0, hopMTU + 1: 1} {
		frame := p.frame(w.dst, w.src, size)
		var o outcome
		var got []byte
		vxlan, _ := b.copies(func() { o, got = b.try(w, frame, 0) })
		if vxlan != copies {
			t.Errorf("%d bytes: %d copies, want %d", size, vxlan, copies)
		}
		if copies == 0 {
			b.want("what fits", o, w.passed, w.counted...)
		} else {
			b.wantError("without DF", w, p, frame, o, got, hopMTU)
		}
	}
	later := packet{src: "10.32.0.1", dst: "10.32.0.4", proto: udp, mayCut: true, fragment: 100}
	o, _ := b.try(w, later.frame(w.dst, w.src, hopMTU+1), 0)
	b.want("later fragment", o, verdictDrop, w.counted...) // the copy left
}
