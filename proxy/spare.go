package proxy

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"time"
)

// spareLimit bounds how long the engine may take for a spare connection.
const spareLimit = 10 * time.Second

// spare keeps one connection to the engine ready for the client that comes
// next. The engine has answered on it once: one that it still waits for would
// hold up its end, by 5 s (net/http.Server.Shutdown).
type spare struct {
	dial   func(context.Context) (net.Conn, error)
	ready  chan net.Conn // capacity 1; run alone sends
	wanted chan struct{} // capacity 1
}

func newSpare(dial func(context.Context) (net.Conn, error)) *spare {
	return &spare{dial: dial, ready: make(chan net.Conn, 1), wanted: make(chan struct{}, 1)}
}

// conn is the spare connection or, where there is none, a new one. A spare one
// that has ended is not used. An engine that ends at this very moment would take
// no new connection either.
func (s *spare) conn(ctx context.Context) (net.Conn, error) {
	select {
	case c := <-s.ready:
		if !gone(c) {
			return c, nil
		}
		_ = c.Close()
	default:
	}
	return s.dial(ctx)
}

// want asks for a spare connection unless there is one. It is called when a
// client has left, so that no client waits for it.
func (s *spare) want() {
	select {
	case s.wanted <- struct{}{}:
	default:
	}
}

// run makes spare connections until ctx ends.
func (s *spare) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			select {
			case c := <-s.ready:
				return c.Close()
			default:
				return nil
			}
		case <-s.wanted:
		}
		if len(s.ready) > 0 {
			continue
		}
		if c, err := s.made(ctx); err == nil { // else the next client dials, and is told
			s.ready <- c
		}
	}
}

func (s *spare) made(ctx context.Context) (net.Conn, error) {
	c, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err = c.SetDeadline(time.Now().Add(spareLimit)); err == nil {
		if _, err = io.WriteString(c, http.MethodHead+" /_ping HTTP/1.1\r\nHost: docker\r\n\r\n"); err == nil {
			_, err = readHead(bufio.NewReader(c))
		}
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}
