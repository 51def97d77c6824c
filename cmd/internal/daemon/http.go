package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/net/netutil"
)

const (
	headerTimeout = 5 * time.Second
	shutdownWait  = 3 * time.Second

	// The status address is open to every user of the host, who must not use
	// up the daemon's file descriptors.
	maxStatusConns = 64
	statusTimeout  = 30 * time.Second
)

// serveStatus is serveHTTP for clients who may mean harm: there are few of them
// at a time, and none stays for long.
func serveStatus(ctx context.Context, l net.Listener, h http.Handler) error {
	return serve(ctx, netutil.LimitListener(l, maxStatusConns), &http.Server{
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
