package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// engineTimeout bounds the start and the stop of a Docker engine.
const engineTimeout = 60 * time.Second

// enginesEnv names the engines of labs that leave it open: for one host after
// the other, again from the first when there are more hosts, a folder with
// unpacked packages or nothing for the machine's own; "@1.44" behind it is
// MinAPI. With commas between: ",/a,/b@1.44".
const enginesEnv = "TEST_ENGINES"

// Engine says which Docker a host has.
type Engine struct {
	// Dir is a folder in which Docker's packages are unpacked; what it has not,
	// such as runc, is the machine's. Empty: the Docker that PATH finds.
	Dir string
	// MinAPI is the oldest version of the API that is served, such as 1.44.
	// Empty: the engine's own choice.
	MinAPI string
}

// engines returns what the environment variable says.
func engines(text string) []Engine {
	var out []Engine
	for word := range strings.SplitSeq(text, ",") {
		dir, minAPI, _ := strings.Cut(word, "@")
		out = append(out, Engine{Dir: dir, MinAPI: minAPI})
	}
	return out
}

// paths are the folders of its programs.
func (e Engine) paths() []string {
	if e.Dir == "" {
		return nil
	}
	return []string{filepath.Join(e.Dir, "usr/sbin"), filepath.Join(e.Dir, "usr/bin")}
}

// prepare makes a command one of the engine's programs, and of those it starts.
func (e Engine) prepare(cmd *exec.Cmd) {
	if e.Dir == "" {
		return
	}
	cmd.Env = append(cmd.Env, "PATH="+strings.Join(append(e.paths(), os.Getenv("PATH")), ":"))
	if strings.Contains(cmd.Args[0], "/") {
		return
	}
	for _, dir := range e.paths() {
		if path, err := exec.LookPath(filepath.Join(dir, cmd.Args[0])); err == nil {
			cmd.Path, cmd.Err = path, nil
			return
		}
	}
}

// CLIPlugins is the folder of compose, buildx and the like of a host whose
// engine is an unpacked one; empty if it has none.
func (h *Host) CLIPlugins() string {
	dir := filepath.Join(h.docker.Dir, "usr/libexec/docker/cli-plugins")
	if _, err := os.Stat(dir); h.docker.Dir == "" || err != nil {
		return ""
	}
	return dir
}

// engine is a running dockerd.
type engine struct {
	cmd  *exec.Cmd
	gone chan struct{}
}

// startEngines starts all engines at once and loads the image.
func (l *Lab) startEngines(ctx context.Context) error {
	if err := writeImage(l.imagePath()); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, h := range l.Hosts {
		g.Go(func() error {
			if err := h.StartDocker(ctx); err != nil {
				return fmt.Errorf("host %s: %w", h.Name, err)
			}
			return h.Docker(ctx, "load", "-q", "-i", l.imagePath()).Err()
		})
	}
	return g.Wait()
}

func (l *Lab) imagePath() string { return filepath.Join(l.dir, "busybox.tar") }

