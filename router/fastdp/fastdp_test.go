package fastdp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
	"weave.local/router/overlay/overlaytest"
)

/*
	a1 ─ A ══ B ══ C ─ c1 (same subnet as a1)
	     a2 ┘    b1 ┘    └ c2 (other subnet, as a2)

There is no cable between A and C: B relays in the kernel.
*/
func TestThreeHosts(t *testing.T) { eachWay(t, testThreeHosts) }

func testThreeHosts(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500, 1500)
	a, b, c := l[0], l[1], l[2]
	a1, a2 := a.container("10.32.0.1/24"), a.container("10.32.1.1/24")
	b1 := b.container("10.32.0.2/24")
	c1, c2 := c.container("10.32.0.3/24"), c.container("10.32.1.3/24")
	for _, x := range []*container{a1, b1, c1, c2} {
		x.echo()
	}
	l.apply(nil)
	// What the devices sent of themselves while the hosts came to know each
	// other, one after the other, is not counted.
	early := map[peer.ShortID]map[string]uint64{}
	for _, h := range l {
		early[h.id] = map[string]uint64{}
		for _, name := range dropped() {
			early[h.id][name] = h.counter(name)
		}
	}

	for _, x := range []struct {
		from, to *container
	}{{a1, b1}, {b1, c1}, {a1, c1}, {c1, a1}, {a2, c2}} {
		for _, size := range []int{1, 1400, 9000} {
			if !x.from.reaches(x.to.addr(), size) {
				t.Errorf("%s does not reach %s with %d bytes", x.from.addr(), x.to.addr(), size)
			}
		}
	}
	if b.counter("relayed") == 0 {
		t.Error("B relayed nothing")
	}
	flooded := b.counter("rx_flooded")
	a1.raw(a1.arp(a1.addr()))
	wait(t, "a flooded frame", func() bool { return b.counter("rx_flooded") > flooded })
	for _, x := range []struct{ from, to *container }{{a1, c2}, {a2, c1}, {a1, a2}, {a2, a1}} {
		if !x.from.silent(x.to.addr()) {
			t.Errorf("%s reaches %s in another subnet", x.from.addr(), x.to.addr())
		}
	}
	l.checkWay(k)
	for _, h := range l {
		for _, name := range dropped() {
			if n := h.counter(name) - early[h.id][name]; n != 0 {
				t.Errorf("host %d: %s is %d", h.id, name, n)
			}
		}
	}
}

// dropped lists what must not happen to a frame where all is well.
func dropped() []string {
	return []string{"dropped_no_path", "dropped_own", "dropped_reverse_path", "dropped_backwards",
		"dropped_not_neighbour", "dropped_malformed", "dropped_send", "dropped_unknown_port"}
}

// udp is an Ethernet frame with a UDP datagram to the echo port.
func udp(srcMAC, dstMAC overlay.MAC, src, dst netip.Addr) []byte {
	f := append(append([]byte{}, dstMAC[:]...), srcMAC[:]...)
	f = append(f, 8, 0)
	h := make([]byte, 20, 60)
	h[0], h[8], h[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(h[2:], 60)
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	sum := uint32(0)
	for i := 0; i < len(h); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum>>16+sum))
	h = binary.BigEndian.AppendUint16(h, 4000)
	h = binary.BigEndian.AppendUint16(h, echoPort)
	h = binary.BigEndian.AppendUint16(h, 40)
	return append(append(f, h...), make([]byte, 34)...)
}

// Raw sockets do not get a container across: what its port does not own is
// dropped where it leaves, what is not of the receiver's subnet where it would
// arrive.
func TestCraftedFrames(t *testing.T) { eachWay(t, testCraftedFrames) }

