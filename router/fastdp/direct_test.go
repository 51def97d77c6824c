package fastdp

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/router/bpf"
	"weave.local/router/netdev"
)

// refresh looks at the routes as they are now and says that somebody watches.
func (h *host) refresh() {
	h.t.Helper()
	h.must(h.dp.refreshDirect)
	h.must(h.dp.extendDirect)
}

// grows says whether a counter does while f runs.
func (h *host) grows(name string, f func()) bool {
	h.t.Helper()
	before := h.counter(name)
	f()
	return h.counter(name) != before
}

// directPair is two hosts that have the direct way to each other, and a
// container on each; the second echoes.
func directPair(t *testing.T) (l line, a1, b1 *container) {
	t.Helper()
	l = newLineOf(t, kind{direct: true}, 1500)
	a1, b1 = l[0].container("10.32.0.1/24"), l[1].container("10.32.0.2/24")
	b1.echo()
	l.apply(nil)
	if !l[0].grows("direct_tx", func() { a1.reaches(b1.addr(), 100) }) || l[1].counter("direct_rx") == 0 {
		t.Fatal("not direct at first")
	}
	return l, a1, b1
}

// A host on which frames go the direct way and one on which they do not
// understand each other.
func TestDirectAndNot(t *testing.T) {
	for _, direct := range []int{0, 1} {
		l := newLineOf(t, kind{direct: true}, 1500)
		l[1-direct].direct = false
		a1, b1 := l[0].container("10.32.0.1/24"), l[1].container("10.32.0.2/24")
		b1.echo()
		l.apply(nil)
		for _, size := range []int{10, 1400, 1422} {
			if !a1.reaches(b1.addr(), size) {
				t.Errorf("host %d direct: %d bytes do not pass", direct+1, size)
			}
		}
		for i, h := range l {
			if got := h.counter("direct_tx") > 0 && h.counter("direct_rx") > 0; got != (i == direct) {
				t.Errorf("host %d of which %d is direct: %v", i+1, direct+1, got)
			}
		}
	}
}

// A relay sends on what it gets without looking inside, super-frames included,
// as long as it fits.
func TestDirectRelay(t *testing.T) {
	l := newLineOf(t, kind{direct: true}, 1500, 1500, 1500)
	a1, d1 := l[0].container("10.32.0.1/24"), l[3].container("10.32.0.2/24")
	d1.echo()
	l.apply(nil)
	if !a1.reaches(d1.addr(), 1400) {
		t.Fatal("no way through the relays")
	}
	for _, relay := range l[1:3] {
		relayed, direct := relay.counter("relayed"), relay.counter("direct_relayed")
		if direct == 0 {
			t.Errorf("host %d: %d frames relayed, none by the direct way", relay.id, relayed)
		}
	}
	a1.sameBytes(d1, 4<<20)
	l[1].proven[l[2].id] = 1300
	l.apply(nil)
	if mtu := a1.pathMTU(d1.addr(), 1400); mtu != 1300 {
		t.Errorf("a1 learnt MTU %d behind a relay that knows of 1300", mtu)
	}
}

// sameBytes sends by TCP and sees that all arrives as it was.
func (c *container) sameBytes(to *container, size int) {
	c.t.Helper()
	var server net.Listener
	to.must(func() (err error) {
		server, err = net.Listen("tcp4", to.addr().String()+":0")
		return err
	})
	defer server.Close() //nolint:errcheck // nothing is lost
	want := bytes.Repeat([]byte("0123456789abcdef-"), size/17)
	got := make(chan []byte, 1)
	go func() {
		conn, err := server.Accept()
		if err != nil {
			got <- nil
			return
		}
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		b, _ := io.ReadAll(conn)
		got <- b
	}()
	var conn net.Conn
	c.must(func() (err error) {
		conn, err = net.DialTimeout("tcp4", server.Addr().String(), 10*time.Second)
		return err
	})
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, err := conn.Write(want)
	_ = conn.Close()
	if b := <-got; err != nil || !bytes.Equal(b, want) {
		c.t.Errorf("of %d bytes %d arrived, or others: %v", len(want), len(b), err)
	}
}

