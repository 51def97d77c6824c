package tests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// testPlugin: containers on Docker's network `weave`, which is there by
// itself. It returns them, one for each host.
func testPlugin(t *testing.T, l *lab.Lab, names map[string]string) []*container {
	var cs []*container
	for i, h := range l.Hosts {
		if got := must(t, h, "docker", "network", "inspect", "-f", "{{.Driver}} {{(index .IPAM.Config 0).Subnet}}", "weave"); got != "weave 10.32.0.0/12" {
			t.Errorf("%s: network weave: %q", h.Name, got)
		}
		cs = append(cs, run(t, h, "", "ethwe0", fmt.Sprintf("c%d", i+1), "--net=weave"))
	}
	whole := netip.MustParsePrefix("10.32.0.0/12")
	for i, c := range cs {
		if c.addr.Bits() != 12 || !whole.Contains(c.addr.Addr()) {
			t.Errorf("%s has %s, which is not of %s", c.name, c.addr, whole)
		}
		for _, d := range cs[:i] {
			if c.addr == d.addr {
				t.Errorf("%s and %s both have %s", c.name, d.name, c.addr)
			}
		}
		if got := must(t, c.Host, "docker", "inspect", "-f", "{{.NetworkSettings.Networks.weave.IPAddress}}", c.name); got != c.addr.Addr().String() {
			t.Errorf("inspect of %s shows %q, it has %s", c.name, got, c.addr)
		}
		testPS(t, c, "ethwe0")
		testIPAMStatus(t, c.Host, names)
	}
	allReach(t, cs...)
	for i, a := range cs {
		b := cs[(i+1)%len(cs)]
		for _, size := range []int{1400, 9000} {
			if err := a.reaches(t.Context(), b.addr.Addr(), size); err != nil {
				t.Errorf("%d bytes: %v", size, err)
			}
		}
		if err := exchange(t.Context(), a, b, 10<<20); err != nil {
			t.Errorf("10 MB between %s and %s: %v", a.name, b.name, err)
		}
	}
	testBroadcast(t, cs)
	return cs
}

// testPS checks the line of `weave ps` for a container: identifier, Ethernet
// address, addresses.
func testPS(t *testing.T, c *container, device string) {
	t.Helper()
	id := must(t, c.Host, "docker", "inspect", "-f", "{{.Id}}", c.name)[:12]
	r := c.exec(t.Context(), "cat", "/sys/class/net/"+device+"/address")
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	want := []string{id, strings.TrimSpace(r.Stdout)}
	for _, a := range c.addresses(t, device) {
		want = append(want, a.String())
	}
	line := strings.Join(want, " ")
	if got := weave(t, c.Host, "ps"); !slices.Contains(strings.Split(got, "\n"), line) {
		t.Errorf("%s: ps has no line %q:\n%s", c.Name, line, got)
	}
	if got := weave(t, c.Host, "ps", id); got != line {
		t.Errorf("%s: ps %s: %q, want %q", c.Name, id, got, line)
	}
}

// testBroadcast: an ARP request of the first container for the second's address
// is answered, and one for an address that nobody has, which only a broadcast
// can find out, is seen by the third, once.
func testBroadcast(t *testing.T, cs []*container) {
	t.Helper()
	third, err := cs[2].Tap(cs[2].netns, cs[2].device)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = third.Close() }()
	ask := func(ip netip.Addr) error {
		return cs[0].exec(t.Context(), "arping", "-c", "1", "-w", "3", "-I", cs[0].device, ip.String()).Err()
	}
	if err := ask(cs[1].addr.Addr()); err != nil {
		t.Error(err)
	}
	nobody := lastHost(cs[1].addr)
	seen := make(chan error, 1)
	go func() { // at once: what else arrives would fill the socket
		_, err := third.Receive(patience, func(f []byte) bool { return isARPRequest(f, nobody) })
		seen <- err
	}()
	if ask(nobody) == nil {
		t.Errorf("somebody answers for %s", nobody)
	}
	if err := <-seen; err != nil {
		t.Errorf("request for %s at %s: %v", nobody, cs[2].name, err)
	}
	if _, err := third.Receive(100*time.Millisecond, func(f []byte) bool { return isARPRequest(f, nobody) }); err == nil {
		t.Errorf("request for %s at %s: seen twice", nobody, cs[2].name)
	}
}

