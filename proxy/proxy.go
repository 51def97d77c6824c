// Package proxy is the Docker API proxy: clients that use its socket instead
// of the engine's get containers that are on the weave network.
//
// It hands everything through as it is, streams included, but for one call:
// containers/create. What the environment variable WEAVE_CIDR of the container
// asks for becomes networks of driver weave, one for each subnet, to which the
// container is connected before the client learns that it was made. The engine
// attaches it from then on, at each start, before its process runs.
//
// The engine refuses a container two addresses of one subnet or of subnets that
// overlap. Such further addresses are added when the container has started, and
// a client that started it through the proxy gets its answer after that.
package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer/state"
	"weave.local/proxy/docker"
	"weave.local/proxy/unixsock"
	"weave.local/router/attach"
)

const (
	// headLimit is how long a client may take to send the head of a request.
	headLimit = time.Minute
	// ownerInterval is how often owner and mode of the engine's socket are
	// taken over: it may be made after ours.
	ownerInterval = 5 * time.Second
	schemeUnix    = "unix://"
	schemeTCP     = "tcp://"
)

// Config is what a Proxy is made of.
type Config struct {
	// Listen holds addresses: unix:///path, /path, tcp://host:port or
	// host:port. Clients are told of the first one.
	Listen []string
	TLS    *tls.Config // of TCP listeners; nil: none
	Docker *docker.Client
	// NoDefaultIPAlloc leaves containers without WEAVE_CIDR alone.
	NoDefaultIPAlloc bool
	Hostnames        Hostnames // of containers that are attached
	// RewriteInspect shows a container's address of ours where clients look
	// for one of the engine's own network.
	RewriteInspect bool
	// Network makes the network for a subnet unless it is there, zero being
	// the default subnet, and returns its name.
	Network       func(ctx context.Context, subnet netip.Prefix) (string, error)
	DefaultSubnet netip.Prefix // invalid: there is none
	// Attach adds the addresses that the engine can't give to a container,
	// once it runs; Watch, which the caller runs and New registers with,
	// tells when that is, and Store keeps which ones they are.
	Attach *attach.Manager
	Watch  *docker.Watcher
	Store  *state.Bucket
	// Keep gives a client's connection and one to the engine to a process that
	// outlives this one and calls Carry with them; an error means that it has
	// not got them. nil: there is none.
	Keep func(client, engine syscall.Conn) error
	Log  *slog.Logger
}

// Proxy serves clients of the engine.
type Proxy struct {
	cfg       Config
	listeners []net.Listener
	addresses []string
	paths     []string // of unix sockets
	forward   *httputil.ReverseProxy
	tunnels   tunnels
	spare     *spare
	extras    *extras
	namer     *namer
}

// New binds the sockets, in place of ones that were left behind. Run serves
// them; without Run, Close removes them.
func New(cfg Config) (*Proxy, error) {
	if len(cfg.Listen) == 0 || cfg.Docker == nil || cfg.Network == nil ||
		cfg.Attach == nil || cfg.Watch == nil || cfg.Store == nil || cfg.Log == nil {
		return nil, errors.New("proxy: incomplete configuration")
	}
	names, err := newNamer(cfg.Hostnames)
	if err != nil {
		return nil, err
	}
	p := &Proxy{cfg: cfg, namer: names, tunnels: tunnels{open: make(map[net.Conn]struct{})}, spare: newSpare(cfg.Docker.Dial), extras: newExtras(cfg)}
	p.forward = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "docker"
			r.Out.URL.RawQuery = r.In.URL.RawQuery // as it came, even if it does not parse
			r.Out.Host = r.In.Host
		},
		Transport:     newCarrier(cfg.Docker),
		FlushInterval: -1,
		ErrorLog:      slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() == nil {
				cfg.Log.Warn("proxy: the engine does not answer", "method", r.Method, "path", r.URL.Path, "err", err)
			}
			writeError(w, http.StatusBadGateway, fmt.Errorf("weave: Docker does not answer: %w", err))
		},
	}
	for _, addr := range cfg.Listen {
		if err := p.listen(addr); err != nil {
			return nil, errors.Join(fmt.Errorf("proxy: %w", err), p.Close())
		}
	}
	return p, nil
}

