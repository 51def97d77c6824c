package plugin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
)

const (
	// maxMoves is how many containers may wait to be put on the networks they
	// choose, and parallelMoves how many are put there at a time: the engine
	// answers for a container only when its start is over.
	maxMoves      = 1024
	parallelMoves = 4
)

// register follows the lives of containers that choose their networks.
func (p *Plugin) register() {
	first := sync.OnceFunc(func() { close(p.engine) })
	p.cfg.Watch.OnConnect(func(_ context.Context, all []docker.Container) {
		first()
		for _, c := range all {
			text, chosen := c.Labels[docker.Choice]
			if chosen {
				p.noteLabel(c.Name(), text)
			}
			if chosen || docker.AllowsAnySource(c.Labels) {
				p.move(c.ID)
			}
		}
		select {
		case p.wake <- struct{}{}:
		default:
		}
	})
	p.cfg.Watch.OnEvent(func(e docker.Event) {
		text, labelled := e.Attributes[docker.Choice]
		switch e.Action {
		case docker.ActionCreate:
			if labelled {
				p.noteLabel(e.Name, text)
				p.move(e.ID)
			}
		case docker.ActionStart:
			if labelled || docker.AllowsAnySource(e.Attributes) || p.expected() {
				p.move(e.ID)
			}
		case docker.ActionDestroy:
			p.mu.Lock()
			delete(p.badLabels, e.Name)
			p.mu.Unlock()
		case docker.ActionDie:
		}
	})
}

// noteLabel keeps the names of containers whose label is wrong.
func (p *Plugin) noteLabel(container, text string) {
	if text == "none" {
		return
	}
	_, err := p.readChoice(text)
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.badLabels, container)
	if err != nil {
		p.badLabels[container] = err
	}
}

func (p *Plugin) hasBadLabel(container string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.badLabels[container] != nil
}

// expectMove notes that a container with an option is about to start on
// network "weave". Other networks have their addresses by themselves.
func (p *Plugin) expectMove(ctx context.Context, network string) error {
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	n, err := p.cfg.Docker.InspectNetwork(ctx, network)
	if err != nil {
		return err
	}
	if n.Name != NetworkName {
		return fmt.Errorf("option %s: addresses on network %s come from its own subnet; the option is for network %s and for networks with --ipam-driver null",
			docker.Choice, n.Name, NetworkName)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.optioned = true
	return nil
}

func (p *Plugin) expected() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.optioned
}

func (p *Plugin) move(id string) {
	select {
	case p.moves <- id:
	default:
		p.cfg.Log.Warn("plugin: container is not put on the networks it chooses, too many start at once", "container", id)
	}
}

// moveAll serves moves until ctx ends.
func (p *Plugin) moveAll(ctx context.Context) error {
	var g errgroup.Group
	g.SetLimit(parallelMoves)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case id := <-p.moves:
			g.Go(func() error {
				if err := p.settle(ctx, id); err != nil && ctx.Err() == nil {
					p.cfg.Log.Warn("plugin: networks chosen by a container", "container", id, "err", err)
				}
				if err := p.allow(ctx, id); err != nil && ctx.Err() == nil {
					p.cfg.Log.Warn("plugin: container may send from its own addresses only", "container", id, "err", err)
				}
				return nil
			})
		}
	}
	return g.Wait()
}

// settle puts a container that was made for network "weave" on the networks
// it chooses instead. It leaves the old one first, since their subnets may
// overlap; should the rest fail, the container is cut off rather than in the
// wrong place.
func (p *Plugin) settle(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, dockerLimit)
	defer cancel()
	info, err := p.cfg.Docker.InspectContainer(ctx, id)
	if docker.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	if info.HostConfig.NetworkMode != NetworkName {
		return nil
	}
	old, on := info.NetworkSettings.Networks[NetworkName]
	text, chosen := info.Config.Labels[docker.Choice]
	if option, ok := old.DriverOpts[docker.Choice]; ok {
		text, chosen = option, true
	}
	if !chosen {
		return nil
	}
	list, err := p.seats(ctx, text)
	if err != nil && !info.State.Running && p.hasBadLabel(strings.TrimPrefix(info.Name, "/")) {
		return err // it will not start
	}
	keep := false
	for _, s := range list {
		keep = keep || s.network == NetworkName && on && (s.ip == "" || old.IPAMConfig != nil && old.IPAMConfig.IPv4Address == s.ip)
	}
	if on && !keep {
		err = errors.Join(err, p.cfg.Docker.DisconnectNetwork(ctx, NetworkName, id, false))
	}
	if err != nil {
		return err
	}
	for _, s := range list {
		if _, there := info.NetworkSettings.Networks[s.network]; there && (s.network != NetworkName || keep) {
			continue
		}
		settings := docker.EndpointSettings{Aliases: old.Aliases}
		if s.ip != "" {
			settings.IPAMConfig = &docker.EndpointIPAM{IPv4Address: s.ip}
		}
		if err := p.cfg.Docker.ConnectNetwork(ctx, s.network, id, &settings); err != nil {
			return err
		}
	}
	return nil
}

// allow lets a running container send from any source if its label says so. The
// endpoints are new at each start, so this is done each time.
func (p *Plugin) allow(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, dockerLimit)
	defer cancel()
	info, err := p.cfg.Docker.InspectContainer(ctx, id)
	if docker.IsNotFound(err) {
		return nil
	} else if err != nil || !docker.AllowsAnySource(info.Config.Labels) {
		return err
	}
	var errs []error
	for _, a := range p.cfg.Attach.List() {
		if a.Kind != attach.KindEndpoint {
			continue
		}
		for _, n := range info.NetworkSettings.Networks {
			if n.EndpointID == a.ID {
				errs = append(errs, p.cfg.Attach.AllowAnySource(ctx, a.ID))
			}
		}
	}
	return errors.Join(errs...)
}
