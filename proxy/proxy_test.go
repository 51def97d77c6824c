package proxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"weave.local/peer/state"
	"weave.local/proxy/docker"
	"weave.local/router/attach"
	"weave.local/router/firewall"
	"weave.local/router/overlay"
)

// fakeEngine answers as an engine would and notes what it was asked.
type fakeEngine struct {
	socket string
	server *httptest.Server
	mu     sync.Mutex
	seen   []string
}

func (e *fakeEngine) note(s string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen = append(e.seen, s)
}

func (e *fakeEngine) calls() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]string(nil), e.seen...)
}

func newEngine(t *testing.T, h http.HandlerFunc) *fakeEngine {
	t.Helper()
	e := &fakeEngine{socket: filepath.Join(t.TempDir(), "docker.sock")}
	l, err := net.Listen("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			w.Header().Set("Api-Version", "1.41")
			return
		}
		if r.Header.Get("Upgrade") == "" && !strings.HasSuffix(r.URL.Path, "/attach") && r.ContentLength >= 0 {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			e.note(strings.TrimSpace(r.Method + " " + r.RequestURI + " " + string(body)))
		}
		h(w, r)
	}))
	s.Listener, e.server = l, s
	s.Start()
	t.Cleanup(s.Close)
	return e
}

// config is that of a proxy in front of e, without addresses and networks.
func config(t *testing.T, e *fakeEngine) Config {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	db, err := state.Open(filepath.Join(t.TempDir(), "weave.db"), log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	fw, err := firewall.New(firewall.Config{Bridge: "weave", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	m, err := attach.New(attach.Config{Bridge: "weave", MTU: 1410, Store: db.Bucket("attach"), Firewall: fw, Log: log,
		SetPort: func(overlay.Port) error { return nil }, RemovePort: func(int) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	c := docker.New(e.socket)
	return Config{Docker: c, Attach: m, Watch: docker.NewWatcher(c, log), Store: db.Bucket("proxy"), Log: log,
		DefaultSubnet: netip.MustParsePrefix("10.32.0.0/12")}
}

type runningProxy struct {
	*Proxy
	socket string
	client *http.Client
	stop   func()
}

func startProxy(t *testing.T, e *fakeEngine, network func(netip.Prefix) (string, error), further ...string) *runningProxy {
	t.Helper()
	return startProxyWith(t, e, network, func(c *Config) { c.Listen = append(c.Listen, further...) })
}

func startProxyWith(t *testing.T, e *fakeEngine, network func(netip.Prefix) (string, error), set func(*Config)) *runningProxy {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "weave.sock")
	cfg := config(t, e)
	cfg.Listen = []string{"unix://" + socket}
	cfg.Network = func(_ context.Context, subnet netip.Prefix) (string, error) {
		if network == nil {
			return "", fmt.Errorf("network for %s asked for", subnet)
		}
		return network(subnet)
	}
	set(&cfg)
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	r := &runningProxy{Proxy: p, socket: socket}
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	r.client = &http.Client{Transport: tr}
	return r
}

func (r *runningProxy) post(t *testing.T, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://docker"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func TestAddresses(t *testing.T) {
	for in, want := range map[string]string{
		"unix:///run/x.sock": "unix:///run/x.sock", "/run/x.sock": "unix:///run/x.sock",
		"tcp://1.2.3.4:5": "tcp://1.2.3.4:5", "[::1]:5": "tcp://[::1]:5", "host:5": "tcp://host:5",
		"unix://x.sock": "", "unix:///a/../b": "", "1.2.3.4": "", "tcp://": "", "tcp://a:1/b": "",
	} {
		if got, err := ParseAddress(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestSocketLooksLikeTheEnginesAndGoes(t *testing.T) {
	e := newEngine(t, func(http.ResponseWriter, *http.Request) {})
	if err := os.Chmod(e.socket, 0o640); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "weave.sock")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	_ = left.Close()
	cfg := config(t, e)
	cfg.Listen = []string{socket, "127.0.0.1:0"}
	cfg.Network = func(context.Context, netip.Prefix) (string, error) { return "", nil }
	p, err := New(cfg)
	if err != nil {
		t.Fatal("over a left-over socket:", err)
	}
	fi, err := os.Stat(socket)
	if err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v; want that of the engine's socket", fi.Mode(), err)
	}
	if a := p.Addresses(); len(a) != 2 || a[0] != "unix://"+socket || !strings.HasPrefix(a[1], "tcp://127.0.0.1:") || strings.HasSuffix(a[1], ":0") {
		t.Errorf("addresses %v", a)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), socket) {
		t.Errorf("over a file: %v", err)
	}
}

// Each piece must arrive before the engine sends the next one.
func TestPiecesArriveAsTheyCome(t *testing.T) {
	got := make(chan struct{})
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		for range 3 {
			_, _ = io.WriteString(w, "piece\n")
			_ = http.NewResponseController(w).Flush()
			select {
			case <-got:
			case <-r.Context().Done():
				return
			}
		}
	})
	p := startProxy(t, e, nil)
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://docker/events?filters=%7B;&x", nil)
	resp, err := p.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	in := bufio.NewReader(resp.Body)
	for range 3 {
		if line, err := in.ReadString('\n'); err != nil || line != "piece\n" {
			t.Fatalf("%q, %v", line, err)
		}
		got <- struct{}{}
	}
	if want := "GET /events?filters=%7B;&x"; e.calls()[0] != want {
		t.Errorf("the engine was asked %q, want %q", e.calls()[0], want)
	}
}

// An engine may answer while the client is still sending, as in a build.
func TestAnswerBeforeEndOfRequest(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		in := bufio.NewReader(r.Body)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			_, _ = io.WriteString(w, "got "+line)
			_ = http.NewResponseController(w).Flush()
		}
	})
	p := startProxy(t, e, nil)
	body, feed := io.Pipe()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://docker/build", body)
	go func() { _, _ = io.WriteString(feed, "one\n") }()
	resp, err := p.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	in := bufio.NewReader(resp.Body)
	for _, s := range []string{"one\n", "two\n"} {
		if line, err := in.ReadString('\n'); err != nil || line != "got "+s {
			t.Fatalf("%q, %v", line, err)
		}
		if s == "one\n" {
			_, _ = io.WriteString(feed, "two\n")
		}
	}
	_ = feed.Close()
}

