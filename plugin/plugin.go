// Package plugin is the Docker network plugin: the remote network driver
// "weave" and the address driver of the same name beside it, on one unix
// socket.
//
// The engine asks the address driver for a container's address, the network
// driver for its endpoint, moves the endpoint's interface into the container
// and undoes it all when the container stops. Nothing here depends on calls
// that came before a restart: pool identifiers carry the pool, endpoints are
// in the journal of package attach, and options of networks are asked of the
// engine when they are not known. The engine holds a lock on the container
// while it waits for the driver, so no call here inspects a container.
//
// After its end a process of package standin answers the engine.
//
// The plugin also keeps the network "weave" in being, and makes further
// networks of the driver, one for each subnet, for the API proxy.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/ipam"
	"weave.local/peer/state"
	"weave.local/plugin/standin"
	"weave.local/proxy/docker"
	"weave.local/proxy/unixsock"
	"weave.local/router/attach"
)

// Bounds on waiting.
const (
	// addressLimit is how long the engine may wait for an address: the
	// cluster may have to agree on the range first.
	addressLimit = 20 * time.Second
	// dockerLimit bounds one piece of work with the engine.
	dockerLimit = 30 * time.Second
	// shutdownLimit is what calls in progress get to end at exit.
	shutdownLimit = 2 * time.Second
)

// Config is what a Plugin is made of.
type Config struct {
	Socket string // path the engine finds the driver by: /run/docker/plugins/weave.sock
	Attach *attach.Manager
	Alloc  *ipam.Allocator // nil: address allocation is switched off
	Docker *docker.Client
	Watch  *docker.Watcher // run by the caller; New registers with it
	Store  *state.Bucket   // options of endpoints
	// OnDemand leaves network "weave" to be made when Network asks for it,
	// instead of always keeping it.
	OnDemand         bool
	NoMulticastRoute bool // no container gets a route for multicast
	// StandIn is the command that calls standin.Serve: it is run once there is
	// an engine, to answer it after the end of this process. nil: none is.
	StandIn func() *exec.Cmd
	Log     *slog.Logger
}

// Plugin serves the engine. Its methods may be called from several goroutines.
type Plugin struct {
	cfg      Config
	listener *net.UnixListener
	wake     chan struct{} // capacity 1: the engine is there (again)
	look     chan struct{} // capacity 1: holders are to be found out
	engine   chan struct{} // closed when an engine was there
	ready    chan struct{} // closed when the first attempt at network "weave" is over
	making   chan struct{} // capacity 1: held while networks are made

	mu        sync.Mutex               // guards what follows; never held during I/O
	networks  map[string]traits        // of networks, by id
	subnets   map[netip.Prefix]bool    // of networks that are known to be of this driver
	sandboxes map[string]string        // endpoint that has the multicast route, by sandbox
	pending   map[netip.Addr]time.Time // handed out, not yet on an endpoint
	suspects  map[string]time.Time     // seems left over since then; by address or endpoint
	badLabels map[string]error         // what is wrong with labels; by name of the container
	holders   map[string]string        // containers, by endpoint
	asked     time.Time                // when a look for holders was wanted; zero: none is
	looked    time.Time                // when the last one ended
	optioned  bool                     // containers may have options that choose their network
	standIn   *standin.Process         // nil: none yet; only the goroutine that keeps it changes that

	patience time.Duration // before what seems left over is removed
	moves    chan string   // ids of containers that may have to be on other networks
}

// New binds the socket, in place of one that was left behind or that a stand-in
// serves. Run serves it, and Close leaves it to a stand-in or removes it.
func New(cfg Config) (*Plugin, error) {
	if cfg.Socket == "" || cfg.Attach == nil || cfg.Docker == nil || cfg.Watch == nil || cfg.Store == nil || cfg.Log == nil {
		return nil, errors.New("plugin: incomplete configuration")
	}
	stoodIn := standin.End(cfg.Socket)
	l, err := unixsock.Listen(cfg.Socket)
	if err != nil {
		return nil, fmt.Errorf("plugin: %w", err)
	}
	l.SetUnlinkOnClose(false)
	p := &Plugin{
		cfg:       cfg,
		listener:  l,
		wake:      make(chan struct{}, 1),
		look:      make(chan struct{}, 1),
		engine:    make(chan struct{}),
		ready:     make(chan struct{}),
		making:    make(chan struct{}, 1),
		networks:  make(map[string]traits),
		subnets:   make(map[netip.Prefix]bool),
		sandboxes: make(map[string]string),
		pending:   make(map[netip.Addr]time.Time),
		suspects:  make(map[string]time.Time),
		badLabels: make(map[string]error),
		patience:  patience,
		moves:     make(chan string, maxMoves),
	}
	p.register()
	if stoodIn { // one is needed even if this daemon does not come to serve
		p.startStandIn()
	}
	return p, nil
}

// Close leaves the socket to the stand-in, or removes it where there is none. To
// be called when Run is over.
func (p *Plugin) Close() error {
	err := p.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	if p.standIn != nil && p.standIn.Release() {
		return err
	}
	return errors.Join(err, os.Remove(p.cfg.Socket))
}

// standInRetry is the wait before another stand-in is started.
const standInRetry = 5 * time.Second

func (p *Plugin) startStandIn() {
	if p.cfg.StandIn == nil {
		return
	}
	s, err := standin.Start(p.cfg.StandIn(), p.listener)
	if err != nil {
		p.cfg.Log.Warn("plugin: Docker will wait for the driver when weave ends", "err", err)
	}
	p.setStandIn(s)
}

func (p *Plugin) setStandIn(s *standin.Process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.standIn = s
}

// Keep leaves a client's connection and the engine's to the process that outlives
// this one, as [standin.Process.Keep] does. An error means that it has not got
// them, as while there is none.
func (p *Plugin) Keep(client, engine syscall.Conn) error {
	p.mu.Lock()
	s := p.standIn
	p.mu.Unlock()
	if s == nil {
		return errors.New("plugin: there is no stand-in")
	}
	return s.Keep(client, engine)
}

// keepStandIn has a stand-in at hand until ctx ends, from when there is an engine
// that would have to wait without.
func (p *Plugin) keepStandIn(ctx context.Context) error {
	if p.cfg.StandIn == nil {
		return nil
	}
	select {
	case <-ctx.Done():
		return nil
	case <-p.engine:
	}
	for {
		if p.standIn == nil {
			p.startStandIn()
		}
		if p.standIn != nil {
			if p.standIn.Wait(ctx) != nil {
				return nil
			}
			p.setStandIn(nil)
			p.cfg.Log.Warn("plugin: the stand-in ended; another is started")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(standInRetry):
		}
	}
}

// Ready is closed once the first attempt to make network "weave" is over:
// containers can be started on it, unless there is no engine.
func (p *Plugin) Ready() <-chan struct{} { return p.ready }

// Run serves the engine until ctx ends, and keeps network "weave" and the
// record of addresses in line with the engine's.
func (p *Plugin) Run(ctx context.Context) error {
	server := &http.Server{
		Handler:           p.routes(),
		ReadHeaderTimeout: dockerLimit,
		ErrorLog:          slog.NewLogLogger(p.cfg.Log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := server.Serve(p.listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("plugin: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
		defer cancel()
		if server.Shutdown(limit) != nil {
			return server.Close()
		}
		return nil
	})
	g.Go(func() error { return p.follow(ctx) })
	g.Go(func() error { return p.moveAll(ctx) })
	g.Go(func() error { return p.findHolders(ctx) })
	g.Go(func() error { return p.keepStandIn(ctx) })
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