// ParseAddress reads an address to listen on and returns it as a URL:
// unix:///path or tcp://host:port.
func ParseAddress(s string) (string, error) {
	bad := fmt.Errorf("address %q: want unix:///path or tcp://host:port", s)
	path, unix := strings.CutPrefix(s, schemeUnix)
	if unix || strings.HasPrefix(s, "/") {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path {
			return "", bad
		}
		return schemeUnix + path, nil
	}
	hostport := strings.TrimPrefix(s, schemeTCP)
	if strings.Contains(hostport, "/") {
		return "", bad
	}
	if _, _, err := net.SplitHostPort(hostport); err != nil {
		return "", bad
	}
	return schemeTCP + hostport, nil
}

func (p *Proxy) listen(addr string) error {
	url, err := ParseAddress(addr)
	if err != nil {
		return err
	}
	if path, unix := strings.CutPrefix(url, schemeUnix); unix {
		l, err := unixsock.Listen(path)
		if err != nil {
			return err
		}
		p.listeners, p.paths = append(p.listeners, l), append(p.paths, path)
		p.takeOwner()
	} else {
		l, err := net.Listen("tcp", strings.TrimPrefix(url, schemeTCP))
		if err != nil {
			return err
		}
		if p.cfg.TLS != nil {
			p.listeners = append(p.listeners, tls.NewListener(l, p.cfg.TLS))
		} else {
			p.listeners = append(p.listeners, l)
		}
		url = schemeTCP + l.Addr().String()
	}
	p.addresses = append(p.addresses, url)
	return nil
}

// takeOwner gives our sockets the owner and the mode of the engine's: who may
// use the one may use the other.
func (p *Proxy) takeOwner() {
	theirs, err := os.Stat(p.cfg.Docker.Socket())
	if err != nil {
		return // not there yet
	}
	want, ok := theirs.Sys().(*syscall.Stat_t)
	if !ok {
		return
	}
	for _, path := range p.paths {
		fi, err := os.Lstat(path)
		if err != nil {
			continue
		}
		if have, ok := fi.Sys().(*syscall.Stat_t); ok && have.Uid == want.Uid && have.Gid == want.Gid && fi.Mode().Perm() == theirs.Mode().Perm() {
			continue
		}
		if err := errors.Join(os.Lchown(path, int(want.Uid), int(want.Gid)), os.Chmod(path, theirs.Mode().Perm())); err != nil {
			p.cfg.Log.Warn("proxy: owner of the socket", "path", path, "err", err)
		}
	}
}

// Addresses returns where the proxy listens, as URLs, in the order of Listen.
func (p *Proxy) Addresses() []string { return append([]string(nil), p.addresses...) }

// Close stops listening and removes the sockets.
func (p *Proxy) Close() error {
	var errs []error
	for _, l := range p.listeners {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Run serves until ctx ends. Connections that are still open are closed then,
// and the sockets are gone when it returns.
func (p *Proxy) Run(ctx context.Context) error {
	server := &http.Server{
		Handler:           p,
		ReadHeaderTimeout: headLimit,
		ConnState:         connState,
		ErrorLog:          slog.NewLogLogger(p.cfg.Log.Handler(), slog.LevelDebug),
	}
	g, ctx := errgroup.WithContext(ctx)
	dial := func() (net.Conn, error) { return p.spare.conn(ctx) }
	for _, l := range p.listeners {
		g.Go(func() error {
			if err := server.Serve(front{l, p, dial}); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("proxy: %w", err)
			}
			return nil
		})
	}
	g.Go(func() error { return p.extras.run(ctx) })
	g.Go(func() error { return p.spare.run(ctx) })
	g.Go(func() error {
		tick := time.NewTicker(ownerInterval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.takeOwner()
			case <-ctx.Done():
				err := server.Close()
				p.forward.Transport.(*carrier).kept.CloseIdleConnections()
				p.tunnels.closeAll()
				return err
			}
		}
	})
	return g.Wait()
}

// tunnels are the connections that were taken from the server.
type tunnels struct {
	mu     sync.Mutex
	wg     sync.WaitGroup
	closed bool
	open   map[net.Conn]struct{}
}

// add registers a connection; false when the proxy is ending.
func (t *tunnels) add(c net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.wg.Add(1)
	t.open[c] = struct{}{}
	return true
}

func (t *tunnels) remove(c net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.open, c)
	t.wg.Done()
}

func (t *tunnels) closeAll() {
	t.mu.Lock()
	t.closed = true
	open := make([]net.Conn, 0, len(t.open))
	for c := range t.open {
		open = append(open, c)
	}
	t.mu.Unlock()
	for _, c := range open {
		_ = c.Close()
	}
	t.wg.Wait()
}