// lastHost is the last address of an IPv4 subnet that a host may have.
func lastHost(p netip.Prefix) netip.Addr {
	base := p.Masked().Addr().As4()
	n := binary.BigEndian.Uint32(base[:]) | 1<<(32-p.Bits()) - 1
	binary.BigEndian.PutUint32(base[:], n-1)
	return netip.AddrFrom4(base)
}

// isARPRequest says whether a frame is a broadcast that asks for an address
// (RFC 826).
func isARPRequest(f []byte, asked netip.Addr) bool {
	return len(f) >= 42 && bytes.Equal(f[:6], broadcastMAC()) && bytes.Equal(f[12:14], []byte{8, 6}) &&
		bytes.Equal(f[20:22], []byte{0, 1}) && bytes.Equal(f[38:42], asked.AsSlice())
}

func broadcastMAC() net.HardwareAddr { return net.HardwareAddr{255, 255, 255, 255, 255, 255} }

// exchange moves bytes over TCP between two containers, both ways at the same
// time, and compares checksums.
func exchange(ctx context.Context, a, b *container, size int) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	var listener net.Listener
	err := b.DoIn(b.netns, func() error {
		var err error
		listener, err = new(net.ListenConfig).Listen(ctx, "tcp4", net.JoinHostPort(b.addr.Addr().String(), "0"))
		return err
	})
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	defer func() { _ = listener.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	type side struct {
		sent, received [32]byte
		err            error
	}
	far := make(chan side, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			far <- side{err: err}
			return
		}
		var s side
		s.sent, s.received, s.err = pump(ctx, conn, size)
		far <- s
	}()
	var conn net.Conn
	err = a.DoIn(a.netns, func() error {
		var err error
		conn, err = new(net.Dialer).DialContext(ctx, "tcp4", listener.Addr().String())
		return err
	})
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	sent, received, err := pump(ctx, conn, size)
	there := <-far
	if err := errors.Join(err, there.err); err != nil {
		return err
	}
	if sent != there.received || received != there.sent {
		return errors.New("what came is not what was sent")
	}
	return nil
}

// pump sends and receives at the same time and returns the checksums.
func pump(ctx context.Context, conn net.Conn, size int) (sent, received [32]byte, err error) {
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	data := make([]byte, size)
	for i := 0; i+8 <= size; i += 8 {
		v := rand.Uint64()
		for j := range 8 {
			data[i+j] = byte(v >> (8 * j))
		}
	}
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		written <- err
	}()
	got := make([]byte, size)
	_, err = io.ReadFull(conn, got)
	return sha256.Sum256(data), sha256.Sum256(got), errors.Join(err, <-written)
}

