package proxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestWaits(t *testing.T) {
	for head, want := range map[string]bool{
		"POST /v1.41/containers/x/wait?condition=removed HTTP/1.1\r\nHost: docker\r\n\r\n": true,
		"POST /containers/x/wait HTTP/1.1\r\n\r\n":                                         true,
		"POST /containers/x/wait HTTP/1.1\r\nconnection: close\r\n\r\n":                    false,
		"GET /containers/x/wait HTTP/1.1\r\n\r\n":                                          false,
		"POST /containers/wait HTTP/1.1\r\n\r\n":                                           false,
		"POST /containers/x/wait/y HTTP/1.1\r\n\r\n":                                       false,
		"POST /volumes/x/wait HTTP/1.1\r\n\r\n":                                            false,
		"POST /containers/x/stop?a=/wait HTTP/1.1\r\n\r\n":                                 false,
	} {
		if got := waits([]byte(head)); got != want {
			t.Errorf("%q: %v", head, got)
		}
	}
}

// keeper does what the process does that outlives the daemon.
type keeper struct {
	wg      sync.WaitGroup
	refuses bool
	mu      sync.Mutex
	kept    int
}

func (k *keeper) keep(client, engine syscall.Conn) error {
	if k.refuses {
		return errors.New("there is none")
	}
	var conns [2]net.Conn
	for i, s := range []syscall.Conn{client, engine} {
		f, err := s.(interface{ File() (*os.File, error) }).File()
		if err == nil {
			conns[i], err = net.FileConn(f)
			_ = f.Close()
		}
		if err != nil {
			return err
		}
	}
	k.mu.Lock()
	k.kept++
	k.mu.Unlock()
	k.wg.Go(func() { Carry(conns[0], conns[1]) })
	return nil
}

// waiting is an engine whose containers end when it is told, and a proxy in front
// of it that has a keeper.
type waiting struct {
	*runningProxy
	*keeper
	asked, over, left chan struct{}
}

func startWaiting(t *testing.T) *waiting {
	t.Helper()
	w := &waiting{keeper: &keeper{}, asked: make(chan struct{}, 10), over: make(chan struct{}), left: make(chan struct{}, 10)}
	e := newEngine(t, func(rw http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/wait") {
			_, _ = io.WriteString(rw, "yes")
			return
		}
		_ = http.NewResponseController(rw).Flush()
		w.asked <- struct{}{}
		select {
		case <-w.over:
			_, _ = io.WriteString(rw, `{"StatusCode":7}`)
		case <-r.Context().Done():
			w.left <- struct{}{}
		}
	})
	w.runningProxy = startProxyWith(t, e, nil, func(c *Config) { c.Keep = w.keep })
	return w
}

// ask makes two requests on a connection, the second one to wait, and returns when
// the engine has got that.
func (w *waiting) ask(t *testing.T) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn := w.dial(t)
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	if _, err := io.WriteString(conn, "GET /one HTTP/1.1\r\nHost: docker\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if body, _, err := readAnswer(in); err != nil || body != "yes" {
		t.Fatalf("%q %v", body, err)
	}
	if _, err := io.WriteString(conn, "POST /v1.41/containers/x/wait HTTP/1.1\r\nHost: docker\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	within(t, w.asked, "the engine is asked")
	return conn, in
}

func readAnswer(in *bufio.Reader) (body string, closes bool, err error) {
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		return "", false, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return string(b), resp.Close, err
}

func within(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Fatalf("not within 10 s: %s", what)
	}
}

// Who waits for a container goes on when the proxy ends, and learns that further
// requests need another connection.
func TestWaitOutlivesTheProxy(t *testing.T) {
	w := startWaiting(t)
	_, whole := w.ask(t)
	conn, half := w.ask(t)
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil { // has nothing more to say
		t.Fatal(err)
	}
	w.stop()
	close(w.over)
	for i, in := range []*bufio.Reader{whole, half} {
		if body, closes, err := readAnswer(in); err != nil || body != `{"StatusCode":7}` || !closes {
			t.Errorf("%d: %q %v, connection closes: %v", i, body, err, closes)
		}
		if _, err := in.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("%d: after the answer: %v", i, err)
		}
	}
	if w.kept != 2 {
		t.Errorf("%d of 2 were kept", w.kept)
	}
	w.wg.Wait()
}

// A client that goes, or asks something else meanwhile, ends the engine's
// connection; what it asked does not get past the proxy.
func TestWaitIsGivenUp(t *testing.T) {
	w := startWaiting(t)
	conn, _ := w.ask(t)
	_ = conn.Close()
	within(t, w.left, "the engine learns that the client has gone")
	conn, in := w.ask(t)
	if _, err := io.WriteString(conn, "POST /containers/create HTTP/1.1\r\nHost: docker\r\nContent-Length: 2\r\n\r\n{}"); err != nil {
		t.Fatal(err)
	}
	within(t, w.left, "the engine's connection ends")
	if body, _, err := readAnswer(in); err == nil {
		t.Errorf("an answer: %q", body)
	}
	w.wg.Wait()
}

// Without a keeper waiting is as ever.
func TestWaitWithoutKeeper(t *testing.T) {
	w := startWaiting(t)
	w.refuses = true
	_, in := w.ask(t)
	close(w.over)
	if body, closes, err := readAnswer(in); err != nil || body != `{"StatusCode":7}` || closes {
		t.Errorf("%q %v, connection closes: %v", body, err, closes)
	}
}
