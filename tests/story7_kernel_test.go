package tests

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/tests/lab"
)

// slow is what traffic may pause where a kernel is emulated, on a busy machine
// at that.
const slow = 3 * time.Second

// removeNamespaces takes away what runBare makes, and the folder that ip(8)
// mounts for it.
const removeNamespaces = "ip -all netns delete && umount -l /run/netns && rmdir /run/netns"

// TestKernelPath is what the kernel does for the fast path, without Docker. It
// also runs under older kernels; see tests/vm.
func TestKernelPath(t *testing.T) {
	l := build(t, lab.Config{})
	before := map[string]lab.State{}
	for _, h := range l.Hosts {
		before[h.Name] = baseline(t, h)
	}
	for _, h := range l.Hosts {
		launch(t, h, append([]string{"--no-dns", "--docker-api="}, others(l, h)...)...)
	}
	established(t, l, patience)
	var cs []*container
	for i, h := range l.Hosts {
		cs = append(cs, runBare(t, h, fmt.Sprintf("c%d", i+1)))
	}
	step(t, "traffic", func(t *testing.T) { testBareTraffic(t, cs) })
	step(t, "relay", func(t *testing.T) { testBareRelay(t, l, cs) })
	step(t, "isolation", func(t *testing.T) { testBareIsolation(t, l, cs[0]) })
	step(t, "narrow underlay", func(t *testing.T) { testNarrow(t, l, cs) })
	step(t, "killed daemons", func(t *testing.T) { testAllKilled(t, l, cs) })
	for _, h := range l.Hosts {
		weave(t, h, "reset")
		must(t, h, "sh", "-c", removeNamespaces)
		asBefore(t, h, before[h.Name])
	}
}

// baseline is the state of a host on which iptables was used before: it leaves
// its tables.
func baseline(t *testing.T, h *lab.Host) lab.State {
	t.Helper()
	must(t, h, "sh", "-c", `for rule in "filter FORWARD" "nat POSTROUTING"; do
		set -- $rule; iptables -t $1 -A $2 -j ACCEPT && iptables -t $1 -D $2 -j ACCEPT || exit 1; done`)
	return state(t, h)
}

// testBareTraffic: every namespace reaches every other, with large packets and
// streams as well, and broadcasts arrive.
func testBareTraffic(t *testing.T, cs []*container) {
	allReach(t, cs...)
	for i, a := range cs {
		b := cs[(i+1)%len(cs)]
		if err := a.reaches(t.Context(), b.addr.Addr(), 1400); err != nil {
			t.Error(err)
		}
		if err := exchange(t.Context(), a, b, 4<<20); err != nil {
			t.Errorf("4 MB between %s and %s: %v", a.name, b.name, err)
		}
	}
	testBroadcast(t, cs)
}

