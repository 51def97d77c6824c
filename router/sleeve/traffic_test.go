package sleeve

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/router/frame"
)

// attach makes a container of host h that talks to the one of host other,
// through the kernel as the real data path does:
//
//	container               host
//	c0 10.9.0.<id> ──veth── h0 → tags on  → weave-sleeve ~~~~
//	                        h0 ← tags off ← weave-sleeve ~~~~
func (h *host) attach(t *testing.T, other *host, mtu int) *space {
	t.Helper()
	in := newSpace(t)
	h.ip(fmt.Sprintf("link add h0 mtu %d type veth peer name c0 mtu %d netns %s", mtu, mtu, in.path))
	h.ip("link set h0 up")
	in.ip("link set c0 up")
	in.ip(fmt.Sprintf("addr add %s/24 dev c0", inside4(h)))
	in.ip(fmt.Sprintf("addr add %s/64 dev c0 nodad", inside6(h)))
	h.ip("link set h0 addrgenmode none")
	var err error
	h.do(func() { err = attachTags(t, "h0", "weave-sleeve", h.id, other.id) })
	if err != nil {
		t.Fatal(err)
	}
	return in
}

// attachTags makes frames go from the device port to the TAP with tags, and
// from there to the port without.
func attachTags(t *testing.T, port, tap string, src, dst peer.ShortID) error {
	from, err := net.InterfaceByName(port)
	if err != nil {
		return err
	}
	to, err := net.InterfaceByName(tap)
	if err != nil {
		return err
	}
	var tags [frame.TagsLen]byte
	frame.Tags{Src: uint16(src), Dst: uint16(dst), Hops: maxHops}.Put(tags[:])
	push := func(tag []byte) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, int32(binary.NativeEndian.Uint16(tag))),
			asm.Mov.Imm(asm.R3, int32(binary.BigEndian.Uint16(tag[2:]))),
			asm.FnSkbVlanPush.Call(),
		}
	}
	pop := asm.Instructions{asm.Mov.Reg(asm.R1, asm.R6), asm.FnSkbVlanPop.Call()}
	return errors.Join(
		attachTCX(t, from.Index, to.Index, append(push(tags[frame.TagLen:]), push(tags[:])...)),
		attachTCX(t, to.Index, from.Index, append(pop, pop...)))
}

// attachTCX runs body, which finds the frame in R6, on what comes in by one
// device and sends it out by another.
func attachTCX(t *testing.T, in, out int, body asm.Instructions) error {
	insns := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	insns = append(insns, body...)
	insns = append(insns,
		asm.Mov.Imm(asm.R1, int32(out)),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnRedirect.Call(),
		asm.Return())
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: insns, License: "MIT"})
	if err != nil {
		return fmt.Errorf("program: %w", err)
	}
	l, err := link.AttachTCX(link.TCXOptions{Program: prog, Attach: ebpf.AttachTCXIngress, Interface: in})
	if err != nil {
		return errors.Join(fmt.Errorf("attaching: %w", err), prog.Close())
	}
	t.Cleanup(func() { _ = l.Close(); _ = prog.Close() })
	return nil
}

func inside4(h *host) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, 0, byte(h.id)}) }

func inside6(h *host) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x09, 15: byte(h.id)})
}

// container is a namespace attached to a host.
type container struct {
	*space
	*host
	addr4, addr6 netip.Addr
}

func (c *container) do(f func()) { c.space.do(f) }

// running is a container on each of two hosts, joined by an underlay.
func running(t *testing.T, underlay, inside int) (a, b *container) {
	t.Helper()
	return runningWith(t, underlay, inside, func(*host) {})
}

// runningWith is running, with prepare done to both hosts before they serve.
func runningWith(t *testing.T, underlay, inside int, prepare func(*host)) (a, b *container) {
	t.Helper()
	x, y := pair(t, underlay)
	a = &container{x.attach(t, y, inside), x, inside4(x), inside6(x)}
	b = &container{y.attach(t, x, inside), y, inside4(y), inside6(y)}
	x.apply(t, forwarding(1, addr4, 2))
	y.apply(t, forwarding(2, addr4, 1))
	prepare(x)
	prepare(y)
	x.serve(t)
	y.serve(t)
	return a, b
}

