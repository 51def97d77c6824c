package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"weave.local/proxy/docker"
)

// NetworkName is the network of the default subnet.
const NetworkName = docker.Driver

// errNoDefault says that there is no default subnet.
var errNoDefault = errors.New("address allocation is switched off, so there is no default subnet")

// EnsureNetwork makes network "weave" of the default subnet unless it is
// there. Without address allocation there is no such network, which is no
// error.
func (p *Plugin) EnsureNetwork(ctx context.Context) error {
	_, err := p.Network(ctx, netip.Prefix{})
	if errors.Is(err, errNoDefault) {
		return nil
	}
	return err
}

// Network returns the name of the network for a subnet, zero meaning the
// default one, and makes it unless it is there.
func (p *Plugin) Network(ctx context.Context, subnet netip.Prefix) (string, error) {
	spec, err := p.networkSpec(subnet)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, dockerLimit)
	defer cancel()
	select {
	case p.making <- struct{}{}:
		defer func() { <-p.making }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	n, found, err := p.findNetwork(ctx, spec.Name)
	if err != nil {
		return "", err
	}
	if found {
		if err := checkNetwork(n, spec); err == nil {
			return spec.Name, nil
		} else if n.Driver != docker.Driver || n.Labels[docker.LabelOurs] == "" {
			return "", err
		}
		// Ours, of an earlier launch with another default subnet.
		if users, err := p.release(ctx, n); err != nil {
			return "", err
		} else if len(users) > 0 {
			return "", fmt.Errorf("%w; remove the containers that use it first: %s", checkNetwork(n, spec), strings.Join(users, ", "))
		}
	}
	if _, err := p.cfg.Docker.CreateNetwork(ctx, spec); err != nil {
		return "", fmt.Errorf("make network %s: %w", spec.Name, err)
	}
	p.cfg.Log.Info("docker network made", "name", spec.Name, "subnet", spec.IPAM.Config[0].Subnet)
	return spec.Name, nil
}

func (p *Plugin) networkSpec(subnet netip.Prefix) (docker.NetworkSpec, error) {
	name := ""
	if p.cfg.Alloc != nil && (!subnet.IsValid() || subnet == p.cfg.Alloc.DefaultSubnet()) {
		name, subnet = NetworkName, p.cfg.Alloc.DefaultSubnet()
	}
	switch {
	case !subnet.IsValid():
		return docker.NetworkSpec{}, errNoDefault
	case name == "":
		name = fmt.Sprintf("%s-%s-%d", NetworkName, subnet.Addr(), subnet.Bits())
	}
	spec := docker.NetworkSpec{
		Name:   name,
		Driver: docker.Driver,
		// The engine accepts an address for a container only on a network
		// whose subnet was given.
		IPAM:   docker.IPAM{Driver: docker.Driver, Config: []docker.IPAMPool{{Subnet: subnet.String()}}},
		Labels: map[string]string{docker.LabelOurs: "true"},
	}
	if !p.cfg.NoMulticastRoute {
		spec.Options = map[string]string{docker.OptionMulticast: "true"}
	}
	return spec, nil
}

// findNetwork finds a network by its very name; the engine would also take the
// beginning of an id.
func (p *Plugin) findNetwork(ctx context.Context, name string) (docker.Network, bool, error) {
	list, err := p.cfg.Docker.ListNetworks(ctx, map[string][]string{"name": {name}})
	if err != nil {
		return docker.Network{}, false, err
	}
	i := slices.IndexFunc(list, func(n docker.Network) bool { return n.Name == name })
	if i < 0 {
		return docker.Network{}, false, nil
	}
	return list[i], true, nil
}

// checkNetwork says in which way a network is not what is wanted.
func checkNetwork(n docker.Network, want docker.NetworkSpec) error {
	subnet := want.IPAM.Config[0].Subnet
	if n.Driver != want.Driver || n.IPAM.Driver != want.IPAM.Driver {
		return fmt.Errorf("docker network %s exists with driver %s and addresses by %s: remove it, so that it can be made with driver %s",
			n.Name, n.Driver, n.IPAM.Driver, want.Driver)
	}
	if len(n.IPAM.Config) != 1 || n.IPAM.Config[0].Subnet != subnet {
		return fmt.Errorf("docker network %s exists with another subnet than %s", n.Name, subnet)
	}
	return nil
}

// ReleaseNetworks removes the networks made by us that no container needs, be
// it stopped: without the driver they only cost the engine time. It returns a
// sentence for each network that stays. To be called while Run serves.
func (p *Plugin) ReleaseNetworks(ctx context.Context) ([]string, error) {
	list, err := p.cfg.Docker.ListNetworks(ctx, map[string][]string{"label": {docker.LabelOurs}})
	if err != nil {
		return nil, err
	}
	var stay []string
	var errs []error
	for _, n := range list {
		users, err := p.release(ctx, n)
		if len(users) > 0 {
			stay = append(stay, fmt.Sprintf("docker network %s stays: in use by %s", n.Name, strings.Join(users, ", ")))
		}
		errs = append(errs, err)
	}
	return stay, errors.Join(errs...)
}

// release removes a network unless containers, which it returns by name, are
// on it or will be when they start.
func (p *Plugin) release(ctx context.Context, n docker.Network) (users []string, err error) {
	on, err := p.users(ctx, n)
	if err != nil {
		return nil, err
	}
	if len(on) == 0 {
		return nil, p.cfg.Docker.RemoveNetwork(ctx, n.ID)
	}
	for _, c := range on {
		users = append(users, c.Name())
	}
	slices.Sort(users)
	return users, nil
}

// users lists the containers of a network, stopped ones included.
func (p *Plugin) users(ctx context.Context, n docker.Network) ([]docker.Container, error) {
	return p.cfg.Docker.ListContainers(ctx, true, map[string][]string{"network": {n.Name, n.ID}})
}

// RemoveNetworks takes all containers off all networks of the driver and
// removes the networks. To be called while Run serves.
func (p *Plugin) RemoveNetworks(ctx context.Context) error {
	list, err := p.cfg.Docker.ListNetworks(ctx, map[string][]string{"driver": {docker.Driver}})
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range list {
		errs = append(errs, p.removeNetwork(ctx, n))
	}
	return errors.Join(errs...)
}

func (p *Plugin) removeNetwork(ctx context.Context, n docker.Network) error {
	on, err := p.users(ctx, n)
	if err != nil {
		return err
	}
	for _, c := range on {
		if err := p.cfg.Docker.DisconnectNetwork(ctx, n.ID, c.ID, true); err != nil && !docker.IsNotFound(err) {
			p.cfg.Log.Warn("container stays on a network", "container", c.Name(), "network", n.Name, "err", err)
		}
	}
	// What the engine has lost track of has only a name.
	left, err := p.cfg.Docker.InspectNetwork(ctx, n.ID)
	if docker.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range left.Containers {
		if err := p.cfg.Docker.DisconnectNetwork(ctx, n.ID, e.Name, true); err != nil && !docker.IsNotFound(err) {
			p.cfg.Log.Warn("endpoint stays on a network", "endpoint", e.Name, "network", n.Name, "err", err)
		}
	}
	if err := p.cfg.Docker.RemoveNetwork(ctx, n.ID); err != nil {
		return fmt.Errorf("remove network %s: %w", n.Name, err)
	}
	return nil
}
