package seal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/flynn/noise"
)

const (
	maxRecord    = 16 << 10 // bytes of the stream in a record
	tagLen       = 16
	recordHead   = 2
	rekeyRecords = 1 << 16
	closeWait    = 100 * time.Millisecond // for the end of the stream, when the connection closes
)

// ErrTampered says that a record is not what the other end sent.
var ErrTampered = errors.New("record of the sealed stream is not authentic")

// Conn is a sealed stream over another connection. A read or write that meets
// its deadline leaves the stream whole: the next one goes on where it stopped.
type Conn struct {
	net.Conn

	wr      sync.Mutex // guards what follows; Close never waits for it
	out     *noise.CipherState
	pending []byte // of a record, not yet written
	sealed  []byte // memory of records
	ended   bool
	wrErr   error

	rd    sync.Mutex // guards what follows
	in    *noise.CipherState
	buf   []byte // a record as far as it arrived
	plain []byte // opened, not yet read
	rdErr error
}

// NewConn seals conn, over which the handshake was done. A Keys serves one
// connection only.
func NewConn(conn net.Conn, k *Keys) *Conn {
	return &Conn{Conn: conn, out: k.out, in: k.in}
}

// Write seals b. When it fails for a deadline, the bytes it counts will be sent
// by the next Write.
func (c *Conn) Write(b []byte) (int, error) {
	c.wr.Lock()
	defer c.wr.Unlock()
	if c.ended {
		return 0, net.ErrClosed
	}
	n := 0
	for {
		if err := c.flush(); err != nil {
			return n, err
		}
		if len(b) == 0 {
			return n, nil
		}
		k := min(len(b), maxRecord)
		if err := c.seal(b[:k]); err != nil {
			return n, err
		}
		n += k
		b = b[k:]
	}
}

// seal makes a record of b, to be flushed.
func (c *Conn) seal(b []byte) error {
	if c.wrErr != nil {
		return c.wrErr
	}
	c.sealed = binary.BigEndian.AppendUint16(c.sealed[:0], uint16(len(b)+tagLen))
	if c.sealed, c.wrErr = c.out.Encrypt(c.sealed, nil, b); c.wrErr != nil {
		return c.wrErr
	}
	rekey(c.out)
	c.pending = c.sealed
	return nil
}

// flush writes what is left of the last record.
func (c *Conn) flush() error {
	for len(c.pending) > 0 {
		n, err := c.Conn.Write(c.pending)
		c.pending = c.pending[n:]
		if err != nil {
			return err
		}
	}
	return c.wrErr
}

// rekey forgets the past of a direction now and then.
func rekey(s *noise.CipherState) {
	if s.Nonce()%rekeyRecords == 0 {
		s.Rekey()
	}
}

// end writes the end of the stream once.
func (c *Conn) end() error {
	if c.ended {
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	c.ended = true
	if err := c.seal(nil); err != nil {
		return err
	}
	return c.flush()
}

// CloseWrite tells the other end that nothing more comes. Reading goes on.
func (c *Conn) CloseWrite() error {
	c.wr.Lock()
	defer c.wr.Unlock()
	if err := c.end(); err != nil {
		return err
	}
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// Close closes the connection. The other end is told, unless a Write is stuck.
func (c *Conn) Close() error {
	if c.wr.TryLock() {
		if c.SetWriteDeadline(time.Now().Add(closeWait)) == nil {
			_ = c.end() // it closes either way
		}
		c.wr.Unlock()
	}
	return c.Conn.Close()
}

// Read opens the next record or gives what is left of the last. It returns
// io.EOF only when the other end said so, and io.ErrUnexpectedEOF when the
// connection ended without that.
func (c *Conn) Read(b []byte) (int, error) {
	c.rd.Lock()
	defer c.rd.Unlock()
	if len(b) == 0 {
		return 0, nil
	}
	if len(c.plain) == 0 {
		if c.rdErr != nil {
			return 0, c.rdErr
		}
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(b, c.plain)
	c.plain = c.plain[n:]
	return n, nil
}

// fill reads one record. What is wrong with it stays wrong for ever, what is
// wrong with the connection may pass.
func (c *Conn) fill() error {
	if err := c.gather(recordHead); err != nil {
		return err
	}
	size := int(binary.BigEndian.Uint16(c.buf))
	if size < tagLen || size > maxRecord+tagLen {
		c.rdErr = fmt.Errorf("%w: %d bytes long", ErrTampered, size)
		return c.rdErr
	}
	if err := c.gather(recordHead + size); err != nil {
		return err
	}
	box := c.buf[recordHead:]
	plain, err := c.in.Decrypt(box[:0], nil, box)
	if err != nil {
		c.rdErr = ErrTampered
		return c.rdErr
	}
	rekey(c.in)
	c.plain, c.buf = plain, c.buf[:0]
	if len(plain) == 0 {
		c.rdErr = io.EOF
		return c.rdErr
	}
	return nil
}

// gather reads until buf holds n bytes.
func (c *Conn) gather(n int) error {
	for len(c.buf) < n {
		if cap(c.buf) < n {
			c.buf = append(make([]byte, 0, max(n, 512)), c.buf...)
		}
		k, err := c.Conn.Read(c.buf[len(c.buf):n])
		c.buf = c.buf[:len(c.buf)+k]
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && len(c.buf) < n {
			return err
		}
	}
	return nil
}
