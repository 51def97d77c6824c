package bpf

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	markSent    = 0x57560001
	markDeliver = 0x57560002
)

// transmitted reads a line of /proc/net/dev.
func transmitted(table, dev string) string {
	for line := range strings.Lines(table) {
		name, fields, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok && name == dev {
			return strings.Fields(fields)[9]
		}
	}
	return ""
}

func (b *bench) want(what string, got outcome, verdict uint32, counted ...string) {
	b.t.Helper()
	if got.Verdict != verdict {
		b.t.Errorf("%s: verdict %#x, want %#x", what, got.Verdict, verdict)
	}
	b.wantCounted(what, counted...)
}

func (b *bench) wantCounted(what string, names ...string) {
	b.t.Helper()
	var got []string
	for name, n := range b.counted() {
		for range n {
			got = append(got, name)
		}
	}
	slices.Sort(got)
	slices.Sort(names)
	if !slices.Equal(got, names) {
		b.t.Errorf("%s: counted %v, want %v", what, got, names)
	}
}

func (b *bench) wantKey(what string, o outcome, remote netip.Addr, src, dst, ttl uint32) {
	b.t.Helper()
	if o.HasKey == 0 || o.Remote4 != host(remote) || o.Vni != src|dst<<12 || o.Ttl != ttl {
		b.t.Errorf("%s: tunnel key %+v, want to %s, %d→%d, hop limit %d", what, o, remote, src, dst, ttl)
	}
}

func (b *bench) wantTags(what string, o outcome, src, dst, ttl uint16) {
	b.t.Helper()
	want := fromTAP(src, dst, ttl)
	if o.VlanProto != 0x88a8 || o.InnerProto != 0x8100 || o.S_tci != want.S_tci || o.C_tci != want.C_tci {
		b.t.Errorf("%s: tags %04x:%04x %04x:%04x, want 88a8:%04x 8100:%04x", what, o.VlanProto, o.S_tci, o.InnerProto, o.C_tci,
			want.S_tci, want.C_tci)
	}
}

// copies runs f and returns how many frames it sent by each device.
func (b *bench) copies(f func()) (vxlan, tap int) {
	b.t.Helper()
	count := func(dev *net.Interface) int {
		n, err := strconv.Atoi(b.sent(dev))
		b.must(err)
		return n
	}
	v, s := count(b.vxlan), count(b.tap)
	f()
	return count(b.vxlan) - v, count(b.tap) - s
}

func TestTransmit(t *testing.T) {
	b := newBench(t)
	frame := func(dst MAC) []byte { return ethernet(dst, localMAC(), 0x0800, ipv4("10.32.0.1")) }
	var none sceneScene

	o := b.run("scene_vxlan_out", none, frame(remoteMAC()))
	b.want("to an endpoint behind a neighbour", o, verdictPass, "tx")
	b.wantKey("to an endpoint behind a neighbour", o, leftAddr(), self, beyond, 63)

	o = b.run("scene_vxlan_out", none, frame(slowMAC()))
	b.want("to the user-space path", o, verdictRedirect, "tx", "to_sleeve")
	b.wantTags("to the user-space path", o, self, slow, 63)

	o = b.run("scene_vxlan_out", none, frame(localMAC()))
	b.want("to a local endpoint", o, verdictDrop, "dropped_local")

	vxlan, tap := b.copies(func() { o = b.run("scene_vxlan_out", none, frame(unknownMAC())) })
	b.want("to nobody known", o, verdictDrop, "flooded", "flooded_unknown", "to_sleeve")
	if vxlan != 2 || tap != 1 {
		t.Errorf("unknown unicast: %d copies by VXLAN and %d by TAP, want 2 and 1", vxlan, tap)
	}
	vxlan, tap = b.copies(func() { o = b.run("scene_vxlan_out", none, frame(broadcast())) })
	b.want("broadcast", o, verdictDrop, "flooded", "to_sleeve")
	if vxlan != 2 || tap != 1 {
		t.Errorf("broadcast: %d copies by VXLAN and %d by TAP, want 2 and 1", vxlan, tap)
	}

	b.must(b.Hops.Delete(beyond))
	b.want("no path", b.run("scene_vxlan_out", none, frame(remoteMAC())), verdictDrop, "tx", "dropped_no_path")
	b.want("spanning tree", b.run("scene_vxlan_out", none, frame(MAC{1, 0x80, 0xc2})), verdictDrop, "dropped_local")
	b.must(b.SetConfig(Config{VXLAN: uint32(b.vxlan.Index)}))
	b.want("without a short id", b.run("scene_vxlan_out", none, frame(remoteMAC())), verdictDrop, "dropped_no_path")
}

