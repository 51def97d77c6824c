package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

const (
	headerTimeout = 5 * time.Second
	shutdownWait  = 3 * time.Second

	// The status address is open to every user of the host, who must not use
	// up the daemon's file descriptors.
	maxStatusConns = 64
	statusTimeout  = 30 * time.Second
)

// few limits how many connections of a listener are open at a time.
type few struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func newFew(l net.Listener, n int) *few {
	return &few{Listener: l, slots: make(chan struct{}, n), closed: make(chan struct{})}
}

// Accept waits for a connection, and before that until there is room for one.
func (f *few) Accept() (net.Conn, error) {
	select {
	case f.slots <- struct{}{}:
	case <-f.closed:
		return nil, net.ErrClosed
	}
	c, err := f.Listener.Accept()
	if err != nil {
		<-f.slots
		return nil, err
	}
	return &oneOfFew{Conn: c, free: sync.OnceFunc(func() { <-f.slots })}, nil
}

// Close ends Accept.
func (f *few) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.Listener.Close()
}

type oneOfFew struct {
	net.Conn
	free func()
}

// Close makes room for another connection.
func (c *oneOfFew) Close() error {
	defer c.free()
	return c.Conn.Close()
}

// serveStatus is serveHTTP for clients who may mean harm: there are few of them
// at a time, and none stays for long.
func serveStatus(ctx context.Context, l net.Listener, h http.Handler) error {
	return serve(ctx, newFew(l, maxStatusConns), &http.Server{
		Handler: h, ReadTimeout: headerTimeout, WriteTimeout: statusTimeout, IdleTimeout: headerTimeout,
	})
}

// serveHTTP serves until ctx ends, then lets requests under way finish.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	return serve(ctx, l, &http.Server{Handler: h, ReadHeaderTimeout: headerTimeout})
}

func serve(ctx context.Context, l net.Listener, srv *http.Server) error {
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	done := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownWait)
		defer cancel()
		done <- srv.Shutdown(end)
	})
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	if err := <-done; err != nil {
		return errors.Join(err, srv.Close())
	}
	return nil
}

// NotifySystemd tells a service manager that started us that we are ready
// (sd_notify(3)); without one it does nothing.
func NotifySystemd() {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	if name[0] == '@' {
		name = "\x00" + name[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return
	}
	defer func() { _ = c.Close() }()
	_, _ = c.Write([]byte("READY=1"))
}