// testBareRelay: u1 forwards between the two others, in its kernel.
func testBareRelay(t *testing.T, l *lab.Lab, cs []*container) {
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	if err := l.Cut(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*lab.Host{u2, u3} {
		within(t, patience, "one connection left", func() error { return on(t.Context(), h, 1, "fastdp") })
	}
	within(t, patience, "relayed", func() error { return cs[1].reaches(t.Context(), cs[2].addr.Addr(), 1400) })
	relayed := weave(t, u1, "report", "-f", "{{.Router.OverlayDiagnostics.FastDP.relayed}}")
	if err := exchange(t.Context(), cs[1], cs[2], 4<<20); err != nil {
		t.Errorf("4 MB through u1: %v", err)
	}
	if now := weave(t, u1, "report", "-f", "{{.Router.OverlayDiagnostics.FastDP.relayed}}"); now == relayed {
		t.Errorf("u1 relayed %s frames before and after", now)
	}
	testBroadcast(t, []*container{cs[1], cs[2], cs[0]})
	if err := l.Heal(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	weave(t, u2, "connect", "u3")
	established(t, l, patience)
}

// testBareIsolation: namespaces of another subnet are not reached by one that
// knows all about them and sends straight at them, on this host and elsewhere.
func testBareIsolation(t *testing.T, l *lab.Lab, c *container) {
	a, b := runBare(t, l.Host("u1"), "a", "net:10.33.0.0/24"), runBare(t, l.Host("u2"), "b", "net:10.33.0.0/24")
	within(t, patience, "within the subnet", func() error { return a.reaches(t.Context(), b.addr.Addr(), 56) })
	introduce(t, a, c)
	introduce(t, b, c)
	for _, other := range []*container{a, b} {
		if c.reaches(t.Context(), other.addr.Addr(), 56) == nil {
			t.Errorf("%s reaches %s, which is in another subnet", c.name, other.name)
		}
		tap, err := other.Tap(other.netns, other.device)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.exec(t.Context(), "ping", "-c", "1", "-W", "1", other.addr.Addr().String())
		if frame, err := tap.Receive(100*time.Millisecond, func(f []byte) bool { return bytes.Contains(f, c.addr.Addr().AsSlice()) }); err == nil {
			t.Errorf("%s gets %x from %s, which is in another subnet", other.name, frame, c.name)
		}
		_ = tap.Close()
	}
}

// introduce lets two namespaces know how to send to each other, whatever lies
// between.
func introduce(t *testing.T, a, b *container) {
	t.Helper()
	for _, p := range [][2]*container{{a, b}, {b, a}} {
		to := p[1].addr.Addr().String()
		must(t, p[0].Host, "ip", "-n", p[0].name, "route", "replace", to, "dev", p[0].device)
		must(t, p[0].Host, "ip", "-n", p[0].name, "neigh", "replace", to, "lladdr", p[1].mac(t), "dev", p[0].device)
	}
}

// mac is the address of a namespace's device.
func (c *container) mac(t *testing.T) string {
	t.Helper()
	fields := strings.Fields(must(t, c.Host, "ip", "-n", c.name, "-o", "link", "show", c.device))
	i := slices.Index(fields, "link/ether")
	if i < 0 || i+1 == len(fields) {
		t.Fatalf("%s: no address of %s in %q", c.name, c.device, fields)
	}
	return fields[i+1]
}

// testNarrow: the underlay of u1 carries less than the containers send. Whoever
// forbids fragments is told so, and streams go on.
func testNarrow(t *testing.T, l *lab.Lab, cs []*container) {
	u1 := l.Host("u1")
	must(t, u1, "ip", "link", "set", "eth0", "mtu", "1400")
	within(t, patience, "error", func() error { return hearsOfMTU(cs[0], cs[2].addr.Addr(), 1350) })
	if err := exchange(t.Context(), cs[0], cs[2], 1<<20); err != nil {
		t.Errorf("1 MB through a narrow underlay: %v", err)
	}
	must(t, u1, "ip", "link", "set", "eth0", "mtu", "1500")
	established(t, l, patience)
}

// hearsOfMTU sends a datagram of 1,440 bytes with headers that must not be
// fragmented, and says whether the kernel of c then knows how much fits.
func hearsOfMTU(c *container, to netip.Addr, want int) error {
	var conn net.Conn
	err := c.DoIn(c.netns, func() (err error) {
		conn, err = net.Dial("udp4", netip.AddrPortFrom(to, 9).String())
		return err
	})
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		return err
	}
	option := func(f func(fd int) error) error {
		var err error
		return errors.Join(raw.Control(func(fd uintptr) { err = f(int(fd)) }), err)
	}
	if err := option(func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	}); err != nil {
		return err
	}
	_, _ = conn.Write(make([]byte, 1412)) // fails once the error has come
	var mtu int
	if err := option(func(fd int) (err error) {
		mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
		return err
	}); err != nil {
		return err
	}
	if mtu != want {
		return fmt.Errorf("%s believes that %d bytes fit, want %d", c.name, mtu, want)
	}
	return nil
}

// testAllKilled: all daemons die; what is in the kernel carries on, also while
// they come back.
func testAllKilled(t *testing.T, l *lab.Lab, cs []*container) {
	flows := []*flow{startFlow(t, cs[0], cs[1]), startFlow(t, cs[1], cs[2]), startFlow(t, cs[2], cs[0])}
	var pids []string
	for _, h := range l.Hosts {
		pids = append(pids, daemonPID(t, h))
	}
	established(t, l, patience)
	begin := time.Now()
	for i, h := range l.Hosts { // all at once: none shall see another go
		must(t, h, "kill", "-9", pids[i])
	}
	holds(t, flows, begin, 5*time.Second, slow)
	if err := exchange(t.Context(), cs[0], cs[1], 1<<20); err != nil {
		t.Errorf("1 MB without daemons: %v", err)
	}
	begin = time.Now()
	for _, h := range l.Hosts[:2] {
		launch(t, h, "--no-dns", "--docker-api=", "--resume")
	}
	for _, h := range l.Hosts[:2] {
		within(t, patience, "one connection", func() error { return on(t.Context(), h, 1, "fastdp") })
	}
	holds(t, flows, begin, 4*time.Second, slow) // they have settled and have not met the third
	launch(t, l.Hosts[2], "--no-dns", "--docker-api=", "--resume")
	established(t, l, patience)
	holds(t, flows, begin, 2*time.Second, slow)
	allReach(t, cs...)
}
