package bpf

import (
	"net/netip"
	"testing"
)

// withShortcut lets frames go past the bridge. The port is described as if it
// were a veth.
func (b *bench) withShortcut() {
	b.t.Helper()
	b.allow(FeatureShortcut | FeatureARP)
	ports, err := b.Ports.All()
	b.must(err)
	b.must(b.Endpoints.Put(localMAC(), Endpoint{IfIndex: 1, Subnets: ports[1].Subnets}))
}

// allow sets features that the daemon may want.
func (b *bench) allow(features uint32) {
	b.t.Helper()
	c, err := b.Config()
	b.must(err)
	c.Features = b.Features() | features
	b.must(b.SetConfig(c))
}

func neighbourMAC() MAC { return MAC{2, 0, 0, 0, 0, 2} } // behind another port here

func TestShortcutOut(t *testing.T) {
	b := newBench(t)
	frame := func(dst MAC) []byte { return ethernet(dst, localMAC(), 0x0800, ipv4("10.32.0.1")) }
	var none sceneScene
	o := b.run("scene_port_in", none, frame(remoteMAC()))
	b.want("not allowed", o, verdictPass)

	b.withShortcut()
	o = b.run("scene_port_in", none, frame(remoteMAC()))
	b.want("to an endpoint behind a neighbour", o, verdictRedirect, "shortcut", "tx")
	b.wantKey("to an endpoint behind a neighbour", o, leftAddr(), self, beyond, 63)
	if o.Mark != markSent {
		t.Errorf("mark %#x: vxlan_out would take it for the bridge's", o.Mark)
	}
	o = b.run("scene_port_in", none, frame(slowMAC()))
	b.want("to the user-space path", o, verdictRedirect, "shortcut", "to_sleeve", "tx")
	b.wantTags("to the user-space path", o, self, slow, 63)

	b.want("to nobody known", b.run("scene_port_in", none, frame(unknownMAC())), verdictPass)
	b.want("broadcast", b.run("scene_port_in", none, frame(broadcast())), verdictPass)
	b.want("to itself", b.run("scene_port_in", none, frame(localMAC())), verdictPass)
	spoofed := ethernet(remoteMAC(), localMAC(), 0x0800, ipv4("10.32.0.2"))
	b.want("another's address", b.run("scene_port_in", none, spoofed), verdictDrop, "dropped_spoofed")

	mine := subnets(t, "10.32.0.0/24")
	b.must(b.Endpoints.Put(neighbourMAC(), Endpoint{IfIndex: uint32(b.tap.Index), Subnets: mine}))
	b.want("to a port here", b.run("scene_port_in", none, frame(neighbourMAC())), verdictRedirect, "shortcut")
	b.must(b.Endpoints.Put(neighbourMAC(), Endpoint{IfIndex: uint32(b.tap.Index), Subnets: subnets(t, "10.32.1.0/24")}))
	b.want("to a port of another subnet", b.run("scene_port_in", none, frame(neighbourMAC())), verdictDrop, "dropped_isolated")
	b.must(b.Endpoints.Put(neighbourMAC(), Endpoint{Subnets: mine}))
	b.want("to the exposed host", b.run("scene_port_in", none, frame(neighbourMAC())), verdictPass)

	b.must(b.Hops.Delete(beyond))
	b.want("no path", b.run("scene_port_in", none, frame(remoteMAC())), verdictDrop, "shortcut", "tx", "dropped_no_path")
	b.must(b.SetConfig(Config{VXLAN: uint32(b.vxlan.Index), Features: FeatureShortcut}))
	b.want("without a short id", b.run("scene_port_in", none, frame(remoteMAC())), verdictPass)
}

