package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/cmd/internal/api"
	"weave.local/ipam"
	"weave.local/peer"
	"weave.local/peer/gossip"
	"weave.local/peer/link"
	"weave.local/peer/state"
	"weave.local/plugin"
	"weave.local/proxy"
	"weave.local/proxy/docker"
	"weave.local/proxy/unixsock"
	"weave.local/router"
	"weave.local/router/attach"
	"weave.local/router/firewall"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
	"weave.local/router/sleeve"
)

// ipamKind is the kind of messages between allocators.
const ipamKind = 3

// ipamState is the name of the allocators' replicated state.
const ipamState = "ipam"

// vxlanOverhead is what VXLAN over IPv4 adds to an IP packet, in bytes: outer
// IP, UDP and VXLAN headers and the inner Ethernet header (RFC 7348 §5).
const vxlanOverhead = 50

// setUp makes all parts, from what can't harm to what touches the host.
func (d *daemon) setUp(ctx context.Context) error {
	if err := d.check(ctx); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{
		d.openFiles, d.openControl, d.openPaths, d.openRouting, d.openDocker, d.openAPI, d.takeOver,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// check refuses what can be refused before anything is touched.
func (d *daemon) check(ctx context.Context) error {
	if err := d.cfg.Check(); err != nil {
		return err
	}
	if err := link.Resolve(ctx, d.cfg.Peers, uint16(d.cfg.Port)); err != nil {
		return err
	}
	if !d.cfg.Range.IsValid() {
		return nil
	}
	route, overlaps, err := netdev.OverlappingRoute(d.cfg.Range, bridgeName)
	if err != nil {
		return fmt.Errorf("routes of this host: %w", err)
	}
	if overlaps {
		return fmt.Errorf("the range %s overlaps the route to %s through %s: choose another with --ipalloc-range, such as %s",
			d.cfg.Range, route.Dst, route.Dev, netdev.FreeRange(d.cfg.Range, bridgeName))
	}
	return nil
}

func (d *daemon) openFiles(context.Context) error {
	if err := d.makeDir(d.cfg.RunDir, 0o755); err != nil {
		return err
	}
	if err := d.lock(); err != nil {
		return err
	}
	if err := d.makeDir(d.cfg.DataDir, 0o700); err != nil {
		return err
	}
	if err := d.openLog(); err != nil {
		return err
	}
	path := d.cfg.data(stateFile)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		d.undo.onFailure(func() { _ = os.Remove(path) })
	}
	db, err := state.Open(path, d.log)
	if err != nil {
		return err
	}
	d.store = db
	d.undo.atEnd(func() { _ = db.Close() })
	if err := saveFolders(db, d.made); err != nil {
		return err
	}
	d.self, err = identify(&d.cfg, db)
	return err
}

// makeDir makes a folder with the given mode where there is none, notes what was
// made and, should the start fail, removes it again.
func (d *daemon) makeDir(path string, mode os.FileMode) error {
	var made []string
	for p := path; p != filepath.Dir(p); p = filepath.Dir(p) {
		if _, err := os.Stat(p); err == nil {
			break
		}
		made = append(made, p)
	}
	if err := os.MkdirAll(path, mode); err != nil {
		return fmt.Errorf("folder: %w", err)
	}
	d.undo.onFailure(func() {
		for _, p := range made {
			_ = os.Remove(p)
		}
	})
	d.made = append(d.made, made...)
	return nil
}

func (d *daemon) lock() error {
	path := d.cfg.run(lockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return fmt.Errorf("%w (folder %s)", ErrAlreadyRunning, d.cfg.RunDir)
	}
	// Removed before it is unlocked, so that nobody locks a file that is
	// about to go.
	d.undo.atEnd(func() { _ = os.Remove(path); _ = f.Close() })
	return nil
}

// openLog starts to log: to the caller's logger, to the file of a daemon in
// the background, or to standard error.
func (d *daemon) openLog() error {
	if d.log != nil {
		return nil
	}
	level, err := d.cfg.level()
	if err != nil {
		return err
	}
	out := os.Stderr
	if d.cfg.LogToFile {
		path := d.cfg.data(logFile)
		if err := os.Rename(path, path+".old"); errors.Is(err, os.ErrNotExist) {
			d.undo.onFailure(func() { _ = os.Remove(path) })
		}
		if out, err = os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600); err != nil {
			return fmt.Errorf("log: %w", err)
		}
		// A panic must leave its words where people look.
		if err := unix.Dup3(int(out.Fd()), 2, 0); err != nil {
			return fmt.Errorf("log: %w", err)
		}
	}
	d.log = slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))
	return nil
}

