package userdp

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"weave.local/router/frame"
)

// FuzzFromBridge lets containers 1 and 2 of the test table send what they
// like: what leaves is addressed as its Ethernet header says and, as far as
// package frame can read it, bears an address of its sender.
func FuzzFromBridge(f *testing.F) {
	f.Add(ipv4(mac(3), mac(1), "10.0.0.1"))
	f.Add(ipv4(mac(3), mac(1), "10.0.0.2"))
	f.Add(arp(mac(1), mac(1), "10.0.0.1"))
	f.Add(append(mac3to1(), 0x86, 0xdd))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < frame.EthernetLen {
			return // refused before
		}
		was := bytes.Clone(b)
		w, e := testTable().fromBridge(b, 1, make(limits))
		if !bytes.Equal(b, was) {
			t.Error("the frame is changed")
		}
		if e.dropped() {
			return
		}
		own := map[byte]netip.Addr{1: netip.MustParseAddr("10.0.0.1"), 2: netip.MustParseAddr("10.0.1.2")}
		addr, here := own[b[11]]
		if !bytes.Equal(b[6:11], []byte{2, 0, 0, 0, 0}) || !here || w.src != self || w.hops != hopLimit || w.flood != (w.dst == 0) {
			t.Fatalf("%s as %+v: % x", e, w, b)
		}
		if l, ok := frame.Parse(b); ok && l.L3+frame.IPv4Len <= len(b) && binary.BigEndian.Uint16(b[12:]) == frame.TypeIPv4 {
			if from := netip.AddrFrom4([4]byte(b[l.L3+12:])); from != addr && !from.IsUnspecified() {
				t.Errorf("%s says it is %s", addr, from)
			}
		}
	})
}

func mac3to1() []byte {
	to, from := mac(3), mac(1)
	return append(to[:], from[:]...)
}

// FuzzFromPeer judges what the sleeve received: nothing is given to a
// container of another subnet, and nothing goes on that has no hop left.
func FuzzFromPeer(f *testing.F) {
	f.Add(make([]byte, 2*frame.TagLen), ipv4(mac(1), mac(3), "10.0.0.3")[:12])
	var tags [2 * frame.TagLen]byte
	way{src: other, dst: self, hops: 5}.put(tags[:])
	f.Add(tags[:], ipv4(mac(1), mac(3), "10.0.0.3")[:12])
	f.Add(tags[:], ipv4(mac(2), mac(3), "10.0.0.3")[:12])
	way{src: other, hops: 2, flood: true}.put(tags[:])
	f.Add(tags[:], ipv4(mac(1), mac(4), "10.0.0.3")[:12])
	f.Fuzz(func(t *testing.T, tags, addrs []byte) {
		if len(tags) < 2*frame.TagLen || len(addrs) < frame.AddrsLen {
			return // refused before
		}
		var w way
		w.get(tags)
		fate := testTable().fromPeer(w, addrs)
		to, from := addrs[5], addrs[11]
		switch {
		case fate.onward && w.hops <= 1:
			t.Errorf("%+v goes on", w)
		case fate.deliver && (w.src == 0 || w.src == self):
			t.Errorf("%+v is delivered", w)
		case fate.deliver && addrs[0] == 2 && bytes.Equal(addrs[1:5], make([]byte, 4)) &&
			bytes.Equal(addrs[6:11], []byte{2, 0, 0, 0, 0}) && (to == 1 && from == 4 || to == 2 && from == 3):
			t.Errorf("% x crosses subnets", addrs)
		}
		var back [2 * frame.TagLen]byte
		w.put(back[:])
		var again way
		if again.get(back[:]); again != w {
			t.Errorf("%+v is read back as %+v", w, again)
		}
	})
}