func TestShortcutIn(t *testing.T) {
	b := newBench(t)
	b.withShortcut()
	frame := func(dst, src MAC) []byte { return ethernet(dst, src, 0x0800, ipv4("10.32.0.4")) }
	fromLeft := fromVXLAN(leftAddr(), beyond, self, 9)

	b.want("same subnet", b.run("scene_vxlan_in", fromLeft, frame(localMAC(), remoteMAC())), verdictRedirect, "rx", "shortcut")
	o := b.run("scene_tap_in", fromTAP(slow, self, 9), frame(localMAC(), slowMAC()))
	b.want("by the TAP", o, verdictRedirect, "from_sleeve", "rx", "shortcut")
	if o.Mark != 0 || o.VlanProto != 0 {
		t.Errorf("by the TAP: mark %#x, tag %#x", o.Mark, o.VlanProto)
	}
	b.want("other subnet", b.run("scene_vxlan_in", fromLeft, frame(localMAC(), foreignMAC())), verdictDrop, "rx", "dropped_isolated")
	b.want("unknown sender", b.run("scene_vxlan_in", fromLeft, frame(localMAC(), unknownMAC())), verdictDrop, "rx", "dropped_unknown_mac")
	b.want("unknown receiver", b.run("scene_vxlan_in", fromLeft, frame(unknownMAC(), remoteMAC())), verdictPass, "rx")
	b.want("receiver elsewhere", b.run("scene_vxlan_in", fromLeft, frame(slowMAC(), remoteMAC())), verdictPass, "rx")
	b.want("flooded", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, 0, 1), frame(localMAC(), remoteMAC())), verdictPass, "rx_flooded")
	b.must(b.Endpoints.Put(neighbourMAC(), Endpoint{Subnets: subnets(t, "10.32.0.0/24")}))
	b.want("to the exposed host", b.run("scene_vxlan_in", fromLeft, frame(neighbourMAC(), remoteMAC())), verdictPass, "rx")

	if b.Features()&FeatureTunnelFlags == 0 {
		return
	}
	s := fromVXLAN(leftAddr(), self, beyond, 63)
	s.Outer.Flags = 0x20 // 0x2000 in network order
	b.want("error about our own frame", b.run("scene_vxlan_in", s, frame(localMAC(), remoteMAC())), verdictRedirect, "pmtu", "shortcut")
}

func TestTraffic(t *testing.T) {
	b := newBench(t)
	frame := ethernet(remoteMAC(), localMAC(), 0x0800, ipv4("10.32.0.1"))
	size := uint64(len(frame))
	flow := func(packets, flooded, relayed uint64) Flow {
		return Flow{Packets: packets, Bytes: packets * size, Flooded: flooded, Relayed: relayed}
	}
	want := func(what string, id uint16, tx, rx Flow) {
		t.Helper()
		got, err := b.Traffic(id)
		b.must(err)
		if want := (Traffic{Tx: tx, Rx: rx}); got != want {
			t.Errorf("%s: neighbour %d: %+v, want %+v", what, id, got, want)
		}
	}
	b.run("scene_vxlan_out", sceneScene{}, frame)
	want("sent by way of left", left, flow(1, 0, 1), Flow{})
	want("sent by way of left", beyond, Flow{}, Flow{})
	b.run("scene_vxlan_in", fromVXLAN(rightAddr(), right, beyond, 20), frame)
	want("relayed to left", left, flow(2, 0, 2), Flow{})
	want("relayed from right", right, Flow{}, flow(1, 0, 1))
	b.run("scene_vxlan_out", sceneScene{}, ethernet(broadcast(), localMAC(), 0x0800, ipv4("10.32.0.1")))
	want("flooded", left, flow(3, 1, 2), Flow{})
	want("flooded", right, flow(1, 1, 0), flow(1, 0, 1))
	b.run("scene_vxlan_in", fromVXLAN(leftAddr(), left, right, 20), frame)
	want("relayed from left", left, flow(3, 1, 2), flow(1, 0, 1))
	want("relayed to right", right, flow(2, 1, 0), flow(1, 0, 1))
	b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, 0, 20), ethernet(broadcast(), remoteMAC(), 0x0800, ipv4("10.32.5.1")))
	want("flooded by left", left, flow(3, 1, 2), flow(2, 1, 1))
	want("flooded on to right", right, flow(3, 2, 0), flow(1, 0, 1))
	b.run("scene_vxlan_out", sceneScene{}, ethernet(slowMAC(), localMAC(), 0x0800, ipv4("10.32.0.1")))
	want("by the TAP", slow, Flow{}, Flow{})
	b.must(b.Neighbours.Put(AddrOf(leftAddr()), Neighbour{N: 2, ID: [MaxSharing]uint16{left, 6}}))
	b.run("scene_vxlan_in", fromVXLAN(leftAddr(), 6, self, 9), frame)
	want("of two behind one address", left, flow(3, 1, 2), flow(2, 1, 1))
	want("of two behind one address", 6, Flow{}, flow(1, 0, 0))
}

