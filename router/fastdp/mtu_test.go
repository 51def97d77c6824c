package fastdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/peer"
)

// joinSilently lays a cable between two hosts that has two routers in it, with
// less room between them than at the ends and never a word about that.
func joinSilently(a, b *host, mtu int) {
	a.t.Helper()
	near, far := newSpace(a.t), newSpace(a.t)
	near.ip(fmt.Sprintf("link add mid mtu %d type veth peer name mid mtu %d netns %s", mtu, mtu, far.path))
	gateway, length := "169.254.7.%d", 32
	if a.ipv6 {
		gateway, length = "fe80::7:%d", 128
	}
	route := func(s *space, to netip.Addr, gw int, dev string) {
		s.ip(fmt.Sprintf("route add %s/%d via "+gateway+" dev %s onlink", to, length, gw, dev))
	}
	address := func(s *space, addr, dev string) {
		s.ip(fmt.Sprintf("link set %s up", dev))
		s.ip(fmt.Sprintf("addr add %s/%d dev %s", addr, length, dev) + map[bool]string{true: " nodad"}[a.ipv6])
	}
	for i, end := range []struct {
		host, other *host
		r           *space
	}{{a, b, near}, {b, a, far}} {
		dev := fmt.Sprintf("to%d", end.other.id)
		end.host.ip(fmt.Sprintf("link add %s mtu 1500 type veth peer name edge mtu 1500 netns %s", dev, end.r.path))
		address(end.host.space, end.host.addr().String(), dev)
		address(end.r, fmt.Sprintf(gateway, 10+i), "edge")
		address(end.r, fmt.Sprintf(gateway, 20+i), "mid")
		route(end.host.space, end.other.addr(), 10+i, dev)
		end.r.ip(fmt.Sprintf("route add %s/%d dev edge", end.host.addr(), length))
		route(end.r, end.other.addr(), 21-i, "mid")
		for _, c := range []string{
			"sysctl -qw net.ipv4.ip_forward=1", "sysctl -qw net.ipv6.conf.all.forwarding=1",
			"iptables -A OUTPUT -p icmp -j DROP", "ip6tables -A OUTPUT -p icmpv6 --icmpv6-type packet-too-big -j DROP",
		} {
			if _, err := end.r.output(c); err != nil {
				a.t.Fatal(err)
			}
		}
	}
}

// silentLine is three hosts; the underlay between the first two carries IP
// packets of mtu bytes, which is proven to the data paths but unknown to the
// kernel.
func silentLine(t *testing.T, k kind, mtu int) (l line, inside int) {
	t.Helper()
	l = line{startedWith(t, 1, k), startedWith(t, 2, k), startedWith(t, 3, k)}
	joinSilently(l[0], l[1], mtu)
	join(l[1], l[2], 1500)
	inside = mtu - overhead(l[0].addr())
	wide := 1500 - overhead(l[0].addr())
	l[0].proven, l[1].proven = map[peer.ShortID]int{2: inside}, map[peer.ShortID]int{1: inside, 3: wide}
	l[2].proven = map[peer.ShortID]int{2: wide}
	for i, h := range l {
		c := h.attach(fmt.Sprintf("10.32.0.%d/24", i+1))
		c.port.Addrs = append(c.port.Addrs, netip.MustParsePrefix(fmt.Sprintf("fd00::%d/64", i+1)))
		c.ip(fmt.Sprintf("addr add fd00::%d/64 dev eth0 nodad", i+1))
		h.must(func() error { return h.dp.SetPort(c.port) })
	}
	l.apply(nil)
	return l, inside
}

func (l line) first(i int) *container { return l[i].containers[0] }

// eachUnderlay tests both ways of frames over both kinds of underlay.
func eachUnderlay(t *testing.T, f func(t *testing.T, k kind)) {
	t.Helper()
	eachWay(t, func(t *testing.T, k kind) {
		for name, ipv6 := range map[string]bool{"IPv4": false, "IPv6": true} {
			if k.ipv6 = ipv6; ipv6 && k.direct {
				continue // that way is for IPv4
			}
			t.Run(name, func(t *testing.T) { f(t, k) })
		}
	})
}