func testCraftedFrames(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500)
	a, b := l[0], l[1]
	a1, a2 := a.container("10.32.0.1/24"), a.container("10.32.1.1/24")
	b1 := b.container("10.32.0.2/24")
	b1.echo()
	l.apply(nil)
	if !a1.reaches(b1.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	got := b1.datagrams()
	spoofed, isolated, unknown := a.counter("dropped_spoofed"), b.counter("dropped_isolated"), b.counter("dropped_unknown_mac")

	a2.raw(udp(a2.port.MAC, b1.port.MAC, a1.addr(), b1.addr())) // a1's address
	a2.raw(udp(a1.port.MAC, b1.port.MAC, a1.addr(), b1.addr())) // a1's MAC, too
	if n := a.counter("dropped_spoofed") - spoofed; n != 2 {
		t.Errorf("%d frames dropped as spoofed, want 2", n)
	}
	a2.raw(udp(a2.port.MAC, b1.port.MAC, a2.addr(), b1.addr())) // honest, but to another subnet
	wait(t, "isolation", func() bool { return b.counter("dropped_isolated") > isolated })

	// A container that nobody announced.
	a3 := a.container("10.32.0.9/24")
	a3.raw(udp(a3.port.MAC, b1.port.MAC, a3.addr(), b1.addr()))
	wait(t, "unknown sender", func() bool { return b.counter("dropped_unknown_mac") > unknown })

	a1.raw(udp(a1.port.MAC, b1.port.MAC, a1.addr(), b1.addr())) // as it should be
	wait(t, "an honest frame", func() bool { return b1.datagrams() > got })
	if n := b1.datagrams() - got; n != 1 {
		t.Errorf("%d datagrams arrived, want 1", n)
	}
}

// datagrams is how many UDP datagrams the container has received.
func (c *container) datagrams() (n int) {
	c.t.Helper()
	c.must(func() error {
		table, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var fields []string
		for line := range strings.Lines(string(table)) {
			if strings.HasPrefix(line, "Udp:") {
				fields = strings.Fields(line)
			}
		}
		for _, d := range fields[1] {
			n = n*10 + int(d-'0')
		}
		return nil
	})
	return n
}

func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.After(5 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-late:
			t.Fatalf("%s: nothing in 5 s", what)
		case <-tick.C:
		}
	}
}

// A path that is narrower than the bridge says so to the containers, also
// where the narrow part is behind a relay.
func TestPathMTU(t *testing.T) { eachWay(t, testPathMTU) }

func testPathMTU(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500, 1300)
	a1, c1 := l[0].container("10.32.0.1/24"), l[2].container("10.32.0.3/24")
	b1 := l[1].container("10.32.0.2/24")
	b1.echo()
	c1.echo()
	l.apply(nil)
	if !a1.reaches(c1.addr(), 100) || !a1.reaches(b1.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	if mtu := a1.pathMTU(b1.addr(), 1400); mtu != 0 {
		t.Errorf("a1 learnt MTU %d on the way to b1, where there is room", mtu)
	}
	if mtu := a1.pathMTU(c1.addr(), 1400); mtu != 1250 {
		t.Errorf("a1 learnt MTU %d on the way to c1, want 1250", mtu)
	}
	if mtu := b1.pathMTU(c1.addr(), 1400); mtu != 1250 {
		t.Errorf("b1 learnt MTU %d on the way to c1, want 1250", mtu)
	}
	l.checkWay(k)
	// Without DF it gets through in fragments.
	if !a1.reaches(c1.addr(), 9000) {
		t.Error("fragments do not arrive")
	}
}

// The exposed host is an endpoint like any other, but may route for others.
func TestExposedHost(t *testing.T) { eachWay(t, testExposedHost) }

