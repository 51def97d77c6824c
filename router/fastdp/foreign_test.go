package fastdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/router/overlay"
)

// sightings counts the frames of a kind that a container's interface receives,
// until the test ends.
type sightings struct {
	mu   sync.Mutex
	seen map[string]int
}

// watch counts frames by what name calls them; those it calls "" are left
// out.
func (c *container) watch(name func(frame []byte) string) *sightings {
	c.t.Helper()
	fd := -1
	c.must(func() (err error) {
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8 // in network order
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, all); err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000}))
	})
	got := &sightings{seen: map[string]int{}}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 65536)
		for {
			n, from, err := unix.Recvfrom(fd, b, 0)
			if err != nil {
				select {
				case <-stop:
					return
				default:
					continue
				}
			}
			link, ok := from.(*unix.SockaddrLinklayer)
			if !ok || link.Pkttype == unix.PACKET_OUTGOING {
				continue
			}
			if what := name(b[:n]); what != "" {
				got.mu.Lock()
				got.seen[what]++
				got.mu.Unlock()
			}
		}
	})
	c.t.Cleanup(func() { close(stop); wg.Wait(); _ = unix.Close(fd) })
	return got
}

func (g *sightings) count(what string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.seen[what]
}

// total is how many different frames were seen, and how often the one seen most.
func (g *sightings) total() (frames, most int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, n := range g.seen {
		most = max(most, n)
	}
	return len(g.seen), most
}

// anySource lets a container send from any address.
func (c *container) anySource() {
	c.t.Helper()
	c.port.AnySource = true
	c.host.must(func() error { return c.host.dp.SetPort(c.port) })
}

// machine makes a second machine behind a container, bridged into its network
// by macvlan as a virtual machine would be.
func (c *container) machine(mac overlay.MAC, cidr string) *container {
	c.t.Helper()
	m := &container{space: newSpace(c.t), host: c.host}
	m.port.MAC, m.port.Addrs = mac, []netip.Prefix{netip.MustParsePrefix(cidr)}
	c.ip(fmt.Sprintf("link add link eth0 name vm address %s type macvlan mode bridge", mac))
	c.ip("link set vm netns " + m.path)
	m.ip("link set vm name eth0")
	m.ip("link set eth0 up")
	m.ip("addr add " + cidr + " dev eth0")
	m.ip("route add default dev eth0")
	return m
}

// A machine behind a container of any source takes part like an endpoint, within
// the subnets of that container; without the permission it does not.
func TestMachineBehindContainer(t *testing.T) { eachWay(t, testMachineBehindContainer) }

func testMachineBehindContainer(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500, 1500)
	a, c := l[0], l[2]
	a1, a2, a3 := a.container("10.32.0.1/24"), a.container("10.32.0.2/24"), a.container("10.32.1.2/24")
	b1 := l[1].container("10.32.0.11/24")
	c1, c2 := c.container("10.32.0.21/24"), c.container("10.32.1.21/24")
	vm := a1.machine(overlay.MAC{2, 0xaa, 0, 0, 0, 1}, "10.32.0.101/24")
	vm2 := c1.machine(overlay.MAC{2, 0xaa, 0, 0, 0, 2}, "10.32.0.102/24")
	all := []*container{a2, a3, b1, c1, c2, vm, vm2}
	for _, x := range all {
		x.echo()
	}
	l.apply(nil)
	if !a1.reaches(c1.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	spoofed := a.counter("dropped_spoofed")
	for _, x := range []*container{a2, b1, c1} {
		if !vm.silent(x.addr()) {
			t.Errorf("the machine reaches %s without permission", x.addr())
		}
	}
	if a.counter("dropped_spoofed") == spoofed {
		t.Error("nothing was dropped as spoofed")
	}
	a1.anySource()
	c1.anySource()
	l.apply(nil)
	strangers := b1.watch(func(f []byte) string {
		if net.HardwareAddr(f[:6]).String() == vm2.port.MAC.String() {
			return "for the other machine"
		}
		return ""
	})
	for _, x := range []struct{ from, to *container }{{vm, a2}, {vm, b1}, {vm, c1}, {c1, vm}, {a2, vm}, {vm, vm2}, {vm2, vm}, {vm2, a2}} {
		for _, size := range []int{100, 1400, 9000} {
			if !x.from.reaches(x.to.addr(), size) {
				t.Errorf("%s does not reach %s with %d bytes", x.from.addr(), x.to.addr(), size)
			}
		}
	}
	// Once learnt, what is for a machine is not flooded.
	unknown, before := a.counter("flooded_unknown"), strangers.count("for the other machine")
	f := vm.dial(vm2.addr())
	for range 20 {
		f.once(100, time.Second)
	}
	if n := a.counter("flooded_unknown") - unknown; n != 0 {
		t.Errorf("%d frames to a machine that is known were flooded", n)
	}
	if n := strangers.count("for the other machine") - before; n != 0 {
		t.Errorf("%d frames for a machine of another host were seen", n)
	}
	for _, x := range []struct{ from, to *container }{{vm, a3}, {vm, c2}, {c2, vm}, {vm2, a3}, {a3, vm2}} {
		if !x.from.silent(x.to.addr()) {
			t.Errorf("%s reaches %s in another subnet", x.from.addr(), x.to.addr())
		}
	}
	// The permission ends.
	a1.port.AnySource = false
	a.must(func() error { return a.dp.SetPort(a1.port) })
	l.apply(nil)
	if !vm.silent(c1.addr()) {
		t.Error("the machine reaches others after the permission has ended")
	}
	if !a1.reaches(c1.addr(), 100) {
		t.Error("the container itself does not reach others any more")
	}
}

