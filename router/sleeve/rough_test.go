package sleeve

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/frame"
)

// rough is a stretch of the underlay that loses datagrams, and holds some back
// until others have overtaken them. It is a host of its own:
//
//	1 ── rough ── 2
type rough struct {
	loss, late float64 // shares
	held       map[netip.AddrPort][]delayed
	rnd        *rand.Rand
}

// smooth is the length in bytes below which datagrams pass: the kernel gives an
// address up that is not found in three tries.
const smooth = 200

// delayed is a datagram that lets some others pass.
type delayed struct {
	after int
	data  []byte
}

// pass carries datagrams between the two hosts until conn is closed.
func (r *rough) pass(conn *net.UDPConn, a, b netip.AddrPort) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		to := a
		if from.Addr().Unmap() == a.Addr() {
			to = b
		}
		switch p := r.rnd.Float64(); {
		case n < smooth:
			_, _ = conn.WriteToUDPAddrPort(buf[:n], to)
		case p < r.loss:
		case p < r.loss+r.late:
			r.held[to] = append(r.held[to], delayed{1 + r.rnd.IntN(20), append([]byte(nil), buf[:n]...)})
		default:
			_, _ = conn.WriteToUDPAddrPort(buf[:n], to)
		}
		var rest []delayed
		for _, d := range r.held[to] {
			if d.after--; d.after > 0 {
				rest = append(rest, d)
				continue
			}
			_, _ = conn.WriteToUDPAddrPort(d.data, to)
		}
		r.held[to] = rest
	}
}

// across is a container on each of two hosts with keys, between which lies r.
func across(t *testing.T, r *rough) (a, b *container) {
	t.Helper()
	x, y, between := newHost(t, 1), newHost(t, 2), newSpace(t)
	join(x.space, between, 1, 3, 1500)
	join(y.space, between, 2, 3, 1500)
	var conn *net.UDPConn
	var err error
	between.do(func() { conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: testPort}) })
	if err != nil {
		t.Fatal(err)
	}
	r.held, r.rnd = make(map[netip.AddrPort][]delayed), rand.New(rand.NewPCG(5, 6))
	var wait sync.WaitGroup
	wait.Go(func() { r.pass(conn, netip.AddrPortFrom(addr4(1), testPort), netip.AddrPortFrom(addr4(2), testPort)) })
	t.Cleanup(func() { _ = conn.Close(); wait.Wait() })
	if err := conn.SetReadBuffer(4 << 20); err != nil {
		t.Fatal(err)
	}
	a = &container{x.attach(t, y, 1412), x, inside4(x), inside6(x)}
	b = &container{y.attach(t, x, 1412), y, inside4(y), inside6(y)}
	viaBetween := func(id peer.ShortID) netip.Addr {
		if id == 1 || id == 2 {
			id = 3
		}
		return addr4(id)
	}
	first, second := sessions(t)()
	x.sealTo(t, forwarding(1, viaBetween, 2), first)
	y.sealTo(t, forwarding(2, viaBetween, 1), second)
	x.serve(t)
	y.serve(t)
	return a, b
}

// TestRoughUnderlay: what is lost costs what was in it and nothing else, and
// what is late is no replay.
func TestRoughUnderlay(t *testing.T) {
	for _, c := range []struct {
		loss, late float64
		bytes      int
	}{{0, 0.05, 2 << 20}, {0.01, 0.02, 2 << 20}, {0.05, 0.05, 1 << 19}} {
		t.Run(fmt.Sprintf("loss%g/late%g", c.loss, c.late), func(t *testing.T) {
			a, b := across(t, &rough{loss: c.loss, late: c.late})
			stream(t, a, b, b.addr4, c.bytes)
			stream(t, b, a, a.addr6, c.bytes)
			a.quiet(t, "dropped_incomplete")
			b.quiet(t, "dropped_incomplete")
			if n := a.host.path.Counters(); n["datagrams_received"] < uint64(c.bytes/1500) {
				t.Errorf("%v: not by this way", n)
			}
		})
	}
}

