package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
)

// Address spaces of our address driver, and the one of networks without
// address management (--ipam-driver null).
const (
	localSpace  = "weavelocal"
	globalSpace = "weaveglobal"
	nullSpace   = "null"
	nullDriver  = "null"
)

// checkSpace refuses networks whose addresses come from the engine itself: it
// would give out the same ones on each host.
func checkSpace(q networkRequest) error {
	for _, d := range q.IPv4Data {
		switch d.AddressSpace {
		case localSpace, globalSpace, nullSpace, "":
		default:
			return errors.New("a network of driver weave needs addresses that are unique in the cluster: create it with --ipam-driver weave as well")
		}
	}
	return nil
}

// endpointAddress is the address of an endpoint: the engine's, which our
// address driver gave it, or, on a network without address management, the one
// its option asks for. chosen tells of the latter, which we own then.
func (p *Plugin) endpointAddress(ctx context.Context, q endpointRequest) (addr netip.Prefix, chosen bool, err error) {
	reqs, wants, err := optionRequests(q)
	if err != nil {
		return addr, false, err
	}
	if q.Interface.Address != "" {
		if addr, err = netip.ParsePrefix(q.Interface.Address); err != nil {
			return addr, false, fmt.Errorf("address %q of the endpoint: want one such as 10.32.0.1/12", q.Interface.Address)
		}
		if wants {
			err = p.expectMove(ctx, q.NetworkID)
		}
		return addr, false, err
	}
	if len(reqs) != 1 {
		return addr, false, fmt.Errorf("option %s names %d addresses: an endpoint has one, want a network for each", docker.Choice, len(reqs))
	}
	addr, err = p.obtain(ctx, reqs[0])
	return addr, err == nil, err
}

// optionRequests reads the option of an endpoint.
func optionRequests(q endpointRequest) (reqs []attach.Request, set bool, err error) {
	text, set := q.Options[docker.Choice].(string)
	if reqs, err = attach.ParseRequests(text); err != nil {
		err = fmt.Errorf("option %s: %w", docker.Choice, err)
	}
	return reqs, set, err
}

// obtain gets an address that the engine has no part in.
func (p *Plugin) obtain(ctx context.Context, r attach.Request) (netip.Prefix, error) {
	ctx, cancel := context.WithTimeout(ctx, addressLimit)
	defer cancel()
	subnet := subnetOf(r)
	if !subnet.IsValid() {
		if p.cfg.Alloc == nil {
			return netip.Prefix{}, errNoDefault
		}
		subnet = p.cfg.Alloc.DefaultSubnet()
	}
	l := pool{subnet, subnet}
	var addr netip.Addr
	var err error
	if r.IP.IsValid() {
		addr, err = p.claim(ctx, l, r.IP.Addr().String())
	} else {
		addr, err = p.allocate(ctx, l)
	}
	return netip.PrefixFrom(addr, subnet.Bits()), err
}

// subnetOf is the subnet a request is for; invalid for the default one.
func subnetOf(r attach.Request) netip.Prefix {
	if r.IP.IsValid() {
		return r.IP.Masked()
	}
	return r.Net
}

// seat is a network that a container shall be on.
type seat struct {
	network string
	ip      string // empty: any
}

// seats finds, or makes, the networks for what a container asks for.
func (p *Plugin) seats(ctx context.Context, text string) ([]seat, error) {
	if text == "none" {
		return nil, nil
	}
	reqs, err := p.readChoice(text)
	if err != nil {
		return nil, err
	}
	var list []seat
	for _, r := range reqs {
		s := seat{}
		if s.network, err = p.Network(ctx, subnetOf(r)); err != nil {
			return nil, err
		}
		if r.IP.IsValid() {
			s.ip = r.IP.Addr().String()
		}
		list = append(list, s)
	}
	return list, nil
}

// readChoice parses the label. The engine takes no container onto networks
// that overlap.
func (p *Plugin) readChoice(text string) ([]attach.Request, error) {
	reqs, err := attach.ParseRequests(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", docker.Choice, err)
	}
	var taken []netip.Prefix
	for _, r := range reqs {
		subnet := subnetOf(r)
		if !subnet.IsValid() && p.cfg.Alloc != nil {
			subnet = p.cfg.Alloc.DefaultSubnet()
		}
		if slices.ContainsFunc(taken, subnet.Overlaps) {
			return nil, fmt.Errorf("%s=%s: subnets overlap; Docker takes no container onto both, only the proxy's WEAVE_CIDR can", docker.Choice, text)
		}
		taken = append(taken, subnet)
	}
	return reqs, nil
}

// checkLabel refuses to start a container whose label makes no sense. The
// engine must not be asked for the container itself here: it would wait for
// our answer.
func (p *Plugin) checkLabel(ctx context.Context, q joinRequest) error {
	p.mu.Lock()
	bad := len(p.badLabels) > 0
	p.mu.Unlock()
	if !bad {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	n, err := p.cfg.Docker.InspectNetwork(ctx, q.NetworkID)
	if err != nil {
		p.cfg.Log.Warn("plugin: containers of the network are not known", "network", q.NetworkID, "err", err)
		return nil
	}
	if n.Name != NetworkName {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range n.Containers {
		if e.EndpointID == q.EndpointID {
			return p.badLabels[e.Name]
		}
	}
	return nil
}
