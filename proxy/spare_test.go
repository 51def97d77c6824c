package proxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"weave.local/proxy/docker"
	"weave.local/tests/lab"
)

// A spare connection serves the next request; one that the engine has closed is
// not used; and none holds up the engine's end, or outlives the proxy.
func TestSpare(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "yes") })
	s := newSpare(docker.New(e.socket).Dial)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.run(ctx) }()
	ready := func() {
		t.Helper()
		s.want()
		err := lab.Wait(t.Context(), 10*time.Second, func() error {
			if len(s.ready) == 0 {
				return errors.New("no connection is ready")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	ask := func() {
		t.Helper()
		c, err := s.conn(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if len(s.ready) != 0 {
			t.Error("the spare connection is left over")
		}
		if _, err := io.WriteString(c, "GET /x HTTP/1.1\r\nHost: docker\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "yes" {
			t.Errorf("%q, %v", body, err)
		}
	}
	ask() // there is none yet
	ready()
	ask()
	ready()
	e.server.CloseClientConnections()
	ask()
	ready()
	cancel()
	if err := <-done; err != nil || len(s.ready) != 0 {
		t.Errorf("%d connections left over, %v", len(s.ready), err)
	}

	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	go func() { done <- s.run(ctx) }()
	ready()
	limited, stop := context.WithTimeout(t.Context(), 3*time.Second) // it waits 5 s for a connection without a request
	defer stop()
	if err := e.server.Config.Shutdown(limited); err != nil {
		t.Errorf("the engine's end is held up: %v", err)
	}
}
