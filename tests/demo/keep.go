package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Hosts live as long as the program that made them. With --keep that is a
// second process, the keeper, in a session of its own: it tells the story on
// the terminal of the first, says on a pipe when that is done, and then waits
// for a connection to its socket, which goes away with it.
const (
	keeperWord   = "keeper"
	keeperSocket = "@weave-demo" // abstract: there is no file to go stale
	keeperPipe   = 3
)

// startKeeper runs the story in a keeper and returns when it is told.
func startKeeper(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer func() { _ = r.Close() }()
	cmd := &exec.Cmd{
		Path: self, Args: append([]string{self, keeperWord}, args...),
		Stdout: os.Stdout, Stderr: os.Stderr, ExtraFiles: []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-signals:
			_ = cmd.Process.Signal(syscall.SIGTERM)
		case <-done:
		}
	}()
	if n, _ := r.Read(make([]byte, 1)); n == 1 {
		return cmd.Process.Release()
	}
	if err := cmd.Wait(); err != nil {
		return errors.New("no hosts are left standing") // it has said why
	}
	return nil
}

// keeper is what startKeeper starts.
func keeper(ctx context.Context) error {
	o, err := parse(os.Args[1:])
	if err != nil {
		return err
	}
	pipe := os.NewFile(keeperPipe, "pipe")
	unix.CloseOnExec(keeperPipe)
	l, err := net.Listen("unix", keeperSocket)
	if err != nil {
		return errors.New("hosts of a demo stand already; go run ./tests/demo --down removes them")
	}
	defer func() { _ = l.Close() }()
	var caller net.Conn
	err = show(ctx, o, func(d *demo) error {
		if err := d.tellHow(); err != nil {
			return err
		}
		if err := background(pipe); err != nil {
			return err
		}
		stop := context.AfterFunc(ctx, func() { _ = l.Close() })
		defer stop()
		caller, err = acceptRoot(l)
		return err
	})
	if caller != nil {
		if err != nil {
			_, _ = io.WriteString(caller, err.Error())
		}
		_ = caller.Close()
	}
	return err
}

// background says on the pipe that the story is told, and lets go of the
// terminal.
func background(pipe *os.File) error {
	if _, err := pipe.Write([]byte{1}); err != nil {
		return fmt.Errorf("who started this has gone: %w", err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { _ = null.Close() }()
	return errors.Join(pipe.Close(),
		unix.Dup3(int(null.Fd()), 1, 0), unix.Dup3(int(null.Fd()), 2, 0))
}

// acceptRoot waits for a connection of root: an abstract socket has no
// permissions of its own.
func acceptRoot(l net.Listener) (net.Conn, error) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(conn); err == nil && uid == 0 {
			return conn, nil
		}
		_ = conn.Close()
	}
}

func peerUID(conn net.Conn) (uint32, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var errCred error
	err = raw.Control(func(fd uintptr) {
		cred, errCred = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, errCred); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// tellHow writes the script that enters a host and prints how to go on.
func (d *demo) tellHow() error {
	script := &strings.Builder{}
	fmt.Fprint(script, "#!/bin/sh\n# enter HOST [COMMAND...]\nhost=$1\nshift\ncase $host in\n")
	for _, h := range d.lab.Hosts {
		// The path of a file of the host begins with /proc and the number of
		// its process 1.
		pid := strings.Split(h.Path("/"), "/")[2]
		fmt.Fprintf(script, "%s) pid=%s ;;\n", h.Name, pid)
	}
	fmt.Fprintf(script, `*) echo "no host $host: want u1, u2 or u3" >&2; exit 2 ;;
esac
[ $# -gt 0 ] || set -- sh -i
unset DOCKER_HOST DOCKER_CONTEXT
exec nsenter -t "$pid" -m -u -i -n -p -- env PATH=%s:"$PATH" PS1="$host# " DOCKER_CONFIG=/run/docker-config "$@"
`, d.bin)
	path := filepath.Join(d.bin, "enter")
	if err := os.WriteFile(path, []byte(script.String()), 0o755); err != nil {
		return fmt.Errorf("script: %w", err)
	}
	d.say("The hosts stay.")
	fmt.Fprintf(d.out, "enter one:     %s u1\nor run there:  %s u1 weave status\nremove all:    go run ./tests/demo --down\n", path, path)
	return nil
}

// down asks the keeper to remove all and returns when it has.
func down(ctx context.Context) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", keeperSocket)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return errors.New("no hosts of a demo stand")
	}
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	said, err := io.ReadAll(conn)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	if len(said) > 0 {
		return errors.New(string(said))
	}
	fmt.Fprintln(os.Stdout, "The hosts are gone.")
	return nil
}
