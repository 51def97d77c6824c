package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"weave.local/ipam"
	"weave.local/proxy/docker"
	"weave.local/router/attach"
	"weave.local/router/netdev"
)

// holder is the owner under which an address of a plugin network is recorded:
// the engine asks for it without saying for which container.
func holder(addr netip.Addr) string { return ipam.Anonymous + addr.String() }

// poolPrefix begins the identifier of a pool, which carries all there is to
// know: weave-<subnet>-<range>.
const poolPrefix = "weave-"

// gatewayOption is how the engine's address management calls a gateway, in
// requests and in the data of a pool.
const (
	gatewayOption = "com.docker.network.gateway"
	typeOption    = "RequestAddressType"
)

// pool is a subnet and the part of it that addresses are taken from.
type pool struct{ subnet, part netip.Prefix }

func (p pool) id() string { return poolPrefix + p.subnet.String() + "-" + p.part.String() }

func parsePool(id string) (pool, error) {
	bad := fmt.Errorf("pool %q: want one such as weave-10.32.0.0/12-10.32.0.0/12", id)
	rest, ok := strings.CutPrefix(id, poolPrefix)
	s, t, both := strings.Cut(rest, "-")
	if !ok || !both {
		return pool{}, bad
	}
	subnet, err := netip.ParsePrefix(s)
	if err != nil {
		return pool{}, bad
	}
	part, err := netip.ParsePrefix(t)
	if err != nil {
		return pool{}, bad
	}
	return pool{subnet, part}, nil
}

// parseSubnet reads a subnet a user gave to a network.
func parseSubnet(s string) (netip.Prefix, error) {
	subnet, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return netip.Prefix{}, fmt.Errorf("subnet %q: want one such as 10.32.1.0/24", s)
	case !subnet.Addr().Is4():
		return netip.Prefix{}, fmt.Errorf("subnet %s: only IPv4 is supported so far", s)
	case subnet != subnet.Masked():
		return netip.Prefix{}, fmt.Errorf("subnet %s has host bits set: want %s", s, subnet.Masked())
	case subnet.Bits() > 30:
		return netip.Prefix{}, fmt.Errorf("subnet %s: too small, want at least four addresses (/30)", s)
	}
	return subnet, nil
}

// requestPool accepts any IPv4 subnet: addresses outside the cluster's range
// can still be claimed one by one.
func (p *Plugin) requestPool(_ context.Context, q poolRequest) (poolAnswer, error) {
	if q.V6 {
		return poolAnswer{}, errors.New("only IPv4 is supported so far: create the network without --ipv6")
	}
	var l pool
	var err error
	switch {
	case q.Pool != "":
		if l.subnet, err = parseSubnet(q.Pool); err != nil {
			return poolAnswer{}, err
		}
	case p.cfg.Alloc == nil:
		return poolAnswer{}, errors.New("address allocation is switched off: name the --subnet")
	default:
		l.subnet = p.cfg.Alloc.DefaultSubnet()
	}
	l.part = l.subnet
	if q.SubPool != "" {
		if l.part, err = parseSubnet(q.SubPool); err != nil {
			return poolAnswer{}, err
		}
		if l.part.Bits() < l.subnet.Bits() || !l.subnet.Contains(l.part.Addr()) {
			return poolAnswer{}, fmt.Errorf("range %s lies outside subnet %s", l.part, l.subnet)
		}
	}
	// The engine takes an address for a gateway unless the pool brings one.
	// There is none, so the subnet's own address stands in, which no host
	// can have.
	return poolAnswer{
		PoolID: l.id(),
		Pool:   l.subnet.String(),
		Data:   map[string]string{gatewayOption: l.subnet.String()},
	}, nil
}

func (p *Plugin) requestAddress(ctx context.Context, q addressRequest) (addressAnswer, error) {
	l, err := parsePool(q.PoolID)
	if err != nil {
		return addressAnswer{}, err
	}
	if q.Options[typeOption] == gatewayOption {
		return requestGateway(l, q.Address)
	}
	if err := p.checkDriver(ctx, l.subnet); err != nil {
		return addressAnswer{}, err
	}
	limited, cancel := context.WithTimeout(ctx, addressLimit)
	defer cancel()
	var addr netip.Addr
	if q.Address != "" {
		addr, err = p.claim(limited, l, q.Address)
	} else {
		addr, err = p.allocate(limited, l)
	}
	if err != nil {
		if limited.Err() != nil && ctx.Err() == nil {
			err = fmt.Errorf("no address within %v (see 'weave status'): %w", addressLimit, err)
		}
		return addressAnswer{}, err
	}
	return addressAnswer{Address: netip.PrefixFrom(addr, l.subnet.Bits()).String()}, nil
}

// checkDriver refuses addresses for networks of other drivers: their endpoints
// are not ours to see, and there is no gateway. The engine does not say for
// which driver it asks; but a network of ours was announced, or the engine lists
// it.
func (p *Plugin) checkDriver(ctx context.Context, subnet netip.Prefix) error {
	p.mu.Lock()
	known := p.subnets[subnet]
	p.mu.Unlock()
	if known {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	list, err := p.cfg.Docker.ListNetworks(ctx, nil)
	if err != nil {
		p.cfg.Log.Warn("plugin: networks are not known: address given all the same", "subnet", subnet, "err", err)
		return nil
	}
	var other string
	for _, n := range list {
		if n.IPAM.Driver != docker.Driver || !slices.ContainsFunc(n.IPAM.Config, func(c docker.IPAMPool) bool { return c.Subnet == subnet.String() }) {
			continue
		}
		if n.Driver == docker.Driver {
			p.mu.Lock()
			p.subnets[subnet] = true
			p.mu.Unlock()
			return nil
		}
		other = fmt.Sprintf("network %s has driver %s: addresses by weave are for networks of driver weave, create it with -d weave", n.Name, n.Driver)
	}
	if other != "" {
		return errors.New(other)
	}
	return nil
}

// releasePool forgets what was known of a pool's network. One that is not known
// is no error.
func (p *Plugin) releasePool(_ context.Context, q addressRequest) (empty, error) {
	if l, err := parsePool(q.PoolID); err == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.subnets, l.subnet)
	}
	return empty{}, nil
}

