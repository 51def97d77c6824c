package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
)

// patience is how long something must seem left over before it is removed: the
// engine repeats a call for 15 s, and shows an endpoint only after the calls
// for its address and itself have been answered.
const patience = time.Minute

// Waits of the loop that keeps the engine's state and ours in line.
const (
	retryNetwork = 2 * time.Second // first wait after network "weave" could not be made
	maxRetry     = time.Minute
	lookSometime = 10 * time.Minute
	// lookAgain follows the first look: the engine may have been refused right
	// before, and gives up on the container only now.
	lookAgain = 5 * time.Second
)

// follow keeps network "weave" in being and frees what the engine has lost,
// each time the engine is there (again) and from time to time.
func (p *Plugin) follow(ctx context.Context) error {
	var wait, retry time.Duration
	for first := true; ; first = false {
		err := p.keepNetwork(ctx)
		if first {
			close(p.ready)
		}
		if err == nil {
			err = p.Reconcile(ctx)
		}
		if err == nil {
			err = p.revive(ctx)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			retry = min(max(retryNetwork, retry*3/2), maxRetry)
			wait = retry
			p.cfg.Log.Warn("plugin: docker networks", "err", err, "retry_in", wait)
		default:
			retry, wait = 0, lookSometime
			if p.suspicious() {
				wait = p.patience + time.Second
			}
			if first {
				wait = min(wait, lookAgain)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
			// The engine that came back may have forgotten networks.
		case <-time.After(wait):
		}
	}
}

func (p *Plugin) keepNetwork(ctx context.Context) error {
	if p.cfg.OnDemand {
		return nil
	}
	return p.EnsureNetwork(ctx)
}

func (p *Plugin) suspicious() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.suspects) > 0
}

// Reconcile compares the records with the engine's endpoints on networks of
// the driver. Addresses in use are claimed again should they be unknown; those
// of no endpoint are freed, and endpoints the engine does not know are deleted,
// both once they have been so for a minute.
func (p *Plugin) Reconcile(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dockerLimit)
	defer cancel()
	addrs, endpoints, err := p.engineState(ctx)
	if err != nil {
		return err
	}
	var errs []error
	seen, kept := make(map[string]bool), make(map[netip.Addr]bool)
	for _, a := range p.cfg.Attach.List() {
		if a.Kind == attach.KindEndpoint && endpoints[a.ID] == "" {
			if p.leftOver(a.ID) {
				p.cfg.Log.Info("plugin: endpoint removed, the engine does not know it", "endpoint", a.ID)
				errs = append(errs, p.cfg.Attach.DeleteEndpoint(ctx, a.ID), p.forget(a.ID))
				continue
			}
			seen[a.ID] = true
		}
		for _, addr := range a.Addrs {
			kept[addr.Addr()] = true
		}
	}
	if p.cfg.Alloc != nil {
		held := make(map[netip.Addr]bool)
		for owner, list := range p.cfg.Alloc.Owned() {
			for _, a := range list {
				held[a.Addr()] = true
				if _, used := addrs[a.Addr()]; used || owner != holder(a.Addr()) {
					continue
				}
				// While an endpoint has it nobody else can.
				if p.leftOver(a.Addr().String()) && !kept[a.Addr()] && !p.isPending(a.Addr()) {
					p.cfg.Log.Info("plugin: address freed, no endpoint has it", "address", a)
					errs = append(errs, p.cfg.Alloc.Free(owner, a.Addr()))
					continue
				}
				seen[a.Addr().String()] = true
			}
		}
		errs = append(errs, p.claimMissing(ctx, addrs, held))
	}
	p.acquit(seen)
	return errors.Join(errs...)
}

// engineState gathers what the engine has on networks of the driver: addresses,
// and endpoints with the containers that they are of.
func (p *Plugin) engineState(ctx context.Context) (addrs map[netip.Addr]netip.Prefix, endpoints map[string]string, err error) {
	list, err := p.cfg.Docker.ListNetworks(ctx, map[string][]string{"driver": {docker.Driver}})
	if err != nil {
		return nil, nil, err
	}
	addrs, endpoints = make(map[netip.Addr]netip.Prefix), make(map[string]string)
	for _, n := range list {
		n, err = p.cfg.Docker.InspectNetwork(ctx, n.ID)
		if docker.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, nil, err
		}
		for id, e := range n.Containers {
			endpoints[e.EndpointID] = id
			// Networks with addresses by another driver are not ours to keep.
			ours := n.IPAM.Driver == docker.Driver || n.IPAM.Driver == nullDriver
			if a, err := netip.ParsePrefix(e.IPv4Address); err == nil && ours {
				addrs[a.Addr()] = a
			}
		}
	}
	return addrs, endpoints, nil
}

func (p *Plugin) claimMissing(ctx context.Context, used map[netip.Addr]netip.Prefix, held map[netip.Addr]bool) error {
	ctx, cancel := context.WithTimeout(ctx, addressLimit)
	defer cancel()
	var errs []error
	for addr, full := range used {
		if held[addr] {
			continue
		}
		if err := p.cfg.Alloc.Claim(ctx, holder(addr), full); err != nil {
			errs = append(errs, fmt.Errorf("address %s of a running container: %w", addr, err))
		}
	}
	return errors.Join(errs...)
}

// leftOver notes that something seems left over, and says whether it has been
// so for long enough.
func (p *Plugin) leftOver(what string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	since, known := p.suspects[what]
	if !known {
		p.suspects[what] = time.Now()
		return false
	}
	return time.Since(since) >= p.patience
}

// acquit drops suspects that were not seen again, and what was pending for
// longer than a start can take.
func (p *Plugin) acquit(seen map[string]bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for what := range p.suspects {
		if !seen[what] {
			delete(p.suspects, what)
		}
	}
	for addr, since := range p.pending {
		if time.Since(since) >= p.patience {
			delete(p.pending, addr)
		}
	}
}

func (p *Plugin) isPending(addr netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	since, ok := p.pending[addr]
	return ok && time.Since(since) < p.patience
}
