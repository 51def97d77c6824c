package plugin

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
	"weave.local/router/overlay"
)

// insidePrefix begins the names of interfaces in containers; the engine adds
// a number.
const insidePrefix = "ethwe"

// multicastRange is where all multicast goes (RFC 5771).
const multicastRange = "224.0.0.0/4"

// genericOptions is where the engine puts a user's --opt of a network.
const genericOptions = "com.docker.network.generic"

// lookupLimit bounds a question to the engine while it waits for the plugin.
const lookupLimit = 2 * time.Second

// note is what the store holds of an endpoint: the engine's call to join it
// may come after a restart of the daemon.
type note struct {
	PeerIf    string // the device to move into the container
	NoGateway bool   `json:",omitempty"` // no way to the outside by the engine's own bridge
	// Addr is the address that we chose and that the engine therefore does
	// not give back; the zero text on networks with address management.
	Addr string `json:",omitempty"`
}

// boolOption reads an option whose empty value means true.
func boolOption(name string, value any) (bool, error) {
	switch v := value.(type) {
	case bool:
		return v, nil
	case string:
		if v == "" {
			return true, nil
		}
		if b, err := strconv.ParseBool(v); err == nil {
			return b, nil
		}
	}
	return false, fmt.Errorf("option %s=%v: want true or false", name, value)
}

func (p *Plugin) createNetwork(_ context.Context, q networkRequest) (empty, error) {
	if err := checkSpace(q); err != nil {
		return empty{}, err
	}
	generic, _ := q.Options[genericOptions].(map[string]any)
	t, err := traitsOf(generic)
	if err != nil {
		return empty{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.networks[q.NetworkID] = t
	for _, d := range q.IPv4Data {
		if subnet, err := netip.ParsePrefix(d.Pool); err == nil {
			p.subnets[subnet] = true
		}
	}
	return empty{}, nil
}

// traits are what a user may choose for a network.
type traits struct {
	multicast bool // its containers get a route for multicast
	anySource bool // its containers may send from any address
}

func traitsOf[V any](options map[string]V) (t traits, err error) {
	for name, field := range map[string]*bool{docker.OptionMulticast: &t.multicast, docker.AnySource: &t.anySource} {
		if v, ok := options[name]; ok {
			if *field, err = boolOption(name, v); err != nil {
				return traits{}, err
			}
		}
	}
	return t, nil
}

func (p *Plugin) deleteNetwork(_ context.Context, q networkRequest) (empty, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.networks, q.NetworkID)
	return empty{}, nil
}

// traits returns what was chosen for a network. The engine does not repeat the
// options of networks after a restart, but it answers at any time when asked.
func (p *Plugin) traits(ctx context.Context, network string) traits {
	p.mu.Lock()
	t, known := p.networks[network]
	p.mu.Unlock()
	if known {
		return t
	}
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	n, err := p.cfg.Docker.InspectNetwork(ctx, network)
	if err != nil {
		p.cfg.Log.Warn("plugin: options of the network are not known: none taken", "network", network, "err", err)
		return traits{}
	}
	if t, err = traitsOf(n.Options); err != nil {
		p.cfg.Log.Warn("plugin: options of the network make no sense: none taken", "network", network, "err", err)
	}
	p.mu.Lock()
	p.networks[network] = t
	p.mu.Unlock()
	return t
}

func (p *Plugin) createEndpoint(ctx context.Context, q endpointRequest) (endpointAnswer, error) {
	var a endpointAnswer
	if q.Interface == nil {
		return a, errors.New("the engine names no interface for the endpoint")
	}
	// A call whose answer the engine did not get is repeated.
	if _, err := p.deleteEndpoint(ctx, endpointRequest{EndpointID: q.EndpointID}); err != nil {
		return a, err
	}
	addr, chosen, err := p.endpointAddress(ctx, q)
	if err != nil {
		return a, err
	}
	if err := p.makeEndpoint(ctx, q, addr, chosen, &a.Interface); err != nil {
		if chosen {
			err = errors.Join(err, p.free(addr.Addr()))
		}
		return endpointAnswer{}, err
	}
	if chosen {
		a.Interface.Address = addr.String()
	}
	return a, nil
}

// makeEndpoint makes the endpoint and notes what later calls need. What it
// chose itself it puts into made.
func (p *Plugin) makeEndpoint(ctx context.Context, q endpointRequest, addr netip.Prefix, chosen bool, made *endpointInterface) error {
	mac, err := parseMAC(q.Interface.MacAddress)
	if err != nil {
		return err
	}
	gateway := true
	if v, ok := q.Options[docker.OptionGateway]; ok {
		if gateway, err = boolOption(docker.OptionGateway, v); err != nil {
			return err
		}
	}
	anySource := p.traits(ctx, q.NetworkID).anySource
	if v, ok := q.Options[docker.AnySource]; ok {
		if anySource, err = boolOption(docker.AnySource, v); err != nil {
			return err
		}
	}
	e, err := p.cfg.Attach.CreateEndpoint(ctx, attach.EndpointSpec{ID: q.EndpointID, MAC: mac, Addrs: []netip.Prefix{addr}, AnySource: anySource})
	if err != nil {
		return err
	}
	n := note{PeerIf: e.PeerIf, NoGateway: !gateway}
	if chosen {
		n.Addr = addr.Addr().String()
	}
	if err := p.remember(q.EndpointID, n); err != nil {
		return errors.Join(err, p.cfg.Attach.DeleteEndpoint(ctx, q.EndpointID))
	}
	p.mu.Lock()
	delete(p.pending, addr.Addr())
	p.mu.Unlock()
	if q.Interface.MacAddress == "" {
		made.MacAddress = e.MAC.String()
	}
	return nil
}

// parseMAC reads an Ethernet address; none gives zero.
func parseMAC(s string) (overlay.MAC, error) {
	var mac overlay.MAC
	if s == "" {
		return mac, nil
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, ":", ""))
	if err != nil || len(b) != len(mac) {
		return mac, fmt.Errorf("MAC address %q: want one such as 7a:0b:1c:2d:3e:4f", s)
	}
	copy(mac[:], b)
	return mac, nil
}