// What is left of a body when the answer is complete is not taken for another
// request, however late it comes.
func TestRestOfBody(t *testing.T) {
	const piece = 1000
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		if _, err := io.ReadFull(r.Body, make([]byte, piece)); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(w, "done")
	})
	p := startProxy(t, e, nil)
	conn := p.dial(t)
	in := bufio.NewReader(conn)
	answer := func(request, want string) {
		t.Helper()
		_, _ = io.WriteString(conn, request)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		if got, err := io.ReadAll(resp.Body); err != nil || string(got) != want {
			t.Fatalf("%q, %v; want %q", got, err, want)
		}
	}
	answer("GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n", "")
	answer("POST /images/load HTTP/1.1\r\nHost: docker\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"+strings.Repeat("x", piece)+"\r\n", "done")
	_, _ = io.WriteString(conn, "0\r\n\r\n")
	if more, err := io.ReadAll(in); err != nil || len(more) > 0 {
		t.Errorf("behind the answer: %q, %v", more, err)
	}
}

// A kept connection that the engine closed fails no request, and requests that
// must not be done twice are sent once.
func TestEngineClosesConnections(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/break" {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_ = conn.Close()
			return
		}
		_, _ = io.WriteString(w, "fine")
	})
	p := startProxy(t, e, nil)
	get := func(path string) int {
		resp, err := p.client.Get("http://docker" + path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	for range 3 {
		if s := get("/info"); s != http.StatusOK {
			t.Errorf("status %d", s)
		}
		if s, _ := p.post(t, "/break", "x"); s != http.StatusBadGateway {
			t.Errorf("a request the engine dropped: status %d", s)
		}
	}
	if n := strings.Count(strings.Join(e.calls(), "\n"), "POST /break"); n != 3 {
		t.Errorf("3 requests were sent %d times", n)
	}
}

// dial connects to the proxy for as long as the test lasts; an answer may take
// 20 s.
func (r *runningProxy) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}
