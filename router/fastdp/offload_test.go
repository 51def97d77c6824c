package fastdp

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// bulkPort takes streams and datagrams of much data.
	bulkPort = 9
	// vxlanInside is what lies in front of the inner Ethernet header on an
	// IPv4 underlay: Ethernet, IPv4, UDP and VXLAN header.
	vxlanInside = 14 + 20 + 8 + 8
)

// Frames of up to 64 KB cross the overlay whole, and checksums are right
// whoever computes them: past the bridge and through it, direct and relayed.
func TestOffloads(t *testing.T) {
	for name, mtus := range map[string][]int{"direct": {1500}, "relayed": {1500, 1500}} {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, k kind) { testOffloads(t, newLineOf(t, k, mtus...), k) })
		})
	}
}

func testOffloads(t *testing.T, l line, k kind) {
	last := l[len(l)-1]
	a, b := l[0].container("10.32.0.1/24"), last.container("10.32.0.2/24")
	b.echo()
	l.apply(nil)
	if !a.reaches(b.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	for _, c := range []struct{ inside, underlay string }{{"on", "on"}, {"off", "on"}, {"on", "off"}, {"off", "off"}} {
		t.Run(fmt.Sprintf("inside_%s_underlay_%s", c.inside, c.underlay), func(t *testing.T) {
			for _, end := range []*container{a, b} {
				end.space.checksums(t, c.inside, "eth0")
				end.host.checksums(t, c.inside, end.port.IfName)
			}
			for i := range l[1:] {
				l[i].checksums(t, c.underlay, fmt.Sprintf("to%d", l[i+1].id))
				l[i+1].checksums(t, c.underlay, fmt.Sprintf("to%d", l[i].id))
			}
			seen := map[string]*capture{"on the first cable": l[0].capture(t, fmt.Sprintf("to%d", l[1].id), vxlanInside),
				"on the last cable": last.capture(t, fmt.Sprintf("to%d", l[len(l)-2].id), vxlanInside), "in the container": b.capture(t, "eth0", 0)}
			transfer(t, a, b, 16<<20)
			segmented := sendSegmented(t, a, b, c.inside == "off")
			whole := c.inside == "on" && c.underlay == "on"
			for where, s := range seen {
				largest := s.stop()
				const tcp, udp = unix.IPPROTO_TCP, unix.IPPROTO_UDP
				t.Logf("%s: largest frame with TCP %d bytes, with UDP %d", where, largest[tcp], largest[udp])
				if whole && (largest[tcp] <= 32<<10 || largest[udp] <= 32<<10 || !segmented) {
					t.Errorf("%s: the largest frame with TCP has %d bytes, with UDP %d", where, largest[tcp], largest[udp])
				}
			}
			for _, s := range append([]*space{a.space, b.space}, l.spaces()...) {
				if n := s.badChecksums(t); n > 0 {
					t.Errorf("%d packets with wrong checksum", n)
				}
			}
		})
	}
	l.checkWay(k)
}

func (l line) spaces() (out []*space) {
	for _, h := range l {
		out = append(out, h.space)
	}
	return out
}

// checksums sets whether a device, and not the kernel, completes checksums.
func (s *space) checksums(t *testing.T, onOff, dev string) {
	t.Helper()
	if _, err := s.output(fmt.Sprintf("ethtool -K %s tx %s", dev, onOff)); err != nil {
		t.Fatal(err)
	}
	if onOff != "on" {
		return
	}
	// What was switched off with it does not come back by itself.
	if _, err := s.output(fmt.Sprintf("ethtool -K %s tso on gso on", dev)); err != nil {
		t.Fatal(err)
	}
}

// badChecksums counts what the namespace refused for its checksum.
func (s *space) badChecksums(t *testing.T) (n int) {
	t.Helper()
	text, err := s.output("cat /proc/net/snmp")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	found := 0
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(names) != len(f) || names[0] != f[0] {
			names = f
			continue
		}
		for i, name := range names {
			if name == "InCsumErrors" {
				v, err := strconv.Atoi(f[i])
				if err != nil {
					t.Fatal(err)
				}
				n += v
				found++
			}
		}
	}
	if found < 3 { // ICMP, TCP, UDP
		t.Fatalf("%d counters of wrong checksums in %s", found, text)
	}
	return n
}

// capture notes the largest frames on a device, by the IP protocol inside.
type capture struct {
	end     func()
	largest chan map[byte]int
}

