package plugin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/ipam"
	"weave.local/peer"
	"weave.local/peer/state"
	"weave.local/plugin/standin"
	"weave.local/proxy/docker"
	"weave.local/router/attach"
	"weave.local/router/firewall"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
	"weave.local/tests/lab"
)

// helperState, in the environment, makes the test binary serve the plugin on
// the host it was started on, with that state file.
const helperState = "PLUGIN_TEST_STATE"

// helperStandIn, in the environment, makes it what stands in for that.
const helperStandIn = "PLUGIN_TEST_STAND_IN"

func TestMain(m *testing.M) {
	if os.Getenv(helperStandIn) != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := standin.Serve(ctx, nil); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return
	}
	if path := os.Getenv(helperState); path != "" {
		if err := serve(context.Background(), path, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1) //nolint:forbidigo // the main of a program
		}
		return
	}
	os.Exit(m.Run()) //nolint:forbidigo // the main of the tests
}

// serve runs a plugin on real parts, with a bridge and no peers. It says when
// it is ready and obeys words on in: owned, goroutines, reconcile, release, remove.
func serve(ctx context.Context, path string, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	db, err := state.Open(path, log)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	p, run, err := assemble(ctx, db, log)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range run {
		g.Go(func() error { return f(ctx) })
	}
	<-p.Ready()
	fmt.Fprintln(out, "ready")
	for lines := bufio.NewScanner(in); lines.Scan(); {
		switch lines.Text() {
		case "goroutines":
			fmt.Fprintln(out, runtime.NumGoroutine())
		case "owned":
			fmt.Fprintln(out, p.cfg.Alloc.Owned())
		case "reconcile":
			fmt.Fprintln(out, p.Reconcile(ctx))
		case "release":
			fmt.Fprintln(out, fmt.Sprint(p.ReleaseNetworks(ctx)))
		case "remove":
			fmt.Fprintln(out, p.RemoveNetworks(ctx))
		}
	}
	cancel()
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return p.Close()
}

func assemble(ctx context.Context, db *state.DB, log *slog.Logger) (*Plugin, []func(context.Context) error, error) {
	name := peer.Name(0x7a0b1c2d3e4f)
	if err := netdev.EnsureBridge("weave", name.MAC(), 1410); err != nil {
		return nil, nil, err
	}
	fw, err := firewall.New(firewall.Config{Bridge: "weave", Log: log})
	if err != nil {
		return nil, nil, err
	}
	subnet := netip.MustParsePrefix("10.32.0.0/24")
	alloc, err := ipam.New(ipam.Config{Self: peer.Info{Name: name, UID: 1}, Range: subnet, DefaultSubnet: subnet,
		Init: ipam.Bootstrap{Mode: ipam.Consensus, N: 1}, Store: db.Bucket("ipam"), Send: func(peer.Name, []byte) error { return nil },
		Reachable: func() []peer.Name { return nil }, Changed: func() {}, Log: log})
	if err != nil {
		return nil, nil, err
	}
	m, err := attach.New(attach.Config{Bridge: "weave", MTU: 1410, Alloc: alloc, Store: db.Bucket("attach"), Firewall: fw, Log: log,
		SetPort: func(overlay.Port) error { return nil }, RemovePort: func(int) error { return nil }})
	if err != nil {
		return nil, nil, err
	}
	if err := m.Reconcile(ctx); err != nil {
		return nil, nil, err
	}
	if err := errors.Join(os.MkdirAll("/etc/docker/plugins", 0o755), WriteAbsence("/etc/docker/plugins/weave.spec")); err != nil {
		return nil, nil, err
	}
	c := docker.New("/run/docker.sock")
	w := docker.NewWatcher(c, log)
	p, err := New(Config{Socket: "/run/docker/plugins/weave.sock", Attach: m, Alloc: alloc, Docker: c, Watch: w,
		Store: db.Bucket("plugin"), Log: log, StandIn: func() *exec.Cmd {
			return &exec.Cmd{Path: "/proc/self/exe", Args: os.Args, Env: []string{helperStandIn + "=1"}}
		}})
	if err == nil {
		p.patience = 5 * time.Second
	}
	return p, []func(context.Context) error{alloc.Run, m.Run, w.Run, p.Run}, err
}

