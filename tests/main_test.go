// Package tests drives the built binary on hosts made of namespaces: one file
// for each part of the story that the program exists for, the parts that
// follow upon each other on the same hosts. It also holds the tests of the
// repository itself.
package tests

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
	"weave.local/tests/setup"
)

// Bars that the program is measured by.
const (
	readyBar = time.Second     // launch to ready
	meshBar  = 3 * time.Second // last launch to all connections established
	rssBar   = 30 << 20        // bytes of memory of an idle daemon with three peers
)

// patience is how long anything may take that has no bar of its own. A test
// that passes does not wait for it.
const patience = 20 * time.Second

// vxlanPort is the UDP port of the fast path.
const vxlanPort = 6784

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) } //nolint:forbidigo // the main of the tests

// buildAndRun builds the program as users do and puts it in the path of all
// hosts.
func buildAndRun(m *testing.M) int {
	if os.Getenv(withoutBPF) != "" {
		fmt.Fprintln(os.Stderr, becomeWithoutBPF(os.Args[1:]))
		return 1
	}
	dir, remove, err := lab.Scratch("weave-built-")
	if err == nil {
		defer func() { _ = remove() }()
		if built := os.Getenv("TEST_BUILT"); built != "" { // where there is no compiler
			dir = built
		} else {
			_, err = setup.Build(context.Background(), dir)
		}
	}
	if err == nil {
		err = os.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// hosts builds three hosts with Docker.
func hosts(t *testing.T) *lab.Lab {
	t.Helper()
	return build(t, lab.Config{Docker: true})
}

func build(t *testing.T, cfg lab.Config) *lab.Lab {
	t.Helper()
	if why := lab.Missing(cfg.Docker); why != "" {
		if os.Getenv("TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	l, err := lab.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			tellOf(t, l)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// tellOf shows what helps to understand a failure.
func tellOf(t *testing.T, l *lab.Lab) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 10*time.Second)
	defer cancel()
	for _, h := range l.Hosts {
		r := h.Run(ctx, "sh", "-c", "weave status; weave status connections; weave status ipam; weave ps; echo; tail -n 40 /var/lib/weave/weave.log.old /var/lib/weave/weave.log")
		t.Logf("---- %s ----\n%s%s", h.Name, r.Stdout, r.Stderr)
	}
}

// step is a subtest on which the following ones stand.
func step(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	if !t.Run(name, f) {
		t.FailNow()
	}
}

// must runs a command on a host and returns what it prints.
func must(t *testing.T, h *lab.Host, args ...string) string {
	t.Helper()
	out, err := h.Output(t.Context(), args...)
	if err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	return out
}

func weave(t *testing.T, h *lab.Host, args ...string) string {
	t.Helper()
	return must(t, h, append([]string{"weave"}, args...)...)
}

// refused runs a command that must fail with an exit code and one line on
// standard error in which all the words stand.
func refused(t *testing.T, h *lab.Host, code int, words []string, args ...string) {
	t.Helper()
	r := h.Run(t.Context(), args...)
	if r.Code != code {
		t.Errorf("%s: exit %d, want %d; said %q", strings.Join(args, " "), r.Code, code, r.Stderr)
	}
	if r.Stdout != "" || strings.Count(r.Stderr, "\n") != 1 {
		t.Errorf("%s: said %q and on stderr %q, want one line there", strings.Join(args, " "), r.Stdout, r.Stderr)
	}
	for _, w := range words {
		if !strings.Contains(r.Stderr, w) {
			t.Errorf("%s: said %q, without %q", strings.Join(args, " "), r.Stderr, w)
		}
	}
}

// within fails the test when check does not succeed in time.
func within(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	if err := lab.Wait(t.Context(), limit, check); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func state(t *testing.T, h *lab.Host) lab.State {
	t.Helper()
	s, err := h.State(t.Context())
	if err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	return s
}

// asBefore waits until a host is again as it was.
func asBefore(t *testing.T, h *lab.Host, before lab.State) {
	t.Helper()
	err := lab.Wait(t.Context(), 5*time.Second, func() error {
		if diff := before.Diff(state(t, h)); len(diff) > 0 {
			return fmt.Errorf("not as before:\n%s", strings.Join(diff, "\n"))
		}
		return nil
	})
	if err != nil {
		t.Errorf("%s: %v", h.Name, err)
	}
}

// peerName is a peer's name as the program writes it.
const peerName = `[0-9a-f]{2}(?::[0-9a-f]{2}){5}`

// launch starts the daemon of a host and returns its peer name and the time it
// took to be ready.
func launch(t *testing.T, h *lab.Host, args ...string) (string, time.Duration) {
	t.Helper()
	begin := time.Now()
	r := h.Run(t.Context(), append([]string{"weave", "launch"}, args...)...)
	took := time.Since(begin)
	if err := r.Err(); err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	if !regexp.MustCompile(`^`+peerName+`\n$`).MatchString(r.Stdout) || r.Stderr != "" {
		t.Errorf("%s: launch printed %q and on stderr %q, want just a peer name", h.Name, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout), took
}

// launchAll launches on every host, naming the others, and waits for the mesh.
func launchAll(t *testing.T, l *lab.Lab, args ...string) {
	t.Helper()
	for _, h := range l.Hosts {
		launch(t, h, slices.Concat(args, []string{"--no-dns"}, others(l, h))...)
	}
	established(t, l, patience)
}

// daemonPID is the process of the daemon, as the host numbers it.
func daemonPID(t *testing.T, h *lab.Host) string {
	t.Helper()
	var pid string
	// A program that the daemon starts has the daemon's name for a moment.
	within(t, patience, h.Name, func() error {
		pid = must(t, h, "sh", "-c", `for p in /proc/[0-9]*; do if [ "$(cat $p/comm 2>/dev/null)" = weave ]; then basename $p; fi; done`)
		if pid == "" || strings.Contains(pid, "\n") {
			return fmt.Errorf("want one daemon, found %q", pid)
		}
		return nil
	})
	return pid
}

func others(l *lab.Lab, h *lab.Host) []string {
	var out []string
	for _, o := range l.Hosts {
		if o != h {
			out = append(out, o.Name)
		}
	}
	return out
}

// connection is a line of `weave status connections`.
type connection struct {
	line, way, address, state, path, peer, nick, attrs string
}

var connectionLine = regexp.MustCompile(
	`^(->|<-) (\S+) +(established|pending|retrying|failed|connecting) *(.*)$`)

var connectionInfo = regexp.MustCompile(
	`^((?:(?:encrypted|unencrypted) +)?(?:fastdp|sleeve)) +(` + peerName + `)\((\S+)\) (.*)$`)

func connections(ctx context.Context, h *lab.Host) ([]connection, error) {
	out, err := h.Output(ctx, "weave", "status", "connections")
	if err != nil {
		return nil, err
	}
	var cs []connection
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		m := connectionLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("%s: what is %q?", h.Name, line)
		}
		c := connection{line: line, way: m[1], address: m[2], state: m[3]}
		if m = connectionInfo.FindStringSubmatch(m[4]); m != nil {
			c.path, c.peer, c.nick, c.attrs = m[1], m[2], m[3], m[4]
		}
		cs = append(cs, c)
	}
	return cs, nil
}

// on returns an error unless all connections of a host that are established
// are on a path, and there are n of these.
func on(ctx context.Context, h *lab.Host, n int, path string) error {
	cs, err := connections(ctx, h)
	if err != nil {
		return err
	}
	var lines []string
	count := 0
	for _, c := range cs {
		lines = append(lines, c.line)
		if c.state == "established" && c.path == path {
			count++
		}
	}
	if count != n {
		return fmt.Errorf("%s: want %d established %s:\n%s", h.Name, n, path, strings.Join(lines, "\n"))
	}
	return nil
}

// established waits until every host has a connection to every other on the
// fast path.
func established(t *testing.T, l *lab.Lab, limit time.Duration) {
	t.Helper()
	within(t, limit, "mesh", func() error {
		for _, h := range l.Hosts {
			if err := on(t.Context(), h, len(l.Hosts)-1, "fastdp"); err != nil {
				return err
			}
		}
		return nil
	})
}

// container is a running container, or just a network namespace.
type container struct {
	*lab.Host
	name   string
	addr   netip.Prefix // on the overlay
	netns  string       // file on the host
	device string       // on the overlay
	bare   bool         // a namespace that Docker does not know
}

// run starts a container that waits, with the flags given, by way of the given
// Docker socket ("" for Docker's own), and finds its address on the device.
func run(t *testing.T, h *lab.Host, socket, device, name string, flags ...string) *container {
	t.Helper()
	args := []string{"docker"}
	if socket != "" {
		args = append(args, "-H", socket)
	}
	must(t, h, slices.Concat(args, []string{"run", "-d", "--name", name}, flags, []string{"busybox", "sleep", "3600"})...)
	c := &container{Host: h, name: name, device: device}
	var err error
	if c.netns, err = h.ContainerNetNS(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	if device != "" {
		addrs := c.addresses(t, device)
		if len(addrs) != 1 {
			t.Fatalf("%s: addresses of %s on %s: %v, want one", h.Name, name, device, addrs)
		}
		c.addr = addrs[0]
	}
	return c
}

// runBare attaches a network namespace, with the addresses asked for.
func runBare(t *testing.T, h *lab.Host, name string, addrs ...string) *container {
	t.Helper()
	c := &container{Host: h, name: name, netns: "/run/netns/" + name, device: "ethwe", bare: true}
	must(t, h, "ip", "netns", "add", name)
	must(t, h, "ip", "-n", name, "link", "set", "lo", "up")
	weave(t, h, append([]string{"attach", "--netns", c.netns}, addrs...)...)
	all := c.addresses(t, c.device)
	if len(all) != 1 {
		t.Fatalf("%s: addresses of %s: %v, want one", h.Name, name, all)
	}
	c.addr = all[0]
	return c
}

// exec runs a command in the container; one of busybox where there is only a
// namespace.
func (c *container) exec(ctx context.Context, args ...string) lab.Result {
	if c.bare {
		return c.Run(ctx, append([]string{"nsenter", "--net=" + c.netns, "busybox"}, args...)...)
	}
	return c.Docker(ctx, append([]string{"exec", c.name}, args...)...)
}

// addresses lists the IPv4 addresses on devices whose name begins so.
func (c *container) addresses(t *testing.T, device string) []netip.Prefix {
	t.Helper()
	r := c.exec(t.Context(), "ip", "-4", "-o", "addr")
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	var out []netip.Prefix
	for line := range strings.Lines(r.Stdout) {
		if f := strings.Fields(line); len(f) > 3 && strings.HasPrefix(f[1], device) {
			out = append(out, netip.MustParsePrefix(f[3]))
		}
	}
	return out
}

// reaches pings an address with a payload of some bytes.
func (c *container) reaches(ctx context.Context, to netip.Addr, size int) error {
	return c.exec(ctx, "ping", "-c", "1", "-W", "2", "-s", fmt.Sprint(size), to.String()).Err()
}

// allReach checks that all containers reach each other.
func allReach(t *testing.T, cs ...*container) {
	t.Helper()
	for _, a := range cs {
		for _, b := range cs {
			if a != b {
				within(t, patience, "ping "+a.name+" to "+b.name, func() error { return a.reaches(t.Context(), b.addr.Addr(), 56) })
			}
		}
	}
}
