// Package lab makes hosts out of namespaces, for tests, demo and bench: each
// host has its own network, mount, process, UTS and IPC namespace, its own
// /run, /sys, /etc and /var/lib, a process 1, and a Docker engine if asked
// for; one switch joins them.
//
//	u1 192.0.2.1 ──┐
//	u2 192.0.2.2 ──┼── switch 192.0.2.254, "the outside"
//	u3 192.0.2.3 ──┘
//
// Nothing of a lab shows in the namespaces of the machine it runs on but
// processes, a temporary folder and control groups, and these go when the lab
// is closed or when the program that made it ends, in whatever way: process 1
// of each host dies with the program and takes along all that runs on the
// host, and a janitor process then removes folder and groups. Nothing is named
// machine-wide except after that folder, so that labs do not meet.
//
// The engine is the dockerd that PATH finds, or one whose packages are unpacked
// somewhere (tests/setup/unpack), as [Engine] or TEST_ENGINES say.
//
// Hosts share the root file system of the machine otherwise, /tmp included.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"
)

// Outside is the address of the switch itself: a machine outside of all
// overlays that every host reaches, and their default router.
func Outside() netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, 254}) }

// Config says what to build.
type Config struct {
	Hosts []string // names; default u1 u2 u3; at most 200
	// Docker starts an engine on each host and loads the image
	// busybox:latest, made of the machine's own static busybox.
	Docker bool
	// Engines of one host after the other, again from the first when there are
	// more hosts. Empty: what the environment variable TEST_ENGINES says, or the
	// machine's.
	Engines []Engine
	// MTU of the underlay in bytes; 0 for 1500.
	MTU int
	// Wire takes segmentation and checksum offload off the underlay, so that
	// every packet crosses it as on a plain network card.
	Wire bool
}

// Lab is a running set of hosts.
type Lab struct {
	Hosts []*Host

	cfg     Config
	dir     string
	id      string // base name of dir
	spawn   chan func()
	ended   chan struct{} // the thread behind spawn has gone
	sw      *process
	extra   []*Host // machines behind hosts
	cuts    map[[2]string]bool
	narrow  map[[2]string]int // MTU between two ports
	drops   []string          // rules of the switch
	janitor *janitor
}

// Missing says why no lab can be built on this machine; empty when one can.
func Missing(docker bool) string {
	if os.Geteuid() != 0 {
		return "needs root, to make namespaces"
	}
	tools := []string{"ip", "nft", "tini-static", "iptables-save"}
	if docker {
		tools = append(tools, "dockerd", "docker", "busybox", "curl")
	}
	for _, t := range tools {
		if _, err := exec.LookPath(t); err != nil {
			return "needs " + t + " (./tests/run installs all that is needed)"
		}
	}
	return ""
}

// New builds a lab. On error nothing is left of it.
func New(ctx context.Context, cfg Config) (*Lab, error) {
	if why := Missing(cfg.Docker); why != "" {
		return nil, errors.New("lab: " + why)
	}
	if len(cfg.Hosts) == 0 {
		cfg.Hosts = []string{"u1", "u2", "u3"}
	}
	if len(cfg.Hosts) > 200 {
		return nil, fmt.Errorf("lab: %d hosts, want at most 200", len(cfg.Hosts))
	}
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	if len(cfg.Engines) == 0 {
		cfg.Engines = engines(os.Getenv(enginesEnv))
	}
	dir, err := os.MkdirTemp("", "weave-lab-")
	if err != nil {
		return nil, fmt.Errorf("lab: folder: %w", err)
	}
	l := &Lab{
		cfg: cfg, dir: dir, id: filepath.Base(dir), cuts: map[[2]string]bool{}, narrow: map[[2]string]int{},
		spawn: make(chan func()), ended: make(chan struct{}),
	}
	if l.janitor, err = startJanitor(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("lab: %w", err), os.RemoveAll(dir))
	}
	go l.spawner()
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("lab: %w", err), l.Close())
	}
	return l, nil
}

func (l *Lab) build(ctx context.Context) error {
	if err := l.startSwitch(ctx); err != nil {
		return fmt.Errorf("switch: %w", err)
	}
	for i, name := range l.cfg.Hosts {
		h, err := l.newHost(ctx, name, netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}))
		if err != nil {
			return fmt.Errorf("host %s: %w", name, err)
		}
		l.Hosts = append(l.Hosts, h)
		if err := l.plug(ctx, h); err != nil {
			return fmt.Errorf("host %s: %w", name, err)
		}
	}
	if l.cfg.Docker {
		if err := l.startEngines(ctx); err != nil {
			return err
		}
	}
	for _, h := range l.Hosts {
		if err := h.settle(ctx); err != nil {
			return fmt.Errorf("host %s: %w", h.Name, err)
		}
	}
	return nil
}

// Host returns the host of that name; it panics when there is none.
func (l *Lab) Host(name string) *Host {
	for _, h := range append(l.Hosts, l.extra...) {
		if h.Name == name {
			return h
		}
	}
	panic("lab: no host " + name)
}

// Dir is the lab's folder, the same on all hosts; it goes with the lab.
func (l *Lab) Dir() string { return l.dir }

// Close ends the hosts with all that runs on them and removes every trace. It
// may be called again.
func (l *Lab) Close() error {
	if l.janitor == nil {
		return nil
	}
	for _, h := range append(l.Hosts, l.extra...) {
		h.Crash()
	}
	if l.sw != nil {
		l.sw.kill()
	}
	close(l.spawn)
	<-l.ended
	j := l.janitor
	l.janitor = nil
	return j.sweep()
}

// spawner starts the processes 1: a signal on the death of their parent comes
// when the parent's thread dies, so they all have this one, which lives as
// long as the lab.
func (l *Lab) spawner() {
	defer close(l.ended)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for f := range l.spawn {
		f()
	}
}

// poll is how often Wait looks again.
const poll = 20 * time.Millisecond

// Wait calls check until it returns nil, and gives up with its last error when
// ctx ends or the time is over.
func Wait(ctx context.Context, timeout time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", timeout, err)
		case <-tick.C:
		}
	}
}