// helper is a plugin that serves on a host.
type helper struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startHelper(t *testing.T, h *lab.Host, path string) *helper {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	if exe, err := os.Executable(); err == nil {
		cmd = exec.Command(exe)
	}
	cmd.Env = append(os.Environ(), helperState+"="+path)
	cmd.Stderr = t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	p := &helper{cmd: cmd, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() { _ = p.cmd.Process.Kill(); _ = p.cmd.Wait() })
	if s := p.hear(t); s != "ready" {
		t.Fatalf("the plugin said %q", s)
	}
	return p
}

func (p *helper) hear(t *testing.T) string {
	t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		t.Fatalf("the plugin said %q, then %v", line, err)
	}
	return strings.TrimSpace(line)
}

func (p *helper) ask(t *testing.T, word string) string {
	t.Helper()
	if _, err := io.WriteString(p.in, word+"\n"); err != nil {
		t.Fatal(err)
	}
	return p.hear(t)
}

// end lets the plugin end as it should.
func (p *helper) end(t *testing.T) {
	t.Helper()
	_ = p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
}

// kill ends the plugin by SIGKILL.
func (p *helper) kill(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.cmd.Wait()
}

// engineHost is a host with a real engine, and the docker command on it, whose
// failure ends the test.
func engineHost(t *testing.T) (h *lab.Host, run func(args ...string) string) {
	t.Helper()
	if why := lab.Missing(true); why != "" {
		if os.Getenv("TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	l, err := lab.New(t.Context(), lab.Config{Docker: true, Hosts: []string{"u1"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	h = l.Host("u1")
	return h, func(args ...string) string {
		t.Helper()
		out, err := h.Output(t.Context(), append([]string{"docker"}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}

func TestEngine(t *testing.T) {
	t.Parallel() // it waits much
	h, run := engineHost(t)
	path := filepath.Join(t.TempDir(), "weave.db")
	p := startHelper(t, h, path)
	t.Run("run", func(t *testing.T) { runs(t, h, run) })
	t.Run("addresses", func(t *testing.T) { addresses(t, h, p, run) })

	t.Run("choices", func(t *testing.T) { choices(t, h, p, run) })
	t.Run("networks", func(t *testing.T) { networks(t, h, run) })
	restart := func() *helper { return startHelper(t, h, path) }
	t.Run("calls", func(t *testing.T) { p = calls(t, h, p, restart) })

	// The plugin dies and comes back; the engine repeats nothing.
	run("run", "-d", "--name", "stays", "--network", "name=weave,ip=10.32.0.77", "busybox", "sleep", "600")
	p.kill(t)
	p = startHelper(t, h, path)
	if owned := p.ask(t, "owned"); !strings.Contains(owned, "_10.32.0.77:[10.32.0.77/24]") {
		t.Errorf("after a restart: %s", owned)
	}
	if out := run("run", "--rm", "--net=weave", "busybox", "ip", "route"); !strings.Contains(out, "224.0.0.0/4 dev ethwe0") {
		t.Errorf("after a restart:\n%s", out)
	}
	if err := h.StopDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	run("start", "stays")
	if out := run("exec", "stays", "ip", "-4", "addr", "show", "ethwe0"); !strings.Contains(out, "10.32.0.77/24") {
		t.Errorf("after a restart of the engine:\n%s", out)
	}

	t.Run("release", func(t *testing.T) { release(t, h, p, run) })
}

// runs checks what a container finds.
func runs(t *testing.T, h *lab.Host, run func(...string) string) {
	show := "ip -4 -o addr; ip route"
	out := run("run", "--rm", "--net=weave", "busybox", "sh", "-c", show)
	for _, want := range []string{`ethwe0 +inet 10\.32\.0\.\d+/24`, `eth0 +inet `, `default via \S+ dev eth0`, `224\.0\.0\.0/4 dev ethwe0`} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	run("network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.32.0.0/24", "--ip-range", "10.32.0.64/26", "part")
	out = run("run", "--rm", "--network", "name=part,driver-opt="+docker.OptionGateway+"=false", "busybox", "sh", "-c", show)
	if !regexp.MustCompile(`ethwe0 +inet 10\.32\.0\.(6[4-9]|[789]\d|1[01]\d|12[0-7])/24`).MatchString(out) {
		t.Errorf("no address of the range in\n%s", out)
	}
	if strings.Contains(out, "default") || strings.Contains(out, "224.0.0.0") || strings.Contains(out, "eth0 ") {
		t.Errorf("more than was asked for in\n%s", out)
	}
	run("network", "rm", "part")
	r := h.Docker(t.Context(), "network", "create", "-d", "weave", "--ipam-driver", "weave", "--gateway", "10.32.0.1", "--subnet", "10.32.0.0/24", "bad")
	if r.Code == 0 || !strings.Contains(r.Stderr, "without --gateway") {
		t.Errorf("exit %d, %s", r.Code, r.Stderr)
	}
}

func addresses(t *testing.T, h *lab.Host, p *helper, run func(...string) string) {
	run("run", "-d", "--name", "aa", "--net=weave", "--ip", "10.32.0.50", "busybox", "sleep", "600")
	r := h.Docker(t.Context(), "run", "--rm", "--net=weave", "--ip", "10.32.0.50", "busybox", "true")
	if r.Code == 0 || !strings.Contains(r.Stderr, "10.32.0.50 is held by") {
		t.Errorf("a second container with the same address: exit %d, %s", r.Code, r.Stderr)
	}
	run("run", "-d", "--name", "bb", "--net=weave", "busybox", "sleep", "600")
	run("exec", "bb", "ping", "-c", "1", "-W", "2", "10.32.0.50")
	run("rm", "-f", "aa", "bb")
	if owned := p.ask(t, "owned"); owned != "map[]" {
		t.Errorf("addresses that are still owned: %s", owned)
	}
	failures(t, h, p)
}

// failures checks what is left of a container that can't be attached, or whose
// start fails after that: the reason in the client's hands, and nothing else.
func failures(t *testing.T, h *lab.Host, p *helper) {
	on := func(args ...string) {
		t.Helper()
		if err := h.Run(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	fails := func(word string, args ...string) {
		t.Helper()
		r := h.Docker(t.Context(), append([]string{"run", "--name", "failed", "--net=weave"}, args...)...)
		if r.Code == 0 || !strings.Contains(r.Stderr, word) {
			t.Errorf("exit %d, said %q, want an error with %q", r.Code, r.Stderr, word)
		}
		if r := h.Docker(t.Context(), "inspect", "-f", "{{.State.Running}} {{.State.Pid}}", "failed"); r.Stdout != "false 0\n" {
			t.Errorf("the container: %q %q", r.Stdout, r.Stderr)
		}
		if owned := p.ask(t, "owned"); owned != "map[]" {
			t.Errorf("addresses that are still owned: %s", owned)
		}
		if r := h.Run(t.Context(), "sh", "-c", "ip -o link | grep vethw"); r.Stdout != "" {
			t.Errorf("devices are left:\n%s", r.Stdout)
		}
		if err := h.Docker(t.Context(), "rm", "failed").Err(); err != nil {
			t.Error(err)
		}
	}
	fails("nosuch", "busybox", "nosuch")
	on("ip", "link", "set", "weave", "down")
	on("ip", "link", "set", "weave", "name", "elsewhere")
	fails("weave", "busybox", "true")
	on("ip", "link", "set", "elsewhere", "name", "weave")
	on("ip", "link", "set", "weave", "up")
}

// release checks what a stop and a reset do to networks.
func release(t *testing.T, h *lab.Host, p *helper, run func(...string) string) {
	run("stop", "-t", "0", "stays")
	if got := p.ask(t, "release"); !strings.Contains(got, "weave stays: in use by stays") {
		t.Errorf("release with a stopped container: %s", got)
	}
	run("start", "stays") // its endpoint of before went with it, unseen
	if got := p.ask(t, "remove"); got != "<nil>" {
		t.Errorf("remove: %s", got)
	}
	if out := run("network", "ls", "--format", "{{.Driver}}"); strings.Contains(out, "weave") {
		t.Errorf("networks are left:\n%s", out)
	}
	if out := run("exec", "stays", "ip", "link"); strings.Contains(out, "ethwe") {
		t.Errorf("the container is still attached:\n%s", out)
	}
	// Endpoints that went unseen are given time: a call for them may be on
	// its way.
	err := lab.Wait(t.Context(), 30*time.Second, func() error {
		if owned := p.ask(t, "owned"); owned != "map[]" {
			return fmt.Errorf("addresses that are still owned: %s", owned)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	_ = p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("the plugin ended with %v", err)
	}
	socket := h.Path("/run/docker/plugins/weave.sock")
	err = h.Do(func() error { return standin.Clear("/run/docker/plugins/weave.sock") })
	if _, there := os.Lstat(socket); err != nil || !os.IsNotExist(there) {
		t.Errorf("the socket is still there: %v, %v", err, there)
	}
}
