package bpf

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
)

func arpRequest(sender MAC, src, target string) []byte {
	a := netip.MustParseAddr(target).As4()
	return append(append(arp(sender, src), make([]byte, 6)...), a[:]...)
}

func TestARP(t *testing.T) {
	b := newBench(t)
	holder := func(addr string, mac MAC) {
		b.must(b.Addresses.Put(AddrOf(netip.MustParseAddr(addr)), mac))
	}
	holder("10.32.0.1", localMAC())
	holder("10.32.0.4", remoteMAC())
	holder("10.32.1.4", foreignMAC())
	holder("10.32.0.99", unknownMAC())
	ask := func(dst MAC, src, target string) []byte {
		return ethernet(dst, localMAC(), 0x0806, arpRequest(localMAC(), src, target))
	}
	request := ask(broadcast(), "10.32.0.1", "10.32.0.4")
	var none sceneScene
	b.want("while rules may be about it", b.run("scene_port_in", none, request), verdictPass)
	b.allow(FeatureARP)
	b.want("while rules are about packets", b.run("scene_port_in", none, request), verdictRedirect, "arp_answered")
	stillThere := ask(remoteMAC(), "10.32.0.1", "10.32.0.4") // only the one asked can tell
	b.want("unicast by the bridge", b.run("scene_port_in", none, stillThere), verdictPass)

	b.withShortcut()
	b.want("for a known address", b.run("scene_port_in", none, request), verdictRedirect, "arp_answered")
	_, answer, err := b.scene.Programs["scene_port_in"].Test(request)
	b.must(err)
	want := arp(remoteMAC(), "10.32.0.4")
	want[7] = 2 // a reply
	mine := localMAC()
	want = append(append(want, mine[:]...), 10, 32, 0, 1)
	if want = ethernet(localMAC(), remoteMAC(), 0x0806, want); !bytes.Equal(answer, want) {
		t.Errorf("answer\n% x, want\n% x", answer, want)
	}
	reply := append([]byte{}, request...)
	reply[14+7] = 2
	odd := append([]byte{}, request...)
	odd[14+4] = 8
	for what, frame := range map[string][]byte{
		"probe for a duplicate":      ask(broadcast(), "0.0.0.0", "10.32.0.4"),
		"announcement":               ask(broadcast(), "10.32.0.1", "10.32.0.1"),
		"for nobody's address":       ask(broadcast(), "10.32.0.1", "10.32.0.5"),
		"for one of no endpoint":     ask(broadcast(), "10.32.0.1", "10.32.0.99"),
		"for one of another subnet":  ask(broadcast(), "10.32.0.1", "10.32.1.4"),
		"reply":                      reply,
		"for other kinds of address": odd,
	} {
		b.want(what, b.run("scene_port_in", none, frame), verdictPass)
	}
	b.want("unicast", b.run("scene_port_in", none, stillThere), verdictRedirect, "shortcut", "tx")
	spoofed := ethernet(broadcast(), localMAC(), 0x0806, arpRequest(localMAC(), "10.32.0.7", "10.32.0.4"))
	b.want("in another's name", b.run("scene_port_in", none, spoofed), verdictDrop, "dropped_spoofed")
	b.must(b.Hops.Delete(beyond))
	b.want("for one that cannot be reached", b.run("scene_port_in", none, request), verdictPass)
}

// A storm of flooded frames is cut down, each kind by itself, and what is known
// where to go is not.
func TestFloodLimit(t *testing.T) {
	b := newBench(t)
	repeat := func(dst MAC, storm int) (passed, dropped uint64, took time.Duration) {
		frame := ethernet(dst, localMAC(), 0x0800, ipv4("10.32.0.1"))
		b.before = b.counters()
		begin := time.Now()
		_, err := b.scene.Programs["scene_vxlan_out"].Run(&ebpf.RunOptions{Data: frame, Repeat: uint32(storm)})
		b.must(err)
		got := b.counted()
		return got["flooded"] + got["tx"], got["dropped_flood_limit"], time.Since(begin)
	}
	for _, c := range []struct {
		name        string
		dst         MAC
		storm       int
		rate, burst uint64
	}{
		{"unknown unicast", unknownMAC(), 2000, 1000, 200},
		{"broadcast", broadcast(), 20000, 10000, 2000},
		{"multicast", MAC{1, 0, 0x5e, 1, 2, 3}, 60000, 50000, 10000},
	} {
		passed, dropped, took := repeat(c.dst, c.storm)
		most := c.burst + uint64(took.Seconds()*float64(c.rate)) + 1
		if passed < c.burst || passed > most || passed+dropped != uint64(c.storm) {
			t.Errorf("%s: of %d frames in %s %d passed and %d were dropped, want %d to %d", c.name, c.storm, took, passed, dropped, c.burst, most)
		}
	}
	if passed, _, _ := repeat(remoteMAC(), 20000); passed != 20000 {
		t.Errorf("of 20000 frames to an endpoint %d passed", passed)
	}
}
