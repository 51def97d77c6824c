package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/cmd/internal/api"
	"weave.local/ipam"
	"weave.local/peer"
	"weave.local/peer/gossip"
	"weave.local/peer/link"
	"weave.local/peer/state"
	"weave.local/plugin"
	"weave.local/proxy"
	"weave.local/proxy/docker"
	"weave.local/router"
	"weave.local/router/attach"
	"weave.local/router/firewall"
	"weave.local/router/seal"
	"weave.local/router/sleeve"
)

// ErrAlreadyRunning says that another daemon uses the run folder.
var ErrAlreadyRunning = errors.New("already running")

// daemon holds the parts of a running router. Those that are switched off are
// nil: alloc, docker, plugin, proxy.
type daemon struct {
	cfg   Config
	log   *slog.Logger
	undo  undo
	made  []string // folders made by this start
	store *state.DB
	self  peer.Info
	mtu   int

	keyMu sync.Mutex  // guards what follows; held while it is changed, with all that depends on it
	keys  []*seal.Key // of the passwords that are good, the preferred one first

	mesh     *link.Mesh
	gossip   *gossip.Gossip
	alloc    *ipam.Allocator
	sleeve   *sleeve.Path
	router   *router.Router
	firewall *firewall.Firewall
	attach   *attach.Manager
	docker   *docker.Client
	watcher  *docker.Watcher
	plugin   *plugin.Plugin
	proxy    *proxy.Proxy
	api      *api.Server
	control  net.Listener
	status   net.Listener // nil when there is no status address

	cancel context.CancelFunc
	once   sync.Once
	reset  bool // leave nothing behind; written before cancel
}

// Run serves until ctx ends or the daemon is told to stop. What fails before
// everything serves is undone and returned. log may be nil.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	d := &daemon{cfg: cfg, log: log}
	if err := d.setUp(ctx); err != nil {
		d.undo.run()
		return err
	}
	err := d.serve(ctx)
	d.undo.release()
	if d.reset {
		// ctx is over by now; what is left must be cleaned up all the same.
		return errors.Join(err, Clean(context.WithoutCancel(ctx), cfg.RunDir, cfg.DataDir))
	}
	return err
}

// undo takes back steps of a start that failed, last first, and releases at
// the end what only the running process holds.
type undo struct {
	steps    []func() // take back what would stay on the host
	releases []func() // close what would go with the process
}

func (u *undo) onFailure(f func()) { u.steps = append(u.steps, f) }
func (u *undo) atEnd(f func())     { u.releases = append(u.releases, f) }

func (u *undo) release() {
	for i := len(u.releases) - 1; i >= 0; i-- {
		u.releases[i]()
	}
	u.releases = nil
}

func (u *undo) run() {
	u.release()
	for i := len(u.steps) - 1; i >= 0; i-- {
		u.steps[i]()
	}
}

// serve runs all parts and says when they are ready.
func (d *daemon) serve(ctx context.Context) error {
	ctx, d.cancel = context.WithCancel(ctx)
	defer d.cancel()
	g, ctx := errgroup.WithContext(ctx)
	start := func(what string, run func(context.Context) error) {
		g.Go(func() error {
			if err := run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("%s: %w", what, err)
			}
			return nil
		})
	}
	start("links", d.mesh.Run)
	start("gossip", d.gossip.Run)
	start("router", d.router.Run)
	start("attachments", d.attach.Run)
	start("firewall", d.firewall.Run)
	start("identity", d.rememberShortID)
	if d.alloc != nil {
		start("address allocation", d.alloc.Run)
	}
	if d.docker != nil {
		start("docker events", d.watcher.Run)
	}
	if d.plugin != nil {
		start("plugin", d.plugin.Run)
	}
	if d.proxy != nil {
		start("proxy", d.proxy.Run)
	}
	start("control", func(ctx context.Context) error { return serveHTTP(ctx, d.control, d.api.Control()) })
	if d.status != nil {
		start("status", func(ctx context.Context) error { return serveStatus(ctx, d.status, d.api.Status()) })
	}
	if d.plugin != nil {
		d.awaitNetwork(ctx)
	}
	d.log.Info("ready", "peer", d.self.String(), "mtu", d.mtu)
	if d.cfg.Ready != nil {
		d.cfg.Ready(d.self.Name)
	}
	err := g.Wait()
	d.log.Info("ended", "err", err)
	return err
}

// networkWait is how long a launch waits for Docker to know the network; the
// plugin goes on trying after it.
const networkWait = 5 * time.Second

func (d *daemon) awaitNetwork(ctx context.Context) {
	select {
	case <-d.plugin.Ready():
	case <-time.After(networkWait):
		d.log.Warn("Docker does not have the network yet; the plugin goes on trying")
	case <-ctx.Done():
	}
}

// stop ends the daemon; what the kernel does goes on.
func (d *daemon) stop(ctx context.Context) ([]string, error) {
	var warnings []string
	if d.plugin != nil {
		stay, err := d.plugin.ReleaseNetworks(ctx)
		if err != nil {
			d.log.Warn("networks of Docker not released", "err", err)
		}
		warnings = stay
	}
	d.once.Do(d.cancel)
	return warnings, nil
}

// leave ends the daemon and takes it out of the cluster and off the host.
func (d *daemon) leave(ctx context.Context) ([]string, error) {
	var warnings []string
	warn := func(what string, err error) {
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("%s: %v", what, err))
		}
	}
	if d.plugin != nil && d.engineInstalled() {
		warn("networks of Docker", d.plugin.RemoveNetworks(ctx))
	}
	warn("attachments", d.attach.RemoveAll(ctx))
	if d.alloc != nil {
		warn("address space", d.alloc.Leave(ctx))
	}
	d.reset = true
	d.once.Do(d.cancel)
	return warnings, nil
}

// engineInstalled says whether there may be networks of ours in an engine: no
// socket, no engine.
func (d *daemon) engineInstalled() bool {
	_, err := os.Stat(d.docker.Socket())
	return err == nil
}

// rememberShortID keeps the short id over restarts, so that frames on their
// way keep their meaning.
func (d *daemon) rememberShortID(ctx context.Context) error {
	changes, stop := d.mesh.Subscribe()
	defer stop()
	last := d.self.ShortID
	for {
		if id := d.mesh.Self().ShortID; id != last && id != 0 {
			if err := saveShortID(d.store, id); err != nil {
				return err
			}
			last = id
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changes:
		}
	}
}

func hostName() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}
