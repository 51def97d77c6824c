package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// engine serves h on a unix socket and returns a client of it.
func engine(t *testing.T, version string, h http.HandlerFunc) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	serve(t, socket, version, h)
	return New(socket)
}

func serve(t *testing.T, socket, version string, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/_ping" {
			w.Header().Set("Api-Version", version)
			return
		}
		h(w, r)
	}))
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return s
}

func TestVersionIsTheOlderOne(t *testing.T) {
	for server, want := range map[string]string{"1.41": "1.41", "1.24": "1.24", "1.51": "1.51", "1.99": newestAPI, "2.0": newestAPI} {
		var path string
		c := engine(t, server, func(w http.ResponseWriter, r *http.Request) {
			path = r.URL.Path
			_, _ = io.WriteString(w, "[]")
		})
		if _, err := c.ListContainers(t.Context(), false, nil); err != nil {
			t.Fatal(err)
		}
		if want := "/v" + want + "/containers/json"; path != want {
			t.Errorf("engine with %s: asked for %s, want %s", server, path, want)
		}
	}
	c := engine(t, "latest", func(http.ResponseWriter, *http.Request) {})
	if _, err := c.APIVersion(t.Context()); err == nil {
		t.Error("a version that is no number was accepted")
	}
}

func TestErrorsCarryTheEnginesMessage(t *testing.T) {
	c := engine(t, "1.41", func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.Contains(r.URL.Path, "/networks/none"):
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, `{"message":"network none not found"}`)
		case strings.Contains(r.URL.Path, "/networks/used"):
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, "plain words\n")
		}
	})
	_, err := c.InspectNetwork(t.Context(), "none")
	if !IsNotFound(err) || !strings.Contains(err.Error(), "network none not found") {
		t.Errorf("got %v", err)
	}
	if err := c.RemoveNetwork(t.Context(), "none"); err != nil {
		t.Errorf("removing what is gone: %v", err)
	}
	if err := c.RemoveNetwork(t.Context(), "used"); !IsConflict(err) || !strings.HasSuffix(err.Error(), "plain words") {
		t.Errorf("got %v", err)
	}
	for _, ref := range []string{"", strings.Repeat("x", maxReference+1)} {
		if _, err := c.InspectContainer(t.Context(), ref); err == nil || IsNotFound(err) {
			t.Errorf("reference of %d bytes: %v", len(ref), err)
		}
	}
}

func TestReferencesAreOnePathElement(t *testing.T) {
	var uri string
	c := engine(t, "1.41", func(w http.ResponseWriter, r *http.Request) {
		uri = r.RequestURI
		_, _ = io.WriteString(w, "{}")
	})
	if _, err := c.InspectContainer(t.Context(), "../networks/x?y"); err != nil {
		t.Fatal(err)
	}
	if want := "/v1.41/containers/..%2Fnetworks%2Fx%3Fy/json"; uri != want {
		t.Errorf("got %s, want %s", uri, want)
	}
}

func TestConnectSendsSettings(t *testing.T) {
	var body map[string]any
	c := engine(t, "1.41", func(_ http.ResponseWriter, r *http.Request) {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
	})
	err := c.ConnectNetwork(t.Context(), "weave", "c1", &EndpointSettings{IPAMConfig: &EndpointIPAM{IPv4Address: "10.32.0.9"}})
	if err != nil {
		t.Fatal(err)
	}
	want := `map[Container:c1 EndpointConfig:map[IPAMConfig:map[IPv4Address:10.32.0.9]]]`
	if got := fmt.Sprint(body); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// The engine goes away in the middle and comes back: the watcher tells of all
// containers again and goes on with events.
func TestWatcherOutlivesTheEngine(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "docker.sock")
	round := 0
	handler := func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/containers/json") {
			_, _ = fmt.Fprintf(w, `[{"Id":"c%d","Names":["/other/alias","/name"],"State":"running"}]`, round)
			return
		}
		_, _ = fmt.Fprintf(w, `{"Type":"container","Action":"exec_die","Actor":{"ID":"x"}}
{"Type":"container","Action":"die","Actor":{"ID":"d%d","Attributes":{"name":"n"}},"timeNano":7}
`, round)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
	first := serve(t, socket, "1.41", handler)
	w := NewWatcher(New(socket), slog.New(slog.DiscardHandler))
	lists, events := make(chan []Container, 4), make(chan Event, 4)
	w.OnConnect(func(_ context.Context, all []Container) { lists <- all })
	w.OnEvent(func(e Event) { events <- e })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	expect := func(n int) {
		t.Helper()
		if all := <-lists; len(all) != 1 || all[0].ID != fmt.Sprintf("c%d", n) || all[0].Name() != "name" {
			t.Errorf("round %d: containers %+v", n, all)
		}
		want := Event{Action: ActionDie, ID: fmt.Sprintf("d%d", n), Name: "n", Attributes: map[string]string{"name": "n"}, Time: time.Unix(0, 7)}
		if e := <-events; !reflect.DeepEqual(e, want) {
			t.Errorf("round %d: event %+v, want %+v", n, e, want)
		}
	}
	expect(0)
	first.CloseClientConnections()
	first.Close()
	round = 1
	serve(t, socket, "1.41", handler)
	expect(1)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Run ended with %v", err)
	}
}

func FuzzParseEvent(f *testing.F) {
	f.Add([]byte(`{"Type":"container","Action":"start","Actor":{"ID":"abc","Attributes":{"name":"n"}},"timeNano":1}`))
	f.Add([]byte(`{"Type":"network"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if e, ok := parseEvent(line); ok && (e.ID == "" || e.Action == "") {
			t.Errorf("event without id or action from %q", line)
		}
	})
}
