package plugin

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"weave.local/plugin/standin"
	"weave.local/tests/lab"
)

// startEnv is how many networks and containers TestEngineStart has, such as
// 50/20. slowEnv makes it also try a socket that nobody serves, for which the
// engine waits 15 s with each call.
const (
	startEnv = "TEST_ENGINE_START"
	slowEnv  = "TEST_SLOW"
)

// away is a test of an engine without a driver.
type away struct {
	h          *lab.Host
	run        func(...string) string
	containers int
	bare       time.Duration // what the engine's start takes without us, on its default network
}

// How long the engine takes to start with networks and containers of ours, and
// for calls that need the driver, while the plugin is there and however it ended.
// The containers run in the end without a command, and each time they started
// their first process had its address.
func TestEngineStart(t *testing.T) {
	networks, containers := 10, 5
	if s := os.Getenv(startEnv); s != "" {
		if _, err := fmt.Sscanf(s, "%d/%d", &networks, &containers); err != nil {
			t.Fatal(err)
		}
	}
	h, run := engineHost(t)
	a := &away{h: h, run: run, containers: containers}
	// Without weave: on Docker's default network, and on one as ours are, where
	// Docker also starts itself once more in each container for its name server.
	run("network", "create", "own")
	for _, network := range []string{"own", "bridge"} {
		a.fill(network)
		a.bare = a.restart(t)
		t.Logf("%d containers on Docker's network %s: the engine starts in %v", containers, network, a.bare)
		run(append([]string{"rm", "-f"}, strings.Fields(run("ps", "-aq"))...)...)
	}
	run("network", "rm", "own")
	state := filepath.Join(t.TempDir(), "weave.db")
	p := startHelper(t, h, state)
	t.Logf("%d networks of ours", networks)
	for i := range networks - 1 {
		run("network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", fmt.Sprintf("10.60.%d.0/24", i), fmt.Sprintf("n%d", i))
	}
	a.fill("weave")
	a.atOnce(t, "up", a.restart(t))
	a.allRun(t)

	for _, c := range []struct {
		how   string
		begin func()
		alone bool // nobody stands in: the engine must start to notice
		slow  bool
	}{
		{"stopped", func() { p.end(t) }, false, false},
		{"killed", func() { p.kill(t) }, false, false},
		{"not started yet", func() { p.end(t); a.endStandIn(t, "-TERM") }, true, false},
		{"killed with its stand-in", func() { p.kill(t); a.endStandIn(t, "-KILL") }, false, true},
	} {
		if c.slow && os.Getenv(slowEnv) == "" {
			continue
		}
		c.begin()
		if !c.alone {
			a.calls(t, c.how)
		}
		took := a.restart(t)
		if c.slow {
			t.Logf("%s: the engine starts in %v", c.how, took)
		} else {
			a.atOnce(t, c.how, took)
			said := run("inspect", "-f", "{{.State.Running}} {{.State.Error}}", "c1")
			if !strings.Contains(said, "false") || !strings.Contains(said, standin.Refusal) {
				t.Errorf("%s: c1: %s", c.how, said)
			}
		}
		p = startHelper(t, h, state)
		a.allRun(t)
	}
	run("restart", "-t", "0", "c0")
	pid, err := h.ContainerPID(t.Context(), "c1")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Run(t.Context(), "kill", "-9", strconv.Itoa(pid)).Err(); err != nil {
		t.Fatal(err)
	}
	a.addressesFirst(t)
}

func (a *away) fill(network string) {
	for i := range a.containers {
		a.run("run", "-d", "--name", fmt.Sprintf("c%d", i), "--restart", "always", "--stop-signal", "KILL", "--net", network, "busybox", "sh", "-c", "ip -4 -o addr; exec sleep 6000")
	}
}

// restart returns the time from the engine's start to its first answer.
func (a *away) restart(t *testing.T) time.Duration {
	t.Helper()
	if err := a.h.StopDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := a.h.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	return time.Since(began).Round(time.Millisecond)
}

