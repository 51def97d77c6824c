package bpf

import (
	"testing"

	"golang.org/x/sys/unix"
)

func virtualMAC() MAC { return MAC{0, 0, 0x5e, 0, 1, 7} } // of a virtual router (RFC 5798 §7.3)

// anySource makes the port one that may send from any address.
func (b *bench) anySource() {
	b.t.Helper()
	ports, err := b.Ports.All()
	p := ports[1]
	p.AnySource = true
	b.must(err, b.Ports.Put(1, p))
}

// age makes the entry of a foreign MAC older by some seconds.
func (b *bench) age(m MAC, seconds uint64) {
	b.t.Helper()
	k, v := weaveMac{B: m}, weaveLearnt{}
	b.must(b.objs.Learnts.Lookup(&k, &v))
	v.Seen -= seconds * 1e9
	b.must(b.objs.Learnts.Put(&k, &v))
}

func TestForeignOut(t *testing.T) {
	b := newBench(t)
	var none sceneScene
	frame := func(dst, src MAC) []byte { return ethernet(dst, src, 0x0800, ipv4("10.32.0.77")) }
	in := func(what string, f []byte, verdict uint32, counted ...string) {
		t.Helper()
		b.want(what, b.run("scene_port_in", none, f), verdict, counted...)
	}
	in("without permission", frame(broadcast(), virtualMAC()), verdictDrop, "dropped_spoofed")
	b.anySource()
	in("the first", frame(broadcast(), virtualMAC()), verdictPass, "learnt")
	in("the second", frame(broadcast(), virtualMAC()), verdictPass)
	in("announced elsewhere", frame(broadcast(), remoteMAC()), verdictDrop, "dropped_spoofed")
	in("a group", frame(broadcast(), MAC{1, 0, 0x5e, 0, 0, 1}), verdictDrop, "dropped_spoofed")
	in("none", frame(broadcast(), MAC{}), verdictDrop, "dropped_spoofed")
	in("VLAN 0", ethernet(broadcast(), virtualMAC(), 0x8100, []byte{0, 0, 8, 0}, ipv4("10.32.0.1")), verdictDrop, "dropped_spoofed")
	in("to an endpoint", frame(remoteMAC(), virtualMAC()), verdictPass)
	in("to one of another subnet", frame(foreignMAC(), virtualMAC()), verdictDrop, "dropped_isolated")
	in("from itself to that one", frame(foreignMAC(), localMAC()), verdictPass) // is dropped there
	b.withShortcut()
	in("to an endpoint past the bridge", frame(remoteMAC(), virtualMAC()), verdictRedirect, "shortcut", "tx")
	in("to one of another subnet past the bridge", frame(foreignMAC(), virtualMAC()), verdictDrop, "dropped_isolated")

	// What the bridge does not know is behind a port here.
	b.want("back to it", b.run("scene_vxlan_out", none, frame(virtualMAC(), localMAC())), verdictDrop, "dropped_local")
	// To the other containers of this host.
	out := func(what string, verdict uint32, counted ...string) {
		t.Helper()
		b.want(what, outcome{Verdict: b.plain(PortOut, frame(broadcast(), virtualMAC()))}, verdict, counted...)
	}
	out("same subnet", verdictPass)
	b.age(virtualMAC(), 599)
	out("after 599 s", verdictPass)
	b.age(virtualMAC(), 2)
	out("after 601 s", verdictDrop, "dropped_unknown_mac")
	b.want("to it after 601 s", b.run("scene_vxlan_out", none, frame(virtualMAC(), localMAC())), verdictDrop, "flooded", "flooded_unknown", "to_sleeve")
	in("once more", frame(broadcast(), virtualMAC()), verdictPass)
	out("once more", verdictPass)
	ports, err := b.Ports.All()
	p := ports[1]
	p.AnySource = false
	b.must(err, b.Ports.Put(1, p))
	out("when the permission is gone", verdictDrop, "dropped_unknown_mac")
}

