package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"weave.local/router/netdev"
)

// carrierWait is how long a new pair may take to come up.
const carrierWait = 3 * time.Second

// Attach gives a container addresses on the network and, before the first one,
// an interface named ethwe. No request means one address of the default
// subnet. It returns the addresses asked for, also those that were there
// already. When it fails, everything is as before.
func (m *Manager) Attach(ctx context.Context, t Target, reqs []Request) (addrs []netip.Prefix, err error) {
	unlock, err := m.keys.lock(ctx, t.ID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	old, before, err := m.prepare(t)
	if err != nil {
		return nil, err
	}
	var u undo
	defer func() {
		if err != nil {
			u.run(m.cfg.Log)
		}
	}()
	if old.ifIndex == 0 {
		u.add(func() error { return m.putBack(old, before) })
		// From here on the journal knows that the id may hold addresses.
		if err := m.save(old); err != nil {
			return nil, err
		}
	}
	addrs, err = m.obtain(ctx, t.ID, orDefault(reqs), &u)
	if err != nil {
		return nil, err
	}
	next := old.clone()
	next.AnySource = old.AnySource || t.AnySource
	added := without(addrs, old.Addrs)
	next.Addrs = append(next.Addrs, added...)
	if err = checkCount(t.ID, next.Addrs); err != nil {
		return nil, err
	}
	if old.ifIndex == 0 {
		err = m.plug(ctx, next, &u)
	} else {
		err = m.extend(old, next, added, &u)
	}
	if err != nil {
		return nil, fmt.Errorf("attach %s: %w", t.ID, err)
	}
	if now := m.get(t.ID); now == nil || now.ifIndex != next.ifIndex {
		return nil, fmt.Errorf("attach %s: it died meanwhile: %w", t.ID, netdev.ErrNoNamespace)
	}
	m.cancelRelease(t.ID)
	return addrs, nil
}

// prepare returns the record of a target: the one of its attachment, or a new
// one without a device and then also the one it had in an earlier life.
func (m *Manager) prepare(t Target) (r, before *record, err error) {
	if t.ID == "" || t.ID == HostID {
		return nil, nil, fmt.Errorf("%q names no container to attach", t.ID)
	}
	ns, err := netdev.NamespaceAt(t.NetNS)
	switch {
	case errors.Is(err, netdev.ErrOwnNamespace):
		return nil, nil, fmt.Errorf("%s shares the network of the host (--net=host) and cannot be attached: use weave expose to join the host: %w", t.ID, err)
	case errors.Is(err, netdev.ErrNoNamespace):
		return nil, nil, fmt.Errorf("%s is not running, so it cannot be attached: %w", t.ID, err)
	case err != nil:
		return nil, nil, err
	}
	r = m.get(t.ID)
	if r != nil && r.Kind != KindContainer {
		return nil, nil, fmt.Errorf("%s is an endpoint of a Docker network and cannot be attached", t.ID)
	}
	if r != nil && r.ifIndex != 0 && r.NS == ns {
		r.NetNS = t.NetNS
		return r, nil, nil
	}
	if r != nil { // it was started again, its old interface is gone or on its way out
		if err := m.unplug(r); err != nil {
			return nil, nil, err
		}
		r.ifIndex = 0
		before = r
	}
	if other := m.sharing(t.ID, ns); other != "" {
		return nil, nil, fmt.Errorf("%s shares its network with %s, which is attached already: attach or detach that one", t.ID, other)
	}
	r = &record{ID: t.ID, Kind: KindContainer, MAC: netdev.RandomMAC(), PeerIf: InsideName,
		HostIf: containerHostIf(t.ID, ns), NetNS: t.NetNS, NS: ns, Since: time.Now(),
		NoMulticastRoute: t.NoMulticastRoute || m.cfg.NoMulticastRoute}
	if other := m.named(r.HostIf, t.ID); other != "" {
		return nil, nil, fmt.Errorf("%s: its device %s belongs to %s: start it again to get another", t.ID, r.HostIf, other)
	}
	return r, before, nil
}

// putBack replaces a record by the one that was there before, if any.
func (m *Manager) putBack(r, before *record) error {
	if before == nil {
		return m.forget(r)
	}
	return m.save(before)
}

func (m *Manager) sharing(id string, ns netdev.Namespace) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.records {
		if r.ID != id && r.Kind == KindContainer && r.ifIndex != 0 && r.NS == ns {
			return r.ID
		}
	}
	return ""
}

// plug makes the interface of a container: announced first, up last.
func (m *Manager) plug(ctx context.Context, r *record, u *undo) error {
	if err := m.save(r); err != nil {
		return err
	}
	if err := m.createPair(r, r.NetNS, u); err != nil {
		return err
	}
	if err := m.inside(r, func() error { return configureInside(r) }); err != nil {
		return err
	}
	if err := netdev.SetUp(r.HostIf); err != nil {
		return err
	}
	if err := m.inside(r, func() error { return netdev.SetUp(r.PeerIf) }); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, carrierWait)
	defer cancel()
	if err := netdev.WaitCarrier(wait, r.HostIf); err != nil {
		return err
	}
	return m.inside(r, func() error { return announceInside(r, r.Addrs) })
}

