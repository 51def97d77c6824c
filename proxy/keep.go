package proxy

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
)

// A client that waits for a container to end takes an end of its connection for
// an end of the container: Nomad starts the task anew, if it does not give it up,
// and the container, which runs on, is nobody's. So such connections are left to a
// process that goes on when the daemon ends.

// waits says whether a plain head is that of a request to wait for a container.
// One that says what becomes of its connection is not ours to change.
func waits(head []byte) bool {
	method, path, _, fields := cutHead(string(head))
	if method != http.MethodPost {
		return false
	}
	kind, _, verb := call(unversioned(path))
	return kind == "containers" && verb == "wait" && !strings.Contains(strings.ToLower("\n"+fields), "\nconnection:")
}

// leaveToKeeper leaves the client's connection, with its request to wait, to the
// keeper, if there is one and this is such a request. It is the last one on this
// connection, which the engine is told: others would not come by the proxy.
func (f *frontConn) leaveToKeeper(head []byte) bool {
	client, ok := f.Conn.(syscall.Conn) // not one of TLS
	if f.p.cfg.Keep == nil || !ok || !waits(head) {
		return false
	}
	f.leave(nil)
	back, err := f.dial()
	if err != nil {
		return false
	}
	defer func() { _ = back.Close() }()
	engine, ok := back.(syscall.Conn)
	if !ok {
		return false
	}
	if err := f.p.cfg.Keep(client, engine); err != nil {
		f.p.cfg.Log.Debug("proxy: who waits for a container won't when the daemon ends", "err", err)
		return false
	}
	// An error is one of the engine's connection: the keeper sees its end.
	_, _ = back.Write(append(bytes.TrimSuffix(head, []byte("\r\n")), "Connection: close\r\n\r\n"...))
	return true
}

// Carry is the keeper's part: it sends a client what comes from the engine until
// either has ended, and closes both. A client that sends something else has to
// come again.
func Carry(client, engine net.Conn) {
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if n, _ := client.Read(make([]byte, 1)); n > 0 || hungUp(client, over) {
			_ = engine.Close()
		}
	})
	// Without these the connections' own ways to copy, which cost two pipes.
	_, _ = io.CopyBuffer(struct{ io.Writer }{client}, struct{ io.Reader }{engine}, make([]byte, smallAnswer))
	close(over)
	_ = engine.Close()
	_ = client.Close()
	wg.Wait()
}
