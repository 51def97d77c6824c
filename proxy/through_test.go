package proxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

func TestPlain(t *testing.T) {
	part := func(method, path string) bool { return creates(method, path) || streams(method, path) }
	for _, head := range []string{
		"GET /v1.41/containers/json?all=1&filters=%7B%7D HTTP/1.1\r\nHost: docker\r\nUser-Agent: x\r\n\r\n",
		"HEAD /_ping HTTP/1.1\r\n\r\n",
		"POST /v1.41/containers/x/stop?t=1 HTTP/1.1\r\nHost: docker\r\nConnection: close\r\ncontent-length: 0\r\n\r\n",
		"DELETE /containers/x HTTP/1.1\r\nHost:\r\n\r\n",
	} {
		if !plain([]byte(head), part) {
			t.Errorf("not plain: %q", head)
		}
	}
	for _, head := range []string{
		"", "\r\n\r\n", "GET / HTTP/1.1\r\n", "GET /\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "PUT / HTTP/1.1\r\n\r\n",
		"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n",
		"POST /containers/create HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
		"POST /v1.41/containers/create?name=a HTTP/1.1\r\n\r\n",
		"POST /containers/x/attach HTTP/1.1\r\n\r\n", "POST /v1.30/exec/x/start HTTP/1.1\r\n\r\n",
		"POST /containers/%63reate HTTP/1.1\r\n\r\n", "POST //containers/create HTTP/1.1\r\n\r\n",
		"POST /containers/./create HTTP/1.1\r\n\r\n", "POST /x/../containers/create HTTP/1.1\r\n\r\n",
		"POST http://docker/containers/create HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\n",
		"GET / HTTP/1.1\r\nUPGRADE: tcp\r\n\r\n", "GET / HTTP/1.1\r\nconnection: Upgrade\r\n\r\n",
		"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
		"POST / HTTP/1.1\r\nContent-Length : 5\r\n\r\n", "POST / HTTP/1.1\r\nA: b\r\n Content-Length: 5\r\n\r\n",
		"POST / HTTP/1.1\r\nA: b\nTransfer-Encoding: chunked\r\n\r\n", "POST / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n",
	} {
		if plain([]byte(head), part) {
			t.Errorf("plain: %q", head)
		}
	}
}

// Requests that are passed through and ones that are served follow upon each
// other on one connection.
func TestBothWaysOnOneConnection(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/create") {
			w.WriteHeader(http.StatusCreated)
			_, _ = io.WriteString(w, `{"Id":"c1"}`)
			return
		}
		for range 100 { // in pieces
			_, _ = io.WriteString(w, strings.Repeat(r.URL.Path, 50))
			_ = http.NewResponseController(w).Flush()
		}
	})
	p := startProxy(t, e, func(netip.Prefix) (string, error) { return "n", nil })
	conn := p.dial(t)
	in := bufio.NewReader(conn)
	for i := range 30 {
		request, want := fmt.Sprintf("GET /%d HTTP/1.1\r\nHost: docker\r\n\r\n", i), strings.Repeat(fmt.Sprintf("/%d", i), 5000)
		if i%3 == 2 {
			request, want = "POST /containers/create HTTP/1.1\r\nHost: docker\r\nContent-Length: 2\r\n\r\n{}", `{"Id":"c1"}`
		}
		half := len(request) / 2
		for _, piece := range []string{request[:half], request[half:]} {
			if _, err := io.WriteString(conn, piece); err != nil {
				t.Fatal(err)
			}
		}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || string(got) != want {
			t.Fatalf("request %d: %d bytes, %v; want %d", i, len(got), err, len(want))
		}
	}
	if got := strings.Count(strings.Join(e.calls(), "\n"), "/networks/n/connect"); got != 10 {
		t.Errorf("%d of 10 containers were connected", got)
	}
}

// The engine ends its connections, as when it is replaced, and clients come
// again.
func TestEngineEndsConnections(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "yes") })
	p := startProxy(t, e, nil)
	for range 20 {
		for range 2 {
			status, body, err := get(t.Context(), p.socket, "/x")
			if err != nil || status != http.StatusOK || string(body) != "yes" {
				t.Fatalf("%d %q %v", status, body, err)
			}
		}
		e.server.CloseClientConnections()
	}
}

// Clients that go away in the middle of a stream, in whatever way and by TCP as
// well, leave nothing. The engine notices only that its connection ends.
func TestVanishedClients(t *testing.T) {
	open := make(chan struct{}, 100)
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			_ = http.NewResponseController(w).Flush()
			open <- struct{}{}
			<-r.Context().Done()
			return
		}
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\n\r\n")
		open <- struct{}{}
		_, _ = io.Copy(io.Discard, buf)
		// The end of input is not that of the stream, and this container says
		// nothing.
		_ = lab.Wait(r.Context(), time.Minute, func() error {
			if !gone(conn) {
				return errors.New("the connection is open")
			}
			return nil
		})
	})
	p := startProxy(t, e, nil, "127.0.0.1:0")
	before := runtime.NumGoroutine()
	for _, network := range []string{"unix", "tcp"} {
		address := p.socket
		if network == "tcp" {
			address = strings.TrimPrefix(p.Addresses()[1], schemeTCP)
		}
		for i := range 40 {
			conn, err := net.Dial(network, address)
			if err != nil {
				t.Fatal(err)
			}
			request := "GET /events HTTP/1.1\r\nHost: docker\r\n\r\n"
			if i%2 == 0 {
				request = "POST /containers/x/attach HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
			}
			if _, err := io.WriteString(conn, request); err != nil {
				t.Fatal(err)
			}
			<-open
			if i%4 < 2 { // first its half, as one that has nothing to send
				closeWrite(conn)
			}
			if c, ok := conn.(*net.TCPConn); ok {
				_ = c.SetLinger(0) // its host says at once that it has gone
			}
			_ = conn.Close()
		}
	}
	err := lab.Wait(t.Context(), 20*time.Second, func() error {
		// Of each kind of client there were ten, and the proxy itself may have
		// been starting.
		if n := runtime.NumGoroutine(); n > before+8 {
			return fmt.Errorf("%d goroutines, %d before", n, before)
		}
		return nil
	})
	if err != nil {
		all := make([]byte, 1<<20)
		t.Errorf("%v:\n%.6000s", err, all[:runtime.Stack(all, true)])
	}
}

// Without an engine a client is told so, and is served again once there is one.
func TestNoEngine(t *testing.T) {
	e := newEngine(t, func(http.ResponseWriter, *http.Request) {})
	p := startProxy(t, e, nil)
	e.server.Close()
	status, body, err := get(t.Context(), p.socket, "/containers/json")
	if err != nil || status != http.StatusBadGateway || !strings.Contains(string(body), "Docker does not answer") {
		t.Errorf("%d %q %v", status, body, err)
	}
}