// When nobody watches the routes any more, frames ask the kernel again, without
// a gap.
func TestDirectEnds(t *testing.T) {
	l, a1, b1 := directPair(t)
	b := l[1]
	sent, back := a1.during(b1.addr(), func() {
		for _, h := range l {
			h.dp.cfg.directFor = -time.Second
			h.refresh()
		}
		for _, h := range l {
			for _, name := range []string{"direct_tx", "direct_rx"} {
				if h.grows(name, func() { a1.reaches(b1.addr(), 100) }) {
					t.Errorf("host %d: %s grows after the end", h.id, name)
				}
			}
		}
		for _, h := range l {
			h.dp.cfg.directFor = time.Hour
			h.refresh()
		}
	})
	if sent != back {
		t.Errorf("of %d datagrams %d came back while the way changed", sent, back)
	}
	if !b.grows("direct_rx", func() { a1.reaches(b1.addr(), 100) }) {
		t.Error("not direct again")
	}
}

// A route that moves to another device is followed.
func TestDirectFollowsRoutes(t *testing.T) {
	l, a1, b1 := directPair(t)
	a, b := l[0], l[1]
	a.ip("link add other type veth peer name other netns " + b.path)
	for _, h := range l {
		h.ip("link set other up")
	}
	b.ip("addr add 198.51.100.2/24 dev other")
	a.ip("addr add 198.51.100.1/24 dev other")
	for _, h := range l {
		h.ip("addr add " + h.addr().String() + "/32 dev lo")
	}
	a.ip("addr del 192.0.2.1/32 peer 192.0.2.2 dev to2")
	b.ip("addr del 192.0.2.2/32 peer 192.0.2.1 dev to1")
	a.ip("route replace 192.0.2.2/32 via 198.51.100.2 dev other src 192.0.2.1")
	b.ip("route replace 192.0.2.1/32 via 198.51.100.1 dev other src 192.0.2.2")
	a.refresh()
	b.refresh()
	a.ip("link set to2 down")
	if !a.grows("direct_tx", func() {
		if !a1.reaches(b1.addr(), 100) {
			t.Error("the new way does not carry frames")
		}
	}) {
		t.Error("the direct way is not used on the new device")
	}
	a.must(func() error {
		for name, want := range map[string]bool{"to2": false, "other": true} {
			i, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if a.dp.objs.Attached(i.Index, bpf.UplinkIn) != want {
				t.Errorf("our program on %s: %v", name, !want)
			}
		}
		return nil
	})
}

// Whoever looks at packets of the host is not passed by.
func TestWhatBarsTheDirectWay(t *testing.T) {
	l, a1, b1 := directPair(t)
	a := l[0]
	for _, c := range []struct{ name, bar, clear string }{
		{"IPsec", "ip xfrm policy add src 192.0.2.1 dst 198.51.100.9 dir out tmpl src 192.0.2.1 dst 198.51.100.9 proto esp mode transport", "ip xfrm policy flush"},
		{"ingress filter", "tc qdisc add dev to2 ingress", "tc qdisc del dev to2 ingress"},
		{"clsact", "tc qdisc add dev to2 clsact", "tc qdisc del dev to2 clsact"},
		{"rules for frames", "nft -f -", "nft delete table netdev x"},
	} {
		if !a.grows("direct_tx", func() { a1.reaches(b1.addr(), 100) }) {
			t.Errorf("%s: not direct before", c.name)
		}
		run := func(command string) {
			t.Helper()
			if command == "nft -f -" {
				for _, part := range []string{"nft add table netdev x", "nft add chain netdev x c", "nft add rule netdev x c accept"} {
					if _, err := a.output(part); err != nil {
						t.Fatal(err)
					}
				}
			} else if _, err := a.output(command); err != nil {
				t.Fatal(err)
			}
			a.refresh()
			l.recheck(0)
		}
		run(c.bar)
		for _, name := range []string{"direct_tx", "direct_rx"} {
			if a.grows(name, func() {
				if !a1.reaches(b1.addr(), 100) {
					t.Errorf("%s: nothing passes", c.name)
				}
			}) {
				t.Errorf("%s: %s grows", c.name, name)
			}
		}
		run(c.clear)
	}
}