// stream sends n random bytes by TCP from a to b and back, and compares.
func stream(t *testing.T, a, b *container, to netip.Addr, n int) {
	t.Helper()
	var l net.Listener
	var err error
	b.do(func() { l, err = new(net.ListenConfig).Listen(t.Context(), "tcp", netip.AddrPortFrom(to, 0).String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	var g errgroup.Group
	g.Go(func() error {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		_, err = io.Copy(c, c) // back as it comes
		return err
	})
	var c net.Conn
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	a.do(func() { c, err = new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String()) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent, got := sha256.New(), sha256.New()
	g.Go(func() error {
		src := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), int64(n)), sent)
		_, err := io.Copy(struct{ io.Writer }{c}, src)
		return errors.Join(err, c.(*net.TCPConn).CloseWrite())
	})
	back, err := io.Copy(got, c)
	if err := errors.Join(err, g.Wait()); err != nil {
		t.Fatal(err)
	}
	if back != int64(n) || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Errorf("%d of %d bytes came back, or other ones", back, n)
	}
}

// datagrams exchanges UDP packets of the given sizes.
func datagrams(t *testing.T, a, b *container, to netip.Addr, sizes ...int) {
	t.Helper()
	var server, client *net.UDPConn
	var err error
	b.do(func() { server, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 0))) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Close() }()
	a.do(func() { client, err = net.DialUDP("udp", nil, server.LocalAddr().(*net.UDPAddr)) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	buf := make([]byte, 1<<16)
	for _, size := range sizes {
		want := make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte{byte(size)}).Read(want)
		if _, err := client.Write(want); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if err := server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, _, err := server.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if !bytes.Equal(buf[:n], want) {
			t.Errorf("of %d bytes %d arrived, or other ones", size, n)
		}
	}
}

// quiet says that nothing was dropped for a reason other than those allowed.
func (h *host) quiet(t *testing.T, allowed ...string) {
	t.Helper()
	for name, n := range h.path.Counters() {
		ok := !strings.HasPrefix(name, "dropped_") || n == 0
		for _, a := range allowed {
			ok = ok || name == a
		}
		if !ok {
			t.Errorf("host %d: %s is %d", h.id, name, n)
		}
	}
}

func TestTraffic(t *testing.T) {
	for _, c := range []struct{ underlay, inside int }{
		{1500, 1426}, // what fits into one datagram
		{1500, 1500},
		{1280, 9000},
		{9000, 65000},
		{600, 1500},
	} {
		t.Run(fmt.Sprintf("underlay%d/inside%d", c.underlay, c.inside), func(t *testing.T) {
			a, b := running(t, c.underlay, c.inside)
			for _, to := range []netip.Addr{b.addr4, b.addr6} {
				stream(t, a, b, to, 8<<20)
				datagrams(t, a, b, to, 0, 1, 100, 1300, 1472, 8000, 60000)
			}
			a.quiet(t)
			b.quiet(t)
			n := a.host.path.Counters()
			t.Logf("%v", n)
			// The kernel left the cutting to us, or the test shows nothing.
			if n["frames_from_tap"]*4000 > 16<<20 {
				t.Errorf("%d frames for 16 MiB: no super-frames", n["frames_from_tap"])
			}
		})
	}
}

// A path MTU that shrinks under traffic costs no more than what is on its way.
func TestMTUShrinks(t *testing.T) {
	a, b := running(t, 1500, 1426)
	stream(t, a, b, b.addr4, 1<<20)
	a.host.ip("link set to2 mtu 1300")
	b.host.ip("link set to1 mtu 1300")
	stream(t, a, b, b.addr4, 4<<20)
	if mtu, want := a.host.path.MTU(2), 1300-ipv4Overhead-headerLen-14; mtu != want {
		t.Errorf("MTU is %d, want %d", mtu, want)
	}
	a.quiet(t, "dropped_too_big")
	b.quiet(t, "dropped_too_big", "dropped_incomplete")
}

// A device that does no checksums takes no messages to be cut.
func TestWithoutOffload(t *testing.T) {
	a, b := running(t, 1500, 1426)
	for _, cmd := range []string{"ethtool -K to2 tx off tso off gso off", "ethtool -K to2 gro off"} {
		if err := a.host.try(cmd); err != nil {
			t.Fatal(err)
		}
	}
	stream(t, a, b, b.addr4, 4<<20)
	stream(t, b, a, a.addr6, 4<<20)
	a.quiet(t)
	b.quiet(t)
}

// A kernel that does not cut messages gets each datagram as a message.
func TestWithoutSegmentation(t *testing.T) {
	a, b := runningWith(t, 1500, 1426, func(h *host) {
		for _, n := range h.path.table.Load().neighbours {
			if n != nil {
				n.plain = true
			}
		}
	})
	stream(t, a, b, b.addr4, 4<<20)
	datagrams(t, a, b, b.addr4, 100, 60000)
	a.quiet(t)
	b.quiet(t)
}
