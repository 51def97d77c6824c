package bpf

import (
	"testing"
	"time"

	"weave.local/ipam/uptime"
)

// When the lease is over, nothing goes from ports here to other peers nor comes
// from there to them, by no way; what is relayed goes on.
func TestLease(t *testing.T) {
	b := newBench(t)
	const ipv4Type = 0x0800
	out := ethernet(remoteMAC(), localMAC(), ipv4Type, ipv4("10.32.0.1"))
	in := ethernet(localMAC(), remoteMAC(), ipv4Type, ipv4("10.32.0.4"))
	to := func(until time.Duration, features uint32) {
		c, err := b.Config()
		c.LeaseUntil, c.Features = until, features
		b.must(err, b.SetConfig(c))
	}
	plain := b.Features()
	cut := func(what string, wanted bool) {
		t.Helper()
		to(map[bool]time.Duration{true: uptime.Now() - 1, false: uptime.Now() + time.Hour}[wanted], plain)
		o := b.run("scene_vxlan_out", sceneScene{}, out)
		if dropped := b.counted()["dropped_lease"] == 1 && o.Verdict == verdictDrop; dropped != wanted {
			t.Errorf("%s, sent by the bridge: %+v, %v", what, o, b.counted())
		}
		o = b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, self, 5), in)
		if dropped := b.counted()["dropped_lease"] == 1 && o.Verdict == verdictDrop; dropped != wanted {
			t.Errorf("%s, received: %+v, %v", what, o, b.counted())
		}
		o = b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, 0, 5), ethernet(broadcast(), remoteMAC(), ipv4Type, ipv4("10.32.0.4")))
		if got := b.counted(); (got["dropped_lease"] == 1) != wanted || got["rx_flooded"] != 1 {
			t.Errorf("%s, received flooded: %+v, %v", what, o, got)
		}
		b.run("scene_vxlan_in", fromVXLAN(leftAddr(), beyond, right, 5), in)
		if got := b.counted(); got["relayed"] != 1 || got["dropped_lease"] != 0 {
			t.Errorf("%s, relayed: %v", what, got)
		}
		to(map[bool]time.Duration{true: 1, false: 0}[wanted], plain|FeatureShortcut)
		verdict := b.plain(PortIn, out)
		if got := b.counted(); (got["dropped_lease"] == 1 && verdict == verdictDrop) != wanted {
			t.Errorf("%s, past the bridge: %d, %v", what, verdict, got)
		}
	}
	cut("before the end", false)
	cut("after it", true)
	cut("after another renewal", false)
}
