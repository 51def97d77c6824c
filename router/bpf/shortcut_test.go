package bpf

import "testing"

// withShortcut lets frames go past the bridge. The port is described as if it
// were a veth.
func (b *bench) withShortcut() {
	b.t.Helper()
	c, err := b.Config()
	b.must(err)
	c.Features |= FeatureShortcut
	ports, err := b.Ports.All()
	b.must(err)
	b.must(b.SetConfig(c), b.Endpoints.Put(localMAC(), Endpoint{IfIndex: 1, Subnets: ports[1].Subnets}))
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
	want := func(what string, id uint16, tx, rx uint64) {
		t.Helper()
		got, err := b.Traffic(id)
		b.must(err)
		if want := (Traffic{TxPackets: tx, TxBytes: tx * size, RxPackets: rx, RxBytes: rx * size}); got != want {
			t.Errorf("%s: neighbour %d: %+v, want %+v", what, id, got, want)
		}
	}
	b.run("scene_vxlan_out", sceneScene{}, frame)
	want("sent by way of left", left, 1, 0)
	want("sent by way of left", beyond, 0, 0)
	b.run("scene_vxlan_in", fromVXLAN(rightAddr(), right, beyond, 20), frame)
	want("relayed to left", left, 2, 0)
	want("relayed from right", right, 0, 1)
	b.run("scene_vxlan_out", sceneScene{}, ethernet(broadcast(), localMAC(), 0x0800, ipv4("10.32.0.1")))
	want("flooded", left, 3, 0)
	want("flooded", right, 1, 1)
	b.run("scene_vxlan_out", sceneScene{}, ethernet(slowMAC(), localMAC(), 0x0800, ipv4("10.32.0.1")))
	want("by the TAP", slow, 0, 0)
	b.must(b.Neighbours.Put(AddrOf(leftAddr()), Neighbour{N: 2, ID: [MaxSharing]uint16{left, 6}}))
	b.run("scene_vxlan_in", fromVXLAN(leftAddr(), 6, self, 9), frame)
	want("of two behind one address", left, 3, 0)
	want("of two behind one address", 6, 0, 1)
}
