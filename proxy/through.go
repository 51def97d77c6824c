package proxy

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

const (
	// plainHead is the longest head of a request, in bytes, that is passed
	// through without the server.
	plainHead = 4 << 10
	// An answer is copied with a buffer of the first size, in bytes, which most
	// fit, and which grows to the second.
	smallAnswer = 4 << 10
	largeAnswer = 256 << 10
	headEnd     = "\r\n\r\n"
)

// front makes front conns of a listener's connections.
type front struct {
	net.Listener
	p    *Proxy
	dial func() (net.Conn, error) // for a connection to the engine
}

// Accept waits for a client.
func (f front) Accept() (net.Conn, error) {
	conn, err := f.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &frontConn{Conn: conn, p: f.p, dial: f.dial, between: true}, nil
}

// frontConn is a client's connection as the server sees it: without the
// requests that the proxy has no part in and that have no body. While the
// server waits for a request, these go to a connection to the engine that is
// this client's own, and what comes back is copied unread. That costs a
// fraction of serving them.
type frontConn struct {
	net.Conn
	p    *Proxy
	dial func() (net.Conn, error)

	// Used by the one goroutine that reads: the server reads either for a
	// request or on behalf of a handler.
	between bool   // the server waits for a request
	head    []byte // read, and for the server
	back    net.Conn
	copied  chan struct{} // closed when no more comes from back
	leaving chan struct{} // closed when that is not the end of the client's connection
}

// connState follows the server's view of a connection (http.Server.ConnState).
func connState(c net.Conn, s http.ConnState) {
	if f, ok := c.(*frontConn); ok && s == http.StateIdle {
		f.between = true
	}
}

// SyscallConn is the connection's socket (syscall.Conn).
func (f *frontConn) SyscallConn() (syscall.RawConn, error) {
	conn := f.Conn
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	if s, ok := conn.(syscall.Conn); ok {
		return s.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// CloseWrite ends what is sent to the client.
func (f *frontConn) CloseWrite() error {
	closeWrite(f.Conn)
	return nil
}

// Read is called by the server.
func (f *frontConn) Read(b []byte) (int, error) {
	if len(f.head) == 0 && f.between {
		if err := f.pass(); err != nil {
			return 0, err
		}
	}
	if len(f.head) > 0 {
		n := copy(b, f.head)
		f.head = f.head[n:]
		return n, nil
	}
	return f.Conn.Read(b)
}

// pass passes requests through until one comes that is the server's, whose
// beginning is in head then.
func (f *frontConn) pass() error {
	buf := make([]byte, plainHead)
	for {
		n, err := f.readHead(buf)
		if err == nil && plain(buf[:n], f.p.part) {
			if f.leaveToKeeper(buf[:n]) {
				return io.EOF
			}
			if f.send(buf[:n]) == nil {
				continue
			}
		}
		f.leave(err)
		if n > 0 {
			f.head, f.between = buf[:n], false
			return nil
		}
		return err
	}
}

// readHead reads until there is an empty line, or as much as it can.
func (f *frontConn) readHead(buf []byte) (n int, err error) {
	if f.back != nil { // the server has set a deadline for its first request only
		if err := f.SetReadDeadline(time.Time{}); err != nil {
			return 0, err
		}
	}
	for n < len(buf) {
		m, err := f.Conn.Read(buf[n:])
		n += m
		if err != nil || bytes.Contains(buf[:n], []byte(headEnd)) {
			return n, err
		}
		if n == m {
			if err := f.SetReadDeadline(time.Now().Add(headLimit)); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// send sends a request to the engine. An error means that it was not sent.
func (f *frontConn) send(head []byte) error {
	if f.back == nil {
		back, err := f.dial()
		if err != nil {
			return err
		}
		if !f.p.tunnels.add(back) {
			return errors.Join(net.ErrClosed, back.Close())
		}
		f.back, f.copied, f.leaving = back, make(chan struct{}), make(chan struct{})
		go f.answer(back, f.copied, f.leaving)
	}
	if n, err := f.back.Write(head); err != nil && n == 0 {
		return err
	}
	return nil
}

// answer copies what the engine sends. Its end is that of the client's
// connection, unless that is left to the server.
func (f *frontConn) answer(back net.Conn, copied, leaving chan struct{}) {
	defer f.p.tunnels.remove(back)
	defer close(copied)
	buf := make([]byte, smallAnswer)
	for {
		n, err := back.Read(buf)
		if n > 0 {
			if _, werr := f.Conn.Write(buf[:n]); werr != nil {
				err = werr
			}
		}
		if err != nil {
			break
		}
		if n == len(buf) && n < largeAnswer {
			buf = make([]byte, 4*n)
		}
	}
	_ = back.Close()
	select {
	case <-leaving:
	default:
		_ = f.Conn.Close()
	}
}

// leave gives up the connection to the engine because of an error of the
// client's or, without, since its next request is the server's. The engine ends
// it when it has answered.
func (f *frontConn) leave(err error) {
	if f.back == nil {
		return
	}
	close(f.leaving)
	if err == nil || errors.Is(err, io.EOF) {
		closeWrite(f.back)
		if err == nil || !hungUp(f, f.copied) {
			<-f.copied
		}
	}
	_ = f.back.Close()
	<-f.copied
	f.back = nil
	f.p.spare.want()
}

// cutHead takes the head of a request apart; path is without a query.
func cutHead(head string) (method, path, version, fields string) {
	first, fields, _ := strings.Cut(head, "\r\n")
	method, target, _ := strings.Cut(first, " ")
	target, version, _ = strings.Cut(target, " ")
	path, _, _ = strings.Cut(target, "?")
	return method, path, version, fields
}

// plain says whether a head is the whole of one request, one that the server
// need not see. When in doubt it is not.
func plain(head []byte, part func(method, path string) bool) bool {
	text, rest, ok := strings.Cut(string(head), headEnd)
	if !ok || rest != "" {
		return false
	}
	method, path, version, fields := cutHead(text)
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodDelete:
	default:
		return false
	}
	// A path could be written in more ways than one.
	if version != "HTTP/1.1" || !strings.HasPrefix(path, "/") || strings.Contains(path, "%") ||
		strings.Contains(path, "//") || strings.Contains(path, "/.") || part(method, unversioned(path)) {
		return false
	}
	for line := range strings.SplitSeq(fields, "\r\n") {
		name, value, ok := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch {
		case line == "":
		case !ok || strings.ContainsAny(name, " \t") || strings.ContainsAny(line, "\r\n"):
			return false
		case strings.EqualFold(name, "Content-Length") && value != "0",
			strings.EqualFold(name, "Connection") && !strings.EqualFold(value, "close") && !strings.EqualFold(value, "keep-alive"),
			strings.EqualFold(name, "Transfer-Encoding"), strings.EqualFold(name, "Upgrade"), strings.EqualFold(name, "Expect"):
			return false
		}
	}
	return true
}