func (p *Plugin) deleteEndpoint(ctx context.Context, q endpointRequest) (empty, error) {
	if err := p.cfg.Attach.DeleteEndpoint(ctx, q.EndpointID); err != nil {
		return empty{}, err
	}
	return empty{}, p.forget(q.EndpointID)
}

func (p *Plugin) remember(id string, n note) error {
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	return p.cfg.Store.Put(id, b)
}

func (p *Plugin) recall(id string) (note, error) {
	var n note
	b, ok := p.cfg.Store.Get(id)
	if !ok {
		return n, fmt.Errorf("endpoint %.12s is not known: start the container again", id)
	}
	if err := json.Unmarshal(b, &n); err != nil {
		return n, fmt.Errorf("endpoint %.12s: %w", id, err)
	}
	return n, nil
}

// forget drops what is kept of an endpoint beside the journal.
func (p *Plugin) forget(id string) error {
	p.leaveSandbox(id)
	if _, kept := p.cfg.Store.Get(id); !kept {
		return nil
	}
	if n, err := p.recall(id); err == nil && n.Addr != "" {
		addr, err := netip.ParseAddr(n.Addr)
		if err == nil {
			err = p.free(addr)
		}
		if err != nil {
			return err
		}
	}
	return p.cfg.Store.Delete(id)
}

func (p *Plugin) join(ctx context.Context, q joinRequest) (joinAnswer, error) {
	var a joinAnswer
	made, err := p.recall(q.EndpointID)
	if err != nil {
		return a, err
	}
	if err := p.checkLabel(ctx, q); err != nil {
		return a, err
	}
	a.InterfaceName = interfaceName{SrcName: made.PeerIf, DstPrefix: insidePrefix}
	a.DisableGatewayService = made.NoGateway
	if err := p.cfg.Attach.JoinEndpoint(ctx, q.EndpointID, q.SandboxKey); err != nil {
		return a, err
	}
	if !p.cfg.NoMulticastRoute && p.traits(ctx, q.NetworkID).multicast && p.enterSandbox(q.SandboxKey, q.EndpointID) {
		a.StaticRoutes = []staticRoute{{Destination: multicastRange, RouteType: connected}}
	}
	return a, nil
}

// enterSandbox says whether the endpoint is the one that gets the multicast
// route in its container: a second route to the same place is refused there,
// and the container would not start.
func (p *Plugin) enterSandbox(sandbox, endpoint string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, taken := p.sandboxes[sandbox]; taken {
		return false
	}
	p.sandboxes[sandbox] = endpoint
	return true
}

func (p *Plugin) leaveSandbox(endpoint string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s, e := range p.sandboxes {
		if e == endpoint {
			delete(p.sandboxes, s)
		}
	}
}

func (p *Plugin) leave(_ context.Context, q joinRequest) (empty, error) {
	p.leaveSandbox(q.EndpointID)
	return empty{}, nil
}