func TestForeignIn(t *testing.T) {
	b := newBench(t)
	fromVM := func(dst MAC) []byte { return ethernet(dst, virtualMAC(), 0x0800, ipv4("10.32.0.77")) }
	flooded, direct := fromVXLAN(leftAddr(), beyond, 0, 1), fromVXLAN(leftAddr(), beyond, self, 9)
	in := func(what string, s sceneScene, dst MAC, verdict uint32, counted ...string) {
		t.Helper()
		b.want(what, b.run("scene_vxlan_in", s, fromVM(dst)), verdict, counted...)
	}
	out := func(what string, verdict uint32, counted ...string) {
		t.Helper()
		b.want(what, outcome{Verdict: b.plain(PortOut, fromVM(broadcast()))}, verdict, counted...)
	}
	to := func(what string, dst MAC, verdict uint32, counted ...string) {
		t.Helper()
		var none sceneScene
		b.want(what, b.run("scene_vxlan_out", none, ethernet(dst, localMAC(), 0x0800, ipv4("10.32.0.1"))), verdict, counted...)
	}
	in("from a peer that announced no such port", flooded, broadcast(), verdictPass, "rx_flooded")
	out("from a peer that announced no such port", verdictDrop, "dropped_unknown_mac")

	b.must(b.Foreign.Put(beyond, subnets(t, "10.32.0.0/24", "10.32.9.0/24")))
	in("flooded, not by the parent", fromVXLAN(rightAddr(), beyond, 0, 9), broadcast(), verdictDrop, "dropped_reverse_path")
	out("flooded, not by the parent", verdictDrop, "dropped_unknown_mac")
	in("flooded", flooded, broadcast(), verdictPass, "learnt", "rx_flooded")
	out("flooded", verdictPass)
	in("unicast", direct, localMAC(), verdictPass, "rx")
	to("an answer", virtualMAC(), verdictPass, "tx")

	b.withShortcut()
	in("unicast past the bridge", direct, localMAC(), verdictRedirect, "rx", "shortcut")
	b.must(b.Foreign.Put(beyond, subnets(t, "10.32.9.0/24")))
	in("of another subnet past the bridge", direct, localMAC(), verdictDrop, "rx", "dropped_isolated")
	out("of another subnet", verdictDrop, "dropped_isolated")

	// It moves to another peer, and from there to a port here.
	b.must(b.Foreign.Put(slow, subnets(t, "10.32.0.0/24")))
	b.want("moved", b.run("scene_tap_in", fromTAP(slow, 0, 1), fromVM(broadcast())), verdictRedirect, "from_sleeve", "learnt", "rx_flooded")
	out("moved", verdictPass)
	to("moved", virtualMAC(), verdictRedirect, "to_sleeve", "tx")
	b.anySource()
	b.want("moved here", b.run("scene_port_in", sceneScene{}, fromVM(broadcast())), verdictPass, "learnt")
	to("moved here", virtualMAC(), verdictDrop, "dropped_local")
	in("moved away again", flooded, broadcast(), verdictPass, "learnt", "rx_flooded")
	to("moved away again", virtualMAC(), verdictPass, "tx")

	// An announcement goes before all that was learnt.
	b.must(b.Endpoints.Put(virtualMAC(), Endpoint{Peer: slow, Subnets: subnets(t, "10.32.0.0/24")}))
	in("announced", flooded, broadcast(), verdictPass, "rx_flooded")
	to("announced", virtualMAC(), verdictRedirect, "to_sleeve", "tx")
	b.must(b.Endpoints.Delete(virtualMAC()), b.Foreign.Delete(beyond))
	to("at a peer that has no such port any more", virtualMAC(), verdictDrop, "flooded", "flooded_unknown", "to_sleeve")
}

// A foreign address behind another port of this host is reached past the bridge
// like an endpoint.
func TestForeignHere(t *testing.T) {
	b := newBench(t)
	b.withShortcut()
	other := uint32(b.tap.Index)
	put := func(p Port) {
		b.must(b.Ports.Put(other, p),
			b.objs.Learnts.Put(&weaveMac{B: virtualMAC()}, &weaveLearnt{Ifindex: other, Seen: now(t)}))
	}
	frame := ethernet(virtualMAC(), localMAC(), 0x0800, ipv4("10.32.0.1"))
	fromLeft := ethernet(virtualMAC(), remoteMAC(), 0x0800, ipv4("10.32.0.4"))
	for _, c := range []struct {
		name    string
		port    Port
		verdict uint32
		counted []string
	}{
		{"same subnet", Port{Veth: true, AnySource: true, Subnets: subnets(t, "10.32.0.0/24")}, verdictRedirect, []string{"shortcut"}},
		{"other subnet", Port{Veth: true, AnySource: true, Subnets: subnets(t, "10.32.9.0/24")}, verdictDrop, []string{"dropped_isolated"}},
		{"not a veth", Port{AnySource: true, Subnets: subnets(t, "10.32.0.0/24")}, verdictPass, nil},
		{"not allowed", Port{Veth: true, Subnets: subnets(t, "10.32.0.0/24")}, verdictPass, nil},
	} {
		put(c.port)
		b.want(c.name, b.run("scene_port_in", sceneScene{}, frame), c.verdict, c.counted...)
		b.want(c.name+" from elsewhere", b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, self, 9), fromLeft), c.verdict, append(c.counted, "rx")...)
	}
}

// now is the time as programs read it.
func now(t *testing.T) uint64 {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		t.Fatal(err)
	}
	return uint64(ts.Nano())
}

// The clock by which entries age is the one that the programs read.
func TestLearntClock(t *testing.T) {
	b := newBench(t)
	b.anySource()
	b.run("scene_port_in", sceneScene{}, ethernet(broadcast(), virtualMAC(), 0x0800, ipv4("10.32.0.77")))
	k, v := weaveMac{B: virtualMAC()}, weaveLearnt{}
	b.must(b.objs.Learnts.Lookup(&k, &v))
	if age := int64(now(t) - v.Seen); age < 0 || age > 10e9 || v.Peer != 0 || v.Ifindex != 1 {
		t.Errorf("%+v, seen %d ns ago", v, age)
	}
}
