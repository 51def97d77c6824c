package daemon

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/netutil"
)

// Whoever holds connections to the status address keeps others from it, but
// does not get more of them, nor does the daemon wait for him when it ends.
func TestStatusConnectionsAreFew(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	ask := func(c net.Conn) error {
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
			return err
		}
		r, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err == nil {
			_ = r.Body.Close()
		}
		return err
	}
	few := netutil.LimitListener(l, 2)
	go func() {
		ended <- serve(ctx, few, &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: time.Minute})
	}()
	conns := make([]net.Conn, 3)
	for i := range conns {
		if conns[i], err = net.Dial("tcp", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conns[i].Close() }()
		if i < 2 {
			if err := ask(conns[i]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := conns[2].Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = conns[2].SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := conns[2].Read(make([]byte, 1)); err == nil {
		t.Errorf("a third connection is served %d bytes", n)
	}
	_ = conns[0].Close()
	_ = conns[2].SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := conns[2].Read(make([]byte, 1)); err != nil {
		t.Errorf("with room for it the third is not served: %v", err)
	}
	another, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = another.Close() }()
	cancel()
	select {
	case err := <-ended: // it had to close what is held
		t.Log(err)
	case <-time.After(shutdownWait + 10*time.Second):
		t.Error("it does not end while connections are held")
	}
}
