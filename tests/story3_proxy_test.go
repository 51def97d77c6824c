package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// proxySocket is Docker's API by way of weave.
const proxySocket = "unix:///var/run/weave/weave.sock"

// testSubnets starts a1 (u1) and a2 (u2) without WEAVE_CIDR, b1 (u1) and b2
// (u3) in a subnet of their own.
func testSubnets(t *testing.T, l *lab.Lab) map[string]*container {
	cs := map[string]*container{}
	for name, where := range map[string]string{"a1": "u1", "a2": "u2", "b1": "u1", "b2": "u3"} {
		subnet, flags := netip.MustParsePrefix("10.32.0.0/24"), []string(nil)
		if name[0] == 'b' {
			subnet, flags = netip.MustParsePrefix("10.32.1.0/24"), []string{"-e", "WEAVE_CIDR=net:10.32.1.0/24"}
		}
		c := run(t, l.Host(where), proxySocket, "ethwe", name, flags...)
		if c.addr.Masked() != subnet {
			t.Errorf("%s has %s, want one of %s", name, c.addr, subnet)
		}
		// Docker's own network is there as well.
		if err := c.reaches(t.Context(), lab.Outside(), 56); err != nil {
			t.Errorf("%s: to the outside: %v", name, err)
		}
		cs[name] = c
	}
	allReach(t, cs["a1"], cs["a2"])
	allReach(t, cs["b1"], cs["b2"])
	return cs
}

// weaveDevice is the device of a container that has an address.
func (c *container) weaveDevice(t *testing.T) string {
	t.Helper()
	r := c.exec(t.Context(), "ip", "-4", "-o", "addr")
	for line := range strings.Lines(r.Stdout) {
		if f := strings.Fields(line); len(f) > 3 && f[3] == c.addr.String() {
			return f[1]
		}
	}
	t.Fatalf("%s: no device has %s:\n%s%v", c.name, c.addr, r.Stdout, r.Err())
	return ""
}

func (c *container) tap(t *testing.T) *lab.Tap {
	t.Helper()
	tap, err := c.Tap(c.netns, c.weaveDevice(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tap.Close() })
	return tap
}

// packet is an Ethernet frame with a UDP datagram that holds a text.
func packet(dst, src net.HardwareAddr, from, to netip.Addr, text string) []byte {
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(28+len(text)))
	ip = slices.Concat(ip, from.AsSlice(), to.AsSlice())
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	udp := []byte{0x30, 0x39, 0x30, 0x39, 0, 0, 0, 0} // no checksum: RFC 768 allows it over IPv4
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(text)))
	return slices.Concat(dst, src, []byte{8, 0}, ip, udp, []byte(text))
}

// arpRequest is a frame that asks all for the Ethernet address of an IP
// address (RFC 826).
func arpRequest(src net.HardwareAddr, from, asked netip.Addr) []byte {
	return slices.Concat(broadcastMAC(), src, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1},
		src, from.AsSlice(), make([]byte, 6), asked.AsSlice(), make([]byte, 18))
}

// testIsolation: between the subnets nothing passes, whatever the sender does.
func testIsolation(t *testing.T, cs map[string]*container) {
	a1, a2, b1, b2 := cs["a1"], cs["a2"], cs["b1"], cs["b2"]
	must(t, a1.Host, "nsenter", "--net="+a1.netns, "ip", "route", "add", "10.32.1.0/24", "dev", a1.weaveDevice(t))
	for _, b := range []*container{b1, b2} {
		if a1.reaches(t.Context(), b.addr.Addr(), 56) == nil {
			t.Errorf("a1 reaches %s", b.name)
		}
	}
	taps := map[*container]*lab.Tap{}
	for _, c := range cs {
		taps[c] = c.tap(t)
	}
	send := func(from *container, frame []byte) {
		t.Helper()
		if err := taps[from].Send(frame); err != nil {
			t.Fatal(err)
		}
	}
	genuine := func(from, to *container, text string) []byte {
		return packet(taps[to].MAC(), taps[from].MAC(), from.addr.Addr(), to.addr.Addr(), text)
	}
	arrives := func(to *container, text string) error {
		_, err := taps[to].Receive(patience, func(f []byte) bool { return bytes.Contains(f, []byte(text)) })
		return err
	}
	// What is allowed passes: this is how a frame would be seen.
	send(a1, genuine(a1, a2, "between two a"))
	send(b1, genuine(b1, b2, "between two b"))
	if err := errors.Join(arrives(a2, "between two a"), arrives(b2, "between two b")); err != nil {
		t.Fatal(err)
	}
	mac, a, b := taps[a1].MAC(), a1.addr.Addr(), b1.addr.Addr()
	free := netip.MustParseAddr("10.32.1.77") // in the subnet of the others, of nobody
	for _, to := range []*container{b1, b2} {
		dst, ip := taps[to].MAC(), to.addr.Addr()
		send(a1, packet(dst, mac, a, ip, "FORBIDDEN as itself"))
		send(a1, packet(dst, mac, free, ip, "FORBIDDEN from a free address"))
		send(a1, packet(dst, mac, b, ip, "FORBIDDEN from the address of b1"))
		send(a1, packet(dst, taps[b1].MAC(), b, ip, "FORBIDDEN as b1"))
		send(a1, packet(broadcastMAC(), mac, a, ip, "FORBIDDEN to all"))
		send(a1, packet(net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}, mac, a, netip.MustParseAddr("224.0.0.1"), "FORBIDDEN by multicast"))
		send(a1, arpRequest(mac, a, ip))
		send(a1, arpRequest(mac, free, ip))
		send(a1, arpRequest(taps[b1].MAC(), b, ip))
	}
	for _, to := range []*container{b1, b2} {
		from := b2
		if to == b2 {
			from = b1
		}
		// The last frame is one that passes: what was sent before has come by
		// then, or a little later when it came another way.
		send(from, genuine(from, to, "after all"))
		if err := arrives(to, "after all"); err != nil {
			t.Errorf("%s: %v", to.name, err)
		}
	}
	for _, to := range []*container{b1, b2} {
		f, err := taps[to].Receive(200*time.Millisecond, func(f []byte) bool { return forbidden(f, mac) })
		if err == nil {
			t.Errorf("%s got a frame of a1: %q", to.name, f)
		}
	}
	// b1's own traffic goes on: nobody has taken its place.
	allReach(t, b1, b2)
	allReach(t, a1, a2)
}

