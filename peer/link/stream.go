package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"

	"weave.local/peer"
)

const (
	streamVersion = 1
	streamHead    = 2 + 2*peer.NameSize

	ackAccepted = 6
	ackNoRoute  = 1
	ackTooFar   = 2
	ackBusy     = 3

	hopWait  = 5 * time.Second  // for the head of a stream, and for each relay's answer
	dialMost = 10 * time.Second // for Dial without a deadline of its own
)

// streamConn is one end of a stream between two peers.
type streamConn struct {
	*yamux.Stream
}

// Read returns io.ErrUnexpectedEOF when the link to the next hop broke.
func (c *streamConn) Read(b []byte) (int, error) {
	n, err := c.Stream.Read(b)
	if n == 0 && errors.Is(err, io.EOF) && c.Session().IsClosed() {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// CloseWrite ends our direction; reading goes on until the other end closes,
// but no longer than a minute.
func (c *streamConn) CloseWrite() error { return c.Stream.Close() }

// Close ends both directions.
func (c *streamConn) Close() error {
	err := c.Stream.Close()
	_ = c.SetDeadline(time.Unix(1, 0)) // wakes who reads
	return err
}

// Dial opens a stream to a peer; when it returns, the peer has accepted it. The
// stream has a CloseWrite method. Without deadline in ctx it takes 10 s at most.
func (m *Mesh) Dial(ctx context.Context, to peer.Name) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialMost)
	defer cancel()
	c, err := m.openHop(ctx, m.hop(to), streamTo{ttl: maxTTL, dst: to, src: m.cfg.Self.Name})
	if err != nil {
		return nil, fmt.Errorf("stream to %s: %w", to, err)
	}
	return c, nil
}

// streamTo is the head of a stream.
type streamTo struct {
	ttl      byte
	dst, src peer.Name
}

func (s streamTo) head() []byte {
	return peer.AppendName(peer.AppendName([]byte{streamVersion, s.ttl}, s.dst), s.src)
}

func parseStreamTo(b []byte) (s streamTo, err error) {
	if len(b) != streamHead || b[0] != streamVersion {
		return s, errFrame
	}
	s.ttl = b[1]
	s.dst = peer.NameFromMAC([peer.NameSize]byte(b[2:]))
	s.src = peer.NameFromMAC([peer.NameSize]byte(b[2+peer.NameSize:]))
	return s, nil
}

// openHop opens a stream over one link and waits for the answer of its
// destination.
func (m *Mesh) openHop(ctx context.Context, l *link, to streamTo) (*streamConn, error) {
	if l == nil {
		return nil, ErrNoRoute
	}
	mux := l.mux.Load()
	if mux == nil {
		return nil, ErrNoRoute
	}
	s, err := mux.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("link to %s: %w", l.peer, err)
	}
	c := &streamConn{s}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	err = ask(c, to)
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func ask(c net.Conn, to streamTo) error {
	if _, err := c.Write(to.head()); err != nil {
		return err
	}
	var ack [1]byte
	if _, err := io.ReadFull(c, ack[:]); err != nil {
		return err
	}
	switch ack[0] {
	case ackAccepted:
		return nil
	case ackNoRoute:
		return ErrNoRoute
	case ackBusy:
		return ErrBusy
	case ackTooFar:
		return fmt.Errorf("%w: more than %d links away", ErrNoRoute, maxTTL)
	}
	return fmt.Errorf("refused with code %d", ack[0])
}

// accept takes the streams that the other end of the link opens.
func (l *link) accept(ctx context.Context, m *Mesh, mux *yamux.Session) error {
	slots := make(chan struct{}, maxIncoming)
	for {
		s, err := mux.AcceptStream()
		if err != nil {
			return lost(err)
		}
		c := &streamConn{s}
		select {
		case slots <- struct{}{}:
			m.tasks.Go(func() {
				defer func() { <-slots }()
				m.incoming(ctx, l, c)
			})
		default:
			_ = c.Close()
		}
	}
}

// incoming takes a stream that is for us and relays one that is not.
func (m *Mesh) incoming(ctx context.Context, l *link, c *streamConn) {
	_ = c.SetDeadline(time.Now().Add(hopWait))
	head := make([]byte, streamHead)
	if _, err := io.ReadFull(c, head); err != nil {
		_ = c.Close()
		return
	}
	to, err := parseStreamTo(head)
	if err != nil {
		m.count.malformed.Add(1)
		_ = c.Close()
		return
	}
	if to.dst == m.cfg.Self.Name {
		m.take(ctx, c, to.src)
		return
	}
	if to.ttl <= 1 {
		refuse(c, ackTooFar)
		return
	}
	to.ttl--
	m.relay(ctx, l, c, to)
}

func refuse(c *streamConn, code byte) {
	_, _ = c.Write([]byte{code}) // the stream ends either way
	_ = c.Close()
}

// take hands a stream to the reader of Streams.
func (m *Mesh) take(ctx context.Context, c *streamConn, from peer.Name) {
	if len(m.streams) == cap(m.streams) {
		refuse(c, ackBusy)
		return
	}
	if _, err := c.Write([]byte{ackAccepted}); err != nil {
		_ = c.Close()
		return
	}
	_ = c.SetDeadline(time.Time{})
	timer := time.NewTimer(hopWait)
	defer timer.Stop()
	select {
	case m.streams <- Stream{Conn: c, From: from}:
	case <-timer.C:
		_ = c.Close()
	case <-ctx.Done():
		_ = c.Close()
	}
}

func (m *Mesh) relay(ctx context.Context, from *link, c *streamConn, to streamTo) {
	next := m.hop(to.dst)
	if next == from {
		next = nil // going back would only make it circle
	}
	wait, cancel := context.WithTimeout(ctx, hopWait)
	defer cancel()
	out, err := m.openHop(wait, next, to)
	switch {
	case errors.Is(err, ErrBusy):
		refuse(c, ackBusy)
		return
	case err != nil:
		refuse(c, ackNoRoute)
		return
	}
	_ = c.SetDeadline(time.Time{})
	if _, err := c.Write([]byte{ackAccepted}); err != nil {
		_ = c.Close()
		_ = out.Close()
		return
	}
	m.count.streams.Add(1)
	splice(c, out)
}

// splice copies both directions until both ended, or until a link breaks.
func splice(a, b *streamConn) {
	ended := make(chan bool, 2) // true: as its source wished
	one := func(dst, src *streamConn) {
		_, err := io.Copy(dst, src)
		_ = dst.CloseWrite()
		ended <- err == nil
	}
	go one(a, b)
	go one(b, a)
	for left := 2; left > 0; {
		select {
		case well := <-ended:
			left--
			if well {
				continue
			}
		case <-a.Session().CloseChan():
		case <-b.Session().CloseChan():
		}
		_ = a.Close()
		_ = b.Close()
		for ; left > 0; left-- {
			<-ended
		}
	}
	_ = a.Close()
	_ = b.Close()
}
