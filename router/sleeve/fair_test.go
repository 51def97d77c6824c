package sleeve

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/peer"
)

// sendTo writes n frames for the peer dst, of a size that none goes together with
// another, to the TAP of h. What finds no room there is lost.
func (h *host) sendTo(t *testing.T, out int, dst peer.ShortID, n int) {
	t.Helper()
	p := testUDP(false, 1300, 0)
	p.src, p.dst, p.hops = h.id, dst, 9
	f := tapFrame(p)
	for range n {
		if _, err := unix.Write(out, f); err != nil && !errors.Is(err, unix.ENOBUFS) {
			t.Fatal(err)
		}
	}
}

// sent and got are how many frames went to a peer, and came from it.
func (h *host) sent(id peer.ShortID) uint64 {
	return h.path.table.Load().traffic[id].tx.snapshot().Packets
}

func (h *host) got(id peer.ShortID) uint64 {
	return h.path.table.Load().traffic[id].rx.snapshot().Packets
}

// reaches waits until what read returns is want.
func reaches(t *testing.T, what string, read func() uint64, want uint64) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for begin := time.Now(); read() < want; <-tick.C {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("%s: %d, want %d", what, read(), want)
		}
	}
}

// some is how many frames a neighbour sends or gets beside another's flood.
const some = 100

// three are hosts in a row: 2 is between 1 and 3, and knows both. None serves.
//
//	1 ── 2 ── 3
func three(t *testing.T) (a, middle, c *host) {
	t.Helper()
	a, middle, c = newHost(t, 1), newHost(t, 2), newHost(t, 3)
	join(a.space, middle.space, 1, 2, 1500)
	join(c.space, middle.space, 3, 2, 1500)
	a.apply(t, forwarding(1, addr4, 2))
	middle.apply(t, forwarding(2, addr4, 1, 3))
	c.apply(t, forwarding(3, addr4, 2))
	return a, middle, c
}

// TestFairSending: more frames for one peer than the TAP holds leave room for
// those for another.
func TestFairSending(t *testing.T) {
	_, h, _ := three(t)
	out := h.packetSocket(t)
	h.sendTo(t, out, 1, 5000)
	h.sendTo(t, out, 3, some)
	h.serve(t)
	reaches(t, "frames for the quiet peer that left", func() uint64 { return h.sent(3) }, some)
	if n := h.sent(1); n == 0 || n == 5000 {
		t.Errorf("%d frames of 5000 left for the other peer: no flood", n)
	}
}

// TestFairReceiving: more datagrams of one peer than the socket holds leave room
// for those of another.
func TestFairReceiving(t *testing.T) {
	a, h, c := three(t)
	a.serve(t)
	c.serve(t)
	flood, quiet := a.packetSocket(t), c.packetSocket(t)
	const many = 4 * socketBuffer / 1300
	for begin := time.Now(); a.sent(2) < many; {
		a.sendTo(t, flood, 2, 500)
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("only %d of %d frames sent", a.sent(2), many)
		}
	}
	c.sendTo(t, quiet, 2, some)
	reaches(t, "frames of the quiet peer that left", func() uint64 { return c.sent(2) }, some)
	h.serve(t)
	reaches(t, "frames of the quiet peer that came", func() uint64 { return h.got(3) }, some)
	if n := h.got(1); n >= many {
		t.Errorf("%d frames of the other peer came: no flood", n)
	}
}

// TestSlowNeighbour: a peer whose way takes no more holds up none of the others.
func TestSlowNeighbour(t *testing.T) {
	_, h, c := three(t)
	if err := h.try("tc qdisc add dev to1 root tbf rate 1mbit burst 16kb limit 100mb"); err != nil {
		t.Fatal(err)
	}
	c.serve(t)
	h.serve(t)
	out := h.packetSocket(t)
	// Until the kernel has no room for more.
	full := func() uint64 { return h.path.table.Load().traffic[1].dropped[sendFailed].Load() }
	for begin := time.Now(); full() == 0 && time.Since(begin) < 10*time.Second; {
		h.sendTo(t, out, 1, 500)
	}
	h.sendTo(t, out, 3, some)
	reaches(t, "frames for the quick peer that came", func() uint64 { return c.got(2) }, some)
	if full() == 0 {
		t.Error(fmt.Sprint("the other peer's way took all: ", h.sent(1)))
	}
}
