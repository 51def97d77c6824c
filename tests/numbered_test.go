package tests

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
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
	seen    map[uint64]bool
	twice   []uint64
	last    time.Time
	longest time.Duration // between two since the last mark

	end func() // stops it; may be called again
}

// startNumbered runs until its end or that of the test, which fails if a datagram came twice.
func startNumbered(t *testing.T, a, b *container) *numbered {
	t.Helper()
	s := &numbered{name: a.name + " to " + b.name, seen: make(map[uint64]bool), last: time.Now()}
	near, far := a.listenUDP(t), b.listenUDP(t)
	var wait sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	s.end = func() { cancel(); _ = near.Close(); _ = far.Close(); wait.Wait() }
	t.Cleanup(func() {
		s.end()
		if len(s.twice) > 0 {
			t.Errorf("stream %s: %d of %d datagrams came twice: %v", s.name, len(s.twice), len(s.seen), s.twice[:min(10, len(s.twice))])
		}
		t.Logf("stream %s: %d datagrams, %d twice", s.name, len(s.seen), len(s.twice))
	})
	wait.Go(func() { s.listen(far) })
	wait.Go(func() { number(ctx, near, far.LocalAddr(), numberedInterval) })
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

// listenUDP opens a socket in the container.
func (c *container) listenUDP(t *testing.T) net.PacketConn {
	t.Helper()
	var conn net.PacketConn
	err := c.DoIn(c.netns, func() error {
		var err error
		conn, err = new(net.ListenConfig).ListenPacket(t.Context(), "udp4", net.JoinHostPort(c.addr.Addr().String(), "0"))
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
		if s.seen[k] {
			s.twice = append(s.twice, k)
		}
		s.seen[k] = true
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