func testExposedHost(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500, 1300)
	a, c := l[0], l[2]
	c1 := c.container("10.32.0.3/24")
	c1.echo()
	bridge := overlay.Port{IfName: "weave", Endpoint: overlay.Endpoint{
		MAC: a.mac(), Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.100/24")}, Peer: a.id}}
	a.must(func() error {
		i, err := net.InterfaceByName("weave")
		bridge.IfIndex = i.Index
		return err
	})
	a.ip("addr add 10.32.0.100/24 dev weave")
	a.must(func() error { return a.dp.SetPort(bridge) })
	a.containers = append(a.containers, &container{space: a.space, host: a, port: bridge})
	l.apply(nil)
	c1.ip("route replace default via 10.32.0.100 dev eth0")
	exposed := a.containers[0]
	if !exposed.reaches(c1.addr(), 100) {
		t.Error("the exposed host does not reach a container")
	}
	if mtu := exposed.pathMTU(c1.addr(), 1400); mtu != 1250 {
		t.Errorf("the exposed host learnt MTU %d, want 1250", mtu)
	}
	a.ip("addr add 198.51.100.1/32 dev lo")
	a.ip("route replace 10.32.0.0/24 dev weave src 198.51.100.1")
	if !exposed.reaches(c1.addr(), 100) {
		t.Error("an address behind the exposed host does not reach a container")
	}
	a.must(func() error { return a.dp.RemovePort(bridge.IfIndex) })
	a.containers = nil
	l.apply(nil)
	if !exposed.silent(c1.addr()) {
		t.Error("the host reaches a container though it is hidden")
	}
}

// inside is a data path all of whose calls are made in its namespace.
type inside struct {
	overlay.Overlay
	s *space
}

func (i inside) Apply(f overlay.Forwarding) error {
	return i.s.do(func() error { return i.Overlay.Apply(f) })
}

func (i inside) Probe(to peer.ShortID, token uint64, size int) error {
	return i.s.do(func() error { return i.Overlay.Probe(to, token, size) })
}

func (i inside) MTU(to peer.ShortID) (mtu int) {
	_ = i.s.do(func() error { mtu = i.Overlay.MTU(to); return nil })
	return mtu
}

func TestConformance(t *testing.T) {
	for name, c := range map[string]struct {
		ipv6 bool
		mtu  int
		add  int
	}{"Ethernet": {false, 1500, overhead4}, "JumboIPv6": {true, 9000, overhead6}} {
		t.Run(name, func(t *testing.T) {
			overlaytest.Run(t, func(t *testing.T) overlaytest.Pair {
				l := newLineOf(t, kind{ipv6: c.ipv6}, c.mtu)
				end := func(i int) overlaytest.End {
					return overlaytest.End{Path: inside{l[i].dp, l[i].space}, Probes: l[i].probes, Forwarding: l.forwarding(i, nil)}
				}
				return overlaytest.Pair{A: end(0), B: end(1), MTU: c.mtu - c.add}
			})
		})
	}
}

// The underlay may be IPv6: relaying, flooding and path MTU are the same.
func TestIPv6Underlay(t *testing.T) { eachWay(t, testIPv6Underlay) }

func testIPv6Underlay(t *testing.T, k kind) {
	k.ipv6 = true
	l := newLineOf(t, k, 1500, 1400)
	a1, c1 := l[0].container("10.32.0.1/24"), l[2].container("10.32.0.3/24")
	a1.echo()
	c1.echo()
	l.apply(nil)
	if !a1.reaches(c1.addr(), 1300) {
		t.Error("1300 bytes do not come back")
	}
	if mtu := a1.pathMTU(c1.addr(), 1400); mtu != 1330 {
		t.Errorf("a1 learnt MTU %d, want 1330", mtu)
	}
	// Unlike IPv4, IPv6 does not fragment outside, so both ends must know.
	if mtu := c1.pathMTU(a1.addr(), 1400); mtu != 1330 {
		t.Errorf("c1 learnt MTU %d, want 1330", mtu)
	}
	if !a1.reaches(c1.addr(), 9000) {
		t.Error("9000 bytes do not come back")
	}
}

// A router or the holder of a virtual address sends from addresses that are
// not its own, if it may; that outlives the daemon.
func TestAnySource(t *testing.T) {
	l, a1, b1 := newPair(t)
	a := l[0]
	virtual := udp(a1.port.MAC, b1.port.MAC, netip.MustParseAddr("10.32.0.200"), b1.addr())
	otherMAC := udp(overlay.MAC{2, 9}, b1.port.MAC, a1.addr(), b1.addr())
	spoofed, got := a.counter("dropped_spoofed"), b1.datagrams()
	a1.raw(virtual, otherMAC)
	if n := a.counter("dropped_spoofed") - spoofed; n != 2 {
		t.Errorf("%d frames dropped as spoofed, want 2", n)
	}
	a1.port.AnySource = true
	a.must(func() error { return a.dp.SetPort(a1.port) })
	if err := a.dp.Close(); err != nil {
		t.Fatal(err)
	}
	a.start()
	a1.raw(virtual, otherMAC)
	wait(t, "a frame from a virtual address", func() bool { return b1.datagrams() > got })
	taken := udp(b1.port.MAC, b1.port.MAC, a1.addr(), b1.addr())
	a1.raw(taken)
	wait(t, "a frame from an announced address", func() bool { return a.counter("dropped_spoofed") > spoofed+2 })
	if n := a.counter("dropped_spoofed") - spoofed; n != 3 {
		t.Errorf("%d frames dropped as spoofed, want 3", n)
	}
}
