package bpf

import (
	"errors"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// fuzzer runs programs on frames in the network namespace of a bench.
type fuzzer struct {
	*bench
	home, ns *os.File
}

func newFuzzer(f *testing.F) *fuzzer {
	open := func() *os.File {
		ns, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { _ = ns.Close() })
		return ns
	}
	home := open()
	b := newBench(f)
	return &fuzzer{b, home, open()}
}

// with does something on a thread in the bench's namespace. Should there be no
// way back, the thread ends.
func (z *fuzzer) with(t *testing.T, do func() error) {
	t.Helper()
	runtime.LockOSThread()
	err := unix.Setns(int(z.ns.Fd()), unix.CLONE_NEWNET)
	if err == nil {
		err = do()
	}
	if back := unix.Setns(int(z.home.Fd()), unix.CLONE_NEWNET); back != nil {
		t.Fatal(errors.Join(err, back))
	}
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatal(err)
	}
}

// testable says whether the kernel runs a program on that frame: newer ones
// refuse to where an IP header is cut short.
func testable(frame []byte) bool {
	if len(frame) < 14 || len(frame) > 1514 {
		return false
	}
	switch uint16(frame[12])<<8 | uint16(frame[13]) {
	case 0x0800:
		return len(frame) >= 14+20
	case 0x86dd:
		return len(frame) >= 14+40
	}
	return true
}

func fuzzedFrames(f *testing.F, add func(frame []byte)) {
	f.Helper()
	me, other := localMAC(), remoteMAC()
	add(ethernet(other, me, 0x0800, ipv4("10.32.0.1")))
	add(ethernet(other, me, 0x0800, ipv4("10.32.0.2")))
	add(ethernet(me, other, 0x0800, ipv4("10.32.0.4")))
	add(ethernet(other, me, 0x86dd, ipv6("fe80::1")))
	add(ethernet(broadcast(), me, 0x0806, arpRequest(me, "10.32.0.1", "10.32.0.4")))
	add(ethernet(broadcast(), other, 0x0806, arp(me, "10.32.0.4")))
	add(ethernet(other, me, 0x8100, []byte{0, 0, 8, 0}, ipv4("10.32.0.1")))
	add(ethernet(MAC{0x33, 0x33, 0xff, 0, 0, 4}, me, 0x86dd, solicitation("fd00::1", "fd00::4", 1, 1, 2, 0, 0, 0, 0, 1)))
	add(make([]byte, 14))
}

// FuzzPortIn lets a container send what it likes: what is not dropped bears its
// own addresses.
func FuzzPortIn(f *testing.F) {
	z := newFuzzer(f)
	z.withShortcut()
	z.must(z.Addresses.Put(AddrOf(netip.MustParseAddr("10.32.0.4")), remoteMAC()),
		z.Addresses.Put(AddrOf(netip.MustParseAddr("fd00::4")), remoteMAC()))
	fuzzedFrames(f, func(frame []byte) { f.Add(frame) })
	f.Fuzz(func(t *testing.T, frame []byte) {
		if !testable(frame) {
			return
		}
		var verdict uint32
		z.with(t, func() (err error) {
			verdict, _, err = z.program(PortIn).Test(frame)
			return err
		})
		if verdict == verdictDrop {
			return
		}
		if MAC(frame[6:12]) != localMAC() {
			t.Fatalf("from another MAC: %#x, % x", verdict, frame)
		}
		var from netip.Addr
		switch l3 := frame[14:]; uint16(frame[12])<<8 | uint16(frame[13]) {
		case 0x0800:
			from, _ = netip.AddrFromSlice(l3[min(12, len(l3)):min(16, len(l3))])
		case 0x86dd:
			from, _ = netip.AddrFromSlice(l3[min(8, len(l3)):min(24, len(l3))])
		case 0x0806:
			from, _ = netip.AddrFromSlice(l3[min(14, len(l3)):min(18, len(l3))])
			if len(l3) >= 14 && MAC(l3[8:14]) != localMAC() {
				t.Errorf("ARP for another MAC: % x", frame)
			}
		case 0x8100, 0x88a8:
			t.Errorf("tagged: % x", frame)
		default:
			return
		}
		own := []netip.Addr{netip.MustParseAddr("10.32.0.1"), netip.MustParseAddr("fd00::1")}
		anybodys := from.IsValid() && (from.IsUnspecified() || from.Is6() && from.IsLinkLocalUnicast())
		if !slices.Contains(own, from) && !anybodys {
			t.Errorf("from %v: %#x, % x", from, verdict, frame)
		}
	})
}

// FuzzVXLANIn lets a neighbour and a stranger send what they like: of the
// stranger nothing passes, whatever he says that he is.
func FuzzVXLANIn(f *testing.F) {
	z := newFuzzer(f)
	fuzzedFrames(f, func(frame []byte) {
		f.Add(frame, uint32(beyond|self<<12), byte(4))
		f.Add(frame, uint32(beyond|right<<12), byte(1))
		f.Add(frame, uint32(beyond), byte(9))
	})
	f.Fuzz(func(t *testing.T, frame []byte, vni uint32, ttl byte) {
		if !testable(frame) {
			return
		}
		for _, remote := range []netip.Addr{leftAddr(), netip.MustParseAddr("192.0.2.77")} {
			var o outcome
			z.with(t, func() error {
				s := fromVXLAN(remote, vni&0xfff, vni>>12&0xfff, uint32(ttl))
				err := errors.Join(z.scene.Maps["scenes"].Put(uint32(0), s), z.scene.Maps["outcomes"].Put(uint32(0), outcome{}))
				if err == nil {
					_, _, err = z.scene.Programs["scene_vxlan_in"].Test(frame)
				}
				return errors.Join(err, z.scene.Maps["outcomes"].Lookup(uint32(0), &o))
			})
			if o.Verdict != verdictDrop && remote != leftAddr() {
				t.Errorf("%#x for a stranger: % x", o.Verdict, frame)
			}
		}
	})
}
