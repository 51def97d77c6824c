package attach

import (
	"context"
	"fmt"
	"hash/fnv"
	"net/netip"
	"time"

	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// EndpointSpec describes an endpoint that another program moves into a
// container. Its addresses are allocated already.
type EndpointSpec struct {
	ID    string      // at least nine characters, the first nine unique
	MAC   overlay.MAC // zero: choose one
	Addrs []netip.Prefix
	// AnySource is that of overlay.Endpoint.
	AnySource bool
}

// Endpoint is what CreateEndpoint made: a veth pair whose host end is on the
// bridge and whose peer end waits on the host to be moved.
type Endpoint struct {
	MAC            overlay.MAC
	HostIf, PeerIf string
}

// CreateEndpoint announces an endpoint and makes its veth pair, host end up and
// on the bridge. An endpoint of that id that exists already is an error.
func (m *Manager) CreateEndpoint(ctx context.Context, spec EndpointSpec) (_ Endpoint, err error) {
	if len(spec.ID) < endpointChars {
		return Endpoint{}, fmt.Errorf("endpoint id %q is too short: want at least %d characters", spec.ID, endpointChars)
	}
	unlock, err := m.keys.lock(ctx, spec.ID)
	if err != nil {
		return Endpoint{}, err
	}
	defer unlock()
	if old := m.get(spec.ID); old != nil {
		if old.Kind != KindEndpoint || old.ifIndex != 0 {
			return Endpoint{}, fmt.Errorf("endpoint %s exists already", spec.ID)
		}
	}
	short := spec.ID[:endpointChars]
	r := &record{ID: spec.ID, Kind: KindEndpoint, MAC: spec.MAC, Addrs: spec.Addrs, AnySource: spec.AnySource, Since: time.Now(),
		HostIf: endpointPrefix + short, PeerIf: endpointPeer + short}
	if r.MAC == (overlay.MAC{}) {
		r.MAC = macOf(spec.Addrs)
	}
	if other := m.named(r.HostIf, r.ID); other != "" {
		return Endpoint{}, fmt.Errorf("endpoint %s: its device %s belongs to endpoint %s", r.ID, r.HostIf, other)
	}
	for _, p := range r.Addrs {
		if err := m.checkHolder(r.ID, p); err != nil {
			return Endpoint{}, err
		}
	}
	var u undo
	defer func() {
		if err != nil {
			u.run(m.cfg.Log)
		}
	}()
	u.add(func() error { return m.forget(r) })
	if err := m.save(r); err != nil {
		return Endpoint{}, err
	}
	if err := m.createPair(r, "", &u); err != nil {
		return Endpoint{}, fmt.Errorf("endpoint %s: %w", r.ID, err)
	}
	if err := netdev.SetUp(r.HostIf); err != nil {
		return Endpoint{}, err
	}
	return Endpoint{MAC: r.MAC, HostIf: r.HostIf, PeerIf: r.PeerIf}, nil
}

// named returns the id of another record with that device, "" for none.
func (m *Manager) named(hostIf, id string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.records {
		if r.HostIf == hostIf && r.ID != id && r.ifIndex != 0 {
			return r.ID
		}
	}
	return ""
}

// JoinEndpoint notes in which namespace an endpoint is, for List. An unknown id
// is an error.
func (m *Manager) JoinEndpoint(ctx context.Context, id, netns string) error {
	r, unlock, err := m.lockEndpoint(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if r == nil {
		return fmt.Errorf("there is no endpoint %s", id)
	}
	r.NetNS = netns
	return m.save(r)
}

// AllowAnySource lets an endpoint send from any source, as EndpointSpec.AnySource
// does from the start. An unknown id is an error.
func (m *Manager) AllowAnySource(ctx context.Context, id string) error {
	r, unlock, err := m.lockEndpoint(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if r == nil {
		return fmt.Errorf("there is no endpoint %s", id)
	}
	if r.AnySource {
		return nil
	}
	r.AnySource = true
	if err := m.save(r); err != nil || r.ifIndex == 0 {
		return err
	}
	return m.cfg.SetPort(r.port())
}

// lockEndpoint keeps others from an endpoint until unlock; r is nil when there is
// none of that id.
func (m *Manager) lockEndpoint(ctx context.Context, id string) (r *record, unlock func(), err error) {
	if unlock, err = m.keys.lock(ctx, id); err != nil {
		return nil, nil, err
	}
	if r = m.get(id); r != nil && r.Kind != KindEndpoint {
		r = nil
	}
	return r, unlock, nil
}

// DeleteEndpoint removes what CreateEndpoint made; an unknown id is no error.
// The addresses stay allocated.
func (m *Manager) DeleteEndpoint(ctx context.Context, id string) error {
	r, unlock, err := m.lockEndpoint(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if r == nil {
		return nil
	}
	if err := m.unplug(r); err != nil {
		return fmt.Errorf("endpoint %s: %w", id, err)
	}
	return m.forget(r)
}

// macOf is the Ethernet address of an endpoint that was given none. It follows
// from its IP address, so that a container that comes back under its address,
// on whatever host, is known to its neighbours by what they remember: nobody
// announces it to them, since the engine moves the device after our last word.
func macOf(addrs []netip.Prefix) overlay.MAC {
	if len(addrs) == 0 {
		return netdev.RandomMAC()
	}
	mac := overlay.MAC{0x76, 0x65} // locally administered, unicast (IEEE 802 §8.4)
	ip := addrs[0].Addr()
	if ip.Is4() {
		b := ip.As4()
		copy(mac[2:], b[:])
		return mac
	}
	b := ip.As16()
	sum := fnv.New32a()
	_, _ = sum.Write(b[:])
	sum.Sum(mac[2:2])
	return mac
}
