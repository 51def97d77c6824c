package proxy

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/proxy/docker"
	"weave.local/tests/lab"
)

// engineHost is a host with a real engine and the proxy in front of it.
func engineHost(t *testing.T) (h *lab.Host, direct, proxied string) {
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
	cfg := config(t, &fakeEngine{socket: h.Path("/run/docker.sock")})
	proxied = filepath.Join(l.Dir(), "proxy.sock")
	cfg.Listen = []string{"unix://" + proxied}
	cfg.NoDefaultIPAlloc = true
	cfg.Network = func(_ context.Context, n netip.Prefix) (string, error) {
		return "", fmt.Errorf("network for %s asked for", n)
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return h, "unix:///run/docker.sock", "unix://" + proxied
}

// The docker command does the same through the proxy as without it.
func TestConformance(t *testing.T) {
	h, direct, proxied := engineHost(t)
	big := strings.Repeat("0123456789abcdef", 1<<18) // 4 MiB
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(big)))
	begin := time.Now()
	prepare := [][]string{
		{"run", "-d", "--name", "idle", "busybox", "sleep", "600"},
		{"run", "--name", "talker", "busybox", "sh", "-c", "for i in 1 2 3; do echo line $i; echo err $i >&2; sleep 0.2; done"},
	}
	for _, args := range prepare {
		if err := h.Docker(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	at := func(d time.Time) string { return fmt.Sprintf("%d.%09d", d.Unix(), d.Nanosecond()) }
	span := []string{"--since", at(begin), "--until", at(time.Now())}
	for _, c := range rows(big, sum, span) {
		t.Run(c.name, func(t *testing.T) {
			way := func(host string) lab.Result {
				r := runDocker(t, h, host, c.stdin, c.args)
				if c.args[0] == "save" {
					r.Stdout = entries(t, strings.NewReader(r.Stdout))
				}
				if len(c.undo) > 0 {
					_ = runDocker(t, h, direct, "", c.undo)
				}
				return r
			}
			want, got := way(direct), way(proxied)
			if !strings.Contains(got.Stdout+got.Stderr, c.want) {
				t.Errorf("said %.300q %.300q", got.Stdout, got.Stderr)
			}
			if same(got.Stdout) != same(want.Stdout) || same(got.Stderr) != same(want.Stderr) || got.Code != want.Code {
				t.Errorf("proxied: exit %d, %.300q %.300q\ndirect:  exit %d, %.300q %.300q",
					got.Code, got.Stdout, got.Stderr, want.Code, want.Stdout, want.Stderr)
			}
		})
	}
	t.Run("detach keys", func(t *testing.T) { detach(t, h, proxied) })
	t.Run("API versions", func(t *testing.T) { versions(t, h, strings.TrimPrefix(proxied, "unix://")) })
	t.Run("100 MB", func(t *testing.T) { large(t, h, direct, proxied) })
	t.Run("context", func(t *testing.T) { contexts(t, h, proxied) })
	if plugins(h) != "" {
		t.Run("compose", func(t *testing.T) { compose(t, h, direct, proxied) })
		t.Run("buildx", func(t *testing.T) { buildx(t, h, direct, proxied) })
	}
	t.Run("overhead", func(t *testing.T) { overhead(t, h.Path("/run/docker.sock"), strings.TrimPrefix(proxied, "unix://")) })
	t.Run("crowd", func(t *testing.T) { crowd(t, strings.TrimPrefix(proxied, "unix://")) })
	t.Run("cp in", func(t *testing.T) { copyIn(t, h, proxied, big) })
	t.Run("terminal", func(t *testing.T) { terminal(t, h, proxied) })
	t.Run("attach without upgrade", func(t *testing.T) { rawAttach(t, h, strings.TrimPrefix(proxied, "unix://")) })
	t.Run("refused", func(t *testing.T) {
		r := runDocker(t, h, proxied, "", []string{"run", "--name", "bad", "-e", "WEAVE_CIDR=net:nowhere", "busybox", "true"})
		if r.Code == 0 || !strings.Contains(r.Stderr, "net:nowhere") {
			t.Errorf("exit %d, %s", r.Code, r.Stderr)
		}
		r = runDocker(t, h, proxied, "", []string{"run", "--name", "bad", "-e", "WEAVE_CIDR=net:10.1.0.0/16", "busybox", "true"})
		if r.Code == 0 || !strings.Contains(r.Stderr, "network for 10.1.0.0/16 asked for") {
			t.Errorf("exit %d, %s", r.Code, r.Stderr)
		}
		if r := h.Docker(t.Context(), "inspect", "--type", "container", "-f", "{{.Name}} {{.State.Status}}", "bad"); r.Code == 0 {
			t.Errorf("a container is left: %s", r.Stdout)
		}
	})
}

// same takes out what differs from run to run: ids, addresses of sockets, how
// long ago something was.
func same(s string) string {
	s = regexp.MustCompile(`(\d+ \w+|About an? \w+|Less than a second) ago`).ReplaceAllString(s, "ago")
	s = regexp.MustCompile(`unix://\S+\.sock`).ReplaceAllString(s, "socket")
	s = regexp.MustCompile(`\b[0-9a-f]{64}\b`).ReplaceAllString(s, "id")
	return regexp.MustCompile(`\b[0-9a-f]{12}\b`).ReplaceAllString(s, "id")
}

// entries tells what is in a tar archive, but for the times: Docker makes some
// files anew each time that it saves an image.
func entries(t *testing.T, archive io.Reader) string {
	t.Helper()
	var list strings.Builder
	for in := tar.NewReader(archive); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return list.String()
		}
		sum := sha256.New()
		if err == nil {
			_, err = io.Copy(sum, in)
		}
		if err != nil {
			t.Errorf("archive: %v", err)
			return ""
		}
		fmt.Fprintf(&list, "%c %s %s %o %d:%d %d %x\n", h.Typeflag, h.Name, h.Linkname, h.Mode, h.Uid, h.Gid, h.Size, sum.Sum(nil))
	}
}