// createPair makes the pair of a saved record, both ends down, and its port.
func (m *Manager) createPair(r *record, peerNS string, u *undo) error {
	// What is left over by that name is nobody's: the caller made sure.
	if err := netdev.DeleteLink(r.HostIf); err != nil {
		return err
	}
	index, err := netdev.CreateVeth(netdev.VethSpec{
		Host: r.HostIf, Peer: r.PeerIf, PeerNS: peerNS, PeerMAC: r.MAC,
		MTU: m.cfg.MTU, Bridge: m.cfg.Bridge, Alias: r.alias(),
	})
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("an interface %s that is not ours is there already: remove it first: %w", r.PeerIf, err)
	}
	if err != nil {
		return err
	}
	r.ifIndex = index
	u.add(func() error { return m.unplug(r) })
	m.set(r) // so that its end is noticed from now on
	return m.cfg.SetPort(r.port())
}

// extend adds addresses to an interface that exists, and puts back what
// somebody may have removed.
func (m *Manager) extend(old, next *record, added []netip.Prefix, u *undo) error {
	u.add(func() error { return m.save(old) })
	if err := m.save(next); err != nil {
		return err
	}
	u.add(func() error { return m.cfg.SetPort(old.port()) })
	if err := m.cfg.SetPort(next.port()); err != nil {
		return err
	}
	u.add(func() error {
		return m.inside(next, func() error { return removeInside(next, added) })
	})
	return m.inside(next, func() error {
		if err := configureInside(next); err != nil {
			return err
		}
		return announceInside(next, added)
	})
}

// inside runs f in the namespace of a record, making sure that it still is the
// one that it was.
func (m *Manager) inside(r *record, f func() error) error {
	ns, err := netdev.NamespaceAt(r.NetNS)
	if err != nil {
		return err
	}
	if ns != r.NS {
		return fmt.Errorf("%s belongs to another container by now: %w", r.NetNS, netdev.ErrNoNamespace)
	}
	return netdev.Do(r.NetNS, f)
}

// configureInside sets up the interface of a container short of starting it.
func configureInside(r *record) error {
	if err := netdev.QuickNeighbours(r.PeerIf); err != nil {
		return err
	}
	for _, s := range [][2]string{
		{filepath.Join("ipv6/conf", r.PeerIf, "accept_ra"), "0"},
		// Removing one of several addresses must not take the others along.
		{filepath.Join("ipv4/conf", r.PeerIf, "promote_secondaries"), "1"},
	} {
		if err := netdev.SetSysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	for _, p := range r.Addrs {
		if err := netdev.AddAddr(r.PeerIf, p); err != nil {
			return err
		}
	}
	return nil
}

// announceInside tells the network of addresses on an interface that is up.
// The multicast route comes last: programs wait for it.
func announceInside(r *record, addrs []netip.Prefix) error {
	if err := netdev.AnnounceAddrs(r.PeerIf, addrs); err != nil {
		return err
	}
	if r.NoMulticastRoute {
		return nil
	}
	return netdev.AddMulticastRoute(r.PeerIf)
}

func removeInside(r *record, addrs []netip.Prefix) error {
	for _, p := range addrs {
		if err := netdev.DelAddr(r.PeerIf, p); err != nil {
			return err
		}
	}
	return nil
}

// Detach takes addresses away and frees them, and removes the interface with
// the last one. No request means those of the default subnet. It returns what
// it took; what is not there is no error. It never waits for other peers.
func (m *Manager) Detach(ctx context.Context, t Target, reqs []Request) ([]netip.Prefix, error) {
	unlock, err := m.keys.lock(ctx, t.ID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	r := m.get(t.ID)
	if r != nil && r.Kind != KindContainer {
		return nil, fmt.Errorf("%s is an endpoint of a Docker network: use docker network disconnect", t.ID)
	}
	var attached []netip.Prefix
	if r != nil {
		attached = r.Addrs
	}
	found, err := m.held(t.ID, orDefault(reqs), attached)
	if err != nil {
		return nil, err
	}
	if r != nil {
		if err := m.withdraw(r, found); err != nil {
			return nil, fmt.Errorf("detach %s: %w", t.ID, err)
		}
	}
	return found, m.free(t.ID, found)
}

// withdraw takes addresses off an attachment, the port's first, so that
// nothing is sent there any more.
func (m *Manager) withdraw(r *record, addrs []netip.Prefix) error {
	next := r.clone()
	next.Addrs = without(r.Addrs, addrs)
	if len(next.Addrs) == 0 {
		if err := m.unplug(r); err != nil {
			return err
		}
		return m.forget(r)
	}
	if slices.Equal(next.Addrs, r.Addrs) {
		return nil
	}
	if r.ifIndex != 0 {
		if err := m.cfg.SetPort(next.port()); err != nil {
			return err
		}
		gone := without(r.Addrs, next.Addrs)
		if err := m.inside(r, func() error { return removeInside(r, gone) }); err != nil {
			return errors.Join(err, m.cfg.SetPort(r.port()))
		}
	}
	return m.save(next)
}