// In steps of one byte: what fits arrives, what does not is answered with the
// size that does, never with silence.
func TestNoBlackHole(t *testing.T) { eachUnderlay(t, testNoBlackHole) }

func testNoBlackHole(t *testing.T, k kind) {
	const underlay = 1400
	l, fits := silentLine(t, k, underlay)
	l[0].offloadsOff("to2")
	for i := range l {
		l.first(i).echo()
		l.first(i).echoIPv6()
	}
	pairs := map[string][2]int{
		"direct": {0, 1}, "direct, back": {1, 0}, "narrow before the relay": {0, 2}, "narrow behind the relay": {2, 0},
	}
	for name, p := range pairs {
		from, to := l.first(p[0]), l.first(p[1])
		if !from.reaches(to.addr(), 100) {
			t.Fatalf("%s: no way", name)
		}
		for _, dst := range []netip.Addr{to.port.Addrs[0].Addr(), to.port.Addrs[1].Addr()} {
			for size := fits - 3; size <= fits+3; size++ {
				got, err := from.ask(dst, size)
				if err != nil {
					t.Errorf("%s: %d bytes to %s: %v", name, size, dst, err)
				} else if want := map[bool]int{true: fits}[size > fits]; got != want {
					t.Errorf("%s: %d bytes to %s: told an MTU of %d, want %d (0: none, it arrives)", name, size, dst, got, want)
				}
			}
		}
	}
	for i, h := range l[:2] {
		if h.counter("too_big") == 0 {
			t.Errorf("host %d made no errors itself", i+1)
		}
	}
	l.checkWay(k)
}

// TCP finds the size by itself, whoever sends and whether the sums are made by
// the sender or left to devices.
func TestTCPThroughNarrowPath(t *testing.T) { eachUnderlay(t, testTCPThroughNarrowPath) }

func testTCPThroughNarrowPath(t *testing.T, k kind) {
	const much = 4 << 20
	l, _ := silentLine(t, k, 1400)
	for _, p := range [][2]int{{0, 2}, {2, 0}, {1, 0}} {
		from, to := l.first(p[0]), l.first(p[1])
		for _, dst := range to.port.Addrs {
			took, err := from.transfer(to, dst.Addr(), much)
			if err != nil {
				t.Errorf("host %d to %s: %v", p[0]+1, dst.Addr(), err)
			}
			t.Logf("host %d to %s: %d bytes in %v", p[0]+1, dst.Addr(), much, took)
		}
		from.offloadsOff("eth0")
		from.ip("route flush cache")
		if _, err := from.transfer(to, to.addr(), much); err != nil {
			t.Errorf("host %d without offloads: %v", p[0]+1, err)
		}
	}
	if l[0].counter("too_big") == 0 || l[1].counter("too_big") == 0 {
		t.Error("the hosts made no errors themselves")
	}
}

// What may be fragmented is, and groups and broadcasts, which nobody answers,
// as well.
func TestFragmentsThroughNarrowPath(t *testing.T) { eachUnderlay(t, testFragmentsThroughNarrowPath) }