// gratuitous is a broadcast that says where an address is (RFC 5227 §3).
func gratuitous(mac overlay.MAC, addr netip.Addr) []byte {
	f := append([]byte{255, 255, 255, 255, 255, 255}, mac[:]...)
	f = append(f, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	f = append(append(f, mac[:]...), addr.AsSlice()...)
	return append(append(f, 0, 0, 0, 0, 0, 0), addr.AsSlice()...)
}

// The address of a virtual router moves from one host to another with one
// gratuitous request, and back.
func TestVirtualRouterMoves(t *testing.T) { eachWay(t, testVirtualRouterMoves) }

func testVirtualRouterMoves(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500, 1500)
	a1, b1, c1 := l[0].container("10.32.0.1/24"), l[1].container("10.32.0.2/24"), l[2].container("10.32.0.3/24")
	a2 := l[0].container("10.32.0.4/24")
	virtual, addr := overlay.MAC{0, 0, 0x5e, 0, 1, 7}, netip.MustParseAddr("10.32.0.200")
	a1.anySource()
	b1.anySource()
	l.apply(nil)
	isMine := func(f []byte) string {
		if overlay.MAC(f[:6]) == virtual && len(f) >= 34 && netip.AddrFrom4([4]byte(f[30:34])) == addr {
			return "mine"
		}
		return ""
	}
	got := map[*container]*sightings{a1: a1.watch(isMine), b1: b1.watch(isMine)}
	for turn, x := range []struct{ master, backup *container }{{a1, b1}, {b1, a1}, {a1, b1}} {
		x.master.raw(gratuitous(virtual, addr))
		for _, from := range []*container{c1, a2} {
			frame := udp(from.port.MAC, virtual, from.addr(), addr)
			begin, before := time.Now(), got[x.master].count("mine")
			wait(t, "a frame at the master", func() bool {
				from.raw(frame)
				return got[x.master].count("mine") > before
			})
			took := time.Since(begin)
			t.Logf("turn %d: from %s after %s", turn, from.addr(), took.Round(time.Millisecond))
			if took > time.Second {
				t.Errorf("turn %d: traffic from %s followed after %s", turn, from.addr(), took)
			}
			stray := got[x.backup].count("mine")
			at := got[x.master].count("mine")
			for range 20 {
				from.raw(frame)
			}
			wait(t, "frames at the master", func() bool { return got[x.master].count("mine") >= at+20 })
			if n := got[x.backup].count("mine") - stray; n != 0 {
				t.Errorf("turn %d: the backup got %d frames from %s", turn, n, from.addr())
			}
		}
	}
}

// A container that is announced to have moved to another host, while its old port
// is still there, is reached at the new place from everywhere.
func TestMovedWhileOldPortStays(t *testing.T) { eachWay(t, testMovedWhileOldPortStays) }

