package tests

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// Gaps in traffic that are allowed.
const (
	fallbackBar = 5 * time.Second        // the fast path is blocked, until the other carries
	smooth      = 400 * time.Millisecond // nothing happens to the path: the noise of a busy machine
)

// testBlockedPort: the fast path to u3 is blocked; the userspace path carries
// until it is free again.
func testBlockedPort(t *testing.T, l *lab.Lab, cs []*container) {
	u1, u3 := l.Host("u1"), l.Host("u3")
	flows := []*flow{startFlow(t, cs[0], cs[2]), startFlow(t, cs[2], cs[1])}
	untouched := startFlow(t, cs[0], cs[1])
	begin := time.Now()
	if err := u3.BlockUDP(t.Context(), vxlanPort); err != nil {
		t.Fatal(err)
	}
	within(t, fallbackBar, "u3 on sleeve", func() error { return on(t.Context(), u3, 2, "sleeve") })
	for _, h := range l.Hosts {
		cs, err := connections(t.Context(), h)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range cs {
			want := "fastdp"
			if h == u3 || c.nick == "u3" {
				want = "sleeve"
			}
			if c.path != want {
				t.Errorf("%s: %q, want %s", h.Name, c.line, want)
			}
			if reason := strings.Contains(c.attrs, "reason="); reason != (want == "sleeve") {
				t.Errorf("%s: %q: with a reason: %t", h.Name, c.line, reason)
			}
		}
	}
	t.Logf("on sleeve after %s", time.Since(begin).Round(time.Millisecond))
	holds(t, flows, begin, time.Second, fallbackBar)
	holds(t, append(flows, untouched), time.Now(), time.Second, smooth)
	holds(t, []*flow{untouched}, begin, 0, smooth)
	for _, size := range []int{1400, 9000} {
		if err := cs[0].reaches(t.Context(), cs[2].addr.Addr(), size); err != nil {
			t.Errorf("%d bytes by sleeve: %v", size, err)
		}
	}
	if err := exchange(t.Context(), cs[0], cs[2], 10<<20); err != nil {
		t.Errorf("10 MB by sleeve: %v", err)
	}

	begin = time.Now()
	if err := u3.UnblockUDP(t.Context(), vxlanPort); err != nil {
		t.Fatal(err)
	}
	within(t, patience, "u3 on fastdp", func() error { return on(t.Context(), u3, 2, "fastdp") })
	within(t, patience, "u1 on fastdp", func() error { return on(t.Context(), u1, 2, "fastdp") })
	t.Logf("on fastdp after %s", time.Since(begin).Round(time.Millisecond))
	holds(t, append(flows, untouched), begin, time.Second, smooth)
}

