package seal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"
)

// writeOnly is a connection that keeps what is written.
type writeOnly struct{ io.Writer }

func (writeOnly) Read([]byte) (int, error)         { return 0, io.EOF }
func (writeOnly) Close() error                     { return nil }
func (writeOnly) LocalAddr() net.Addr              { return nil }
func (writeOnly) RemoteAddr() net.Addr             { return nil }
func (writeOnly) SetDeadline(time.Time) error      { return nil }
func (writeOnly) SetReadDeadline(time.Time) error  { return nil }
func (writeOnly) SetWriteDeadline(time.Time) error { return nil }

// readOnly is a connection from which bytes are read, as many at once as the
// reader likes.
type readOnly struct {
	writeOnly
	io.Reader
}

func (r readOnly) Read(b []byte) (int, error) { return r.Reader.Read(b) }

// tcpPair is a sealed TCP connection on loopback.
func tcpPair(t *testing.T) (a, b *Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	out, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	d, k := shake(t, both())
	a, b = NewConn(out, d), NewConn(in, k)
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	return a, b
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = r.Read(b)
	return b
}

func TestStreamBothWaysWithHalfClose(t *testing.T) {
	a, b := tcpPair(t)
	text := random(3<<20 + 17)
	go func() {
		for rest := text; len(rest) > 0; {
			n := min(len(rest), 1+rand.N(40000))
			_, _ = a.Write(rest[:n])
			rest = rest[n:]
		}
		_ = a.CloseWrite()
	}()
	got, err := io.ReadAll(b)
	if err != nil || !bytes.Equal(got, text) {
		t.Fatalf("%d bytes arrive of %d, %v", len(got), len(text), err)
	}
	if _, err := a.Write([]byte("more")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	if _, err := b.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(a); err != nil || string(got) != "answer" {
		t.Errorf("after the half close: %q, %v", got, err)
	}
}

func TestStreamCutShows(t *testing.T) {
	a, b := tcpPair(t)
	if _, err := a.Write([]byte("half")); err != nil {
		t.Fatal(err)
	}
	if err := a.Conn.Close(); err != nil { // as a third party on the path could
		t.Fatal(err)
	}
	got, err := io.ReadAll(b)
	if string(got) != "half" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%q, %v: a cut stream looks whole", got, err)
	}
}

func TestDeadlinesLeaveTheStreamWhole(t *testing.T) {
	a, b := tcpPair(t)
	text := random(16 << 20) // more than the buffers of a TCP connection hold
	past := time.Unix(1, 0)
	written := 0
	if err := a.SetWriteDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := a.Write(text)
	written += n
	if !errors.Is(err, os.ErrDeadlineExceeded) || n == len(text) {
		t.Fatalf("%d bytes, %v: no deadline met", n, err)
	}
	done := make(chan error, 1)
	go func() {
		for written < len(text) {
			_ = a.SetWriteDeadline(time.Now().Add(time.Millisecond))
			n, err := a.Write(text[written:])
			written += n
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				done <- err
				return
			}
		}
		_ = a.SetWriteDeadline(time.Time{})
		done <- a.CloseWrite()
	}()
	var got []byte
	buf := make([]byte, 1000)
	for i := 0; ; i++ {
		if i%3 == 0 {
			_ = b.SetReadDeadline(past)
		} else {
			_ = b.SetReadDeadline(time.Now().Add(time.Millisecond))
		}
		n, err := b.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !bytes.Equal(got, text) {
		t.Errorf("%d bytes arrive of %d, or others", len(got), len(text))
	}
}

func TestCloseDoesNotWaitForAStuckWriter(t *testing.T) {
	a, _ := tcpPair(t)
	stuck := make(chan error, 1)
	started := make(chan struct{})
	go func() {
		close(started)
		_, err := a.Write(make([]byte, 64<<20))
		stuck <- err
	}()
	<-started
	for a.wr.TryLock() { // until the writer has it
		a.wr.Unlock()
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := <-stuck; err == nil {
		t.Error("64 MiB written to nobody")
	}
}

// wire returns what one end sends for the given writes.
func wire(t testing.TB, writes ...string) (stream []byte, reader *Keys) {
	t.Helper()
	d, l := shake(t, both())
	var out bytes.Buffer
	c := NewConn(writeOnly{&out}, d)
	for _, w := range writes {
		if _, err := c.Write([]byte(w)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), l
}

func TestStreamTamper(t *testing.T) {
	stream, _ := wire(t, "one", "two")
	size := recordHead + 3 + tagLen
	swapped := append(append(bytes.Clone(stream[size:2*size]), stream[:size]...), stream[2*size:]...)
	tests := map[string][]byte{
		"swapped records":  swapped,
		"repeated record":  append(bytes.Clone(stream[:size]), stream...),
		"left out record":  stream[size:],
		"too short record": binary.BigEndian.AppendUint16(nil, tagLen-1),
		"too long record":  binary.BigEndian.AppendUint16(nil, maxRecord+tagLen+1),
	}
	for i := range size {
		bad := bytes.Clone(stream)
		bad[i] ^= 1
		tests["byte "+string(rune('0'+i))] = bad
	}
	for name, b := range tests {
		_, keys := wire(t)
		got, err := io.ReadAll(NewConn(readOnly{Reader: bytes.NewReader(b)}, keys))
		if err == nil || bytes.HasPrefix([]byte("onetwo"), got) == false {
			t.Errorf("%s: read %q, %v", name, got, err)
		}
	}
}

func TestStreamRekeys(t *testing.T) {
	d, l := shake(t, both())
	var out bytes.Buffer
	c, r := NewConn(writeOnly{&out}, d), NewConn(readOnly{Reader: &out}, l)
	before := d.out.UnsafeKey()
	for range rekeyRecords + 10 {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Read(make([]byte, 9)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
	}
	if d.out.UnsafeKey() == before {
		t.Error("the key of the stream stays")
	}
}

func FuzzStream(f *testing.F) {
	stream, _ := wire(f, "hello, ", "world")
	f.Add(stream)
	f.Add(stream[:20])
	f.Add([]byte{0, 16})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, keys := wire(t)
		got, err := io.ReadAll(NewConn(readOnly{Reader: bytes.NewReader(b)}, keys))
		if !bytes.HasPrefix([]byte("hello, world"), got) {
			t.Fatalf("read %q", got)
		}
		if err == nil && !bytes.HasPrefix(b, stream) {
			t.Fatalf("another stream ends well")
		}
	})
}