// TestEverySize sends UDP packets of all sizes around what one datagram holds,
// with DF and without: sleeve has no size that it does not carry.
func TestEverySize(t *testing.T) {
	const underlay, inside = 1300, 1500
	a, b := runningWith(t, underlay, inside, func(*host) {})
	first, second := sessions(t)()
	for _, sealed := range []bool{false, true} {
		if sealed {
			a.host.sealTo(t, forwarding(1, addr4, 2), first)
			b.host.sealTo(t, forwarding(2, addr4, 1), second)
		}
		one := a.host.path.MTU(2) // largest IP packet in one datagram
		for _, to := range []netip.Addr{b.addr4, b.addr6} {
			headers := frame.UDPLen + frame.IPv4Len
			if to.Is6() {
				headers = frame.UDPLen + frame.IPv6Len
			}
			var sizes []int
			for size := one - headers - 20; size <= inside-headers; size++ {
				sizes = append(sizes, size)
			}
			for size := range 40 {
				sizes = append(sizes, size)
			}
			datagrams(t, a, b, to, sizes...) // Linux sets DF by itself
		}
	}
	a.space.do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_no_pmtu_disc", []byte("1"), 0); err != nil {
			t.Error(err)
		}
	})
	one := a.host.path.MTU(2)
	datagrams(t, a, b, b.addr4, one-29, one-28, one-27, 1472)
	a.quiet(t)
	b.quiet(t)
}

// TestWithoutGRO: a kernel that joins no datagrams, and one that cuts none.
func TestWithoutGRO(t *testing.T) {
	a, b := runningWith(t, 1500, 1426, func(h *host) {
		for _, fd := range h.path.sock.fds {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 0); err != nil {
				t.Error(err)
			}
		}
		for _, n := range h.path.table.Load().neighbours {
			if n != nil {
				n.plain = h.id == 1
			}
		}
	})
	stream(t, a, b, b.addr4, 4<<20)
	datagrams(t, a, b, b.addr4, 100, 60000)
	a.quiet(t)
	b.quiet(t)
}

// TestBuffers counts what a Path holds for frames on their way. It is all made
// when it begins, but for the frames put together of fragments.
func TestBuffers(t *testing.T) {
	x, _ := pair(t, 1500)
	s := x.path.newSender()
	total := cap(s.in) + cap(s.arena) + int(unsafe.Sizeof(*s)) + int(unsafe.Sizeof(receiver{}))
	for _, b := range x.path.sock.bufs {
		total += cap(b)
	}
	w := newWire(600)
	for range 3 * reassemblies {
		w.receive(t, w.datagrams(testPlain(3000))[1:])
	}
	for i := range w.r.frags.slots {
		total += cap(w.r.frags.slots[i].buf)
	}
	// And what each system call needs.
	total += 2 * int(unsafe.Sizeof(batch{}))
	t.Logf("%d bytes", total)
	if total > MaxBuffers {
		t.Errorf("%d bytes, more than the %d that are promised", total, MaxBuffers)
	}
}

// TestFlooded: while one neighbour sends all that it can, another's stream goes
// on.
func TestFlooded(t *testing.T) {
	a, b := running(t, 1500, 1426)
	c := newHost(t, 3)
	join(c.space, b.host.space, 3, 2, 1500)
	b.host.apply(t, forwarding(2, addr4, 1, 3))
	c.apply(t, forwarding(3, addr4, 2))
	stop := c.serve(t)
	out := c.packetSocket(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	p := testUDP(false, 1000, 0) // for nobody behind the TAP
	p.src, p.dst, p.hops = 3, 2, 9
	f := tapFrame(p)
	wait.Go(func() {
		for ctx.Err() == nil {
			if _, err := unix.Write(out, f); err != nil && !errors.Is(err, unix.ENOBUFS) {
				t.Error(err)
				return
			}
		}
	})
	begin := time.Now()
	stream(t, a, b, b.addr4, 1<<20)
	took := time.Since(begin)
	cancel()
	wait.Wait()
	stop()
	rx := b.host.path.table.Load().traffic
	from, flood := rx[1].rx.snapshot(), rx[3].rx.snapshot()
	t.Logf("%s; %d packets of the stream, %d of the flood", took, from.Packets, flood.Packets)
	if flood.Packets < 1000 {
		t.Errorf("no flood: %d packets", flood.Packets)
	}
}
