package standin

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// helperEnv makes the test binary a stand-in.
const helperEnv = "STAND_IN_TEST"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := Serve(ctx, carry); err != nil {
			os.Exit(1) //nolint:forbidigo // the main of a program
		}
		return
	}
	os.Exit(m.Run()) //nolint:forbidigo // the main of the tests
}

// carry is what Serve does with kept connections here.
func carry(client, engine net.Conn) {
	_, _ = io.Copy(client, engine)
	_ = client.Close()
	_ = engine.Close()
}

// start binds a socket and has a stand-in on it.
func start(t *testing.T) (*net.UnixListener, *Process) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	p, err := Start(&exec.Cmd{Path: "/proc/self/exe", Args: []string{"stand-in"}, Env: []string{helperEnv + "=1"}}, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(); _ = p.cmd.Process.Kill(); _ = p.cmd.Wait() })
	return l, p
}

// ask makes a call, as the engine does.
func ask(t *testing.T, l *net.UnixListener) (status int, text string, closed bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/NetworkDriver.Join", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var a struct{ Err string }
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, a.Err, resp.Close
}

func ended(t *testing.T, p *Process) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the stand-in runs on")
	}
}

func TestTheDaemonIsGone(t *testing.T) {
	l, p := start(t)
	// While the daemon lives it alone answers.
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = http.ReadRequest(bufio.NewReader(c))
		}
		if err == nil {
			_, err = io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\n{\"Err\":\"the daemon\"}")
			_ = c.Close()
		}
		served <- err
	}()
	if status, text, _ := ask(t, l); status != http.StatusOK || text != "the daemon" {
		t.Errorf("while the daemon lives: %d %s", status, text)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if !p.Release() {
		t.Error("the stand-in is said to be gone")
	}
	_ = l.Close()
	for range 2 {
		if status, text, closed := ask(t, l); status != http.StatusInternalServerError || text != Refusal || !closed {
			t.Errorf("%d %q, connection closed: %v", status, text, closed)
		}
	}
	if !Answers(l.Addr().String()) || Abandoned(l.Addr().String()) {
		t.Error("no stand-in is said to answer")
	}
	if !End(l.Addr().String()) {
		t.Error("no stand-in was ended")
	}
	ended(t, p)
	if Answers(l.Addr().String()) || !Abandoned(l.Addr().String()) {
		t.Error("the socket of nobody is not said to be abandoned")
	}
	if End(l.Addr().String()) {
		t.Error("one was ended twice")
	}
	if err := Clear(l.Addr().String()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(l.Addr().String()); !errors.Is(err, os.ErrNotExist) || Abandoned(l.Addr().String()) {
		t.Errorf("the socket stays: %v", err)
	}
}

func TestSignalled(t *testing.T) {
	l, p := start(t)
	p.Release()
	_ = l.Close()
	ask(t, l) // it serves
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ended(t, p)
	if _, err := os.Lstat(l.Addr().String()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays: %v", err)
	}
}

func TestTheStandInIsGone(t *testing.T) {
	l, p := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("waited for one that lives: %v", err)
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	if p.Release() {
		t.Error("the stand-in is said to be there")
	}
	// The socket is the daemon's, which has not been asked.
	if err := Clear(l.Addr().String()); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(l.Addr().String()); err != nil {
		t.Errorf("a socket that is served was removed: %v", err)
	}
}

// Connections that were given to the stand-in are served while the daemon lives
// and afterwards, and it ends when the last of them has.
func TestKept(t *testing.T) {
	l, p := start(t)
	pair := func() (inside, outside net.Conn) {
		t.Helper()
		back, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
		if err == nil {
			defer func() { _ = back.Close() }()
			outside, err = net.DialTimeout("unix", back.Addr().String(), limit)
		}
		if err == nil {
			inside, err = back.Accept()
		}
		if err == nil {
			err = outside.SetDeadline(time.Now().Add(10 * time.Second))
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = inside.Close(); _ = outside.Close() })
		return inside, outside
	}
	hear := func(client net.Conn, want string) {
		t.Helper()
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(client, buf); err != nil || string(buf) != want {
			t.Errorf("%q, %v; want %q", buf, err, want)
		}
	}
	type way struct{ client, engine net.Conn } // their ends
	var ways []way
	for range 2 {
		ours, client := pair()
		back, engine := pair()
		if err := p.Keep(ours.(*net.UnixConn), back.(*net.UnixConn)); err != nil {
			t.Fatal(err)
		}
		_, _ = ours.Close(), back.Close()
		if _, err := io.WriteString(engine, "one"); err != nil {
			t.Fatal(err)
		}
		hear(client, "one")
		ways = append(ways, way{client, engine})
	}
	_ = ways[0].engine.Close()
	if _, err := ways[0].client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the engine ended, and the client saw %v", err)
	}
	p.Release()
	_ = l.Close()
	ask(t, l)
	if !End(l.Addr().String()) {
		t.Error("no stand-in was ended")
	}
	if _, err := io.WriteString(ways[1].engine, "two"); err != nil {
		t.Fatal(err)
	}
	hear(ways[1].client, "two")
	if err := p.cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("it ended before its last connection: %v", err)
	}
	_ = ways[1].engine.Close()
	ended(t, p)
	if err := p.Keep(l, l); err == nil {
		t.Error("one that is gone took connections")
	}
}
