package proxy

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

// hijack takes the connection over as the engine does and echoes the client's
// bytes back, in upper case, once the client has ended its half.
func hijack(t *testing.T, w http.ResponseWriter, head string) {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer func() { _ = conn.Close() }()
	_, _ = io.WriteString(conn, head+"ready\n")
	all, err := io.ReadAll(buf)
	if err != nil {
		t.Error(err)
	}
	_, _ = conn.Write(bytes.ToUpper(all))
}

func TestStreamsWithHalfClose(t *testing.T) {
	const (
		raw   = "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n"
		multi = "HTTP/1.1 200 OK\r\ncontent-type: application/vnd.docker.multiplexed-stream\r\n\r\n"
		tcp   = "HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
		h2c   = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
	)
	cases := []struct{ name, request, head string }{
		{"attach without upgrade", "POST /v1.41/containers/x/attach?stdin=1 HTTP/1.1\r\nHost: docker\r\nContent-Type: text/plain\r\n\r\n", raw},
		{"attach with upgrade", "POST /containers/x/attach HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n", tcp},
		{"exec with a body", "POST /v1.42/exec/x/start HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 13\r\n\r\n{\"Tty\":false}", tcp},
		{"exec without upgrade", "POST /v1.42/exec/x/start HTTP/1.1\r\nHost: docker\r\nContent-Length: 2\r\n\r\n{}", multi},
		{"session", "POST /session HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", h2c},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
				if _, err := io.Copy(io.Discard, r.Body); err != nil {
					t.Error(err)
				}
				hijack(t, w, c.head)
			})
			p := startProxy(t, e, nil)
			conn := p.dial(t)
			if _, err := io.WriteString(conn, c.request+"first "); err != nil {
				t.Fatal(err)
			}
			start := make([]byte, len(c.head)+len("ready\n"))
			if _, err := io.ReadFull(conn, start); err != nil || string(start) != c.head+"ready\n" {
				t.Fatalf("head %q, %v; want %q", start, err, c.head)
			}
			big := strings.Repeat("x", 1<<20)
			if _, err := io.WriteString(conn, big); err != nil {
				t.Fatal(err)
			}
			if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			rest, err := io.ReadAll(conn)
			if want := "FIRST " + strings.ToUpper(big); err != nil || string(rest) != want {
				t.Errorf("%d bytes came back, %v; want %d", len(rest), err, len(want))
			}
		})
	}
}

// A refused attach leaves the connection to HTTP: a create that follows on it
// must not slip past the proxy.
func TestRefusedStreamStaysHTTP(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch {
		case strings.HasSuffix(r.URL.Path, "/attach"):
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, `{"message":"No such container: x"}`)
		case strings.HasSuffix(r.URL.Path, "/create"):
			w.WriteHeader(http.StatusCreated)
			_, _ = io.WriteString(w, `{"Id":"c1"}`)
		}
	})
	p := startProxy(t, e, func(netip.Prefix) (string, error) { return "n", nil })
	conn := p.dial(t)
	in := bufio.NewReader(conn)
	for _, c := range []struct {
		request string
		status  int
	}{
		{"POST /containers/x/attach HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n", 404},
		{"POST /containers/create HTTP/1.1\r\nHost: docker\r\nContent-Length: 2\r\n\r\n{}", 201},
	} {
		if _, err := io.WriteString(conn, c.request); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("got %s, want %d", resp.Status, c.status)
		}
	}
	if got := strings.Join(e.calls(), "\n"); !strings.Contains(got, "/networks/n/connect") {
		t.Errorf("the create was not taken over; the engine saw\n%s", got)
	}
}

// Ending the proxy ends streams, and Run waits for them.
func TestEndingClosesStreams(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, _ *http.Request) {
		hijack(t, w, "HTTP/1.1 101 UPGRADED\r\n\r\n")
	})
	p := startProxy(t, e, nil)
	conn := p.dial(t)
	_, _ = io.WriteString(conn, "POST /containers/x/attach HTTP/1.1\r\nHost: docker\r\n\r\n")
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line == "ready\n" {
			break
		}
	}
	p.stop()
	if _, err := io.Copy(io.Discard, in); err != nil {
		t.Errorf("the stream ended with %v", err)
	}
}

func TestLongHeadsAreRefused(t *testing.T) {
	_, err := readHead(bufio.NewReader(strings.NewReader(strings.Repeat("x", maxHead+5000))))
	if err == nil || !strings.Contains(err.Error(), "longer") {
		t.Errorf("got %v", err)
	}
	if _, err := readHead(bufio.NewReader(strings.NewReader("HTTP/1.1 200 OK\r\nA: b\r\n"))); err == nil {
		t.Error("a head without an end was accepted")
	}
}
