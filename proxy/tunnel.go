package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxHead = 256 << 10 // bytes of the head of an answer
	// smallBody is how many bytes of a body are read before its request is
	// answered.
	smallBody = 64 << 10
	// lastWords is how long a client may go on sending after the engine has
	// ended the stream.
	lastWords = 10 * time.Second
	// hangupInterval is how often it is looked whether a client that has
	// nothing more to send is still there.
	hangupInterval = time.Second
)

// isStream says whether the engine turned the connection into a stream; it
// answers 200 to clients that did not ask for an upgrade.
func isStream(resp *http.Response) bool {
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return true
	}
	if resp.StatusCode != http.StatusOK || resp.ContentLength >= 0 || len(resp.TransferEncoding) > 0 {
		return false
	}
	t, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return err == nil && (t == "application/vnd.docker.raw-stream" || t == "application/vnd.docker.multiplexed-stream")
}

// tunnel serves a request whose connection may become a stream. If it does,
// the bytes go through unread in both directions, each of which can end before
// the other.
func (p *Proxy) tunnel(w http.ResponseWriter, r *http.Request) {
	// A client that has nothing to send closes its half at once, which ends
	// the request's context but not the stream.
	back, end := p.toEngine(w, r.WithContext(context.WithoutCancel(r.Context())))
	if back == nil {
		return
	}
	defer end()
	in := bufio.NewReader(back)
	head, resp, err := exchange(back, in, r)
	if err != nil {
		p.forward.ErrorHandler(w, r, err)
		return
	}
	defer func() { _ = resp.Body.Close() }()
	if !isStream(resp) {
		relay(w, resp)
		return
	}
	p.couple(w, r, head, back, in)
}

// toEngine is a connection to the engine, and what ends it; nil when the client
// has been told that there is none, or the proxy ends.
func (p *Proxy) toEngine(w http.ResponseWriter, r *http.Request) (back net.Conn, end func()) {
	back, err := p.cfg.Docker.Dial(r.Context())
	if err != nil {
		p.forward.ErrorHandler(w, r, err)
		return nil, nil
	}
	if !p.tunnels.add(back) {
		_ = back.Close()
		return nil, nil
	}
	return back, func() {
		_ = back.Close()
		p.tunnels.remove(back)
	}
}

// couple sends head to the client, and then all that comes both ways until both
// have ended.
func (p *Proxy) couple(w http.ResponseWriter, r *http.Request, head []byte, back net.Conn, in *bufio.Reader) {
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		p.forward.ErrorHandler(w, r, err)
		return
	}
	defer func() { _ = client.Close() }()
	if !p.tunnels.add(client) {
		return
	}
	defer p.tunnels.remove(client)
	if _, err := client.Write(head); err != nil {
		return
	}
	splice(client, buffered.Reader, back, in)
	// What the engine did not want: closing before it has come would look like
	// a failure to the client.
	_, _ = io.Copy(io.Discard, client)
}

// upload serves a request with a large body. Its bytes and those of the answer
// go through unread, and at the same time; then the connection ends, since
// whatever comes after the body is no request that we would see. (The server of
// net/http may take what is left of a body for the next request when an answer
// has overtaken it.)
func (p *Proxy) upload(w http.ResponseWriter, r *http.Request) {
	back, end := p.toEngine(w, r)
	if back == nil {
		return
	}
	defer end()
	r.Header.Set("Connection", "close")
	if r.ContentLength < 0 {
		r.Header.Set("Transfer-Encoding", "chunked")
	}
	head, err := requestHead(r)
	if err == nil {
		_, err = back.Write(head)
	}
	if err != nil {
		p.forward.ErrorHandler(w, r, err)
		return
	}
	p.couple(w, r, nil, back, bufio.NewReader(back))
}

// requestHead is the head of a request as it came.
func requestHead(r *http.Request) ([]byte, error) {
	var head bytes.Buffer
	fmt.Fprintf(&head, "%s %s HTTP/1.1\r\nHost: %s\r\n", r.Method, r.RequestURI, r.Host)
	if err := r.Header.Write(&head); err != nil {
		return nil, err
	}
	head.WriteString("\r\n")
	return head.Bytes(), nil
}

