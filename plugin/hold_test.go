package plugin

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// How long the engine takes to start with networks and containers of ours while
// the plugin is there, and when it ended as it should. The containers run in
// the end, and each time they started their first process had its address.
func TestEngineStart(t *testing.T) {
	const networks, containers = 20, 10
	h, run := engineHost(t)
	restart := func() time.Duration {
		t.Helper()
		began := time.Now()
		if err := h.StopDocker(t.Context()); err != nil {
			t.Fatal(err)
		}
		stopped := time.Since(began)
		began = time.Now()
		if err := h.StartDocker(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Logf("the engine stopped in %v", stopped.Round(time.Millisecond))
		return time.Since(began)
	}
	fill := func(network string) {
		for i := range containers {
			run("run", "-d", "--name", fmt.Sprintf("c%d", i), "--restart", "always", "--net", network, "busybox", "sh", "-c", "ip -4 -o addr; exec sleep 6000")
		}
	}
	fill("bridge")
	bare := restart()
	run(append([]string{"rm", "-f"}, strings.Fields(run("ps", "-aq"))...)...)
	state := filepath.Join(t.TempDir(), "weave.db")
	p := startHelper(t, h, state)
	for i := range networks - 1 {
		run("network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", fmt.Sprintf("10.60.%d.0/24", i), fmt.Sprintf("n%d", i))
	}
	fill("weave")
	all := func() {
		t.Helper()
		err := lab.Wait(t.Context(), 60*time.Second, func() error {
			if n := len(strings.Fields(run("ps", "-q"))); n != containers {
				return fmt.Errorf("%d containers run, want %d", n, containers)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	// A second on a machine that does nothing else; a driver that lets the
	// engine wait costs it fifteen.
	up := restart()
	if up > 2*bare+5*time.Second {
		t.Errorf("with the plugin up the engine starts in %v, without it in %v", up, bare)
	}
	all()
	if err := h.StopDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.end(t)
	began := time.Now()
	if err := h.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	down := time.Since(began)
	if down > 2*bare+5*time.Second {
		t.Errorf("with the plugin ended the engine starts in %v, without it in %v", down, bare)
	}
	said := run("inspect", "-f", "{{.State.Running}} {{.State.Error}}", "c0")
	if !strings.Contains(said, "false") || !strings.Contains(said, "weave is not running on this host: start it") {
		t.Errorf("c0: %s", said)
	}
	startHelper(t, h, state)
	all()
	run("restart", "-t", "0", "c0")
	pid, err := h.ContainerPID(t.Context(), "c1")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Run(t.Context(), "kill", "-9", strconv.Itoa(pid)).Err(); err != nil {
		t.Fatal(err)
	}
	for i := range containers {
		name, starts := fmt.Sprintf("c%d", i), 3
		if i < 2 {
			starts++
		}
		err := lab.Wait(t.Context(), 60*time.Second, func() error {
			said := run("logs", name)
			if n := strings.Count(said, ": lo "); n < starts || strings.Count(said, ": ethwe0 ") != n {
				return fmt.Errorf("%s, which started %d times, saw\n%s", name, starts, said)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	t.Logf("engine start: without weave %v, plugin up %v, ended %v", bare, up, down)
}
