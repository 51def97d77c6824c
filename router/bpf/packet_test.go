package bpf

import (
	"encoding/binary"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

/*
What the tests' tables say. This peer is 1.

	4 ══ 2 ══ 1 ══ 3 (by the user-space path)
	          ╚══ 5
	local ports: this network namespace's lo, as if it were a container's veth
*/
const (
	self   = 1
	left   = 2 // neighbour at 192.0.2.2
	slow   = 3 // neighbour by the user-space path
	beyond = 4 // behind left
	right  = 5 // neighbour at 192.0.2.5

	verdictPass     = 0xffffffff
	verdictDrop     = 2
	verdictRedirect = 7
)

func leftAddr() netip.Addr  { return netip.MustParseAddr("192.0.2.2") }
func rightAddr() netip.Addr { return netip.MustParseAddr("192.0.2.5") }

func localMAC() MAC   { return MAC{2, 0, 0, 0, 0, 1} } // the port's
func remoteMAC() MAC  { return MAC{2, 0, 0, 0, 0, 4} } // at beyond, same subnet as local
func foreignMAC() MAC { return MAC{2, 0, 0, 0, 0, 5} } // at beyond, other subnet
func slowMAC() MAC    { return MAC{2, 0, 0, 0, 0, 3} } // at slow
func unknownMAC() MAC { return MAC{2, 0, 0, 0, 0, 9} }
func broadcast() MAC  { return MAC{255, 255, 255, 255, 255, 255} }

func needRoot(t testing.TB) {
	t.Helper()
	need(t, os.Geteuid() == 0, "needs root")
}

// need skips a test that cannot work here; under TEST_STRICT=1 that is a
// failure.
func need(t testing.TB, met bool, what string) {
	t.Helper()
	if met {
		return
	}
	if os.Getenv("TEST_STRICT") == "1" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// newNamespace puts the test into a network namespace of its own, together
// with its thread, which ends with the test.
func newNamespace(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	ip(t, "link", "set", "lo", "up")
}

func ip(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %v: %v\n%s", args, err, out)
	}
}

// bench is a set of programs with tables to try them on.
type bench struct {
	*Objects
	t          testing.TB
	scene      *ebpf.Collection
	vxlan, tap *net.Interface
	before     map[string]uint64
}

func newBench(t testing.TB) *bench {
	t.Helper()
	needRoot(t)
	newNamespace(t)
	b := &bench{Objects: &Objects{}, t: t}
	for name, dev := range map[string]**net.Interface{"vx": &b.vxlan, "tap": &b.tap} {
		ip(t, "link", "add", name, "type", "veth", "peer", "name", name+"-end")
		ip(t, "link", "set", name, "up")
		ip(t, "link", "set", name+"-end", "up")
		i, err := net.InterfaceByName(name)
		if err != nil {
			t.Fatal(err)
		}
		*dev = i
	}
	main, err := loadWeave()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.load(main, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	scene, err := loadScene()
	if err != nil {
		t.Fatal(err)
	}
	b.scene, err = ebpf.NewCollectionWithOptions(scene, ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		"config": b.objs.Config, "neighbours": b.objs.Neighbours, "hops": b.objs.Hops, "trees": b.objs.Trees,
		"endpoints": b.objs.Endpoints, "ports": b.objs.Ports, "addresses": b.objs.Addresses, "limits": b.objs.Limits, "foreign": b.objs.Foreign, "learnts": b.objs.Learnts, "traffics": b.objs.Traffics, "losses": b.objs.Losses,
		"counters": b.objs.Counters, "events": b.objs.Events,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.scene.Close)
	b.fill()
	return b
}

func subnets(t testing.TB, list ...string) (s Subnets) {
	t.Helper()
	var prefixes []netip.Prefix
	for _, p := range list {
		prefixes = append(prefixes, netip.MustParsePrefix(p))
	}
	s, ok := SubnetsOf(prefixes)
	if !ok {
		t.Fatal("too many subnets")
	}
	return s
}

func (b *bench) must(errs ...error) {
	b.t.Helper()
	for _, err := range errs {
		if err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *bench) fill() {
	b.t.Helper()
	port, err := PortOf(localMAC(), []netip.Prefix{netip.MustParsePrefix("10.32.0.1/24"), netip.MustParsePrefix("fd00::1/64")})
	b.must(err,
		b.SetConfig(Config{Self: self, VXLAN: uint32(b.vxlan.Index), TAP: uint32(b.tap.Index), Features: b.Features()}),
		b.Neighbours.Put(AddrOf(leftAddr()), Neighbour{N: 1, ID: [MaxSharing]uint16{left}}),
		b.Neighbours.Put(AddrOf(rightAddr()), Neighbour{N: 1, ID: [MaxSharing]uint16{right}}),
		// A key that was set to send is read as the receiver would see it:
		// "remote" is what we set as local. So both are the same here.
		b.Hops.Put(left, Hop{Kind: KindVXLAN, Via: left, Remote: leftAddr(), Local: leftAddr()}),
		b.Hops.Put(beyond, Hop{Kind: KindVXLAN, Via: left, Remote: leftAddr(), Local: leftAddr()}),
		b.Hops.Put(right, Hop{Kind: KindVXLAN, Via: right, Remote: rightAddr(), Local: rightAddr()}),
		b.Hops.Put(slow, Hop{Kind: KindSleeve, Via: slow}),
		b.Trees.Put(self, Tree{N: 3, Children: [MaxChildren]uint16{left, slow, right}}),
		b.Trees.Put(beyond, Tree{Parent: left, N: 2, Children: [MaxChildren]uint16{slow, right}}),
		b.Trees.Put(slow, Tree{Parent: slow, N: 2, Children: [MaxChildren]uint16{left, right}}),
		b.Endpoints.Put(localMAC(), Endpoint{Subnets: port.Subnets}),
		b.Endpoints.Put(remoteMAC(), Endpoint{Peer: beyond, Subnets: subnets(b.t, "10.32.5.1/24", "10.32.0.4/24")}),
		b.Endpoints.Put(foreignMAC(), Endpoint{Peer: beyond, Subnets: subnets(b.t, "10.32.1.4/24", "fd00:1::1/64")}),
		b.Endpoints.Put(slowMAC(), Endpoint{Peer: slow, Subnets: subnets(b.t, "10.32.0.3/24")}),
		b.Ports.Put(1, port))
}

// ethernet is a frame with 64 bytes after the header, at first those of payload.
func ethernet(dst, src MAC, etherType uint16, payload ...[]byte) []byte {
	f := append(append([]byte{}, dst[:]...), src[:]...)
	f = binary.BigEndian.AppendUint16(f, etherType)
	body := make([]byte, 64)
	at := body
	for _, p := range payload {
		at = at[copy(at, p):]
	}
	return append(f, body...)
}

func ipv4(src string) []byte {
	h := make([]byte, 20)
	h[0] = 0x45
	a := netip.MustParseAddr(src).As4()
	copy(h[12:], a[:])
	return h
}

func ipv6(src string) []byte {
	h := make([]byte, 40)
	h[0] = 0x60
	a := netip.MustParseAddr(src).As16()
	copy(h[8:], a[:])
	return h
}

func arp(sender MAC, src string) []byte {
	h := []byte{0, 1, 8, 0, 6, 4, 0, 1}
	a := netip.MustParseAddr(src).As4()
	return append(append(h, sender[:]...), a[:]...)
}

// outcome is what became of a frame.
type outcome = sceneOutcome

func (b *bench) counters() map[string]uint64 {
	b.t.Helper()
	c, err := b.Counters()
	b.must(err)
	return c
}

// counted returns what was counted since the last call of run or plain.
func (b *bench) counted() map[string]uint64 {
	now := b.counters()
	maps.DeleteFunc(now, func(name string, n uint64) bool { return n == b.before[name] })
	for name := range now {
		now[name] -= b.before[name]
	}
	return now
}

func (b *bench) run(prog string, s sceneScene, frame []byte) outcome {
	b.t.Helper()
	b.must(b.scene.Maps["scenes"].Put(uint32(0), s), b.scene.Maps["outcomes"].Put(uint32(0), outcome{}))
	b.before = b.counters()
	_, _, err := b.scene.Programs[prog].Test(frame)
	b.must(err)
	var o outcome
	b.must(b.scene.Maps["outcomes"].Lookup(uint32(0), &o))
	return o
}

func (b *bench) plain(p Program, frame []byte) uint32 {
	b.t.Helper()
	b.before = b.counters()
	verdict, _, err := b.program(p).Test(frame)
	b.must(err)
	return verdict
}

func fromVXLAN(remote netip.Addr, src, dst, ttl uint32) (s sceneScene) {
	s.Outer.Remote.B = AddrOf(remote)
	s.Outer.Vni = src | dst<<12
	s.Outer.Ttl = ttl
	return s
}

// fromTAP is the tags of a frame, flooded when dst is 0.
func fromTAP(src, dst, ttl uint16) (s sceneScene) {
	s.S_tci = src | ttl>>2<<12
	s.C_tci = dst | ttl&3<<12
	if dst == 0 {
		s.C_tci |= 1 << 15
	}
	return s
}

func host(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// sent is how many frames left by a device.
func (b *bench) sent(dev *net.Interface) string {
	b.t.Helper()
	n, err := os.ReadFile("/proc/thread-self/net/dev")
	b.must(err)
	return transmitted(string(n), dev.Name)
}