func runDocker(t *testing.T, h *lab.Host, host, stdin string, args []string) lab.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", append([]string{"-H", host}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "DOCKER_BUILDKIT=0")
	return h.RunCmd(cmd)
}

func copyIn(t *testing.T, h *lab.Host, host, content string) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := runDocker(t, h, host, "", []string{"cp", file, "idle:/copied"}).Err(); err != nil {
		t.Fatal(err)
	}
	r := runDocker(t, h, host, "", []string{"exec", "idle", "cat", "/copied"})
	if r.Stdout != content {
		t.Errorf("%d bytes arrived, want %d; %v", len(r.Stdout), len(content), r.Err())
	}
}

// terminal types into `docker run -ti`.
func terminal(t *testing.T, h *lab.Host, host string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	master, tty := openTerminal(t)
	defer func() { _ = master.Close() }()
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 31, Col: 117}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, "docker", "-H", host, "run", "--rm", "-ti", "busybox", "sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err := h.Start(cmd)
	_ = tty.Close()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	in := bufio.NewReader(io.TeeReader(master, &said))
	if _, err := in.ReadString('#'); err != nil { // the prompt
		t.Fatalf("%v after %q", err, said.String())
	}
	_, _ = io.WriteString(master, "test -t 0 && echo on a $((6*7)) terminal; until stty size | grep -q 31.117; do sleep 0.1; done; echo wide=$(stty size); exit 5\r")
	_, _ = io.Copy(io.Discard, in) // ends with an error when the other side goes
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 5 || !strings.Contains(said.String(), "on a 42 terminal") ||
		!strings.Contains(said.String(), "wide=31 117") {
		t.Errorf("ended with %v after %q", err, said.String())
	}
}

// openTerminal makes a pseudo-terminal.
func openTerminal(t *testing.T) (master, tty *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var number int
	var ioctl error
	err = raw.Control(func(fd uintptr) {
		if ioctl = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); ioctl == nil {
			number, ioctl = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	})
	if err := errors.Join(err, ioctl); err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, tty
}

// rawAttach is a client that asks for no upgrade and ends its half.
func rawAttach(t *testing.T, h *lab.Host, socket string) {
	id, err := h.Output(t.Context(), "docker", "create", "-i", "busybox", "sh", "-c", "sha256sum")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	_, _ = fmt.Fprintf(conn, "POST /containers/%s/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: docker\r\nContent-Type: text/plain\r\n\r\n", id)
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Error(resp.Status)
	}
	if err := h.Docker(t.Context(), "start", id).Err(); err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("x"), 1<<20)
	if _, err := conn.Write(big); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if want := fmt.Sprintf("%x", sha256.Sum256(big)); err != nil || !strings.Contains(string(out), want) {
		t.Errorf("got %q, %v; want %s", out, err, want)
	}
}

// The client and the watcher against a real engine.
func TestRealEvents(t *testing.T) {
	h, _, _ := engineHost(t)
	c := docker.New(h.Path("/run/docker.sock"))
	w := docker.NewWatcher(c, slog.New(slog.DiscardHandler))
	lists, events := make(chan []docker.Container, 8), make(chan docker.Event, 64)
	w.OnConnect(func(_ context.Context, all []docker.Container) { lists <- all })
	w.OnEvent(func(e docker.Event) { events <- e })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run ended with %v", err)
		}
	}()
	<-lists
	life := func(name string) {
		t.Helper()
		if err := h.Docker(t.Context(), "run", "--rm", "--name", name, "busybox", "true").Err(); err != nil {
			t.Fatal(err)
		}
		for _, want := range []docker.Action{docker.ActionCreate, docker.ActionStart, docker.ActionDie, docker.ActionDestroy} {
			if e := <-events; e.Action != want || e.Name != name || len(e.ID) != 64 {
				t.Errorf("event %+v, want %s of %s", e, want, name)
			}
		}
	}
	life("one")
	if err := h.StopDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-lists
	life("two")
	if v, err := c.APIVersion(t.Context()); err != nil || v == "" {
		t.Errorf("API version %q, %v", v, err)
	}
	if _, err := c.InspectContainer(t.Context(), "nobody"); !docker.IsNotFound(err) {
		t.Errorf("inspect of nobody: %v", err)
	}
}