// StartDocker starts the host's Docker engine and returns when it answers.
// Further flags of dockerd may be given.
func (h *Host) StartDocker(ctx context.Context, flags ...string) error {
	log, err := os.OpenFile(h.DockerLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer func() { _ = log.Close() }()
	runtimeFlags, err := h.lab.runtimeFlags()
	if err != nil {
		return err
	}
	args := append([]string{
		"-H", "unix:///var/run/docker.sock",
		"--cgroup-parent", "/" + h.lab.id + "-" + h.Name,
		"--exec-opt", "native.cgroupdriver=cgroupfs",
	}, runtimeFlags...)
	// A killed one leaves its file, and the number may be another's by now.
	if err := os.Remove(h.Path("/run/docker.pid")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("old dockerd: %w", err)
	}
	cmd := exec.Command("dockerd", append(args, flags...)...)
	cmd.Env = environment()
	if v := h.docker.MinAPI; v != "" {
		cmd.Env = append(cmd.Env, "DOCKER_MIN_API_VERSION="+v)
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := h.Start(cmd); err != nil {
		return fmt.Errorf("dockerd: %w", err)
	}
	e := &engine{cmd: cmd, gone: make(chan struct{})}
	h.engine = e
	go func() {
		_ = cmd.Wait()
		close(e.gone)
	}()
	if err := Wait(ctx, engineTimeout, func() error { return h.pingDocker(ctx) }); err != nil {
		said, _ := os.ReadFile(h.DockerLog())
		return fmt.Errorf("dockerd does not answer: %w: %s", err, tail(string(said), 20))
	}
	return nil
}

// DockerLog is the file of the engine's log.
func (h *Host) DockerLog() string { return filepath.Join(h.dir, "dockerd.log") }

func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

func (h *Host) pingDocker(ctx context.Context) error {
	select {
	case <-h.engine.gone:
		return fmt.Errorf("dockerd ended: %s", h.engine.cmd.ProcessState)
	default:
	}
	t := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", h.Path("/run/docker.sock"))
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
	if err != nil {
		return err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("answer %s", resp.Status)
	}
	return nil
}

// StopDocker asks the engine to end and returns when it has.
func (h *Host) StopDocker(ctx context.Context) error { return h.endDocker(ctx, syscall.SIGTERM) }

// KillDocker ends the engine by SIGKILL; its containers run on.
func (h *Host) KillDocker(ctx context.Context) error { return h.endDocker(ctx, syscall.SIGKILL) }

func (h *Host) endDocker(ctx context.Context, sig os.Signal) error {
	if err := h.engine.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("dockerd: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	select {
	case <-h.engine.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("dockerd has not ended: %w", ctx.Err())
	}
}

// Docker runs the docker command on the host.
func (h *Host) Docker(ctx context.Context, args ...string) Result {
	return h.Run(ctx, append([]string{"docker"}, args...)...)
}

// ContainerPID is the first process of a container, as the host numbers it.
func (h *Host) ContainerPID(ctx context.Context, container string) (int, error) {
	text, err := h.Output(ctx, "docker", "inspect", "-f", "{{.State.Pid}}", container)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(text)
	if err != nil || pid == 0 {
		return 0, fmt.Errorf("container %s does not run (process %q)", container, text)
	}
	return pid, nil
}

// ContainerNetNS is the file, on the host, of a container's network namespace.
func (h *Host) ContainerNetNS(ctx context.Context, container string) (string, error) {
	pid, err := h.ContainerPID(ctx, container)
	return fmt.Sprintf("/proc/%d/ns/net", pid), err
}

// lessScript runs runc without the capability CAP_SYS_RESOURCE in a
// container's description: engines ask for it for privileged containers, and
// fail where the machine itself does not have it.
const lessScript = `#!/bin/sh
f= p=
for a in "$@"; do
	case $p in --bundle) f=$a/config.json ;; --process) f=$a ;; esac
	p=$a
done
[ -n "$f" ] && [ -f "$f" ] && sed -i 's/"CAP_SYS_RESOURCE",//g; s/,"CAP_SYS_RESOURCE"//g' "$f"
exec runc "$@"
`

// runtimeFlags makes the engine cope with a machine that lacks a capability.
func (l *Lab) runtimeFlags() ([]string, error) {
	has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("capabilities: %w", err)
	}
	if has == 1 {
		return nil, nil
	}
	path := filepath.Join(l.dir, "runc-less")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		// Under another name first: engines start at the same time, and a file
		// being written can't be run.
		tmp, err := os.CreateTemp(l.dir, "runc-")
		if err != nil {
			return nil, fmt.Errorf("runtime: %w", err)
		}
		_, err = tmp.WriteString(lessScript)
		if err := errors.Join(err, tmp.Chmod(0o755), tmp.Close(), os.Rename(tmp.Name(), path)); err != nil {
			return nil, fmt.Errorf("runtime: %w", err)
		}
	}
	return []string{"--add-runtime", "less=" + path, "--default-runtime", "less"}, nil
}
