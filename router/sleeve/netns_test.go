package sleeve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/overlay"
	"weave.local/router/overlay/overlaytest"
)

// space is a network namespace that ends with the test: nothing names it but
// the thread of its worker.
type space struct {
	t    *testing.T
	jobs chan func()
	path string // names it to ip(8)
}

func newSpace(t *testing.T) *space {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("TEST_STRICT") != "" {
			t.Fatal("needs root for network namespaces")
		}
		t.Skip("needs root for network namespaces")
	}
	s := &space{t: t, jobs: make(chan func())}
	ready := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // for good: the thread dies with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		s.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- err
		if err != nil {
			return
		}
		for f := range s.jobs {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("network namespace: %v", err)
	}
	t.Cleanup(func() { close(s.jobs); <-ended })
	s.ip("link set lo up")
	return s
}

// do runs f in the namespace.
func (s *space) do(f func()) {
	done := make(chan struct{})
	s.jobs <- func() { defer close(done); f() }
	<-done
}

// try runs a command in the namespace.
func (s *space) try(command string) error {
	var out []byte
	var err error
	s.do(func() {
		args := strings.Fields(command)
		out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
	})
	if err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

func (s *space) ip(args string) {
	s.t.Helper()
	if err := s.try("ip " + args); err != nil {
		s.t.Fatal(err)
	}
}

// join lays a cable of the given MTU between a and b; their addresses on it are
// 192.0.2.x and 2001:db8::x.
func join(a, b *space, x, y, mtu int) {
	a.t.Helper()
	name := func(n int) string { return fmt.Sprintf("to%d", n) }
	a.ip(fmt.Sprintf("link add %s mtu %d type veth peer name %s mtu %d netns %s", name(y), mtu, name(x), mtu, b.path))
	a.ip("link set " + name(y) + " up")
	b.ip("link set " + name(x) + " up")
	for _, end := range []struct {
		s       *space
		dev     string
		own, to int
	}{{a, name(y), x, y}, {b, name(x), y, x}} {
		end.s.ip(fmt.Sprintf("addr add 192.0.2.%d/32 peer 192.0.2.%d dev %s", end.own, end.to, end.dev))
		if mtu < 1280 {
			continue // no IPv6 there
		}
		end.s.ip(fmt.Sprintf("addr add 2001:db8::%d/128 dev %s nodad", end.own, end.dev))
		end.s.ip(fmt.Sprintf("route add 2001:db8::%d/128 dev %s", end.to, end.dev))
	}
}

// host is a sleeve in a namespace of its own.
type host struct {
	*space
	id     peer.ShortID
	path   *Path
	probes *overlaytest.Recorder
}

const testPort = 6783

func newHost(t *testing.T, id peer.ShortID) *host {
	t.Helper()
	h := &host{space: newSpace(t), id: id, probes: overlaytest.NewRecorder()}
	h.start(t, netip.Addr{})
	return h
}

func (h *host) start(t *testing.T, bind netip.Addr) {
	t.Helper()
	var err error
	h.do(func() {
		h.path, err = New(Config{
			Port: testPort, Bind: bind, TapName: "weave-sleeve",
			OnProbe: h.probes.OnProbe, Log: slog.New(slog.DiscardHandler),
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	p := h.path
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
}

// serve runs the path until stop is called or the test ends.
func (h *host) serve(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.path.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func addr4(n peer.ShortID) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}) }

func addr6(n peer.ShortID) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 15: byte(n)})
}

// sessionOf is the secret of the link of a and b.
func sessionOf(a, b peer.ShortID) uint64 { return uint64(min(a, b))<<32 | uint64(max(a, b)) | 1<<60 }

// forwarding knows the given neighbours of self, each reached by sleeve at its
// address, and has no trees.
func forwarding(self peer.ShortID, addr func(peer.ShortID) netip.Addr, others ...peer.ShortID) overlay.Forwarding {
	f := overlay.Forwarding{Self: self, Hops: map[peer.ShortID]overlay.Hop{}, Trees: map[peer.ShortID]overlay.Tree{}}
	for _, id := range others {
		f.Neighbours = append(f.Neighbours, overlay.Neighbour{
			Info:  peer.Info{Name: peer.Name(id), ShortID: id, Port: testPort},
			Local: addr(self), Remote: addr(id), Session: sessionOf(self, id),
		})
		f.Hops[id] = overlay.Hop{Via: id, Path: overlay.Sleeve}
	}
	return f
}

func (h *host) apply(t *testing.T, f overlay.Forwarding) {
	t.Helper()
	if err := h.path.Apply(f); err != nil {
		t.Fatalf("Apply: %v", err)
	}
}

// packetSocket reads and writes whole frames at the TAP, tags and
// virtio-net header included, from the kernel's side of it.
func (h *host) packetSocket(t *testing.T) int {
	t.Helper()
	var fd int
	var err error
	h.do(func() {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return
		}
		var ifi *unix.Ifreq
		ifi, err = unix.NewIfreq("weave-sleeve")
		err = errors.Join(err, unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifi))
		err = errors.Join(err,
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}),
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: int(ifi.Uint32())}))
	})
	if err != nil {
		t.Fatalf("packet socket: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
