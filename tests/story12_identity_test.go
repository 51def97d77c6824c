package tests

import (
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// TestIdentity: another cluster, a name that is taken and a copy of a host's
// state stay outside, each with the reason at both ends; nobody else notices.
func TestIdentity(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3"}})
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	plain := []string{"--docker-api", ""}
	name, _ := launch(t, u1, plain...)
	launch(t, u2, append(plain, "u1")...)
	within(t, patience, "pair", func() error { return on(t.Context(), u1, 1, "fastdp") })
	pair := startFlow(t, exposed(t, u1), exposed(t, u2))
	begin := time.Now()

	step(t, "another cluster", func(t *testing.T) {
		launch(t, u3, plain...)
		weave(t, u3, "expose")
		weave(t, u3, "connect", "u1")
		refusedBy(t, u3, "both have addresses in use")
		refusedBy(t, u1, "both have addresses in use")
		weave(t, u3, "reset")
		launch(t, u3, append(plain, "u1")...)
		established(t, l, patience)
		weave(t, u3, "reset")
	})
	step(t, "name", func(t *testing.T) {
		launch(t, u3, append(plain, "--name", name, "u1", "u2")...)
		refusedBy(t, u3, "--name")
		refusedBy(t, u1, "--name")
		refusedBy(t, u2, "--name")
		weave(t, u3, "reset")
	})
	step(t, "copied state", func(t *testing.T) {
		copied := filepath.Join(t.TempDir(), "weave.db")
		must(t, u2, "cp", "/var/lib/weave/weave.db", copied)
		must(t, u3, "mkdir", "-p", "/var/lib/weave")
		must(t, u3, "cp", copied, "/var/lib/weave/weave.db")
		launch(t, u3, append(plain, "u1")...)
		refusedBy(t, u3, "--name")
		refusedBy(t, u1, "--name")
		weave(t, u3, "stop")
	})
	if err := on(t.Context(), u1, 1, "fastdp"); err != nil {
		t.Errorf("the others were disturbed: %v", err)
	}
	holds(t, []*flow{pair}, begin, time.Second, smooth)
}

// exposed is a host with an address of the network.
func exposed(t *testing.T, h *lab.Host) *container {
	t.Helper()
	c := host(h)
	c.name, c.addr = h.Name, netip.MustParsePrefix(weave(t, h, "expose")+"/12")
	return c
}
