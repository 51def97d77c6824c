// Package standin answers the engine's calls to the network driver while no
// daemon does.
//
// The engine repeats a call that nobody answers for 15 s, one call after the
// other; only an answer, be it a refusal, ends that at once. So a small process
// of its own, the stand-in, holds the driver's socket too. While the daemon lives
// it does nothing: it waits on a socket pair whose other end the daemon has. When
// that end is closed, by the daemon or, however the daemon ended, by the kernel,
// it refuses every call with one sentence. The next daemon ends it.
//
// It also has the connections of clients that must not end with the daemon: the
// proxy's, of who waits for a container to end. These it serves from the
// beginning and to their end.
package standin

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// NotRunning is in every error that the engine gets while no daemon runs.
const NotRunning = "weave is not running on this host"

// Refusal is the whole sentence.
const Refusal = NotRunning + ": start it with 'weave launch', and the containers that Docker would have started on its networks are started then"

const (
	// pairFD is the stand-in's end of the socket pair.
	pairFD = 3
	// endPath asks a stand-in to end.
	endPath = "/StandIn.End"
	// limit bounds one exchange with the other side, and maxAnswer its bytes.
	limit     = 2 * time.Second
	maxAnswer = 4 << 10
	// heapPercent keeps the little heap of the stand-in small
	// (runtime/debug.SetGCPercent).
	heapPercent = 10
)

// Process is a stand-in, seen by the daemon that started it. Its methods are for
// one goroutine at a time.
type Process struct {
	cmd  *exec.Cmd
	pair *net.UnixConn
}

// Start starts cmd, which has to call Serve, as the stand-in on a socket.
func Start(cmd *exec.Cmd, socket *net.UnixListener) (*Process, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("stand-in: socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "stand-in"), os.NewFile(uintptr(fds[1]), "daemon")
	pair, err := net.FileConn(ours)
	_ = ours.Close()
	if err == nil {
		cmd.ExtraFiles = []*os.File{theirs}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what is typed at the daemon is not for it
		err = cmd.Start()
	}
	_ = theirs.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("stand-in: %w", err), closeConn(pair))
	}
	p := &Process{cmd: cmd, pair: pair.(*net.UnixConn)}
	if err := p.pass(socket); err != nil {
		_ = p.pair.Close()
		return nil, errors.Join(fmt.Errorf("stand-in: pass the socket: %w", err), cmd.Process.Kill(), cmd.Wait())
	}
	return p, nil
}

func closeConn(c net.Conn) error {
	if c == nil {
		return nil
	}
	return c.Close()
}

// Keep gives the stand-in two connections, for the carry of Serve, which has them
// to itself when the caller has closed its own. An error means that it has not got
// them. Unlike the other methods it may be called at any time.
func (p *Process) Keep(client, engine syscall.Conn) error {
	if err := p.pair.SetWriteDeadline(time.Now().Add(limit)); err != nil {
		return fmt.Errorf("stand-in: %w", err)
	}
	if err := p.pass(client, engine); err != nil {
		return fmt.Errorf("stand-in: pass connections: %w", err)
	}
	return nil
}

// pass sends sockets (unix(7), SCM_RIGHTS). As files of exec.Cmd they would
// become blocking ones, here too.
func (p *Process) pass(sockets ...syscall.Conn) error {
	return withFDs(sockets, nil, func(fds []int) error {
		_, _, err := p.pair.WriteMsgUnix([]byte{0}, unix.UnixRights(fds...), nil)
		return err
	})
}

// withFDs calls f while the sockets cannot be closed.
func withFDs(sockets []syscall.Conn, fds []int, f func(fds []int) error) error {
	if len(sockets) == 0 {
		return f(fds)
	}
	raw, err := sockets[0].SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = withFDs(sockets[1:], append(fds, int(fd)), f) })
	return errors.Join(err, inner)
}

