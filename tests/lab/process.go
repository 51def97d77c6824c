package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is the first process of a set of namespaces; while it lives they do.
type process struct {
	cmd  *exec.Cmd
	gone chan struct{}
}

// start runs cmd as the first process of new namespaces. It dies with this
// program.
func (l *Lab) start(cmd *exec.Cmd, namespaces uintptr) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL, Setsid: true}
	cmd.Dir = "/"
	result := make(chan error)
	l.spawn <- func() { result <- cmd.Start() }
	if err := <-result; err != nil {
		return nil, fmt.Errorf("first process: %w", err)
	}
	p := &process{cmd: cmd, gone: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.gone)
	}()
	return p, nil
}

// kill ends the process and, if it is the first of a PID namespace, all others
// in it, and returns once they are gone.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.gone
}

func (p *process) ns(kind string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", p.cmd.Process.Pid, kind)
}

// enter runs f in the namespaces named by the files, on a thread of its own
// that is given up afterwards: there is no way back for a thread that has left
// the mount namespace of its process.
func enter(files []string, f func() error) error {
	result := make(chan error)
	go func() { result <- onFreshThread(files, f) }()
	return <-result
}

// onFreshThread is run on a goroutine that ends with it.
func onFreshThread(files []string, f func() error) error {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The main thread can't be given up: it would stay in the namespaces
		// and keep them alive. While it is held here another one is taken.
		defer runtime.UnlockOSThread()
		return enter(files, f)
	}
	if err := setns(files); err != nil {
		return err
	}
	return f()
}

func setns(files []string) error {
	// All are opened first: the paths mean something else once inside.
	fds := make([]int, 0, len(files))
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for _, file := range files {
		fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("namespace %s: %w", file, err)
		}
		fds = append(fds, fd)
	}
	// Only a thread that shares its working directory with no other may change
	// its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	for i, fd := range fds {
		if err := unix.Setns(fd, 0); err != nil {
			return fmt.Errorf("enter %s: %w", files[i], err)
		}
	}
	return nil
}

// Result is the outcome of a command.
type Result struct {
	Args   []string
	Stdout string
	Stderr string
	Code   int // exit code; -1 when the command did not run to its end
	err    error
}

// Err is nil when the command ended with exit code 0, and otherwise tells the
// command, what became of it and what it said.
func (r Result) Err() error {
	if r.err == nil {
		return nil
	}
	said := strings.TrimSpace(r.Stderr)
	if said == "" {
		said = strings.TrimSpace(r.Stdout)
	}
	return fmt.Errorf("%s: %w: %s", strings.Join(r.Args, " "), r.err, said)
}

// collect runs cmd, which start starts, and gathers what it says.
func collect(cmd *exec.Cmd, start func(*exec.Cmd) error) Result {
	var out, errOut bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &errOut
	}
	cmd.WaitDelay = outputDelay
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	r := Result{Args: cmd.Args, Stdout: out.String(), Stderr: errOut.String(), Code: -1, err: err}
	if cmd.ProcessState != nil {
		r.Code = cmd.ProcessState.ExitCode()
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		r.err = fmt.Errorf("a process it left behind holds its output: %w", err)
	}
	return r
}

// run runs a command with an input in a network namespace, but otherwise in
// the namespaces of this program.
func run(ctx context.Context, netns string, stdin io.Reader, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin = stdin
	return collect(cmd, func(c *exec.Cmd) error { return enter([]string{netns}, c.Start) }).Err()
}

// batch runs a script of ip(8) commands in a network namespace.
func batch(ctx context.Context, netns string, lines ...string) error {
	script := strings.Join(lines, "\n") + "\n"
	if err := run(ctx, netns, strings.NewReader(script), "ip", "-batch", "-"); err != nil {
		return fmt.Errorf("%w\n%s", err, script)
	}
	return nil
}

// environment is that of this program without what would steer Docker or
// weave.
func environment() []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "DOCKER_") && !strings.HasPrefix(e, "WEAVE_") {
			env = append(env, e)
		}
	}
	return append(env, "DOCKER_CONFIG=/run/docker-config")
}