// testCut: u2 and u3 do not reach each other; u1 relays.
func testCut(t *testing.T, l *lab.Lab, cs []*container) {
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	flows := []*flow{startFlow(t, cs[1], cs[2]), startFlow(t, cs[2], cs[1])}
	untouched := startFlow(t, cs[0], cs[1])
	begin := time.Now()
	if err := l.Cut(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	within(t, fallbackBar, "relayed", func() error {
		for _, f := range flows {
			if len(f.since(begin.Add(time.Second))) == 0 {
				return fmt.Errorf("flow %s: no answer", f.name)
			}
		}
		return nil
	})
	for _, h := range []*lab.Host{u2, u3} {
		within(t, patience, "one connection left", func() error { return on(t.Context(), h, 1, "fastdp") })
	}
	if err := on(t.Context(), u1, 2, "fastdp"); err != nil {
		t.Error(err)
	}
	holds(t, flows, begin, 0, fallbackBar)
	holds(t, append(flows, untouched), time.Now(), time.Second, smooth)
	if err := exchange(t.Context(), cs[1], cs[2], 10<<20); err != nil {
		t.Errorf("10 MB through u1: %v", err)
	}
	testBroadcast(t, []*container{cs[1], cs[2], cs[0]})

	begin = time.Now()
	if err := l.Heal(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	// The next attempt may be a while away; "connect" makes it at once.
	weave(t, u2, "connect", "u3")
	established(t, l, patience)
	t.Logf("direct again after %s", time.Since(begin).Round(time.Millisecond))
	holds(t, append(flows, untouched), begin, time.Second, smooth)
	allReach(t, cs...)
}

// testKilled: a daemon dies by SIGKILL and another one takes over.
func testKilled(t *testing.T, l *lab.Lab, cs []*container) {
	u1 := l.Host("u1")
	exposed := weave(t, u1, "expose")
	flows := []*flow{startFlow(t, cs[0], cs[2]), startFlow(t, cs[1], cs[0]), startFlow(t, cs[1], cs[2])}
	programs := programsOf(t, u1)
	name, ps, targets := weave(t, u1, "report", "-f", "{{.Router.Name}}"), weave(t, u1, "ps"), weave(t, u1, "status", "targets")

	ends := waitFor(t, u1)
	begin := time.Now()
	must(t, u1, "kill", "-9", daemonPID(t, u1))
	within(t, patience, "others notice", func() error { return on(t.Context(), l.Host("u3"), 1, "fastdp") })
	holds(t, flows, begin, 5*time.Second, smooth)
	refused(t, u1, 1, []string{"not running", "a stand-in refuses"}, "weave", "status")

	begin = time.Now()
	again, took := launch(t, u1)
	if took > readyBar {
		t.Errorf("launch took %s, want at most %s", took, readyBar)
	}
	established(t, l, meshBar)
	holds(t, flows, begin, 2*time.Second, smooth)
	ends()
	if got := weave(t, u1, "ps"); again != name || got != ps {
		t.Errorf("before: %s\n%s\nafter: %s\n%s", name, ps, again, got)
	}
	if got := weave(t, u1, "status", "targets"); !slices.Equal(sorted(strings.Fields(got)), sorted(strings.Fields(targets))) {
		t.Errorf("targets before: %q, after: %q", targets, got)
	}
	if got := programsOf(t, u1); !slices.Equal(got, programs) {
		t.Errorf("programs in the kernel before: %q, after: %q", programs, got)
	}
	taken := map[string]string{exposed + "/12": "the host"}
	for _, c := range cs {
		taken[c.addr.String()] = c.name
		if got := c.addresses(t, "ethwe0"); len(got) != 1 || got[0] != c.addr {
			t.Errorf("%s has %v, before %s", c.name, got, c.addr)
		}
	}
	// Two new ones on each host: whatever is taken is known.
	var fresh []*container
	for _, h := range l.Hosts {
		for i := range 2 {
			c := run(t, h, "", "ethwe0", fmt.Sprintf("n%d%s", i, h.Name), "--net=weave")
			if other := taken[c.addr.String()]; other != "" {
				t.Errorf("%s got %s, which %s has", c.name, c.addr, other)
			}
			taken[c.addr.String()] = c.name
			fresh = append(fresh, c)
		}
	}
	allReach(t, fresh[0], fresh[5], cs[0], cs[1])
	for _, c := range fresh {
		must(t, c.Host, "docker", "rm", "-f", c.name)
	}
	if got := weave(t, u1, "hide"); got != exposed {
		t.Errorf("hide printed %q, want %s", got, exposed)
	}
}

// programsOf lists the eBPF programs that run on a host's devices.
func programsOf(t *testing.T, h *lab.Host) []string {
	t.Helper()
	return slices.DeleteFunc(state(t, h), func(line string) bool { return !strings.HasPrefix(line, "bpf: ") })
}

// testStopped: a daemon that is stopped leaves the kernel's part of the
// traffic alone.
func testStopped(t *testing.T, l *lab.Lab, cs []*container) {
	u2 := l.Host("u2")
	flows := []*flow{startFlow(t, cs[1], cs[2]), startFlow(t, cs[0], cs[1])}
	name := weave(t, u2, "report", "-f", "{{.Router.Name}}")
	stopped, launched := waitFor(t, u2), waitFor(t, u2)
	begin := time.Now()
	weave(t, u2, "stop")
	holds(t, flows, begin, 5*time.Second, smooth)
	refused(t, u2, 1, []string{"not running", "a stand-in refuses"}, "weave", "status")
	for _, file := range []string{"/run/weave/control.sock", "/run/weave/weave.sock"} {
		if u2.Run(t.Context(), "test", "-e", file).Code == 0 {
			t.Errorf("%s stays after stop", file)
		}
	}
	asked := time.Now()
	r := u2.Docker(t.Context(), "run", "--rm", "--net=weave", "busybox", "true")
	if took := time.Since(asked); r.Code == 0 || !strings.Contains(r.Stderr, "weave is not running on this host: start it") || took > 10*time.Second {
		t.Errorf("a container while weave is stopped: exit %d after %s, %s", r.Code, took, r.Stderr)
	}
	if r := u2.Run(t.Context(), "weave", "stop"); r.Code != 0 || !strings.Contains(r.Stderr, "not running") {
		t.Errorf("stop once more: exit %d, said %q", r.Code, r.Stderr)
	}
	stopped()
	begin = time.Now()
	if again, _ := launch(t, u2); again != name {
		t.Errorf("peer %s before, %s after", name, again)
	}
	established(t, l, meshBar)
	holds(t, flows, begin, time.Second, smooth)
	launched()
}

// waitFor asks, by way of the proxy, for the end of a container, as Nomad does of
// each task. What it returns ends the container and checks the answer.
func waitFor(t *testing.T, h *lab.Host) (ends func()) {
	t.Helper()
	container := must(t, h, "docker", "run", "-d", "--net=none", "busybox", "sleep", "3600")
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", h.Path("/run/weave/weave.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := fmt.Fprintf(conn, "POST /containers/%s/wait HTTP/1.1\r\nHost: docker\r\n\r\n", container); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil) // its head comes at once
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	return func() {
		t.Helper()
		must(t, h, "docker", "kill", container)
		_ = conn.SetDeadline(time.Now().Add(patience))
		said, err := io.ReadAll(resp.Body)
		if err != nil || !strings.Contains(string(said), `"StatusCode":137`) {
			t.Errorf("who waits for a container is told %q, %v", said, err)
		}
		must(t, h, "docker", "rm", container)
	}
}

// testTargets: connect and forget change what is connected to, also over a
// restart.
func testTargets(t *testing.T, l *lab.Lab) {
	u1 := l.Host("u1")
	targets := func(want ...string) {
		t.Helper()
		if got := sorted(strings.Fields(weave(t, u1, "status", "targets"))); !slices.Equal(got, want) {
			t.Errorf("targets %v, want %v", got, want)
		}
	}
	restart := func() {
		t.Helper()
		weave(t, u1, "stop")
		launch(t, u1)
	}
	targets("u2", "u3")
	weave(t, u1, "forget", "u3")
	targets("u2")
	if err := on(t.Context(), u1, 2, "fastdp"); err != nil {
		t.Errorf("forget drops no connection: %v", err)
	}
	restart()
	targets("u2")
	established(t, l, patience)
	weave(t, u1, "connect", "192.0.2.3")
	targets("192.0.2.3", "u2")
	restart()
	targets("192.0.2.3", "u2")
	weave(t, u1, "connect", "--replace", "u3")
	targets("u3")
	refused(t, u1, 1, []string{"no-such-host"}, "weave", "connect", "no-such-host", "u2")
	targets("u2", "u3")
	restart()
	targets("u2", "u3")
	established(t, l, patience)
}

// lives checks that a container runs that has been started n times at least,
// that each of its first processes found its address, and that it reaches
// another and is reached.
func lives(t *testing.T, h *lab.Host, name string, n int, other *container) {
	t.Helper()
	within(t, time.Minute, name, func() error {
		said := must(t, h, "docker", "logs", name)
		if starts := strings.Count(said, ": lo "); starts < n || strings.Count(said, ": ethwe0 ") != starts {
			return fmt.Errorf("want %d starts with an address each:\n%s", n, said)
		}
		addr, err := netip.ParseAddr(must(t, h, "docker", "inspect", "-f", "{{.NetworkSettings.Networks.weave.IPAddress}}", name))
		if err != nil {
			return fmt.Errorf("no address: %w", err)
		}
		c := &container{Host: h, name: name}
		if err := c.reaches(t.Context(), other.addr.Addr(), 56); err != nil {
			return err
		}
		return other.reaches(t.Context(), addr, 56)
	})
}

// testRestarts: whatever starts again, and in whatever order, a container with a
// restart policy runs again without a command, and its first process finds the
// address.
func testRestarts(t *testing.T, l *lab.Lab, cs []*container) {
	u1, other := l.Host("u1"), cs[1]
	must(t, u1, "docker", "run", "-d", "--name", "ever", "--restart", "always", "--net=weave", "busybox", "sh", "-c", "ip -4 -o addr; exec sleep 3600")
	lives(t, u1, "ever", 1, other)
	must(t, u1, "docker", "restart", "-t", "0", "ever")
	lives(t, u1, "ever", 2, other)
	pid, err := u1.ContainerPID(t.Context(), "ever")
	if err != nil {
		t.Fatal(err)
	}
	must(t, u1, "kill", "-9", strconv.Itoa(pid))
	lives(t, u1, "ever", 3, other)

	// The daemon goes and comes while the container starts. That may fail, in
	// the client's hands.
	for i := range 2 {
		must(t, u1, "sh", "-c", "docker restart -t 0 ever >/dev/null 2>&1 & weave stop >/dev/null 2>&1; weave launch >/dev/null; wait")
		lives(t, u1, "ever", 4+i, other)
	}

	reboot := func() {
		t.Helper()
		if err := u1.Reboot(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	docker := func() {
		t.Helper()
		if err := u1.StartDocker(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	reboot()
	begin := time.Now()
	docker()
	t.Logf("Docker first: it is there after %s", time.Since(begin).Round(time.Millisecond))
	if said := must(t, u1, "docker", "inspect", "-f", "{{.State.Status}}: {{.State.Error}}", "ever"); !strings.Contains(said, "weave is not running on this host") {
		t.Errorf("Docker first: the container is %s", said)
	}
	launch(t, u1)
	lives(t, u1, "ever", 6, other)

	reboot()
	launch(t, u1)
	docker()
	lives(t, u1, "ever", 7, other)
	// Nothing is kept of what ended with the host.
	within(t, 2*time.Minute, "leftovers", func() error {
		if ps := weave(t, u1, "ps"); strings.Count(ps, "\n") != 1 {
			return fmt.Errorf("want the host and one container:\n%s", ps)
		}
		return nil
	})
	established(t, l, patience)
}