// capture begins at once. Inner frames lie after the given number of bytes.
func (s *space) capture(t *testing.T, dev string, inside int) *capture {
	t.Helper()
	var fd int
	s.must(func() (err error) {
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8 // in network order
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0); err != nil {
			return err
		}
		i, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}))
	})
	end := make(chan struct{})
	c := &capture{end: sync.OnceFunc(func() { close(end) }), largest: make(chan map[byte]int, 1)}
	t.Cleanup(c.end)
	go func() {
		defer unix.Close(fd) //nolint:errcheck // nothing is lost
		largest := map[byte]int{}
		b := make([]byte, inside+14+20)
		for {
			n, _, err := unix.Recvfrom(fd, b, unix.MSG_TRUNC)
			if err == nil && n >= len(b) && bytes.Equal(b[inside+12:inside+14], []byte{8, 0}) {
				proto := b[inside+14+9]
				largest[proto] = max(largest[proto], n)
			}
			if err == nil {
				continue // there may be more, and all of it counts
			}
			select {
			case <-end:
				c.largest <- largest
				return
			default:
			}
		}
	}()
	return c
}

func (c *capture) stop() map[byte]int {
	c.end()
	return <-c.largest
}

// transfer sends n random bytes by TCP and compares what arrives.
func transfer(t *testing.T, a, b *container, n int64) {
	t.Helper()
	at := netip.AddrPortFrom(b.addr(), bulkPort).String()
	var conn net.Conn
	var server net.Listener
	b.must(func() (err error) { server, err = net.Listen("tcp4", at); return err })
	defer server.Close() //nolint:errcheck // nothing is lost
	a.must(func() (err error) { conn, err = net.DialTimeout("tcp4", at, 5*time.Second); return err })
	sent, arrived := sha256.New(), sha256.New()
	var g errgroup.Group
	g.Go(func() error {
		c, err := server.Accept()
		if err != nil {
			return err
		}
		defer c.Close() //nolint:errcheck // nothing is lost
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = io.Copy(arrived, c)
		return err
	})
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	src := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{7}), n), sent)
	_, err := io.CopyBuffer(struct{ io.Writer }{conn}, src, make([]byte, 256<<10))
	if err := errors.Join(err, conn.Close(), g.Wait()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(sent.Sum(nil), arrived.Sum(nil)) {
		t.Error("other bytes arrive than were sent")
	}
}

// sendSegmented sends datagrams by UDP_SEGMENT (udp(7)), which the kernel
// takes in one piece, and compares what arrives. It is false when the kernel
// does not do that without checksum offload, which it may refuse (before 6.11).
func sendSegmented(t *testing.T, a, b *container, mayRefuse bool) bool {
	t.Helper()
	const segment, segments, rounds = 1000, 60, 50
	server := b.listen(bulkPort)
	defer server.Close() //nolint:errcheck // nothing is lost
	// The kernel may count the whole of a super-frame for each of its segments.
	option(t, server, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	var client *net.UDPConn
	a.must(func() (err error) {
		client, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.addr(), bulkPort)))
		return err
	})
	defer client.Close() //nolint:errcheck // nothing is lost
	option(t, client, unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment)
	rnd := rand.NewChaCha8([32]byte{8})
	out, in := make([]byte, segments*segment), make([]byte, 2*segment)
	for i := range rounds {
		var seen [segments]bool
		_, _ = rnd.Read(out)
		for k := range segments {
			out[k*segment] = byte(k)
		}
		if _, err := client.Write(out); mayRefuse && errors.Is(err, unix.EIO) {
			return false
		} else if err != nil {
			t.Fatal(err)
		}
		_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
		for k := range segments {
			n, err := server.Read(in)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("round %d: %d of %d datagrams arrive", i, k, segments)
			}
			if err != nil {
				t.Fatal(err)
			}
			// The first byte tells which: their order is not promised.
			which := int(in[0])
			if n != segment || which >= segments || seen[which] || !bytes.Equal(in[:n], out[which*segment:(which+1)*segment]) {
				t.Fatalf("round %d: datagram %d arrives with %d bytes, twice, or with other ones", i, which, n)
			}
			seen[which] = true
		}
	}
	return true
}

func option(t *testing.T, conn *net.UDPConn, level, name, value int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	e := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, name, value) })
	if err := errors.Join(e, err); err != nil {
		t.Fatal(err)
	}
}
