package plugin

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// How long the engine takes to start with networks and containers of ours, in
// each state the plugin can be in. The containers run in the end. It takes
// minutes: the engine waits for a driver that is not there.
func TestEngineStart(t *testing.T) {
	if os.Getenv("TEST_SLOW") == "" {
		t.Skip("takes minutes: set TEST_SLOW=1 to run it")
	}
	h, run := engineHost(t)
	restart := func(between func()) time.Duration {
		t.Helper()
		if err := h.StopDocker(t.Context()); err != nil {
			t.Fatal(err)
		}
		between()
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
	bare := restart(func() {})
	run("rm", "-f", "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9")
	path := filepath.Join(t.TempDir(), "weave.db")
	p := startHelper(t, h, path)
	for i := range 19 {
		run("network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", fmt.Sprintf("10.60.%d.0/24", i), fmt.Sprintf("n%d", i))
	}
	fill("weave")
	up := restart(func() {})
	t.Logf("engine start: without weave %v, plugin up %v", bare, up)
	if up > bare+time.Second {
		t.Errorf("with the plugin up the engine starts in %v, without it in %v", up, bare)
	}
	comeBack := func() {
		t.Helper()
		began := time.Now()
		err := lab.Wait(t.Context(), 60*time.Second, func() error {
			if n := len(strings.Fields(run("ps", "-q"))); n != 10 {
				return fmt.Errorf("%d containers run, want 10", n)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		t.Logf("all containers run %v after the plugin is ready", time.Since(began))
	}
	comeBack()
	p.kill(t)
	t.Logf("engine start, plugin killed, socket left: %v", restart(func() {}))
	p = startHelper(t, h, path)
	comeBack()
	_ = p.in.Close()
	_ = p.cmd.Wait()
	t.Logf("engine start, plugin stopped: %v", restart(func() {}))
	startHelper(t, h, path)
	comeBack()
}
