package userdp

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

const (
	self     = peer.ShortID(7)
	other    = peer.ShortID(9)
	relay    = peer.ShortID(3)
	bridge   = 2
	hostPort = 10
)

func mac(n byte) overlay.MAC { return overlay.MAC{2, 0, 0, 0, 0, n} }

func endpointAt(m overlay.MAC, cidr string, p peer.ShortID) overlay.Endpoint {
	return overlay.Endpoint{MAC: m, Addrs: []netip.Prefix{netip.MustParsePrefix(cidr)}, Peer: p}
}

// testTable has here 1 (subnet 10.0.0.0/24) and 2 (10.0.1.0/24), and at other
// 3 and 4 of the same subnets.
func testTable() *table {
	return newTable(self, bridge, []overlay.Endpoint{
		endpointAt(mac(3), "10.0.0.3/24", other), endpointAt(mac(4), "10.0.1.4/24", other), endpointAt(mac(5), "10.0.9.5/24", other),
	}, map[int]overlay.Port{
		hostPort:     {IfIndex: hostPort, Endpoint: endpointAt(mac(1), "10.0.0.1/24", 0)},
		hostPort + 1: {IfIndex: hostPort + 1, Endpoint: endpointAt(mac(2), "10.0.1.2/24", 0)},
	})
}

// ipv4 is a frame with an IPv4 packet.
func ipv4(dst, src overlay.MAC, from string) []byte {
	b := slices.Concat(dst[:], src[:], []byte{8, 0}, make([]byte, 20))
	copy(b[ipv4Src:], netip.MustParseAddr(from).AsSlice())
	return b
}

// arp is a request of an address with a sender.
func arp(src, claimed overlay.MAC, from string) []byte {
	b := slices.Concat(slices.Repeat([]byte{0xff}, 6), src[:], []byte{8, 6}, make([]byte, 28))
	copy(b[arpSender:], claimed[:])
	copy(b[arpSender+6:], netip.MustParseAddr(from).AsSlice())
	return b
}

func TestFromBridge(t *testing.T) {
	everybody := overlay.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	tagged := ipv4(mac(3), mac(1), "10.0.0.1")
	copy(tagged[12:], []byte{0x81, 0})
	for name, c := range map[string]struct {
		frame []byte
		want  event
		dst   peer.ShortID
	}{
		"to another peer":          {ipv4(mac(3), mac(1), "10.0.0.1"), sent, other},
		"to this host":             {ipv4(mac(2), mac(1), "10.0.0.1"), droppedLocal, 0},
		"to another subnet":        {ipv4(mac(4), mac(1), "10.0.0.1"), droppedIsolated, 0},
		"to nobody known":          {ipv4(mac(99), mac(1), "10.0.0.1"), sentUnknown, 0},
		"to everybody":             {ipv4(everybody, mac(1), "10.0.0.1"), sentFlood, 0},
		"to bridges":               {ipv4(overlay.MAC{1, 0x80, 0xc2, 0, 0, 0}, mac(1), "10.0.0.1"), droppedLocal, 0},
		"from another's address":   {ipv4(mac(3), mac(1), "10.0.0.2"), droppedSpoofed, 0},
		"from another peer's MAC":  {ipv4(mac(4), mac(3), "10.0.0.3"), droppedSpoofed, 0},
		"from an unknown MAC":      {ipv4(mac(3), mac(98), "10.0.0.1"), droppedUnknownMAC, 0},
		"from no address":          {ipv4(everybody, mac(1), "0.0.0.0"), sentFlood, 0},
		"with a VLAN tag":          {tagged, droppedSpoofed, 0},
		"ARP":                      {arp(mac(1), mac(1), "10.0.0.1"), sentFlood, 0},
		"ARP with another MAC":     {arp(mac(1), mac(2), "10.0.0.1"), droppedSpoofed, 0},
		"ARP with another address": {arp(mac(1), mac(1), "10.0.0.2"), droppedSpoofed, 0},
		"short":                    {ipv4(mac(3), mac(1), "10.0.0.1")[:20], droppedSpoofed, 0},
	} {
		w, got := testTable().fromBridge(c.frame, 1, make(limits))
		if got != c.want || w.dst != c.dst {
			t.Errorf("%s: %s to %d, want %s to %d", name, got, w.dst, c.want, c.dst)
		}
		if !got.dropped() && (w.src != self || w.hops != hopLimit || w.flood != (c.dst == 0)) {
			t.Errorf("%s: sent with %+v", name, w)
		}
	}
	if _, got := newTable(0, bridge, nil, nil).fromBridge(ipv4(mac(3), mac(1), "10.0.0.1"), 1, make(limits)); got != droppedNoPath {
		t.Errorf("without a short id: %s", got)
	}
}