func testFragmentsThroughNarrowPath(t *testing.T, k kind) {
	l, fits := silentLine(t, k, 1400)
	l.first(2).echo()
	from := l.first(0)
	if !from.reaches(l.first(2).addr(), 100) {
		t.Fatal("no way")
	}
	f := from.dial(l.first(2).addr())
	f.option(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
	ok := false
	for range 10 { // the answer has DF, and its sender is told at first
		ok = ok || f.once(fits+20, 200*time.Millisecond)
	}
	if !ok {
		t.Errorf("%d bytes without DF do not arrive", fits+20)
	}
}

func (f *flow) control(do func(fd int) error) {
	f.t.Helper()
	raw, err := f.conn.SyscallConn()
	if err != nil {
		f.t.Fatal(err)
	}
	var err2 error
	if err := errors.Join(raw.Control(func(fd uintptr) { err2 = do(int(fd)) }), err2); err != nil {
		f.t.Fatal(err)
	}
}

func (f *flow) option(level, name, value int) {
	f.t.Helper()
	f.control(func(fd int) error { return unix.SetsockoptInt(fd, level, name, value) })
}

// ask sends IP packets of size bytes that must not be fragmented, whatever was
// learnt before, until one comes back or an error does, and returns the MTU
// that the error tells, 0 without. The error here says that neither came.
func (c *container) ask(to netip.Addr, size int) (mtu int, err error) {
	c.t.Helper()
	f, headers := &flow{t: c.t}, 28
	c.must(func() (err error) {
		f.conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, echoPort)))
		return err
	})
	defer f.conn.Close() //nolint:errcheck // nothing is lost
	if to.Is6() {
		headers = 48
		f.option(unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)
		f.option(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
	} else {
		f.option(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		f.option(unix.IPPROTO_IP, unix.IP_RECVERR, 1)
	}
	for range 20 {
		if f.once(size-headers, 100*time.Millisecond) {
			return 0, nil
		}
		if mtu := f.told(); mtu != 0 {
			return mtu, nil
		}
	}
	return 0, errors.New("silence")
}

// told is the MTU that an ICMP error told the socket, 0 when none did.
func (f *flow) told() (mtu int) {
	const extendedErr = 16 // struct sock_extended_err
	f.control(func(fd int) error {
		b, oob := make([]byte, 65536), make([]byte, 512)
		_, n, _, _, err := unix.Recvmsg(fd, b, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return nil //nolint:nilerr // none is there
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		for _, m := range messages {
			if len(m.Data) >= extendedErr && binary.NativeEndian.Uint32(m.Data) == uint32(unix.EMSGSIZE) {
				mtu = int(binary.NativeEndian.Uint32(m.Data[8:]))
			}
		}
		return err
	})
	return mtu
}

// echoIPv6 is echo for the container's IPv6 address.
func (c *container) echoIPv6() {
	c.t.Helper()
	var conn *net.UDPConn
	c.must(func() (err error) {
		conn, err = net.ListenUDP("udp6", net.UDPAddrFromAddrPort(netip.AddrPortFrom(c.port.Addrs[1].Addr(), echoPort)))
		return err
	})
	c.answer(conn)
}

// transfer sends bytes by TCP to an address of another container.
func (c *container) transfer(to *container, addr netip.Addr, much int64) (time.Duration, error) {
	c.t.Helper()
	const within = 10 * time.Second
	var server net.Listener
	to.must(func() (err error) {
		server, err = net.Listen("tcp", net.JoinHostPort(addr.String(), "0"))
		return err
	})
	defer server.Close() //nolint:errcheck // nothing is lost
	begin := time.Now()
	sent := make(chan error, 1)
	go func() {
		sent <- c.do(func() error {
			conn, err := net.DialTimeout("tcp", server.Addr().String(), within)
			if err != nil {
				return err
			}
			defer conn.Close() //nolint:errcheck // the receiver counts
			_ = conn.SetDeadline(time.Now().Add(within))
			_, err = io.CopyN(conn, zeroes{}, much)
			return err
		})
	}()
	conn, err := server.Accept()
	if err != nil {
		return 0, err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	_ = conn.SetDeadline(time.Now().Add(within))
	n, err := io.Copy(io.Discard, conn)
	if err2 := <-sent; err != nil || err2 != nil || n != much {
		return 0, fmt.Errorf("%d of %d bytes: %w", n, much, errors.Join(err, err2))
	}
	return time.Since(begin), nil
}

type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) { return len(b), nil }

// offloadsOff makes a device leave no checksum to the one behind it.
func (s *space) offloadsOff(dev string) {
	s.t.Helper()
	if _, err := s.output("ethtool -K " + dev + " tx off"); err != nil {
		s.t.Fatal(err)
	}
}