// Where the underlay joins no packets, we do: a container gets super-frames.
func TestJoined(t *testing.T) {
	const enough = 20000 // bytes of a frame, more than a dozen segments
	l := newLineOf(t, kind{direct: true}, 1500)
	a, b := l[0], l[1]
	for _, h := range l {
		for _, dev := range []string{"to1", "to2"} {
			if out, err := h.output("ethtool -K " + dev + " tso off gso off gro off tx off"); err != nil && !strings.Contains(out+err.Error(), "No such device") {
				t.Fatal(err)
			}
		}
	}
	a1, b1 := a.container("10.32.0.1/24"), b.container("10.32.0.2/24")
	b1.echo()
	l.apply(nil)
	if !a1.reaches(b1.addr(), 1000) {
		t.Fatal("no way between the hosts")
	}
	seen := b1.capture(t, "eth0", 0)
	a1.sameBytes(b1, 8<<20)
	largest := seen.stop()[unix.IPPROTO_TCP]
	if largest < enough {
		t.Errorf("the largest frame that arrived has %d bytes", largest)
	}
	if _, err := b.output("ethtool -K to1 gro on"); err != nil {
		t.Fatal(err)
	}
	b.refresh()
	b.must(func() error {
		if _, err := netdev.DeviceByName(joinerIn); err == nil {
			t.Errorf("%s is there though nobody needs it", joinerIn)
		}
		return nil
	})
	a1.sameBytes(b1, 1<<20)
}

// Strangers do not get in by the direct way, and what is not plain VXLAN takes
// the VXLAN device, which knows what to do with it.
func TestDirectIsPicky(t *testing.T) {
	l, a1, b1 := directPair(t)
	a, b := l[0], l[1]
	a.ip("addr add 192.0.2.77/32 dev to2")
	b.ip("route add 192.0.2.77/32 dev to1")
	for _, c := range []struct {
		name   string
		source netip.Addr
		counts string // what the VXLAN device makes of it
	}{
		{"from a stranger", netip.MustParseAddr("192.0.2.77"), "dropped_not_neighbour"},
		{"with UDP checksum, which no program can test,", a.addr(), "rx"},
	} {
		if b.grows("direct_rx", func() {
			before := b.counter(c.counts)
			a.vxlanFrom(c.source, b, a1, b1)
			for range 100 {
				if b.counter(c.counts) != before {
					return
				}
				<-time.After(20 * time.Millisecond)
			}
			t.Errorf("a frame %s: %s does not grow", c.name, c.counts)
		}) {
			t.Errorf("a frame %s was taken by the direct way", c.name)
		}
	}
}

// vxlanFrom sends a frame between two containers from an ordinary socket, which
// adds a UDP checksum.
func (h *host) vxlanFrom(source netip.Addr, to *host, from, dst *container) {
	h.t.Helper()
	vni := uint32(h.id) | uint32(to.id)<<shortIDBits
	p := []byte{vxlanFlagVNI, 0, 0, 0, byte(vni >> 16), byte(vni >> 8), byte(vni), 0}
	p = append(append(p, dst.port.MAC[:]...), from.port.MAC[:]...)
	p = append(p, 8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0)
	p = append(append(p, from.addr().AsSlice()...), dst.addr().AsSlice()...)
	p = append(p, 0, 1, 0, 2, 0, 8, 0, 0)
	h.must(func() error {
		conn, err := net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(source, 0)),
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.addr(), testPort)))
		if err != nil {
			return err
		}
		defer conn.Close() //nolint:errcheck // nothing is lost
		_, err = conn.Write(p)
		return err
	})
}