func TestReceiveUnicast(t *testing.T) {
	b := newBench(t)
	frame := ethernet(localMAC(), remoteMAC(), 0x0800, ipv4("10.32.0.4"))

	b.want("for us", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, self, 1), frame), verdictPass, "rx")
	o := b.run("scene_tap_in", fromTAP(slow, self, 1), frame)
	b.want("for us by the TAP", o, verdictRedirect, "from_sleeve", "rx")
	if o.Mark != markDeliver || o.VlanProto != 0 {
		t.Errorf("by the TAP: mark %#x, tag %#x", o.Mark, o.VlanProto)
	}
	stranger := netip.MustParseAddr("192.0.2.77")
	b.want("from a stranger", b.run("scene_vxlan_in", fromVXLAN(stranger, beyond, self, 63), frame), verdictDrop, "dropped_not_neighbour")
	b.want("from ourselves", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), self, self, 63), frame), verdictDrop, "dropped_own")
	b.want("from nobody", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), 0, self, 63), frame), verdictDrop, "dropped_malformed")
}

func TestRelay(t *testing.T) {
	b := newBench(t)
	frame := ethernet(MAC{2, 7}, MAC{2, 8}, 0x0800, ipv4("10.32.0.8"))

	o := b.run("scene_vxlan_in", fromVXLAN(rightAddr(), right, beyond, 20), frame)
	b.want("relayed", o, verdictRedirect, "relayed")
	b.wantKey("relayed", o, leftAddr(), right, beyond, 19)
	if o.Mark != markSent {
		t.Errorf("relayed: mark %#x", o.Mark)
	}
	o = b.run("scene_vxlan_in", fromVXLAN(rightAddr(), right, slow, 255), frame)
	b.want("relayed to the user-space path", o, verdictRedirect, "relayed", "to_sleeve")
	b.wantTags("relayed to the user-space path", o, right, slow, 63)
	o = b.run("scene_tap_in", fromTAP(slow, beyond, 33), frame)
	b.want("relayed from the user-space path", o, verdictRedirect, "from_sleeve", "relayed")
	b.wantKey("relayed from the user-space path", o, leftAddr(), slow, beyond, 32)

	b.want("hop limit", b.run("scene_vxlan_in", fromVXLAN(rightAddr(), right, beyond, 1), frame), verdictDrop, "dropped_hop_limit")
	b.want("hop limit by the TAP", b.run("scene_tap_in", fromTAP(slow, beyond, 1), frame), verdictDrop, "from_sleeve", "dropped_hop_limit")
	b.want("backwards", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), right, beyond, 9), frame), verdictDrop, "relayed", "dropped_backwards")
	b.want("no path", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), right, 99, 9), frame), verdictDrop, "relayed", "dropped_no_path")

	// Two peers share an address: it cannot be told which one sent this.
	b.must(b.Neighbours.Put(AddrOf(leftAddr()), Neighbour{N: 2, ID: [MaxSharing]uint16{left, 6}}))
	b.want("shared address", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), 6, beyond, 9), frame), verdictRedirect, "relayed")
}

func TestReceiveFlooded(t *testing.T) {
	b := newBench(t)
	frame := ethernet(broadcast(), remoteMAC(), 0x0806, arp(remoteMAC(), "10.32.0.4"))
	var o outcome

	vxlan, tap := b.copies(func() { o = b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, 0, 9), frame) })
	b.want("from the parent", o, verdictPass, "rx_flooded", "to_sleeve")
	if vxlan != 1 || tap != 1 {
		t.Errorf("from the parent: %d copies by VXLAN and %d by TAP, want 1 and 1", vxlan, tap)
	}
	if o.VlanProto != 0 {
		t.Errorf("delivered with tag %#x", o.VlanProto)
	}
	vxlan, tap = b.copies(func() { o = b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, 0, 1), frame) })
	b.want("last hop", o, verdictPass, "rx_flooded")
	if vxlan+tap != 0 {
		t.Errorf("last hop: %d copies", vxlan+tap)
	}
	vxlan, tap = b.copies(func() { o = b.run("scene_vxlan_in", fromVXLAN(rightAddr(), beyond, 0, 9), frame) })
	b.want("not from the parent", o, verdictDrop, "dropped_reverse_path")
	if vxlan+tap != 0 {
		t.Errorf("not from the parent: %d copies", vxlan+tap)
	}
	b.want("no tree", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), 99, 0, 9), frame), verdictDrop, "dropped_reverse_path")

	vxlan, tap = b.copies(func() { o = b.run("scene_tap_in", fromTAP(slow, 0, 9), frame) })
	b.want("by the TAP", o, verdictRedirect, "from_sleeve", "rx_flooded")
	if vxlan != 2 || tap != 0 || o.Mark != markDeliver {
		t.Errorf("by the TAP: %d copies by VXLAN and %d by TAP, mark %#x", vxlan, tap, o.Mark)
	}
}

