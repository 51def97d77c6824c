package api

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/peer/gossip"
	"weave.local/peer/link"
	"weave.local/router"
	"weave.local/router/overlay"
)

// stuck is a data path whose work in the kernel does not end.
type stuck struct {
	entered chan string
	release chan struct{}
}

func (s stuck) wait(what string) error {
	s.entered <- what
	<-s.release
	return nil
}

func (s stuck) Name() string                                       { return overlay.FastDP }
func (s stuck) Apply(overlay.Forwarding) error                     { return s.wait("Apply") }
func (s stuck) SetPort(overlay.Port) error                         { return s.wait("SetPort") }
func (s stuck) RemovePort(int) error                               { return s.wait("RemovePort") }
func (s stuck) SetLease(time.Duration) error                       { return s.wait("SetLease") }
func (s stuck) Probe(peer.ShortID, uint64, int) error              { return nil }
func (s stuck) MTU(peer.ShortID) int                               { return 1500 }
func (s stuck) Traffic() (map[peer.ShortID]overlay.Traffic, error) { return nil, nil }
func (s stuck) Counters() (map[string]uint64, error)               { return nil, nil }
func (s stuck) Run(ctx context.Context) error                      { <-ctx.Done(); return nil }

// However long the kernel takes over what it was asked for, status answers.
func TestStatusNeverWaits(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	mesh, err := link.Listen(t.Context(), link.Config{
		Self: peer.Info{Name: 1, UID: 1, NickName: "one"}, Bind: netip.MustParseAddr("127.0.0.1"),
		Targets: []string{"127.0.0.2:1"}, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	g, err := gossip.New(gossip.Config{Mesh: mesh, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	r := router.New(router.Config{Mesh: mesh, Table: g.Table(router.TableName), Log: log})
	path := stuck{entered: make(chan string, 16), release: make(chan struct{})}
	r.Use(path, path)

	ctx, cancel := context.WithCancel(t.Context())
	var group errgroup.Group
	group.Go(func() error { return mesh.Run(ctx) })
	group.Go(func() error { return r.Run(ctx) })
	group.Go(func() error { return r.SetLocal(overlay.Port{IfIndex: 7}) })
	group.Go(func() error { return r.RemoveLocal(8) })
	group.Go(func() error { return r.SetLease(time.Hour) })
	defer func() {
		close(path.release)
		cancel()
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	}()
	in := map[string]bool{}
	for len(in) < 4 {
		select {
		case what := <-path.entered:
			in[what] = true
		case <-time.After(10 * time.Second):
			t.Fatalf("only in %v", in)
		}
	}

	h := New(Config{
		Mesh: mesh, Router: r, Log: log,
		Changing: func() bool { return false }, Sleeve: func() map[string]uint64 { return nil },
	}).Control()
	for request, want := range map[string]string{
		"/status": "Name", "/status/peers": "one", "/status/connections": "127.0.0.2:1", "/report": `"NickName": "one"`,
	} {
		answers(t, h, request, want)
	}
}

// answers asks for a page and looks for a word on it.
func answers(t *testing.T, h http.Handler, request, want string) {
	t.Helper()
	answer := make(chan *httptest.ResponseRecorder, 1)
	go func() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, request, nil))
		answer <- w
	}()
	select {
	case w := <-answer:
		if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s: %d %s", request, w.Code, w.Body)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("%s waits for the kernel", request)
	}
}
