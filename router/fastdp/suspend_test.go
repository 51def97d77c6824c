package fastdp

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/router/overlay"
)

// What goes wrong with the direct way costs that way only, is said once, and is
// tried again.
func TestDirectFails(t *testing.T) {
	l, a1, b1 := directPair(t)
	a := l[0]
	before, err := a.dp.objs.Config()
	if err != nil {
		t.Fatal(err)
	}
	process := l.spawn(0, []overlay.Port{a1.port}, l.forwarding(0, nil)) // runs it as a daemon does
	pins := filepath.Join(a.cfg.PinDir, "links")
	isDirect := func() bool {
		return a.grows("direct_tx", func() {
			if !a1.reaches(b1.addr(), 100) {
				t.Error("nothing passes")
			}
		})
	}
	said := func(what string) int {
		text, err := os.ReadFile(a.logFile())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(text), what)
	}
	wait(t, "the process to watch", func() bool {
		c, err := a.dp.objs.Config()
		return err == nil && c.DirectUntil != before.DirectUntil
	})
	wait(t, "the direct way to be used", isDirect)
	// The programs' pins cannot be listed any more.
	if err := os.Rename(pins, pins+"-away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(a.pinned("config"), pins); err != nil {
		t.Fatal(err)
	}
	a.ip("route add 203.0.113.0/24 dev to2") // an event
	wait(t, "the VXLAN device to be used", func() bool { return !isDirect() })
	const tries = 5
	<-time.After(tries * shortRetry)
	if n, all := said("list pinned links"), said("level=WARN"); n != 1 || all != 1 {
		t.Errorf("said %d times, among %d warnings", n, all)
	}
	if err := os.Remove(pins); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(pins+"-away", pins); err != nil {
		t.Fatal(err)
	}
	wait(t, "the direct way to be used again", isDirect)
	if process.Process.Signal(unix.Signal(0)) != nil {
		t.Error("the process has ended")
	}
}

// pinned is the path of a pinned map.
func (h *host) pinned(name string) string {
	h.t.Helper()
	found, err := filepath.Glob(filepath.Join(h.cfg.PinDir, "maps-*", name))
	if err != nil || len(found) != 1 {
		h.t.Fatalf("pinned maps of name %s: %v %v", name, found, err)
	}
	return found[0]
}

// A joiner that cannot be made costs TCP packets only; it is made once.
func TestJoinerFails(t *testing.T) {
	l, a1, b1 := directPair(t)
	a := l[0]
	var log strings.Builder
	a.dp.log = slog.New(slog.NewTextHandler(&log, nil))
	for _, h := range l { // so that packets have to be joined
		for _, dev := range []string{"to1", "to2"} {
			_, _ = h.output("ethtool -K " + dev + " tso off gso off gro off")
		}
	}
	a.ip("link add " + joinerIn + " type bridge")
	for range 2 {
		a.refresh()
		if !a.grows("direct_rx", func() { a1.reaches(b1.addr(), 100) }) {
			t.Error("UDP is not direct")
		}
		if a.grows("direct_rx", func() { b1.sameBytes(a1, 1<<20) }) && a.dp.config.Join == 0 {
			t.Error("TCP is direct though nothing joins its packets")
		}
	}
	if n := strings.Count(log.String(), "packets of TCP"); n != 1 {
		t.Errorf("said %d times: %s", n, log.String())
	}
	a.ip("link del " + joinerIn)
	a.refresh()
	if a.dp.config.Join == 0 {
		t.Error("packets are not joined though they could be")
	}
	if was := a.dp.config.Join; was != 0 {
		a.refresh()
		if a.dp.config.Join != was {
			t.Error("the joiner was made anew without need")
		}
	}
}