// exchange sends a request as it came and reads the head of the answer, which
// it also returns byte for byte.
func exchange(back net.Conn, in *bufio.Reader, r *http.Request) ([]byte, *http.Response, error) {
	req, err := requestHead(r)
	if err != nil {
		return nil, nil, err
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, nil, err
	}
	if _, err := back.Write(append(req, body...)); err != nil {
		return nil, nil, err
	}
	for {
		head, err := readHead(in)
		if err != nil {
			return nil, nil, err
		}
		resp, err := http.ReadResponse(bufio.NewReader(io.MultiReader(bytes.NewReader(head), in)), r)
		if err != nil {
			return nil, nil, err
		}
		if resp.StatusCode >= http.StatusOK || resp.StatusCode == http.StatusSwitchingProtocols {
			return head, resp, nil
		}
		_ = resp.Body.Close() // 100 Continue: the body was sent already
	}
}

// readHead reads up to and including the empty line.
func readHead(in *bufio.Reader) ([]byte, error) {
	var head []byte
	for {
		line, err := in.ReadSlice('\n')
		head = append(head, line...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case err == io.EOF:
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		case len(bytes.TrimRight(line, "\r\n")) == 0 && len(line) <= 2:
			return head, nil
		}
		if len(head) > maxHead {
			return nil, fmt.Errorf("head of the answer is longer than %d bytes", maxHead)
		}
	}
}

// relay hands on an answer that is no stream after all.
func relay(w http.ResponseWriter, resp *http.Response) {
	for _, h := range []string{"Connection", "Keep-Alive", "Transfer-Encoding", "Upgrade"} {
		resp.Header.Del(h)
	}
	maps.Copy(w.Header(), resp.Header)
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(flushing{w}, resp.Body)
}

// flushing sends on each piece as it comes.
type flushing struct{ w http.ResponseWriter }

func (f flushing) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = http.NewResponseController(f.w).Flush()
	}
	return n, err
}

// splice copies both ways until both have ended.
func splice(client net.Conn, fromClient *bufio.Reader, back net.Conn, fromBack *bufio.Reader) {
	var wg sync.WaitGroup
	over := make(chan struct{})
	wg.Go(func() {
		// An error may be of either side: a container that takes no input still
		// says something.
		if copyFrom(back, fromClient, client) == nil {
			closeWrite(back)
		}
		if hungUp(client, over) {
			_ = back.Close()
		}
	})
	err := copyFrom(client, fromBack, back)
	close(over)
	if err != nil {
		// The client has gone, or the engine broke off.
		_ = back.Close()
		_ = client.Close()
	} else {
		closeWrite(client)
		_ = client.SetReadDeadline(time.Now().Add(lastWords))
	}
	wg.Wait()
}

// hungUp waits until a client that ended its half has gone altogether, or the
// stream is over; it says whether the former came first. The end of input alone
// does not tell, and a container that says nothing would never find out. A unix
// socket shows it at once (POLLHUP, poll(2)); on TCP a client that closed its
// connection looks like one that ended its half until its host answers a
// keep-alive probe with a reset, which takes about a minute.
func hungUp(client net.Conn, over <-chan struct{}) bool {
	tick := time.NewTicker(hangupInterval)
	defer tick.Stop()
	for {
		if gone(client) {
			return true
		}
		select {
		case <-over:
			return false
		case <-tick.C:
		}
	}
}

// gone says whether the other side of a connection takes nothing any more.
func gone(c net.Conn) bool {
	s, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	found := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}} // asks for errors and hang-ups only
		n, err := unix.Poll(p, 0)
		found = err == nil && n > 0
	})
	return err != nil || found
}

// copyFrom copies what was read ahead, then the connection itself, for which
// the kernel can move the bytes.
func copyFrom(dst net.Conn, ahead *bufio.Reader, src net.Conn) error {
	if _, err := io.CopyN(dst, ahead, int64(ahead.Buffered())); err != nil {
		return err
	}
	_, err := io.Copy(dst, src)
	return err
}

// closeWrite ends one direction of a connection.
func closeWrite(c net.Conn) {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		_ = h.CloseWrite()
	}
}
