// Package memnet is a network of hosts in memory, for simulations in bubbles of
// testing/synctest: TCP connections with a delay, and cuts of either direction
// between any two hosts, during which what is sent waits, as it does in TCP.
package memnet

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// Net is a network. Its methods may be called from several goroutines.
type Net struct {
	delay time.Duration

	mu        sync.Mutex
	listeners map[netip.AddrPort]*Listener
	blocked   func(from, to netip.Addr) bool
	halves    map[*half]struct{} // with something that a cut may hold back
	port      uint16
}

// New is a network in which everything takes delay from end to end.
func New(delay time.Duration) *Net {
	return &Net{
		delay: delay, listeners: make(map[netip.AddrPort]*Listener), halves: make(map[*half]struct{}),
		blocked: func(_, _ netip.Addr) bool { return false },
	}
}

// Cut says which ways are cut from now on; nil: none. It is called with the
// network locked and must not call it.
func (n *Net) Cut(blocked func(from, to netip.Addr) bool) {
	if blocked == nil {
		blocked = func(_, _ netip.Addr) bool { return false }
	}
	n.mu.Lock()
	n.blocked = blocked
	halves := make([]*half, 0, len(n.halves))
	for h := range n.halves {
		halves = append(halves, h)
	}
	n.mu.Unlock()
	for _, h := range halves {
		h.wake()
	}
}

func (n *Net) cut(from, to netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.blocked(from, to)
}

// Listen opens a port.
func (n *Net) Listen(at netip.AddrPort) (*Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[at] != nil {
		return nil, syscall.EADDRINUSE
	}
	l := &Listener{net: n, at: at, conns: make(chan net.Conn, 128), done: make(chan struct{})}
	n.listeners[at] = l
	return l, nil
}

// Dial connects from a host to a port. Where the way is cut it takes as long as
// ctx lets it.
func (n *Net) Dial(ctx context.Context, from netip.Addr, to netip.AddrPort) (net.Conn, error) {
	timer := time.NewTimer(2 * n.delay)
	defer timer.Stop()
	if n.cut(from, to.Addr()) || n.cut(to.Addr(), from) {
		<-ctx.Done()
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	}
	select {
	case <-ctx.Done():
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: ctx.Err()}
	case <-timer.C:
	}
	n.mu.Lock()
	l := n.listeners[to]
	n.port = max(n.port+1, 32768)
	local := netip.AddrPortFrom(from, n.port)
	n.mu.Unlock()
	if l == nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	there, back := newHalf(n, from, to.Addr()), newHalf(n, to.Addr(), from)
	select {
	case l.conns <- &conn{in: there, out: back, local: to, remote: local}:
		return &conn{in: back, out: there, local: local, remote: to}, nil
	default:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
}

// Listener is an open port.
type Listener struct {
	net   *Net
	at    netip.AddrPort
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

// Accept waits for a connection.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close gives the port back.
func (l *Listener) Close() error {
	l.once.Do(func() {
		l.net.mu.Lock()
		delete(l.net.listeners, l.at)
		l.net.mu.Unlock()
		close(l.done)
	})
	return nil
}

// Addr is where it listens.
func (l *Listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

// conn is one end of a connection.
type conn struct {
	in, out       *half
	local, remote netip.AddrPort
}

func (c *conn) Read(b []byte) (int, error)  { return c.in.read(b) }
func (c *conn) Write(b []byte) (int, error) { return c.out.write(b) }
func (c *conn) LocalAddr() net.Addr         { return net.TCPAddrFromAddrPort(c.local) }
func (c *conn) RemoteAddr() net.Addr        { return net.TCPAddrFromAddrPort(c.remote) }

func (c *conn) Close() error {
	c.in.leave()
	c.out.end()
	return nil
}

func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.in.mu.Lock()
	c.in.deadline = t
	c.in.mu.Unlock()
	c.in.wake()
	return nil
}

// SetWriteDeadline does nothing: writes do not wait.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// half is one direction of a connection.
type half struct {
	net      *Net
	from, to netip.Addr
	news     chan struct{}

	mu       sync.Mutex
	chunks   []chunk
	ended    time.Time // the writing end closed; zero: no
	left     bool      // the reading end closed
	deadline time.Time // of the reader
}

type chunk struct {
	data []byte
	at   time.Time // when it arrives
}

func newHalf(n *Net, from, to netip.Addr) *half {
	h := &half{net: n, from: from, to: to, news: make(chan struct{}, 1)}
	n.mu.Lock()
	n.halves[h] = struct{}{}
	n.mu.Unlock()
	return h
}

func (h *half) wake() {
	select {
	case h.news <- struct{}{}:
	default:
	}
}

func (h *half) write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.ended.IsZero() {
		return 0, net.ErrClosed
	}
	if h.left && !h.net.cut(h.to, h.from) {
		return 0, syscall.EPIPE
	}
	h.chunks = append(h.chunks, chunk{append([]byte(nil), b...), time.Now().Add(h.net.delay)})
	h.wake()
	return len(b), nil
}

func (h *half) end() {
	h.mu.Lock()
	if h.ended.IsZero() {
		h.ended = time.Now().Add(h.net.delay)
	}
	h.mu.Unlock()
	h.wake()
}

func (h *half) leave() {
	h.mu.Lock()
	h.left, h.chunks = true, nil
	h.mu.Unlock()
	h.net.mu.Lock()
	delete(h.net.halves, h)
	h.net.mu.Unlock()
	h.wake()
}

func (h *half) read(b []byte) (int, error) {
	for {
		n, wait, err := h.try(b)
		if n > 0 || err != nil {
			return n, err
		}
		if wait <= 0 {
			<-h.news
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-h.news:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// try reads what has arrived; else it says for how long to wait, 0: for news.
func (h *half) try(b []byte) (n int, wait time.Duration, err error) {
	cut := h.net.cut(h.from, h.to)
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	sooner := func(t time.Time) {
		if d := t.Sub(now); wait == 0 || d < wait {
			wait = max(d, 1)
		}
	}
	switch {
	case h.left:
		return 0, 0, net.ErrClosed
	case !h.deadline.IsZero() && !now.Before(h.deadline):
		return 0, 0, os.ErrDeadlineExceeded
	case !h.deadline.IsZero():
		sooner(h.deadline)
	}
	if cut {
		return 0, wait, nil
	}
	for n < len(b) && len(h.chunks) > 0 && !h.chunks[0].at.After(now) {
		m := copy(b[n:], h.chunks[0].data)
		n += m
		if h.chunks[0].data = h.chunks[0].data[m:]; len(h.chunks[0].data) == 0 {
			h.chunks = h.chunks[1:]
		}
	}
	switch {
	case n > 0:
	case len(h.chunks) > 0:
		sooner(h.chunks[0].at)
	case !h.ended.IsZero() && !h.ended.After(now):
		return 0, 0, io.EOF
	case !h.ended.IsZero():
		sooner(h.ended)
	}
	return n, wait, nil
}
