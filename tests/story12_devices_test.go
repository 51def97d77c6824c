package tests

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"weave.local/router/netdev/netdevtest"
	"weave.local/tests/lab"
)

// TestBadDevices: the network device of u1 does not do what is left to it with
// frames in tunnels. TCP passes all the same, and users are told.
func TestBadDevices(t *testing.T) {
	l := build(t, lab.Config{})
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	n := &netdevtest.NIC{Port: vxlanPort}
	err := u1.Interpose(t.Context(), func(host, network string) error {
		stop, err := n.Carry(host, network)
		if err == nil {
			t.Cleanup(stop)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	start := func(h *lab.Host) {
		launch(t, h, append([]string{"--no-dns", "--docker-api="}, others(l, h)...)...)
	}
	n.NoSums.Store(true)
	n.NoSuper.Store(true)
	for _, h := range l.Hosts {
		start(h)
	}
	cs := []*container{runBare(t, u1, "c1"), runBare(t, u2, "c2"), runBare(t, u3, "c3")}
	const relieved, sums, super = "relieved", "checksums inside tunnels", "super-frames inside tunnels"
	// told is what u1 says of its device: once in the log, and of both connections.
	told := func(t *testing.T, fault string, lines int) {
		for _, to := range []*lab.Host{u2, u3} {
			within(t, patience, "reason", func() error { return remarked(t.Context(), u1, to, fault) })
		}
		if said := strings.Count(must(t, u1, "cat", "/var/lib/weave/weave.log"), relieved); said != lines {
			t.Errorf("%d lines about devices, want %d", said, lines)
		}
		for _, c := range cs[1:] {
			if err := exchange(t.Context(), cs[0], c, 4<<20); err != nil {
				t.Errorf("4 MB between %s and %s: %v", cs[0].name, c.name, err)
			}
		}
	}
	step(t, "no checksums", func(t *testing.T) {
		told(t, sums, 1)
		// What the others send to u1 goes by the same device; only that does.
		within(t, patience, "reason", func() error { return remarked(t.Context(), u2, u1, sums) })
		if err := remarked(t.Context(), u2, u3, ""); err != nil {
			t.Error(err)
		}
	})
	n.NoSums.Store(false)
	step(t, "super-frames lost", func(t *testing.T) {
		weave(t, u1, "stop")
		start(u1)
		told(t, super, 1)
	})
	n.NoSuper.Store(false)
	step(t, "mended", func(t *testing.T) {
		weave(t, u1, "stop")
		start(u1)
		told(t, "", 0)
		within(t, patience, "use of what the device can do", func() error {
			if text := must(t, u1, "ethtool", "-k", fmt.Sprintf("vxlan-%d", vxlanPort)); !strings.Contains(text, "tx-checksum-ip-generic: on") {
				return errors.New(text)
			}
			return nil
		})
	})
}

// remarked returns an error unless a host has its connection to another on the
// fast path, with a reason that begins so, or with none.
func remarked(ctx context.Context, h, to *lab.Host, reason string) error {
	cs, err := connections(ctx, h)
	if err != nil {
		return err
	}
	for _, c := range cs {
		if c.nick == to.Name && c.state == "established" && c.path == "fastdp" && strings.Contains(c.attrs, "reason=") == (reason != "") &&
			strings.Contains(c.attrs, reason) {
			return nil
		}
	}
	return fmt.Errorf("%s: connection to %s on fastdp with reason %q: %v", h.Name, to.Name, reason, cs)
}