// Wait returns nil when the stand-in has ended, or ctx's error when that ends
// first.
func (p *Process) Wait(ctx context.Context) error {
	_ = p.pair.SetReadDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { _ = p.pair.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := p.pair.Read(make([]byte, 1)) // it never sends: this ends with it
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	_ = p.cmd.Wait()
	return nil
}

// Release leaves the socket to the stand-in, unless that has ended, which it
// says.
func (p *Process) Release() (there bool) {
	_ = p.pair.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := p.pair.Read(make([]byte, 1))
	_ = p.pair.Close()
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// Serve is the stand-in, in the process that Start started. It returns when ctx
// ends, and then removes the socket if it served it, or when End asks for that and
// carry has returned for all that Keep gave. carry has the connections to itself,
// and closes them.
func Serve(ctx context.Context, carry func(client, engine net.Conn)) error {
	debug.SetGCPercent(heapPercent)
	pair, socket, err := begin()
	if err != nil {
		return fmt.Errorf("this is for the daemon, which starts it: %w", err)
	}
	defer func() { _ = pair.Close() }()
	// The name that ps shows. Without it the stand-in is not worse.
	_ = os.WriteFile("/proc/self/comm", []byte("weave-stand-in"), 0)
	stop := context.AfterFunc(ctx, func() { _ = pair.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	debug.FreeOSMemory()
	var carried sync.WaitGroup
	for {
		var conns []net.Conn
		if conns, err = receive(pair, net.FileConn); err != nil {
			break
		}
		if len(conns) != 2 { // no more files can be opened
			for _, c := range conns {
				_ = c.Close()
			}
			continue
		}
		carried.Go(func() { carry(conns[0], conns[1]) })
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err := refuse(ctx, socket); err != nil {
		return err
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		carried.Wait()
	}()
	select {
	case <-over:
	case <-ctx.Done():
	}
	return nil
}

// begin gets what Start gives.
func begin() (*net.UnixConn, net.Listener, error) {
	f := os.NewFile(pairFD, "daemon")
	c, err := net.FileConn(f)
	if err != nil {
		return nil, nil, err
	}
	_ = f.Close()
	pair, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("file descriptor %d is no unix socket", pairFD)
	}
	sockets, err := receive(pair, net.FileListener)
	if err == nil && len(sockets) != 1 {
		err = fmt.Errorf("%d sockets instead of one", len(sockets))
	}
	if err != nil {
		return nil, nil, err
	}
	return pair, sockets[0], nil
}

// receive gets the sockets of one message. An error means that no more come; a
// message that is not as it should be has none.
func receive[T any](pair *net.UnixConn, open func(*os.File) (T, error)) ([]T, error) {
	oob := make([]byte, unix.CmsgSpace(2*4))
	n, m, _, _, err := pair.ReadMsgUnix(make([]byte, 1), oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, err
	}
	var out []T
	messages, _ := unix.ParseSocketControlMessage(oob[:m])
	for _, message := range messages {
		fds, _ := unix.ParseUnixRights(&message)
		for _, fd := range fds {
			f := os.NewFile(uintptr(fd), "socket")
			if s, err := open(f); err == nil {
				out = append(out, s)
			}
			_ = f.Close()
		}
	}
	return out, nil
}

// refuse answers all calls until ctx ends or End asks for it.
func refuse(ctx context.Context, socket net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answer, err := json.Marshal(map[string]string{"Err": Refusal})
	if err != nil {
		return err
	}
	server := &http.Server{ReadHeaderTimeout: limit, ReadTimeout: limit, WriteTimeout: limit}
	// A connection that is kept would still lead here when the daemon is back.
	server.SetKeepAlivesEnabled(false)
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == endPath {
			w.WriteHeader(http.StatusNoContent)
			cancel(errEnded)
			return
		}
		w.Header().Set("Content-Type", "application/vnd.docker.plugins.v1.1+json")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write(answer)
	})
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		if !errors.Is(context.Cause(ctx), errEnded) {
			_ = os.Remove(socket.Addr().String())
		}
		limited, done := context.WithTimeout(context.WithoutCancel(ctx), limit)
		defer done()
		_ = server.Shutdown(limited)
	})
	if err := server.Serve(socket); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return err
	}
	<-stopped
	return nil
}

var errEnded = errors.New("ended by the next daemon")

// End ends the stand-in that serves a socket, and says whether there was one.
// The socket's file stays.
func End(path string) bool {
	status, _, err := call(path, endPath)
	return err == nil && status == http.StatusNoContent
}

// Answers says whether a stand-in answers on a socket in a daemon's place.
func Answers(path string) bool {
	_, text, err := call(path, "/Plugin.Activate")
	return err == nil && strings.Contains(text, NotRunning)
}

// Abandoned says whether a socket is there that nobody serves, as when a daemon
// and its stand-in were both killed: the engine waits for it with each call.
func Abandoned(path string) bool {
	_, _, err := call(path, "/Plugin.Activate")
	return errors.Is(err, syscall.ECONNREFUSED)
}

// call makes one call on a socket.
func call(path, method string) (status int, text string, err error) {
	c, err := net.DialTimeout("unix", path, limit)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return 0, "", err
	}
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.0\r\n\r\n", method); err != nil {
		return 0, "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, "", err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	return resp.StatusCode, string(b), errors.Join(err, resp.Body.Close())
}

// Clear ends the stand-in on a socket and removes the file, also one that a
// killed process left. A socket that another program serves is left alone.
func Clear(path string) error {
	if !End(path) {
		if c, err := net.DialTimeout("unix", path, limit); err == nil {
			return c.Close()
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
