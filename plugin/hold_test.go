package plugin

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// How long the engine takes to start with 20 networks and 10 containers of ours
// while the plugin is there. The containers run in the end.
func TestEngineStart(t *testing.T) {
	h, run := engineHost(t)
	restart := func() time.Duration {
		t.Helper()
		if err := h.StopDocker(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := h.StartDocker(t.Context()); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}
	fill := func(network string) {
		for i := range 10 {
			run("run", "-d", "--name", fmt.Sprintf("c%d", i), "--restart", "always", "--net", network, "busybox", "sleep", "6000")
		}
	}
	fill("bridge")
	bare := restart()
	run("rm", "-f", "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9")
	startHelper(t, h, filepath.Join(t.TempDir(), "weave.db"))
	for i := range 19 {
		run("network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", fmt.Sprintf("10.60.%d.0/24", i), fmt.Sprintf("n%d", i))
	}
	fill("weave")
	up := restart()
	t.Logf("engine start: without weave %v, plugin up %v", bare, up)
	// A second on a machine that does nothing else; a driver that lets the
	// engine wait costs it fifteen.
	if up > 2*bare+5*time.Second {
		t.Errorf("with the plugin up the engine starts in %v, without it in %v", up, bare)
	}
	err := lab.Wait(t.Context(), 60*time.Second, func() error {
		if n := len(strings.Fields(run("ps", "-q"))); n != 10 {
			return fmt.Errorf("%d containers run, want 10", n)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
