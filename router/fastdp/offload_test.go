package fastdp

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TCP keeps super-frames of 64 KB from one container to the other.
func TestSuperFrames(t *testing.T) { eachWay(t, testSuperFrames) }

func testSuperFrames(t *testing.T, k kind) {
	const enough = 60000 // bytes of a frame, in which there are dozens of segments
	l := newLineOf(t, k, 1500)
	a1, b1 := l[0].container("10.32.0.1/24"), l[1].container("10.32.0.2/24")
	b1.echo()
	l.apply(nil)
	if !a1.reaches(b1.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	var conn net.Conn
	var server net.Listener
	b1.must(func() (err error) {
		server, err = net.Listen("tcp4", b1.addr().String()+":9")
		return err
	})
	defer server.Close() //nolint:errcheck // nothing is lost
	a1.must(func() (err error) {
		conn, err = net.DialTimeout("tcp4", server.Addr().String(), 5*time.Second)
		return err
	})
	listener, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	capture := b1.capture()
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(io.Discard, listener); _ = listener.Close() })
	wg.Go(func() {
		b := make([]byte, 1<<20)
		for {
			if _, err := conn.Write(b); err != nil {
				return
			}
		}
	})
	largest := 0
	for end := time.Now().Add(10 * time.Second); largest < enough && time.Now().Before(end); {
		n, _, err := unix.Recvfrom(capture, nil, unix.MSG_TRUNC)
		if err == nil {
			largest = max(largest, n)
		}
	}
	_ = conn.Close()
	wg.Wait()
	if largest < enough {
		t.Errorf("the largest frame that arrived has %d bytes", largest)
	}
	l.checkWay(k)
}

// capture is a socket that sees what comes in by the container's device.
func (c *container) capture() (fd int) {
	c.t.Helper()
	c.must(func() (err error) {
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8 // in network order
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, all); err != nil {
			return err
		}
		return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000})
	})
	c.t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}