// openControl makes the control plane: links and gossip.
func (d *daemon) openControl(ctx context.Context) error {
	list, err := targets(&d.cfg, d.store)
	if err != nil {
		return err
	}
	if d.keys, err = deriveKeys(d.cfg.PasswordNext, d.cfg.Password); err != nil {
		return err
	}
	d.mesh, err = link.Listen(ctx, link.Config{
		Self:      d.self,
		Bind:      d.cfg.Host,
		Targets:   list,
		Discovery: !d.cfg.NoDiscovery,
		ConnLimit: d.cfg.ConnLimit,
		Keys:      d.keys,
		Trusted:   d.cfg.Trusted,
		Log:       d.log.With("part", "link"),
	})
	if err != nil {
		return err
	}
	d.undo.atEnd(func() { _ = d.mesh.Close() })
	d.gossip, err = gossip.New(gossip.Config{Mesh: d.mesh, Log: d.log.With("part", "gossip")})
	if err != nil {
		return err
	}
	if !d.cfg.Range.IsValid() {
		return nil
	}
	return d.openIPAM()
}

func (d *daemon) openIPAM() error {
	init, err := d.cfg.bootstrap()
	if err != nil {
		return err
	}
	d.alloc, err = ipam.New(ipam.Config{
		Self:          d.self,
		Range:         d.cfg.Range,
		DefaultSubnet: d.cfg.DefaultSubnet,
		Init:          init,
		Store:         d.store.Bucket("ipam"),
		Send:          func(to peer.Name, b []byte) error { return d.mesh.Send(to, ipamKind, b) },
		Reachable:     d.reachable,
		Nick:          d.nick,
		Changed: func() {
			d.gossip.Announce(ipamState)
			d.router.Recheck()
		},
		Stranger: d.mesh.Refuse,
		Lease:    d.cfg.Lease,
		Fence:    func(until time.Duration) error { return d.router.SetLease(until) },
		Lost:     func(owner string, addr netip.Prefix) { d.attach.Lose(owner, addr) },
		Holder: func(addr netip.Addr) (string, bool) {
			if d.plugin == nil {
				return "", true
			}
			return d.plugin.Holder(addr)
		},
		Log: d.log.With("part", "ipam"),
	})
	if err != nil {
		return err
	}
	d.mesh.Handle(ipamKind, d.alloc.Receive)
	d.gossip.Register(ipamState, d.alloc)
	return nil
}

// reachable lists the peers to which there is a route.
func (d *daemon) reachable() []peer.Name {
	var out []peer.Name
	for _, n := range d.mesh.Topology().Reachable() {
		if n != d.self.Name {
			out = append(out, n)
		}
	}
	return out
}

func (d *daemon) nick(name peer.Name) string {
	for _, r := range d.mesh.Topology().Records() {
		if r.Name == name {
			return r.NickName
		}
	}
	return ""
}