// What is dropped is told by the peer it came from or would have gone to.
func TestLosses(t *testing.T) {
	b := newBench(t)
	frame := ethernet(localMAC(), remoteMAC(), 0x0800, ipv4("10.32.5.1"))
	shout := ethernet(broadcast(), remoteMAC(), 0x0800, ipv4("10.32.5.1"))
	lost := MAC{2, 0, 0, 0, 9, 9}
	b.must(b.Endpoints.Put(lost, Endpoint{Peer: 77, Subnets: subnets(t, "10.32.0.9/24")}))
	for _, c := range []struct {
		what    string
		program string
		scene   sceneScene
		frame   []byte
		peer    uint16
		reason  string
	}{
		{"our own frame", "scene_vxlan_in", fromVXLAN(leftAddr(), self, right, 9), frame, left, "own"},
		{"a frame from nowhere", "scene_vxlan_in", fromVXLAN(leftAddr(), 0, self, 9), frame, left, "malformed"},
		{"the last hop", "scene_vxlan_in", fromVXLAN(leftAddr(), beyond, right, 1), frame, left, "hop_limit"},
		{"not the parent", "scene_vxlan_in", fromVXLAN(rightAddr(), beyond, 0, 9), shout, right, "reverse_path"},
		{"back", "scene_vxlan_in", fromVXLAN(leftAddr(), right, beyond, 9), frame, left, "backwards"},
		{"no way", "scene_vxlan_in", fromVXLAN(leftAddr(), beyond, 99, 9), frame, 99, "no_path"},
		{"no way from here", "scene_vxlan_out", sceneScene{}, ethernet(lost, localMAC(), 0x0800, ipv4("10.32.0.1")), 77, "no_path"},
		{"the last hop, by the TAP", "scene_tap_in", fromTAP(beyond, right, 1), frame, beyond, "hop_limit"},
	} {
		before, err := b.Losses()
		b.must(err)
		b.run(c.program, c.scene, c.frame)
		after, err := b.Losses()
		b.must(err)
		if n := after[c.peer][c.reason] - before[c.peer][c.reason]; n != 1 {
			t.Errorf("%s: peer %d has %v, before %v; want one more by %s", c.what, c.peer, after[c.peer], before[c.peer], c.reason)
		}
	}
	b.withShortcut()
	b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, self, 9), ethernet(localMAC(), foreignMAC(), 0x0800, ipv4("10.32.1.4")))
	b.run("scene_vxlan_in", fromVXLAN(netip.MustParseAddr("203.0.113.9"), beyond, self, 9), frame)
	all, err := b.Losses()
	b.must(err)
	if n := all[beyond]["isolated"]; n != 1 {
		t.Errorf("%d frames from another subnet", n)
	}
	n := uint64(0)
	for _, reasons := range all {
		for _, k := range reasons {
			n += k
		}
	}
	if n != 9 {
		t.Errorf("%d frames in all: %v; a stranger's is nobody's", n, all)
	}
}
