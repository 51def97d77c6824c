package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"weave.local/peer"
	"weave.local/peer/handshake"
	"weave.local/router/seal"
)

const (
	byeWait      = 200 * time.Millisecond // for the last words on a link
	streamLinger = time.Minute            // for the other end's close of a stream
	writeWait    = 10 * time.Second
	maxIncoming  = 128     // streams one link may have in the making or relayed here
	pieceSize    = 8 << 10 // bytes written at once: yamux keeps a buffer of the largest for the life of a link
)

// link is one live link.
type link struct {
	peer     peer.Info // as of the handshake
	session  uint64
	key      *seal.Key     // of the password it was made with; nil: there is none
	keys     *seal.Session // for the data path; nil: in clear
	trusted  bool          // both ends trust the network between them
	outbound bool
	local    netip.AddrPort
	remote   netip.AddrPort
	began    time.Time
	conn     *heardConn
	queue    *queue
	mux      atomic.Pointer[yamux.Session] // nil until the session is up

	// Guarded by Mesh.mu.
	helloDue   time.Time
	before     uint64    // our digest when the link came up
	told       uint64    // digest in our last hello
	heard      uint64    // and in theirs
	joins      bool      // the other end could not be reached before, and no hello is here yet
	mismatches int       // hellos in a row with a digest other than ours
	expires    time.Time // when the link ends, its password being good no more; zero: it is

	once   sync.Once
	reason error // why it ended; set before done is closed
	done   chan struct{}
}

func newLink(h *handshake.Other, conn *heardConn, now time.Time) *link {
	return &link{
		peer:     h.Info,
		session:  h.Session,
		key:      h.Key,
		keys:     h.Keys,
		trusted:  h.Trusted,
		outbound: h.Outbound,
		local:    addrPort(conn.LocalAddr()),
		remote:   addrPort(conn.RemoteAddr()),
		began:    now,
		conn:     conn,
		queue:    newQueue(),
		done:     make(chan struct{}),
	}
}

// stop ends the link for the first reason given. It does not wait.
func (l *link) stop(reason error) {
	l.once.Do(func() {
		l.reason = reason
		close(l.done)
		if l.mux.Load() == nil { // open waits for the other end
			_ = l.conn.Close()
		}
	})
}

func (l *link) sendUrgent(frames [][]byte) {
	for _, f := range frames {
		l.queue.push(f, true)
	}
}

// hello sends our digest, or nothing for the same as before.
func (l *link) hello(digest uint64) {
	f := frame(typeHello, nil)
	if digest != l.told {
		f = helloFrame(digest)
	}
	if l.queue.push(f, true) {
		l.told = digest
	}
}

func (l *link) ended() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// serve runs a registered link until it is stopped or breaks, takes it out of
// the mesh and closes its connection. When ctx ends the other end is told.
func (l *link) serve(ctx context.Context, m *Mesh) error {
	defer context.AfterFunc(ctx, func() { l.stop(errors.New("it stops")) })()
	mux, control, err := l.open(m.log)
	if err != nil {
		l.stop(err)
		m.unregister(l)
		_ = l.conn.Close()
		return l.reason
	}
	l.mux.Store(mux)
	var tasks sync.WaitGroup
	flushed := make(chan struct{})
	tasks.Go(func() { l.stop(l.receive(m, control)) })
	tasks.Go(func() { l.stop(l.accept(ctx, m, mux)) })
	tasks.Go(func() {
		defer close(flushed)
		l.stop(l.transmit(control))
	})
	<-l.done
	m.unregister(l)
	l.queue.end(frame(typeBye, []byte(l.reason.Error())))
	timer := time.NewTimer(byeWait)
	defer timer.Stop()
	select {
	case <-flushed:
	case <-timer.C:
	}
	// The connection first: yamux would wait for a writer that is stuck.
	_ = l.conn.Close()
	_ = mux.Close()
	tasks.Wait()
	return l.reason
}

