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

// flowInterval is the time between two questions of a flow.
const flowInterval = 20 * time.Millisecond

// flow asks and answers between two containers all the time, and knows when
// answers came.
type flow struct {
	name string
	mu   sync.Mutex
	came []time.Time
}

// startFlow runs until the test ends.
func startFlow(t *testing.T, a, b *container) *flow {
	t.Helper()
	f := &flow{name: a.name + " to " + b.name}
	near, far := a.listenUDP(t, a.addr.Addr()), b.listenUDP(t, b.addr.Addr())
	var wait sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); _ = near.Close(); _ = far.Close(); wait.Wait() })
	wait.Go(func() { echo(far) })
	wait.Go(func() { f.listen(near) })
	wait.Go(func() { number(ctx, near, far.LocalAddr(), flowInterval) })
	within(t, patience, "flow "+f.name, func() error {
		if len(f.since(time.Time{})) == 0 {
			return fmt.Errorf("no answer")
		}
		return nil
	})
	return f
}

func echo(conn net.PacketConn) {
	buf := make([]byte, 64)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = conn.WriteTo(buf[:n], from)
	}
}

// number sends datagrams that are numbered until ctx ends.
func number(ctx context.Context, conn net.PacketConn, to net.Addr, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := uint64(0); ; n++ {
		_, _ = conn.WriteTo(binary.BigEndian.AppendUint64(nil, n), to)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (f *flow) listen(conn net.PacketConn) {
	buf := make([]byte, 64)
	for {
		if _, _, err := conn.ReadFrom(buf); err != nil {
			return
		}
		f.mu.Lock()
		f.came = append(f.came, time.Now())
		f.mu.Unlock()
	}
}

// since returns the times of answers from then on.
func (f *flow) since(then time.Time) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, c := range f.came {
		if c.After(then) {
			return append([]time.Time(nil), f.came[i:]...)
		}
	}
	return nil
}

// gap is the longest time without an answer from then to now.
func (f *flow) gap(then time.Time) time.Duration {
	var longest time.Duration
	for _, c := range append(f.since(then), time.Now()) {
		longest = max(longest, c.Sub(then))
		then = c
	}
	return longest
}

// holds watches flows for a time: no gap may be longer than limit since then.
func holds(t *testing.T, fs []*flow, then time.Time, watch, limit time.Duration) {
	t.Helper()
	select {
	case <-time.After(watch):
	case <-t.Context().Done():
	}
	for _, f := range fs {
		gap := f.gap(then)
		t.Logf("flow %s: longest gap %s", f.name, gap.Round(time.Millisecond))
		if gap > limit {
			t.Errorf("flow %s: no answer for %s, want at most %s", f.name, gap.Round(time.Millisecond), limit)
		}
	}
}