// testExpose: the host joins, a machine behind it gets in, and all is undone.
func testExpose(t *testing.T, l *lab.Lab, cs []*container) {
	u1 := l.Host("u1")
	for _, c := range cs {
		if u1.Run(t.Context(), "busybox", "ping", "-c", "1", "-W", "1", c.addr.Addr().String()).Err() == nil {
			t.Errorf("the host reaches %s without being exposed", c.name)
		}
	}
	before := state(t, u1)
	text := weave(t, u1, "expose")
	addr, err := netip.ParseAddr(text)
	if err != nil || !netip.MustParsePrefix("10.32.0.0/12").Contains(addr) {
		t.Fatalf("expose printed %q, want an address", text)
	}
	if again := weave(t, u1, "expose"); again != text {
		t.Errorf("expose once more printed %q, first %q", again, text)
	}
	if routes := must(t, u1, "ip", "route"); !strings.Contains(routes, "10.32.0.0/12 dev weave ") {
		t.Errorf("no route to the range:\n%s", routes)
	}
	if ps := weave(t, u1, "ps"); !strings.HasPrefix(ps, "weave:expose ") || !strings.Contains(strings.Split(ps, "\n")[0], text+"/12") {
		t.Errorf("ps does not begin with the exposed address:\n%s", ps)
	}
	for _, c := range cs {
		within(t, patience, "host to "+c.name, func() error {
			return u1.Run(t.Context(), "busybox", "ping", "-c", "1", "-W", "1", c.addr.Addr().String()).Err()
		})
		if err := c.reaches(t.Context(), addr, 56); err != nil {
			t.Errorf("to the host: %v", err)
		}
		if err := c.reaches(t.Context(), lab.Outside(), 56); err != nil {
			t.Errorf("to the outside: %v", err)
		}
	}
	behind(t, l, u1, cs)
	if got := weave(t, u1, "hide"); got != text {
		t.Errorf("hide printed %q, want %s", got, text)
	}
	asBefore(t, u1, before)
	if u1.Run(t.Context(), "busybox", "ping", "-c", "1", "-W", "1", cs[1].addr.Addr().String()).Err() == nil {
		t.Errorf("the host reaches %s although it is hidden", cs[1].name)
	}
	if got := weave(t, u1, "hide"); got != "" {
		t.Errorf("hide once more printed %q", got)
	}
}

// behind lets a machine outside of the overlay, with a route through the host,
// reach the containers.
func behind(t *testing.T, l *lab.Lab, h *lab.Host, cs []*container) {
	t.Helper()
	m, err := l.Behind(t.Context(), h, "behind")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cs {
		within(t, patience, "machine behind to "+c.name, func() error {
			return m.Run(t.Context(), "busybox", "ping", "-c", "1", "-W", "1", c.addr.Addr().String()).Err()
		})
	}
	if err := l.Unbehind(t.Context(), h, m); err != nil {
		t.Fatal(err)
	}
}

// testReset: hosts are as they were before launch.
func testReset(t *testing.T, l *lab.Lab, before map[string]lab.State) {
	for _, h := range l.Hosts {
		// One container stays: reset takes it off the network.
		if h.Name != "u1" {
			must(t, h, "sh", "-c", "docker rm -f $(docker ps -aq)")
		}
		weave(t, h, "expose")
		begin := time.Now()
		weave(t, h, "reset")
		t.Logf("%s: reset in %s", h.Name, time.Since(begin).Round(time.Millisecond))
		refused(t, h, 1, []string{"not running"}, "weave", "status")
	}
	u1 := l.Host("u1")
	if links := must(t, u1, "docker", "exec", "c1", "ip", "-o", "link"); strings.Contains(links, "ethwe") {
		t.Errorf("the container is still on the network:\n%s", links)
	}
	must(t, u1, "docker", "rm", "-f", "c1")
	for _, h := range l.Hosts {
		// Docker made this one for the containers' way to the outside.
		must(t, h, "docker", "network", "rm", "docker_gwbridge")
		asBefore(t, h, before[h.Name])
		weave(t, h, "reset") // nothing to do, and no error
	}
}

// testRelaunch: a network anew, with another range and a subnet of it by
// default.
func testRelaunch(t *testing.T, l *lab.Lab) {
	launchAll(t, l, "--ipalloc-range", "10.32.0.0/16", "--ipalloc-default-subnet", "10.32.0.0/24")
	var cs []*container
	for i, h := range l.Hosts {
		c := run(t, h, "", "ethwe0", fmt.Sprintf("d%d", i+1), "--net=weave")
		if c.addr.Masked() != netip.MustParsePrefix("10.32.0.0/24") {
			t.Errorf("%s has %s, want one of 10.32.0.0/24", c.name, c.addr)
		}
		cs = append(cs, c)
		if got := weave(t, h, "status"); !strings.Contains(got, "Range: 10.32.0.0/16\n") || !strings.Contains(got, "DefaultSubnet: 10.32.0.0/24\n") {
			t.Errorf("status:\n%s", got)
		}
	}
	allReach(t, cs...)
}