// openPaths makes the bridge and the data paths.
func (d *daemon) openPaths(context.Context) error {
	d.mtu = d.cfg.MTU
	if d.mtu == 0 {
		underlay, err := netdev.DefaultUnderlayMTU()
		if err != nil {
			return fmt.Errorf("MTU of the underlay: %w", err)
		}
		d.mtu = underlay - vxlanOverhead
		if d.cfg.Password != "" {
			d.mtu = underlay - sleeve.SealedOverhead
		}
	}
	existed := netdev.Exists(bridgeName)
	if err := netdev.EnsureBridge(bridgeName, d.self.Name.MAC(), d.mtu); err != nil {
		return err
	}
	if !existed {
		d.undo.onFailure(func() { _ = netdev.DeleteLink(bridgeName) })
	}
	table := d.gossip.Table(router.TableName)
	cfg := router.Config{Mesh: d.mesh, Table: table, MTU: d.mtu, Log: d.log.With("part", "router")}
	if d.alloc != nil {
		cfg.Granted = d.alloc.Granted
	}
	d.router = router.New(cfg)
	var err error
	if d.sleeve, err = sleeve.New(d.sleeveConfig()); err != nil {
		return err
	}
	d.undo.atEnd(func() { _ = d.sleeve.Close() })
	sw, err := d.openSwitch()
	if err != nil {
		return err
	}
	paths := []overlay.Overlay{sw, d.sleeve}
	if d.cfg.NoFastDP {
		paths = paths[1:]
	}
	d.router.Use(sw, paths...)
	if d.alloc == nil {
		return d.router.SetLease(0)
	}
	return d.alloc.FenceNow()
}

// openRouting makes what joins containers and host.
func (d *daemon) openRouting(context.Context) error {
	var err error
	d.firewall, err = firewall.New(firewall.Config{Bridge: bridgeName, VXLAN: uint16(d.cfg.Port + 1), Log: d.log.With("part", "firewall")})
	if err != nil {
		return err
	}
	d.attach, err = attach.New(attach.Config{
		Bridge: bridgeName, MTU: d.mtu, Alloc: d.alloc, Store: d.store.Bucket("attachments"),
		SetPort: d.router.SetLocal, RemovePort: d.router.RemoveLocal, Firewall: d.firewall,
		NoMulticastRoute: d.cfg.NoMulticastRoute, Log: d.log.With("part", "attach"),
	})
	return err
}

func (d *daemon) openDocker(context.Context) error {
	socket, err := d.cfg.docker()
	if err != nil || socket == "" {
		return err
	}
	d.docker = docker.New(socket)
	d.watcher = docker.NewWatcher(d.docker, d.log.With("part", "docker"))
	d.watcher.OnEvent(func(e docker.Event) {
		switch e.Action {
		case docker.ActionStart:
			d.attach.ContainerStarted(e.ID)
		case docker.ActionDie:
			d.attach.ContainerDied(e.ID)
		case docker.ActionDestroy:
			d.attach.ContainerDestroyed(e.ID)
		case docker.ActionCreate:
		}
	})
	if !d.cfg.Plugin {
		return nil
	}
	if err := d.makeDir(filepath.Dir(d.cfg.PluginSocket), 0o755); err != nil {
		return err
	}
	d.writeAbsence()
	if err := saveFolders(d.store, d.made); err != nil {
		return err
	}
	cfg := plugin.Config{
		Socket: d.cfg.PluginSocket, Attach: d.attach, Alloc: d.alloc, Docker: d.docker, Watch: d.watcher,
		Store: d.store.Bucket("plugin"), NoMulticastRoute: d.cfg.NoMulticastRoute, Log: d.log.With("part", "plugin"),
	}
	if d.cfg.PluginSocket == DefaultPluginSocket { // the one that a reset knows
		cfg.StandIn = standIn
	}
	d.plugin, err = plugin.New(cfg)
	if err != nil {
		return err
	}
	d.undo.atEnd(func() { _ = d.plugin.Close() })
	if !d.cfg.Proxy {
		return nil
	}
	var secure *tls.Config
	if d.cfg.ProxyTLS != nil {
		if secure, err = d.cfg.ProxyTLS.Load(); err != nil {
			return err
		}
	}
	d.proxy, err = proxy.New(proxy.Config{
		Listen: append([]string{"unix://" + d.proxySocket()}, d.cfg.ProxyListen...), Docker: d.docker,
		Network: d.plugin.Network, DefaultSubnet: d.defaultSubnet(), NoDefaultIPAlloc: d.cfg.NoDefaultIPAlloc || d.alloc == nil,
		Hostnames: d.cfg.Hostnames, RewriteInspect: d.cfg.RewriteInspect, TLS: secure,
		Attach: d.attach, Watch: d.watcher, Store: d.store.Bucket("proxy"), Keep: d.plugin.Keep, Log: d.log.With("part", "proxy"),
	})
	if err != nil {
		return err
	}
	d.undo.atEnd(func() { _ = d.proxy.Close() })
	return nil
}