func TestOwnErrors(t *testing.T) {
	b := newBench(t)
	need(t, b.Features()&FeatureTunnelFlags != 0, "needs a kernel that tells flags of tunnel keys")
	const noCache = 0x20 // 0x2000 in network order
	frame := ethernet(MAC{2, 8}, MAC{2, 7}, 0x0800, ipv4("10.32.0.7"))
	s := fromVXLAN(leftAddr(), self, beyond, 63)
	s.Outer.Flags = noCache
	b.want("about our frame", b.run("scene_vxlan_in", s, frame), verdictPass, "pmtu")
	s = fromVXLAN(leftAddr(), right, beyond, 63)
	s.Outer.Flags = noCache
	o := b.run("scene_vxlan_in", s, frame)
	b.want("about a relayed frame", o, verdictRedirect, "pmtu")
	b.wantKey("about a relayed frame", o, rightAddr(), beyond, right, 63)
}

func TestProbe(t *testing.T) {
	b := newBench(t)
	probe := ethernet(MAC{}, MAC{}, 0x88b5, []byte{1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 60})
	b.want("from a neighbour", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), left, self, 60), probe), verdictDrop, "probes")

	got := make(chan Probe, 1)
	done := make(chan error, 1)
	go func() { done <- b.ReadProbes(t.Context(), func(p Probe) { got <- p }) }()
	select {
	case p := <-got:
		if want := (Probe{Token: 0x0102030405060708, Size: 60, From: left}); p != want {
			t.Errorf("got %+v, want %+v", p, want)
		}
	case err := <-done:
		t.Fatal(err)
	}
	for what, s := range map[string]sceneScene{
		"relayed":                fromVXLAN(leftAddr(), beyond, self, 60),
		"for another":            fromVXLAN(leftAddr(), left, right, 60),
		"in a neighbour's name":  fromVXLAN(rightAddr(), left, self, 60),
		"flooded":                fromVXLAN(leftAddr(), left, 0, 60),
		"by a neighbour further": fromVXLAN(leftAddr(), right, self, 60),
	} {
		b.want(what, b.run("scene_vxlan_in", s, probe), verdictDrop, "dropped_probes")
	}
	boast := ethernet(MAC{}, MAC{}, 0x88b5, []byte{1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 65})
	b.want("claims more than it is", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), left, self, 60), boast), verdictDrop, "dropped_probes")
	b.want("by the TAP", b.run("scene_tap_in", fromTAP(slow, self, 9), probe), verdictDrop, "from_sleeve", "dropped_probes")
}

// A probe that is a TCP segment counts only as it left its sender.
func TestSegment(t *testing.T) {
	b := newBench(t)
	const headers = 14 + 20 + 20
	f := make([]byte, headers+Segment)
	copy(f[12:], []byte{8, 0, 0x45, 0, (headers - 14 + Segment) >> 8, (headers - 14 + Segment) & 0xff, 0, 0, 0, 0, 64, 6})
	copy(f[26:], []byte{1, 2, 3, 4, 5, 6, 0xee, 0xee}) // token
	binary.BigEndian.PutUint16(f[36:], left)           // its neighbour
	binary.BigEndian.PutUint32(f[38:], Segment)        // the second one
	f[46], f[headers] = 0x50, 77
	sum := uint32(6 + len(f) - 34)
	for i := 26; i < len(f); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(f[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(f[50:], ^uint16(sum>>16+sum))
	s := fromVXLAN(leftAddr(), left, self, 60)
	b.want("as it was sent", b.run("scene_vxlan_in", s, f), verdictDrop, "probes")
	got := make(chan Probe, 1)
	done := make(chan error, 1)
	go func() { done <- b.ReadProbes(t.Context(), func(p Probe) { got <- p }) }()
	select {
	case p := <-got:
		if want := (Probe{Token: SegmentToken(0x0102030405060000, 1, 2), From: left}); p != want {
			t.Errorf("got %+v, want %+v", p, want)
		}
	case err := <-done:
		t.Fatal(err)
	}
	for _, at := range []int{27, 39, 50, headers, len(f) - 1} {
		spoilt := slices.Clone(f)
		spoilt[at]++
		b.want(fmt.Sprintf("with byte %d changed", at), b.run("scene_vxlan_in", s, spoilt), verdictDrop, "dropped_probes")
	}
	b.want("cut", b.run("scene_vxlan_in", s, f[:len(f)-1]), verdictDrop, "dropped_probes")
	b.want("of another length", b.run("scene_vxlan_in", s, append(f, 0, 0)), verdictDrop, "probes") // padding
	b.want("from a stranger", b.run("scene_vxlan_in", fromVXLAN(rightAddr(), left, self, 60), f), verdictDrop, "dropped_probes")
}
