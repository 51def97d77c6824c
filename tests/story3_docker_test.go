package tests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/tests/lab"
)

// dockerSocket is Docker's API itself.
const dockerSocket = "unix:///var/run/docker.sock"

// testDockerAsWithout runs the docker command by way of the proxy and past it,
// and compares.
func testDockerAsWithout(t *testing.T, h *lab.Host) {
	must(t, h, "sh", "-c", "mkdir -p /run/ctx && printf 'FROM busybox\\nRUN echo made > /made\\nCOPY f /f\\n' > /run/ctx/Dockerfile && seq 100000 > /run/ctx/f")
	must(t, h, "docker", "run", "-d", "--name", "still", "busybox", "sleep", "3600")
	must(t, h, "docker", "run", "--name", "said", "busybox", "sh", "-c", "echo one; echo two >&2; seq 20000")
	for _, c := range []struct {
		name, script string
		code         int
	}{
		{"exec", "docker exec still sh -c 'echo out; echo err >&2; exit 5'", 5},
		{"exec with input", "seq 50000 | docker exec -i still sh -c 'cat; echo end'", 0},
		{"run with input", "seq 50000 | docker run --rm -i busybox sh -c 'sort -n | tail -n 3'", 0},
		{"run that fails", "docker run --rm busybox sh -c 'exit 9'", 9},
		{"logs", "docker logs said 2>&1 | sort", 0},
		{"logs of a running one", "c=$(docker run -d busybox sh -c 'for i in 1 2 3; do echo $i; sleep 0.2; done') && docker logs -f $c && docker rm -f $c >/dev/null", 0},
		{"copy in and out", "seq 30000 > /run/in && docker cp /run/in still:/in && docker cp still:/in /run/out && cmp /run/in /run/out && docker cp still:/in - | tar -x -O", 0},
		{"build", "DOCKER_BUILDKIT=0 docker build -q -t built /run/ctx >/dev/null 2>&1 && docker run --rm built sh -c 'cat /made; wc -l /f'; r=$?; docker rmi built >/dev/null; exit $r", 0},
		{"events", "docker events --since 1 --until $(date +%s) --filter container=said --format '{{.Action}}'", 0},
		{"wait", "docker wait said", 0},
		{"save and load", "docker save busybox | docker load -q", 0},
		{"what is not there", "docker inspect not-there", 1},
		{"pause", "docker pause still && docker inspect -f '{{.State.Paused}}' still && docker unpause still", 0},
		{"top", "docker top still -o pid,args", 0},
		{"version", "docker version -f '{{.Server.Version}} {{.Server.APIVersion}}'", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got [2]lab.Result
			for i, socket := range []string{dockerSocket, proxySocket} {
				got[i] = h.Run(t.Context(), "env", "DOCKER_HOST="+socket, "WEAVE_CIDR=none", "bash", "-o", "pipefail", "-c", c.script)
			}
			direct, through := got[0], got[1]
			if direct.Code != c.code {
				t.Errorf("past the proxy: exit %d, want %d: %v", direct.Code, c.code, direct.Err())
			}
			if through.Code != direct.Code || through.Stdout != direct.Stdout || through.Stderr != direct.Stderr {
				t.Errorf("through the proxy: exit %d\n%.500s\n%.500s\npast it: exit %d\n%.500s\n%.500s",
					through.Code, through.Stdout, through.Stderr, direct.Code, direct.Stdout, direct.Stderr)
			}
		})
	}
	t.Run("inspect", func(t *testing.T) { testSameInspect(t, h) })
	t.Run("terminal", func(t *testing.T) { testTerminal(t, h) })
	t.Run("events as they come", func(t *testing.T) { testEvents(t, h) })
	must(t, h, "docker", "rm", "-f", "still", "said")
	must(t, h, "rm", "-r", "/run/ctx", "/run/in", "/run/out")
}

func testSameInspect(t *testing.T, h *lab.Host) {
	var got [2]any
	for i, socket := range []string{dockerSocket, proxySocket} {
		if err := json.Unmarshal([]byte(must(t, h, "docker", "-H", socket, "inspect", "still", "busybox", "weave")), &got[i]); err != nil {
			t.Fatal(err)
		}
	}
	if !reflect.DeepEqual(got[0], got[1]) {
		t.Errorf("inspect through the proxy:\n%v\npast it:\n%v", got[1], got[0])
	}
}

// terminal opens a pair of pseudo-terminal devices (pts(4)).
func terminal() (screen, tty *os.File, err error) {
	if screen, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		_ = screen.Close()
	}
	return screen, tty, err
}

// testTerminal types at a shell in a container with a terminal.
func testTerminal(t *testing.T, h *lab.Host) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	screen, tty, err := terminal()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = screen.Close() }()
	cmd := exec.CommandContext(ctx, "docker", "-H", proxySocket, "run", "--rm", "-ti", "busybox", "sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = h.Start(cmd)
	_ = tty.Close()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := screen.WriteString("tty; echo $((6*7)); ip -4 -o addr; exit 3\n"); err != nil {
		t.Fatal(err)
	}
	said, _ := io.ReadAll(screen) // ends with EIO when the last one has closed the terminal
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("the shell ended with %v, want exit 3", err)
	}
	for _, want := range []string{"/dev/pts/", "\n42\r", "ethwe"} {
		if !strings.Contains(string(said), want) {
			t.Errorf("the terminal shows %q, without %q", said, want)
		}
	}
}

// testEvents: events come while they happen.
func testEvents(t *testing.T, h *lab.Host) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	r, w := io.Pipe()
	cmd := exec.CommandContext(ctx, "docker", "-H", proxySocket, "events", "--format", "{{.Type}} {{.Action}} {{.Actor.Attributes.name}}")
	cmd.Stdout = w
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = w.Close() })
	defer stop()
	defer func() { _ = r.Close(); _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	// The command says nothing when it has begun to listen: make events until
	// one comes.
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			h.Docker(ctx, "rename", "said", "renamed")
			h.Docker(ctx, "rename", "renamed", "said")
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	var said string
	buf := make([]byte, 4096)
	for !strings.Contains(said, "container rename said\n") {
		n, err := r.Read(buf)
		said += string(buf[:n])
		if err != nil {
			t.Errorf("events: %q, and no more: %v", said, err)
			break
		}
	}
	cancel()
	<-done
	// The name must be the one the others know.
	h.Docker(t.Context(), "rename", "renamed", "said")
}