// open starts the yamux session and its first stream, which carries control
// frames.
func (l *link) open(log *slog.Logger) (*yamux.Session, net.Conn, error) {
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive = false // hellos do it
	cfg.StreamOpenTimeout = 0   // ours is in the opening of a stream, and closes no session
	cfg.StreamCloseTimeout = streamLinger
	cfg.ConnectionWriteTimeout = writeWait
	cfg.LogOutput = nil
	cfg.Logger = quiet{log}
	if l.outbound {
		mux, err := yamux.Client(l.conn, cfg)
		if err != nil {
			return nil, nil, fmt.Errorf("session: %w", err)
		}
		control, err := mux.Open()
		if err != nil {
			_ = mux.Close()
			return nil, nil, fmt.Errorf("control stream: %w", err)
		}
		return mux, control, nil
	}
	mux, err := yamux.Server(l.conn, cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("session: %w", err)
	}
	watch := time.AfterFunc(handshakeWait, func() { _ = l.conn.Close() })
	defer watch.Stop()
	control, err := mux.Accept()
	if err != nil {
		_ = mux.Close()
		return nil, nil, fmt.Errorf("control stream: %w", err)
	}
	return mux, control, nil
}

// transmit writes queued frames until the queue ends or the link breaks.
func (l *link) transmit(control io.Writer) error {
	for {
		f, ok := l.queue.pop()
		if !ok {
			return errors.New("closed")
		}
		for piece := range slices.Chunk(f, pieceSize) {
			if _, err := control.Write(piece); err != nil {
				return lost(err)
			}
		}
	}
}

// receive reads frames until the link breaks.
func (l *link) receive(m *Mesh, control io.Reader) error {
	var head [headSize]byte
	for {
		if _, err := io.ReadFull(control, head[:]); err != nil {
			return lost(err)
		}
		n := int64(binary.BigEndian.Uint32(head[:])) - 1
		if n < 0 || n > maxBody {
			return fmt.Errorf("frame of %d bytes, want at most %d", n, maxBody)
		}
		body := make([]byte, n)
		if _, err := io.ReadFull(control, body); err != nil {
			return lost(err)
		}
		if s, ok := control.(*yamux.Stream); ok && head[4] == typeHello {
			s.Shrink() // else it keeps room for all that ever waited in it at one time
		}
		if err := m.handleFrame(l, head[4], body); err != nil {
			return err
		}
	}
}

func lost(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, yamux.ErrSessionShutdown) {
		return errors.New("closed by the other end")
	}
	return err
}

// heardConn remembers when something last arrived.
type heardConn struct {
	net.Conn
	began time.Time
	heard atomic.Int64 // nanoseconds after began, which no change of the clock disturbs
	count *counters
}

func newHeardConn(c net.Conn, count *counters) *heardConn {
	return &heardConn{Conn: c, began: time.Now(), count: count}
}

// silence is how long nothing has arrived.
func (c *heardConn) silence(now time.Time) time.Duration {
	return now.Sub(c.began) - time.Duration(c.heard.Load())
}

// Read notes the time of what it reads.
func (c *heardConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.heard.Store(int64(time.Since(c.began)))
		c.count.bytesIn.Add(uint64(n))
	}
	return n, err
}

// Write counts what it writes.
func (c *heardConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.count.bytesOut.Add(uint64(max(n, 0)))
	return n, err
}

// quiet hands what yamux has to say to the debug log.
type quiet struct{ log *slog.Logger }

// Print logs its operands.
func (q quiet) Print(v ...any) { q.log.Debug("yamux", "text", fmt.Sprint(v...)) }

// Printf logs a formatted text.
func (q quiet) Printf(format string, v ...any) {
	q.log.Debug("yamux", "text", fmt.Sprintf(format, v...))
}

// Println logs its operands.
func (q quiet) Println(v ...any) { q.log.Debug("yamux", "text", fmt.Sprint(v...)) }

// addrPort is the address of a TCP end point.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