// writeAbsence keeps Docker from waiting for a driver that is not there. A host
// whose /etc can't be written does without.
func (d *daemon) writeAbsence() {
	if d.cfg.PluginSocket != DefaultPluginSocket {
		return
	}
	err := d.makeDir(filepath.Dir(pluginSpec), 0o755)
	if err == nil {
		if _, none := os.Stat(pluginSpec); none != nil {
			d.undo.onFailure(func() { _ = plugin.RemoveAbsence(pluginSpec) })
		}
		err = plugin.WriteAbsence(pluginSpec)
	}
	if err != nil {
		d.log.Warn("Docker will wait for containers of ours while weave is stopped", "err", err)
	}
}

// standIn is this program as what answers Docker while weave is stopped. Nothing
// in our environment is for it, the password least of all.
func standIn() *exec.Cmd {
	return &exec.Cmd{
		Path: "/proc/self/exe", // good even when the file was replaced since
		Args: []string{"weave-stand-in", StandInCommand},
		Env:  []string{"GOMAXPROCS=1"},
		Dir:  "/",
	}
}

// defaultSubnet is that of addresses for which nobody names one; invalid
// without allocation.
func (d *daemon) defaultSubnet() netip.Prefix {
	if d.alloc == nil {
		return netip.Prefix{}
	}
	return d.alloc.DefaultSubnet()
}

// proxySocket is where the proxy listens: under the name that scripts of Weave
// users have, as long as the run folder is where it usually is.
func (d *daemon) proxySocket() string {
	if d.cfg.RunDir == DefaultRunDir {
		return "/var/run/weave/" + proxySocket
	}
	return d.cfg.run(proxySocket)
}

func (d *daemon) openAPI(context.Context) error {
	cfg := api.Config{
		Hello: api.Hello{Version: Version(), Name: d.self.Name.String(), PID: os.Getpid(), Started: time.Now()},
		Mesh:  d.mesh, Router: d.router, Alloc: d.alloc, Attach: d.attach, Docker: d.docker,
		Plugin: d.plugin != nil, Sleeve: d.sleeve.Counters, Bridge: bridgeName, Port: d.cfg.Port, Discover: !d.cfg.NoDiscovery,
		Encryption: d.cfg.Password != "", Trusted: d.cfg.Trusted,
		SetPassword: d.setPassword, Changing: d.changing,
		Targets: func(list []string) error { return saveTargets(d.store, list) },
		Stop:    d.stop, Reset: d.leave, Log: d.log.With("part", "api"),
	}
	if d.proxy != nil {
		cfg.Proxy = d.proxy.Addresses()
	}
	d.api = api.New(cfg)
	var err error
	if d.control, err = unixsock.Listen(d.cfg.run(ControlSocket)); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	d.undo.atEnd(func() { _ = d.control.Close(); _ = os.Remove(d.cfg.run(ControlSocket)) })
	if d.cfg.StatusAddr == "" {
		return nil
	}
	if d.status, err = net.Listen("tcp", d.cfg.StatusAddr); err != nil {
		return fmt.Errorf("status address %s: %w; choose another with --status-addr", d.cfg.StatusAddr, err)
	}
	d.undo.atEnd(func() { _ = d.status.Close() })
	return nil
}

// takeOver adopts what an earlier run left attached and announces all of it.
func (d *daemon) takeOver(ctx context.Context) error {
	if err := d.attach.Reconcile(ctx); err != nil {
		return fmt.Errorf("what was attached: %w", err)
	}
	d.router.Publish()
	return nil
}