// requestGateway answers the engine's wish for a gateway address without
// giving one away: a container reaches no host by it.
func requestGateway(l pool, want string) (addressAnswer, error) {
	addr := l.subnet.Addr()
	if want != "" {
		var err error
		if addr, err = netip.ParseAddr(want); err != nil || !l.subnet.Contains(addr) {
			return addressAnswer{}, fmt.Errorf("gateway %q: want an address in %s, or none", want, l.subnet)
		}
		if addr != l.subnet.Addr() {
			return addressAnswer{}, fmt.Errorf("gateway %s: a network of driver weave has none, create it without --gateway", want)
		}
	}
	return addressAnswer{Address: netip.PrefixFrom(addr, l.subnet.Bits()).String()}, nil
}

func (p *Plugin) allocate(ctx context.Context, l pool) (netip.Addr, error) {
	if p.cfg.Alloc == nil {
		return netip.Addr{}, errors.New("address allocation is switched off: give the container an --ip")
	}
	got, err := p.cfg.Alloc.Allocate(ctx, ipam.Anonymous, l.part)
	if err != nil {
		return netip.Addr{}, err
	}
	p.setPending(got.Addr())
	return got.Addr(), nil
}

func (p *Plugin) claim(ctx context.Context, l pool, want string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(want)
	if err != nil || !l.subnet.Contains(addr) {
		return netip.Addr{}, fmt.Errorf("address %q: want one in %s", want, l.subnet)
	}
	if addr == l.subnet.Addr() {
		return netip.Addr{}, fmt.Errorf("address %s is the address of the network itself", addr)
	}
	// All plugin networks are one owner to the allocator, so who of them has
	// the address is to be seen here.
	if user, used := p.inUse(ctx, addr); used {
		return netip.Addr{}, fmt.Errorf("%s is held by %s on this host", addr, user)
	}
	if p.cfg.Alloc != nil {
		if err := p.cfg.Alloc.Claim(ctx, holder(addr), netip.PrefixFrom(addr, l.subnet.Bits())); err != nil {
			return netip.Addr{}, err
		}
	}
	p.setPending(addr)
	return addr, nil
}

// inUse says whether an endpoint has the address or is about to.
// One whose container ended while we were not there to be told is deleted.
func (p *Plugin) inUse(ctx context.Context, addr netip.Addr) (user string, used bool) {
	for _, a := range p.cfg.Attach.List() {
		if !slices.ContainsFunc(a.Addrs, func(x netip.Prefix) bool { return x.Addr() == addr }) {
			continue
		}
		if !p.isLost(ctx, a) {
			return p.user(ctx, a), true
		}
		p.cfg.Log.Info("plugin: endpoint removed, its address is asked for", "endpoint", a.ID, "address", addr)
		if _, err := p.deleteEndpoint(ctx, endpointRequest{EndpointID: a.ID}); err != nil {
			p.cfg.Log.Warn("plugin: endpoint of a container that is gone", "endpoint", a.ID, "err", err)
			return p.user(ctx, a), true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if since, ok := p.pending[addr]; ok && time.Since(since) < p.patience {
		return "a container that is being started", true
	}
	return "", false
}

// isLost says whether an endpoint is of no container: its device is gone, or
// the engine did not know it when all was compared, and still does not.
func (p *Plugin) isLost(ctx context.Context, a attach.Attachment) bool {
	if a.Kind != attach.KindEndpoint {
		return false
	}
	if !netdev.Exists(a.HostIf) {
		return true
	}
	p.mu.Lock()
	_, suspect := p.suspects[a.ID]
	p.mu.Unlock()
	if !suspect {
		return false
	}
	users, err := p.endpointUsers(ctx)
	return err == nil && users[a.ID] == ""
}

func (p *Plugin) setPending(addr netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pending[addr] = time.Now()
}

// releaseAddress gives an address back; one that nobody holds is no error.
func (p *Plugin) releaseAddress(_ context.Context, q addressRequest) (empty, error) {
	l, err := parsePool(q.PoolID)
	if err != nil {
		return empty{}, err
	}
	addr, err := netip.ParseAddr(q.Address)
	if err != nil {
		return empty{}, fmt.Errorf("address %q: want one in %s", q.Address, l.subnet)
	}
	if addr == l.subnet.Addr() {
		return empty{}, nil // the stand-in for a gateway
	}
	return empty{}, p.free(addr)
}

func (p *Plugin) free(addr netip.Addr) error {
	p.mu.Lock()
	delete(p.pending, addr)
	p.mu.Unlock()
	if p.cfg.Alloc == nil {
		return nil
	}
	if len(p.cfg.Alloc.Lookup(holder(addr), netip.Prefix{})) == 0 {
		return nil
	}
	return p.cfg.Alloc.Free(holder(addr), addr)
}