// TestExposedHost: the host routes for others, so its addresses are not looked
// at.
func TestExposedHost(t *testing.T) {
	table := newTable(self, bridge, []overlay.Endpoint{endpointAt(mac(3), "10.0.0.3/24", other)},
		map[int]overlay.Port{bridge: {IfIndex: bridge, Endpoint: endpointAt(mac(1), "10.0.0.1/24", 0)}})
	if _, got := table.fromBridge(ipv4(mac(3), mac(1), "198.51.100.2"), 1, make(limits)); got != sent {
		t.Errorf("%s, want it sent", got)
	}
}

func TestFromPeer(t *testing.T) {
	for name, c := range map[string]struct {
		way      way
		dst, src overlay.MAC
		want     fate
	}{
		"for a container":        {way{src: other, dst: self, hops: 5}, mac(1), mac(3), fate{deliver: true, event: received}},
		"of another subnet":      {way{src: other, dst: self, hops: 5}, mac(1), mac(4), fate{event: droppedIsolated}},
		"of nobody known":        {way{src: other, dst: self, hops: 5}, mac(1), mac(97), fate{event: droppedUnknownMAC}},
		"for another peer":       {way{src: other, dst: relay, hops: 5}, mac(90), mac(3), fate{onward: true, event: relayed}},
		"too often relayed":      {way{src: other, dst: relay, hops: 1}, mac(90), mac(3), fate{event: droppedHopLimit}},
		"our own":                {way{src: self, dst: self, hops: 5}, mac(1), mac(3), fate{event: droppedOwn}},
		"without source":         {way{dst: self, hops: 5}, mac(1), mac(3), fate{event: droppedMalformed}},
		"for all":                {way{src: other, hops: 5, flood: true}, mac(255), mac(3), fate{true, true, receivedFlood}},
		"for all, last hop":      {way{src: other, hops: 1, flood: true}, mac(255), mac(3), fate{true, false, receivedFlood}},
		"for all, nobody shares": {way{src: other, hops: 5, flood: true}, mac(255), mac(5), fate{false, true, receivedFlood}},
		"flooded unicast":        {way{src: other, hops: 5, flood: true}, mac(2), mac(3), fate{false, true, receivedFlood}},
	} {
		if got := testTable().fromPeer(c.way, slices.Concat(c.dst[:], c.src[:])); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestWayKeepsWhatItIsGiven(t *testing.T) {
	for _, w := range []way{
		{src: 1, dst: 4095, hops: 63}, {src: 4095, dst: 1, hops: 1}, {src: 17, hops: 42, flood: true},
	} {
		var b [tagsLen]byte
		var got way
		w.put(b[:])
		got.get(b[:])
		if got != w {
			t.Errorf("%+v became %+v", w, got)
		}
	}
}

func TestFloodLimit(t *testing.T) {
	l := make(limits)
	now := time.Unix(1, 0)
	count := func(src overlay.MAC) (n int) {
		for !l.exceeded(src, 1, now) {
			n++
		}
		return n
	}
	if n := count(mac(1)); n < floodBurst || n > floodBurst+1 {
		t.Errorf("%d frames at once, want about %d", n, floodBurst)
	}
	if n := count(mac(2)); n < floodBurst {
		t.Errorf("another sender may send %d", n)
	}
	now = now.Add(50 * floodInterval)
	if n := count(mac(1)); n != 50 {
		t.Errorf("%d frames after the time of 50", n)
	}
}
