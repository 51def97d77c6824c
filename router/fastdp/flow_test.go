package fastdp

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const echoPort = 7

// echo answers datagrams until the test ends.
func (c *container) echo() {
	c.t.Helper()
	c.answer(c.listen(echoPort))
}

// answer sends datagrams back to where they come from.
func (c *container) answer(conn *net.UDPConn) {
	c.t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 65536)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = conn.WriteToUDPAddrPort(b[:n], from)
		}
	})
	c.t.Cleanup(func() { _ = conn.Close(); wg.Wait() })
}

// flow is a client of echo.
type flow struct {
	t    *testing.T
	conn *net.UDPConn
}

func (c *container) dial(to netip.Addr) *flow {
	c.t.Helper()
	f := &flow{t: c.t}
	c.must(func() (err error) {
		f.conn, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, echoPort)))
		return err
	})
	c.t.Cleanup(func() { _ = f.conn.Close() })
	return f
}

// once sends a datagram of size bytes and says whether it comes back in time.
func (f *flow) once(size int, wait time.Duration) bool {
	f.t.Helper()
	b := make([]byte, max(size, 8))
	now := uint64(time.Now().UnixNano())
	binary.BigEndian.PutUint64(b, now)
	if _, err := f.conn.Write(b); err != nil {
		return false
	}
	_ = f.conn.SetReadDeadline(time.Now().Add(wait))
	in := make([]byte, 65536)
	for {
		n, err := f.conn.Read(in)
		if err != nil {
			return false
		}
		if n == len(b) && binary.BigEndian.Uint64(in) == now {
			return true
		}
	}
}

// reaches sends until an answer comes: neighbour discovery and the bridge take
// a moment at first.
func (c *container) reaches(to netip.Addr, size int) bool {
	c.t.Helper()
	f := c.dial(to)
	for range 30 {
		if f.once(size, 200*time.Millisecond) {
			return true
		}
	}
	return false
}

// silent says that nothing comes back in a while.
func (c *container) silent(to netip.Addr) bool {
	c.t.Helper()
	f := c.dial(to)
	for range 3 {
		if f.once(100, 150*time.Millisecond) {
			return false
		}
	}
	return true
}

// during sends a numbered datagram each millisecond while f runs and for a
// while before and after, and returns how many were sent and came back.
func (c *container) during(to netip.Addr, f func()) (sent, back int) {
	c.t.Helper()
	conn := c.dial(to).conn
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		b := make([]byte, 8)
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			sent++
			binary.BigEndian.PutUint64(b, uint64(sent))
			if _, err := conn.Write(b); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				c.t.Error(err)
			}
		}
	})
	seen := map[uint64]bool{}
	var reader sync.WaitGroup
	reader.Go(func() {
		b := make([]byte, 16)
		for {
			if _, err := conn.Read(b); err != nil {
				return
			}
			seen[binary.BigEndian.Uint64(b)] = true
		}
	})
	pause := func() { <-time.After(200 * time.Millisecond) }
	pause()
	f()
	pause()
	close(stop)
	wg.Wait()
	_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	reader.Wait()
	return sent, len(seen)
}

// pathMTU sends datagrams with DF until the kernel has been told a size that
// fits to the destination; 0 when it never is.
func (c *container) pathMTU(to netip.Addr, size int) int {
	c.t.Helper()
	f := c.dial(to)
	raw, err := f.conn.SyscallConn()
	if err != nil {
		c.t.Fatal(err)
	}
	option := func(do func(fd int) error) {
		if err := raw.Control(func(fd uintptr) { err = do(int(fd)) }); err != nil {
			c.t.Fatal(err)
		}
	}
	option(func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	for range 20 {
		f.once(size, 100*time.Millisecond)
		mtu := 0
		option(func(fd int) (err error) { mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU); return err })
		if mtu < testMTU {
			return mtu
		}
	}
	return 0
}

// raw sends frames as they are.
func (c *container) raw(frames ...[]byte) {
	c.t.Helper()
	c.must(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd) //nolint:errcheck // nothing is lost
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		for _, f := range frames {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: dev.Index}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *container) listen(port int) (conn *net.UDPConn) {
	c.t.Helper()
	c.must(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: port})
		return err
	})
	return conn
}
