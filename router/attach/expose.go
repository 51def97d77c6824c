package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"weave.local/router/firewall"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// ExposeOptions modify Expose.
type ExposeOptions struct {
	NoMasquerade bool // keep the source addresses of what is routed through the host
}

// Expose gives the host addresses on the network, which makes it one of its
// members and a router to its subnets for others. No request means one address
// of the default subnet. It returns the addresses asked for, also those that
// were there already, to which the options apply as well. When it fails,
// everything is as before.
func (m *Manager) Expose(ctx context.Context, reqs []Request, o ExposeOptions) (addrs []netip.Prefix, err error) {
	unlock, err := m.keys.lock(ctx, HostID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var u undo
	defer func() {
		if err != nil {
			u.run(m.cfg.Log)
		}
	}()
	addrs, err = m.obtain(ctx, HostID, orDefault(reqs), &u)
	if err != nil {
		return nil, err
	}
	old := m.exposures()
	next := slices.Clone(old)
	for _, p := range addrs {
		e := exposure{Addr: p, NoMasquerade: o.NoMasquerade}
		if i := slices.IndexFunc(next, func(x exposure) bool { return x.Addr == p }); i >= 0 {
			next[i] = e
		} else {
			next = append(next, e)
		}
	}
	if len(next) > overlay.MaxAddrs {
		return nil, fmt.Errorf("the host would have %d addresses on the network: at most %d are possible, so hide some first", len(next), overlay.MaxAddrs)
	}
	u.add(func() error { return m.settleHost(context.WithoutCancel(ctx), next, old) })
	if err := m.settleHost(ctx, old, next); err != nil {
		return nil, fmt.Errorf("expose: %w", err)
	}
	return addrs, nil
}

// Hide undoes Expose and frees the addresses. No request means those of the
// default subnet. It returns what it took; what is not there is no error. It
// never waits for other peers.
func (m *Manager) Hide(ctx context.Context, reqs []Request) ([]netip.Prefix, error) {
	unlock, err := m.keys.lock(ctx, HostID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	old := m.exposures()
	var attached []netip.Prefix
	for _, e := range old {
		attached = append(attached, e.Addr)
	}
	found, err := m.held(HostID, orDefault(reqs), attached)
	if err != nil {
		return nil, err
	}
	next := slices.DeleteFunc(slices.Clone(old), func(e exposure) bool { return slices.Contains(found, e.Addr) })
	if len(next) != len(old) {
		if err := m.settleHost(ctx, old, next); err != nil {
			return nil, fmt.Errorf("hide: %w", err)
		}
	}
	return found, m.free(HostID, found)
}

func (m *Manager) exposures() []exposure {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.exposed)
}

// settleHost leads the host from one set of exposed addresses to another. It
// may be repeated, and undone by the reverse.
func (m *Manager) settleHost(ctx context.Context, old, next []exposure) error {
	if err := m.journalHost(old, next); err != nil {
		return err
	}
	if err := m.cfg.Firewall.SetExposed(ctx, subnets(next)); err != nil {
		return err
	}
	has := func(list []exposure, e exposure) bool {
		return slices.ContainsFunc(list, func(x exposure) bool { return x.Addr == e.Addr })
	}
	for _, e := range old {
		if !has(next, e) {
			if err := netdev.DelAddr(m.cfg.Bridge, e.Addr); err != nil {
				return err
			}
		}
	}
	if len(next) == 0 {
		return m.cfg.RemovePort(m.hostPort(nil).IfIndex)
	}
	if err := m.forward(); err != nil {
		return err
	}
	var addrs, added []netip.Prefix
	for _, e := range next {
		addrs = append(addrs, e.Addr)
		if !has(old, e) {
			added = append(added, e.Addr)
		}
	}
	if err := m.cfg.SetPort(m.hostPort(addrs)); err != nil {
		return err
	}
	for _, p := range addrs {
		if err := netdev.AddAddr(m.cfg.Bridge, p); err != nil {
			return err
		}
	}
	return netdev.AnnounceAddrs(m.cfg.Bridge, added)
}

// journalHost writes down which addresses the host is to have.
func (m *Manager) journalHost(old, next []exposure) error {
	changes := make(map[string][]byte)
	for _, e := range old {
		changes[keyHost+e.Addr.String()] = nil
	}
	for _, e := range next {
		e.Version = journalVersion
		b, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("journal of the host: %w", err)
		}
		changes[keyHost+e.Addr.String()] = b
	}
	if err := m.cfg.Store.Update(changes); err != nil {
		return fmt.Errorf("journal of the host: %w", err)
	}
	m.mu.Lock()
	m.exposed = slices.Clone(next)
	m.mu.Unlock()
	return nil
}

// hostPort is the host as a port of the network.
func (m *Manager) hostPort(addrs []netip.Prefix) overlay.Port {
	m.mu.Lock()
	defer m.mu.Unlock()
	return overlay.Port{IfIndex: m.hostIf, IfName: m.cfg.Bridge,
		Endpoint: overlay.Endpoint{MAC: m.hostMAC, Addrs: addrs}}
}

// subnets tells the firewall of the exposed subnets. Two addresses in one
// subnet are masqueraded unless both decline it.
func subnets(list []exposure) []firewall.Exposure {
	var out []firewall.Exposure
	for _, e := range list {
		f := firewall.Exposure{Subnet: e.Addr.Masked(), NoMasquerade: e.NoMasquerade}
		i := slices.IndexFunc(out, func(x firewall.Exposure) bool { return x.Subnet == f.Subnet })
		if i < 0 {
			out = append(out, f)
		} else if !f.NoMasquerade {
			out[i].NoMasquerade = false
		}
	}
	return out
}

// forward makes the host route packets, remembering how it was before.
func (m *Manager) forward() error {
	before, err := netdev.ForwardingOff()
	if err != nil || before == nil {
		return err
	}
	b, err := json.Marshal(before)
	if err != nil {
		return fmt.Errorf("journal of the host: %w", err)
	}
	if err := m.cfg.Store.Put(keyForwarding, b); err != nil {
		return fmt.Errorf("journal of the host: %w", err)
	}
	return netdev.EnableForwarding()
}

// unforward brings back what forward changed.
func (m *Manager) unforward() error {
	b, ok := m.cfg.Store.Get(keyForwarding)
	if !ok {
		return nil
	}
	var before netdev.Forwarding
	if err := json.Unmarshal(b, &before); err != nil {
		return errors.Join(fmt.Errorf("journal of the host: %w", err), m.cfg.Store.Delete(keyForwarding))
	}
	if err := before.Restore(); err != nil {
		return err
	}
	return m.cfg.Store.Delete(keyForwarding)
}