func testMovedWhileOldPortStays(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500, 1500)
	old := l[0].container("10.32.0.1/24")
	a2, b1, c1 := l[0].container("10.32.0.2/24"), l[1].container("10.32.0.3/24"), l[2].container("10.32.0.4/24")
	old.echo()
	c1.echo()
	l.apply(nil)
	for _, x := range []*container{a2, b1, c1} {
		if !x.reaches(old.addr(), 100) {
			t.Fatalf("%s does not reach the container where it was", x.addr())
		}
	}
	// It comes up at B, in silence.
	moved := l[1].attach("10.32.0.1/24")
	moved.ip("link set eth0 address " + old.port.MAC.String())
	moved.port.MAC = old.port.MAC
	l[1].must(func() error { return l[1].dp.SetPort(moved.port) })
	l[0].containers = l[0].containers[1:] // the router leaves out what is announced with a lower number
	l.apply(nil)
	count := func(f []byte) string {
		if len(f) >= 34 && overlay.MAC(f[:6]) == old.port.MAC && f[12] == 8 && f[13] == 0 {
			return "mine"
		}
		return ""
	}
	here, there := moved.watch(count), old.watch(count)
	for _, x := range []*container{a2, b1, c1} {
		at := here.count("mine")
		x.raw(udp(x.port.MAC, old.port.MAC, x.addr(), old.addr()))
		wait(t, "a frame at the new place from "+x.addr().String(), func() bool { return here.count("mine") > at })
	}
	// The bridge sends one to all its ports before it knows better.
	if n := there.count("mine"); n > 1 || n > 0 && !k.bridged {
		t.Errorf("%d frames went to the old place", n)
	}
	// What is left at the old place is not heard.
	heard, spoofed := c1.datagrams(), l[0].counter("dropped_spoofed")
	old.raw(udp(old.port.MAC, c1.port.MAC, old.addr(), c1.addr()))
	wait(t, "a frame from the old place", func() bool { return l[0].counter("dropped_spoofed") > spoofed })
	moved.raw(udp(old.port.MAC, c1.port.MAC, old.addr(), c1.addr()))
	wait(t, "a frame from the new place", func() bool { return c1.datagrams() > heard })
	if n := c1.datagrams() - heard; n != 1 {
		t.Errorf("%d datagrams arrived, want 1", n)
	}
}

// Questions for announced IPv6 addresses stay on the host, and the answers are
// such that the kernel takes them.
func TestNDStaysLocal(t *testing.T) {
	const storm = 200
	l := newLine(t, 1500, 1500)
	a := l[0]
	a1, a2, b1, c1 := a.container("10.32.0.1/24"), a.container("10.32.0.2/24"), l[1].container("10.32.0.3/24"), l[2].container("10.32.0.4/24")
	for i, c := range []*container{a1, a2, b1, c1} {
		p := netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 15: byte(i + 1)}), 64)
		c.ip(fmt.Sprintf("addr add %s dev eth0 nodad", p))
		c.port.Addrs = append(c.port.Addrs, p)
		c.host.must(func() error { return c.host.dp.SetPort(c.port) })
	}
	l.apply(nil)
	questions := c1.watch(func(f []byte) string {
		if len(f) >= 78 && f[12] == 0x86 && f[13] == 0xdd && f[20] == 58 && f[54] == 135 {
			return net.IP(f[62:78]).String()
		}
		return ""
	})
	for _, x := range []*container{a2, b1} {
		to := x.port.Addrs[1].Addr()
		conn := x.listen6(echoPort)
		answered := a.counter("nd_answered")
		for range storm {
			a1.ip("-6 neigh flush dev eth0")
			a1.must(func() error { return send6(to, echoPort) })
			b := make([]byte, 16)
			_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
			if _, _, err := conn.ReadFromUDPAddrPort(b); err != nil {
				t.Fatalf("datagram to %s: %v", to, err)
			}
		}
		if n := a.counter("nd_answered") - answered; n < storm {
			t.Errorf("%s: %d questions of %d were answered", to, n, storm)
		}
		if n := questions.count(to.String()); n != 0 {
			t.Errorf("%d questions for %s were seen by a third host", n, to)
		}
	}
	// One that nobody has goes to all.
	a1.must(func() error { return send6(netip.MustParseAddr("fd00::99"), echoPort) })
	wait(t, "a question to all", func() bool { return questions.count("fd00::99") > 0 })
}

func (c *container) listen6(port int) (conn *net.UDPConn) {
	c.t.Helper()
	c.must(func() (err error) {
		conn, err = net.ListenUDP("udp6", &net.UDPAddr{Port: port})
		return err
	})
	c.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func send6(to netip.Addr, port uint16) error {
	conn, err := net.DialUDP("udp6", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, port)))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_, err = conn.Write(binary.BigEndian.AppendUint64(nil, 1))
	return err
}