// atOnce bounds the time of a start. It would be a second more than without
// weave on a machine that does nothing else; a driver that lets the engine wait
// costs it fifteen.
func (a *away) atOnce(t *testing.T, how string, took time.Duration) {
	t.Helper()
	t.Logf("%s: the engine starts in %v", how, took)
	if took > 2*a.bare+5*time.Second {
		t.Errorf("%s: the engine starts in %v, without weave in %v", how, took, a.bare)
	}
}

// allRun waits until all containers run and say so.
func (a *away) allRun(t *testing.T) {
	t.Helper()
	err := lab.Wait(t.Context(), 60*time.Second, func() error {
		if n := len(strings.Fields(a.run("ps", "-q"))); n != a.containers {
			return fmt.Errorf("%d containers run, want %d", n, a.containers)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// calls has a running engine need the driver: what can't be done is refused
// with the reason, the rest is done, and nothing waits.
func (a *away) calls(t *testing.T, how string) {
	t.Helper()
	spare := strings.Fields(a.run("network", "ls", "-f", "driver=weave", "-f", "name=^n[0-9]", "--format", "{{.Name}}"))[0]
	for _, c := range []struct {
		args    []string
		refused bool
	}{
		{[]string{"run", "--rm", "--net=weave", "busybox", "true"}, true},
		{[]string{"stop", "-t", "0", "c0"}, false},
		{[]string{"start", "c0"}, true},
		{[]string{"network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.61.0.0/24", "new"}, true},
		{[]string{"network", "rm", spare}, false},
		{[]string{"info"}, false},
	} {
		began := time.Now()
		r := a.h.Docker(t.Context(), c.args...)
		took := time.Since(began).Round(time.Millisecond)
		what := "docker " + strings.Join(c.args, " ")
		t.Logf("%s: %s: exit %d in %v", how, what, r.Code, took)
		if strings.Contains(how, "with its stand-in") {
			continue // it waits, and says what the engine says then
		}
		if took > 10*time.Second {
			t.Errorf("%s: %s took %v", how, what, took)
		}
		if c.refused == (r.Code == 0) || c.refused && !strings.Contains(r.Stderr, standin.Refusal) {
			t.Errorf("%s: %s: exit %d, said %s", how, what, r.Code, r.Stderr)
		}
	}
}

// endStandIn ends the stand-in that serves the socket by a signal.
func (a *away) endStandIn(t *testing.T, signal string) {
	t.Helper()
	const script = `for p in /proc/[0-9]*; do if [ "$(cat $p/comm 2>/dev/null)" = weave-stand-in ]; then basename $p; fi; done`
	pids := func() []string {
		r := a.h.Run(t.Context(), "sh", "-c", script)
		return strings.Fields(r.Stdout)
	}
	list := pids()
	if len(list) != 1 {
		t.Fatalf("stand-ins %v, want one", list)
	}
	if err := a.h.Run(t.Context(), "kill", signal, list[0]).Err(); err != nil {
		t.Fatal(err)
	}
	err := lab.Wait(t.Context(), 10*time.Second, func() error {
		if list = pids(); len(list) > 0 {
			return fmt.Errorf("stand-ins %v", list)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// addressesFirst checks what each first process of the containers saw.
func (a *away) addressesFirst(t *testing.T) {
	t.Helper()
	for i := range a.containers {
		name := fmt.Sprintf("c%d", i)
		err := lab.Wait(t.Context(), 60*time.Second, func() error {
			said := a.run("logs", name)
			// The first start, four of the engine, and one by a command or a
			// restart policy.
			want := 5
			if i < 2 {
				want++
			}
			if n := strings.Count(said, ": lo "); n < want || strings.Count(said, ": ethwe0 ") != n {
				return fmt.Errorf("%s, which started %d times, saw\n%s", name, want, said)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}