// forbidden says whether a frame came from the container with that address.
func forbidden(f []byte, mac net.HardwareAddr) bool {
	return bytes.Contains(f, []byte("FORBIDDEN")) || len(f) > 14 && bytes.Equal(f[6:12], mac)
}

// testAddressRules: the values that WEAVE_CIDR may have.
func testAddressRules(t *testing.T, l *lab.Lab) {
	u1, u2 := l.Host("u1"), l.Host("u2")
	for _, c := range []struct {
		name, cidr string
		want       []string // subnets, or addresses
	}{
		{"none", "none", nil},
		{"default", "net:default", []string{"10.32.0.0/24"}},
		{"empty", "", []string{"10.32.0.0/24"}},
		{"one", "ip:10.32.2.9/24", []string{"10.32.2.9/24"}},
		{"bare", "10.32.2.10/24", []string{"10.32.2.10/24"}},
		{"several", "net:default net:10.32.1.0/24 ip:10.32.3.7/24", []string{"10.32.0.0/24", "10.32.1.0/24", "10.32.3.7/24"}},
		{"outside", "ip:10.60.0.5/24", []string{"10.60.0.5/24"}}, // of the range
	} {
		got := run(t, u1, proxySocket, "", c.name, "-e", "WEAVE_CIDR="+c.cidr).addresses(t, "ethwe")
		if len(got) != len(c.want) {
			t.Errorf("WEAVE_CIDR=%q: addresses %v, want %v", c.cidr, got, c.want)
			continue
		}
		for _, w := range c.want {
			want := netip.MustParsePrefix(w)
			if !slices.ContainsFunc(got, func(p netip.Prefix) bool { return p == want || want == want.Masked() && p.Masked() == want }) {
				t.Errorf("WEAVE_CIDR=%q: addresses %v, want %v", c.cidr, got, c.want)
			}
		}
	}
	x := run(t, u2, proxySocket, "ethwe", "xx", "-e", "WEAVE_CIDR=net:10.32.2.0/24")
	if err := x.reaches(t.Context(), netip.MustParseAddr("10.32.2.9"), 56); err != nil {
		t.Error(err)
	}
	for value, word := range map[string]string{
		"net:10.32.1.1/24": "10.32.1.1/24",
		"lots":             "lots",
		"net:10.32.1.0/31": "10.32.1.0/31",
		"ip:10.32.2.9/24":  "10.32.2.9", // u1 has given it
	} {
		r := u2.Docker(t.Context(), "-H", proxySocket, "run", "-d", "--name", "bad", "-e", "WEAVE_CIDR="+value, "busybox", "sleep", "3600")
		if r.Code == 0 || !strings.Contains(r.Stderr, word) {
			t.Errorf("WEAVE_CIDR=%s: exit %d, said %q, want an error with %q", value, r.Code, r.Stderr, word)
		}
		u2.Docker(t.Context(), "rm", "-f", "bad")
	}
}

// testNetworkRules: which containers are attached, and which left alone.
func testNetworkRules(t *testing.T, h *lab.Host) {
	must(t, h, "docker", "network", "create", "plain")
	other := run(t, h, "", "", "other")
	for _, c := range []struct {
		net  string
		want int
	}{{"none", 1}, {"bridge", 1}, {"default", 1}, {"plain", 0}, {"container:other", 0}, {"host", 0}} {
		name := "net-" + strings.ReplaceAll(c.net, ":", "-")
		if got := run(t, h, proxySocket, "", name, "--net="+c.net).addresses(t, "ethwe"); len(got) != c.want {
			t.Errorf("--net=%s: addresses %v, want %d", c.net, got, c.want)
		}
		must(t, h, "docker", "rm", "-f", name)
	}
	if got := other.addresses(t, "ethwe"); len(got) > 0 {
		t.Errorf("a container started past the proxy has %v", got)
	}
	must(t, h, "docker", "rm", "-f", "other")
	must(t, h, "docker", "network", "rm", "plain")
}

