package bpf

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
)

// sumICMPv6 is the checksum over a packet (RFC 4443 §2.3), 0 when it is right.
func sumICMPv6(p []byte) uint16 {
	length := len(p) - 40
	sum := uint32(length) + 58
	for _, part := range [][]byte{p[8:40], p[40:]} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// solicitation is an IPv6 packet that asks for an address (RFC 4861 §4.3).
func solicitation(src, target string, options ...byte) []byte {
	a, b := netip.MustParseAddr(src).As16(), netip.MustParseAddr(target).As16()
	p := []byte{0x60, 0, 0, 0, 0, byte(24 + len(options)), 58, 255}
	p = append(p, a[:]...)
	p = append(p, 0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, b[13], b[14], b[15])
	p = append(p, 135, 0, 0, 0, 0, 0, 0, 0)
	p = append(append(p, b[:]...), options...)
	binary.BigEndian.PutUint16(p[42:], sumICMPv6(p))
	return p
}

func TestND(t *testing.T) {
	b := newBench(t)
	me := localMAC()
	b.must(
		b.Endpoints.Put(remoteMAC(), Endpoint{Peer: beyond, Subnets: subnets(t, "10.32.0.4/24", "fd00::4/64")}),
		b.Addresses.Put(AddrOf(netip.MustParseAddr("fd00::1")), me),
		b.Addresses.Put(AddrOf(netip.MustParseAddr("fd00::12:3456")), remoteMAC()),
		b.Addresses.Put(AddrOf(netip.MustParseAddr("fd00:1::1")), foreignMAC()),
		b.Addresses.Put(AddrOf(netip.MustParseAddr("fd00::99")), unknownMAC()))
	source := append([]byte{1, 1}, me[:]...)
	frame := func(packet []byte) []byte {
		return append(append(append([]byte{0x33, 0x33, 0xff}, packet[37:40]...), append(me[:], 0x86, 0xdd)...), packet...)
	}
	var none sceneScene
	request := solicitation("fd00::1", "fd00::12:3456", source...)
	b.want("while rules may be about it", b.run("scene_port_in", none, frame(request)), verdictPass)
	b.allow(FeatureARP)
	b.want("while only ARP is answered", b.run("scene_port_in", none, frame(request)), verdictPass)

	b.withShortcut()
	for _, src := range []string{"fd00::1", "fe80::1"} {
		request := solicitation(src, "fd00::12:3456", source...)
		b.want(src, b.run("scene_port_in", none, frame(request)), verdictRedirect, "nd_answered")
		_, answer, err := b.scene.Programs["scene_port_in"].Test(frame(request))
		b.must(err)
		holder, target, asker := remoteMAC(), netip.MustParseAddr("fd00::12:3456").As16(), netip.MustParseAddr(src).As16()
		want := append(append([]byte{}, me[:]...), holder[:]...)
		want = append(want, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255)
		want = append(append(want, target[:]...), asker[:]...)
		want = append(want, 136, 0, answer[56], answer[57], 0x60, 0, 0, 0) // solicited, override
		want = append(append(append(want, target[:]...), 2, 1), holder[:]...)
		if !bytes.Equal(answer, want) {
			t.Errorf("answer\n% x, want\n% x", answer, want)
		}
		if sum := sumICMPv6(answer[14:]); sum != 0 {
			t.Errorf("checksum is off by %#x", sum)
		}
	}
	// changed returns the question with octets of the packet changed, right
	// again as to its checksum.
	changed := func(at int, to ...byte) []byte {
		p := bytes.Clone(request)
		copy(p[at:], to)
		p[42], p[43] = 0, 0
		binary.BigEndian.PutUint16(p[42:], sumICMPv6(p))
		return p
	}
	wrong := bytes.Clone(request)
	wrong[43]++
	for what, packet := range map[string][]byte{
		"probe for a duplicate":     solicitation("::", "fd00::12:3456"),
		"the same with an option":   solicitation("::", "fd00::12:3456", source...),
		"for the asker's own":       solicitation("fd00::1", "fd00::1", source...),
		"for nobody's address":      solicitation("fd00::1", "fd00::5", source...),
		"for one of no endpoint":    solicitation("fd00::1", "fd00::99", source...),
		"for one of another subnet": solicitation("fd00::1", "fd00:1::1", source...),
		"without its source":        solicitation("fd00::1", "fd00::12:3456"),
		"with two options":          solicitation("fd00::1", "fd00::12:3456", append(source, source...)...),
		"with another option":       changed(64, 14),
		"option of no length":       changed(65, 0),
		"option too long":           changed(65, 2),
		"from further away":         changed(7, 254),
		"code":                      changed(41, 1),
		"another message":           changed(40, 137),
		"to another group":          changed(39, 0x57),
		"to all nodes":              changed(24, 0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
		"to one":                    changed(24, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34, 0x56),
		"other protocol":            changed(6, 17),
		"not IPv6":                  changed(0, 0x50),
		"wrong checksum":            wrong,
		"cut short":                 request[:60],
	} {
		b.want(what, b.run("scene_port_in", none, frame(packet)), verdictPass)
	}
	spoofed := solicitation("fd00::7", "fd00::12:3456", source...)
	b.want("in another's name", b.run("scene_port_in", none, frame(spoofed)), verdictDrop, "dropped_spoofed")
	remote := remoteMAC()
	unicast := append(append(append(remote[:], me[:]...), 0x86, 0xdd), request...)
	b.want("unicast", b.run("scene_port_in", none, unicast), verdictRedirect, "shortcut", "tx") // only the one asked can tell
	b.must(b.Hops.Delete(beyond))
	b.want("for one that cannot be reached", b.run("scene_port_in", none, frame(request)), verdictPass)
}

// A container advertises its own addresses only, whatever headers it puts before.
func TestAdvertisement(t *testing.T) {
	b := newBench(t)
	me := localMAC()
	advertisement := func(target string, extensions int) []byte {
		p := solicitation("fd00::1", target, append([]byte{2, 1}, me[:]...)...)
		p[40] = 136
		p[6] = 58
		if extensions > 0 {
			p[6] = 60
		}
		p = bytes.Clone(p)
		for i := range extensions {
			next := byte(60)
			if i == 0 {
				next = 58
			}
			p = slices.Insert(p, 40, next, 0, 1, 4, 0, 0, 0, 0)
		}
		return append(append(append([]byte{0x33, 0x33, 0, 0, 0, 1}, me[:]...), 0x86, 0xdd), p...)
	}
	var none sceneScene
	for _, extensions := range []int{0, 1, 4} {
		for _, own := range []string{"fd00::1", "fe80::1"} {
			b.want(own, b.run("scene_port_in", none, advertisement(own, extensions)), verdictPass)
		}
		b.want("another's", b.run("scene_port_in", none, advertisement("fd00::4", extensions)), verdictDrop, "dropped_spoofed")
	}
	b.want("behind too many headers", b.run("scene_port_in", none, advertisement("fd00::1", 5)), verdictDrop, "dropped_spoofed")
	port, err := PortOf(me, []netip.Prefix{netip.MustParsePrefix("fd00::1/64")})
	port.AnySource = true
	b.must(err, b.Ports.Put(1, port))
	b.want("of a port of any source", b.run("scene_port_in", none, advertisement("fd00::4", 0)), verdictPass)
}
