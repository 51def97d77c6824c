package tests

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// numberedInterval is the time between two of these datagrams.
const numberedInterval = 5 * time.Millisecond

// numbered is datagrams from one container to another all the time. It
// knows which came twice and how long none came.
type numbered struct {
	name string

	mu      sync.Mutex
	seen    map[uint64]int // how often
	again   int            // what came not for the first time
	last    time.Time
	longest time.Duration // between two since the last mark

	end func() // stops it; may be called again
}

// startNumbered runs until its end or that of the test, which fails if a datagram
// came twice.
func startNumbered(t *testing.T, a, b *container) *numbered {
	t.Helper()
	far := b.listenUDP(t, b.addr.Addr())
	return startNumberedTo(t, a, b, far, far.LocalAddr(), 1)
}

// startBroadcasts is the same by broadcasts of the subnet. While routes change one
// may come twice.
func startBroadcasts(t *testing.T, a, b *container) *numbered {
	t.Helper()
	far := b.listenUDP(t, netip.IPv4Unspecified())
	port := far.LocalAddr().(*net.UDPAddr).Port
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(lastHost(b.addr).Next(), uint16(port)))
	return startNumberedTo(t, a, b, far, to, 2)
}

// startNumberedTo lets each datagram come most times.
func startNumberedTo(t *testing.T, a, b *container, far net.PacketConn, to net.Addr, most int) *numbered {
	t.Helper()
	s := &numbered{name: a.name + " to " + b.name, seen: make(map[uint64]int), last: time.Now()}
	near := a.listenUDP(t, a.addr.Addr())
	var wait sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	s.end = func() { cancel(); _ = near.Close(); _ = far.Close(); wait.Wait() }
	t.Cleanup(func() {
		s.end()
		for k, n := range s.seen {
			if n > most {
				t.Errorf("stream %s: datagram %d of %d came %d times", s.name, k, len(s.seen), n)
			}
		}
		t.Logf("stream %s: %d datagrams, %d times one too many", s.name, len(s.seen), s.again)
	})
	wait.Go(func() { s.listen(far) })
	wait.Go(func() { number(ctx, near, to, numberedInterval) })
	within(t, patience, "stream "+s.name, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.seen) == 0 {
			return fmt.Errorf("no datagram")
		}
		return nil
	})
	s.mark()
	return s
}

// listenUDP opens a socket in the container at an address.
func (c *container) listenUDP(t *testing.T, at netip.Addr) net.PacketConn {
	t.Helper()
	var conn net.PacketConn
	err := c.DoIn(c.netns, func() error {
		var err error
		conn, err = new(net.ListenConfig).ListenPacket(t.Context(), "udp4", net.JoinHostPort(at.String(), "0"))
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", c.name, err)
	}
	return conn
}

func (s *numbered) listen(conn net.PacketConn) {
	buf := make([]byte, 64)
	for {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if n != 8 {
			continue
		}
		k := binary.BigEndian.Uint64(buf)
		now := time.Now()
		s.mu.Lock()
		if s.seen[k]++; s.seen[k] > 1 {
			s.again++
		}
		s.longest = max(s.longest, now.Sub(s.last))
		s.last = now
		s.mu.Unlock()
	}
}

// mark returns the longest time without a datagram since the last mark, up to
// now.
func (s *numbered) mark() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	longest := max(s.longest, time.Since(s.last))
	s.longest = 0
	return longest
}