// testRestart: a container is attached each time it starts, under the address
// it had.
func testRestart(t *testing.T, cs map[string]*container) {
	a1 := cs["a1"]
	must(t, a1.Host, "docker", "restart", "a1")
	if got := a1.addresses(t, "ethwe"); !slices.Equal(got, []netip.Prefix{a1.addr}) {
		t.Errorf("after a restart a1 has %v, before %s", got, a1.addr)
	}
	var err error
	if a1.netns, err = a1.ContainerNetNS(t.Context(), "a1"); err != nil {
		t.Fatal(err)
	}
	allReach(t, a1, cs["a2"])
	// The address is there when the first instruction runs.
	out := must(t, a1.Host, "docker", "-H", proxySocket, "run", "--rm", "busybox", "ip", "-4", "-o", "addr")
	if !strings.Contains(out, "ethwe") || !strings.Contains(out, "10.32.0.") {
		t.Errorf("a container's first command sees\n%s", out)
	}
}

// testAttach: a running container joins and leaves.
func testAttach(t *testing.T, l *lab.Lab, cs map[string]*container) {
	u3 := l.Host("u3")
	c := run(t, u3, "", "", "late")
	id := must(t, u3, "docker", "inspect", "-f", "{{.Id}}", "late")
	addr := weave(t, u3, "attach", "late")
	if got := fmt.Sprint(c.addresses(t, "ethwe")); got != "["+addr+"/24]" {
		t.Errorf("attach printed %q, the container has %s", addr, got)
	}
	if again := weave(t, u3, "attach", id[:12]); again != addr {
		t.Errorf("attach once more printed %q, first %q", again, addr)
	}
	c.addr = netip.MustParsePrefix(addr + "/24")
	allReach(t, c, cs["a1"], cs["a2"])
	testPS(t, c, "ethwe")
	if got := weave(t, u3, "attach", "net:10.32.1.0/24", "ip:10.32.9.9/24", "late"); !strings.HasPrefix(got, "10.32.1.") || !strings.HasSuffix(got, " 10.32.9.9") {
		t.Errorf("attach to two more printed %q", got)
	}
	if err := c.reaches(t.Context(), cs["b1"].addr.Addr(), 56); err != nil {
		t.Error(err)
	}
	if got := weave(t, u3, "detach", "net:10.32.1.0/24", "ip:10.32.9.9/24", "late"); !strings.HasPrefix(got, "10.32.1.") || !strings.HasSuffix(got, " 10.32.9.9") {
		t.Errorf("detach from two printed %q", got)
	}
	if got := weave(t, u3, "detach", "late"); got != addr {
		t.Errorf("detach printed %q, want %s", got, addr)
	}
	if got := c.addresses(t, "ethwe"); len(got) > 0 {
		t.Errorf("after detach the container has %v", got)
	}
	if c.reaches(t.Context(), cs["a1"].addr.Addr(), 56) == nil {
		t.Error("after detach the container reaches others")
	}
	refused(t, u3, 1, []string{"nobody"}, "weave", "attach", "nobody")
	refused(t, u3, 1, []string{"10.32.0.0"}, "weave", "attach", "10.32.0.0", "late")
	must(t, u3, "docker", "run", "-d", "--name", "hosts", "--net=host", "busybox", "sleep", "3600")
	refused(t, u3, 1, []string{"host"}, "weave", "attach", "hosts")
	must(t, u3, "docker", "rm", "-f", "hosts", "late")
}

// testAttachNetNS: a network namespace that no Docker knows.
func testAttachNetNS(t *testing.T, l *lab.Lab, cs map[string]*container) {
	u2 := l.Host("u2")
	must(t, u2, "ip", "netns", "add", "plain")
	must(t, u2, "ip", "-n", "plain", "link", "set", "lo", "up")
	addr := weave(t, u2, "attach", "--netns", "/run/netns/plain")
	for _, name := range []string{"a1", "a2"} {
		within(t, patience, "namespace to "+name, func() error {
			return u2.Run(t.Context(), "ip", "netns", "exec", "plain", "busybox", "ping", "-c", "1", "-W", "1", cs[name].addr.Addr().String()).Err()
		})
	}
	if err := cs["a1"].reaches(t.Context(), netip.MustParseAddr(addr), 56); err != nil {
		t.Error(err)
	}
	if got := weave(t, u2, "detach", "--netns", "/run/netns/plain"); got != addr {
		t.Errorf("detach printed %q, want %s", got, addr)
	}
	if links := must(t, u2, "ip", "-n", "plain", "-o", "link"); strings.Contains(links, "ethwe") {
		t.Errorf("after detach:\n%s", links)
	}
	refused(t, u2, 1, []string{"/run/netns/nothing"}, "weave", "attach", "--netns", "/run/netns/nothing")
	refused(t, u2, 1, nil, "weave", "attach", "--netns", "/proc/1/ns/net")
	must(t, u2, "ip", "netns", "del", "plain")
}
