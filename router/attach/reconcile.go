package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"weave.local/router/netdev"
)

// claim is an address that an adopted attachment has and IPAM does not know.
type claim struct {
	owner string
	addr  netip.Prefix
}

// Reconcile compares the journal with what is there. Devices that exist are
// adopted and their ports set again, those that are gone are forgotten and
// their addresses freed, exposed addresses come back, and what a crash left
// half made is removed. Call it once, before anything else.
func (m *Manager) Reconcile(ctx context.Context) error {
	bridge, err := netdev.DeviceByName(m.cfg.Bridge)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.hostIf, m.hostMAC = bridge.Index, bridge.MAC
	m.mu.Unlock()
	devices, err := netdev.Devices()
	if err != nil {
		return err
	}
	records, exposed := m.readJournal()
	var errs []error
	for _, r := range records {
		i := slices.IndexFunc(devices, func(d netdev.Device) bool { return d.Name == r.HostIf && d.Kind == "veth" })
		if i < 0 {
			errs = append(errs, m.vanished(r))
			continue
		}
		errs = append(errs, m.adopt(r, devices[i], bridge.Index))
	}
	for _, d := range devices {
		errs = append(errs, m.stray(d, bridge.Index))
	}
	m.mu.Lock()
	m.exposed = exposed
	m.mu.Unlock()
	for _, e := range exposed {
		m.claimLater(HostID, []netip.Prefix{e.Addr})
	}
	return errors.Join(append(errs, m.restoreHost(ctx, exposed))...)
}

// readJournal reads what was attached and exposed. Entries that cannot be read
// are reported and dropped: what is really there is found all the same.
func (m *Manager) readJournal() ([]*record, []exposure) {
	var records []*record
	var exposed []exposure
	for key, value := range m.cfg.Store.All() {
		if key == keyForwarding {
			continue
		}
		var err error
		if strings.HasPrefix(key, keyHost) {
			var e exposure
			if err = decode(value, &e, &e.Version); err == nil {
				exposed = append(exposed, e)
			}
		} else {
			r := new(record)
			if err = decode(value, r, &r.Version); err == nil {
				records = append(records, r)
			}
		}
		if err != nil {
			m.cfg.Log.Warn("journal entry dropped", "key", key, "err", errors.Join(err, m.cfg.Store.Delete(key)))
		}
	}
	slices.SortFunc(exposed, func(a, b exposure) int { return a.Addr.Compare(b.Addr) })
	return records, exposed
}

func decode(value []byte, into any, version *int) error {
	if err := json.Unmarshal(value, into); err != nil {
		return err
	}
	if *version != journalVersion {
		return fmt.Errorf("layout %d is not known", *version)
	}
	return nil
}

// vanished forgets a record whose device is gone. The addresses of endpoints
// are not ours to free.
func (m *Manager) vanished(r *record) error {
	if r.Kind == KindContainer {
		if err := m.freeAll(r.ID); err != nil {
			return err
		}
	}
	m.cfg.Log.Info("no longer attached", "id", r.ID, "device", r.HostIf)
	return m.forget(r)
}

// adopt takes over an existing device: it becomes a port again with the same
// address, and what was not finished is.
func (m *Manager) adopt(r *record, d netdev.Device, bridge int) error {
	r.ifIndex = d.Index
	m.set(r)
	if err := m.cfg.SetPort(r.port()); err != nil {
		return fmt.Errorf("adopt %s: %w", r.ID, err)
	}
	if d.Master != bridge {
		if err := netdev.SetMaster(r.HostIf, m.cfg.Bridge); err != nil {
			return fmt.Errorf("adopt %s: %w", r.ID, err)
		}
	}
	if !d.Up {
		if err := netdev.SetUp(r.HostIf); err != nil {
			return fmt.Errorf("adopt %s: %w", r.ID, err)
		}
	}
	if r.Kind == KindEndpoint {
		return nil
	}
	m.claimLater(r.ID, r.Addrs)
	err := m.inside(r, func() error {
		if err := configureInside(r); err != nil {
			return err
		}
		if err := netdev.SetUp(r.PeerIf); err != nil {
			return err
		}
		return announceInside(r, nil)
	})
	if errors.Is(err, netdev.ErrNoNamespace) {
		return nil // it lives, but under another path: a later attach says which
	}
	return err
}

func (m *Manager) claimLater(owner string, addrs []netip.Prefix) {
	if m.cfg.Alloc == nil {
		return
	}
	known := m.cfg.Alloc.Lookup(owner, netip.Prefix{})
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range addrs {
		if indexAddr(known, p.Addr()) < 0 {
			m.unsaved = append(m.unsaved, claim{owner, p})
		}
	}
}

// stray looks at a device that may be ours without a record: if its other end
// still lies on the host, it was never finished and goes; if a container has
// it, the journal was lost and is written anew.
func (m *Manager) stray(d netdev.Device, bridge int) error {
	kind, id, ours := parseAlias(d.Alias)
	if !ours || d.Kind != "veth" || !ownName(d.Name) || m.get(id) != nil {
		return nil
	}
	if d.PeerNSID < 0 {
		m.cfg.Log.Info("removing what was never finished", "id", id, "device", d.Name)
		return netdev.DeleteLink(d.Name)
	}
	r := &record{ID: id, Kind: kind, HostIf: d.Name}
	path, err := netdev.FindNamespace(d.PeerNSID)
	if errors.Is(err, netdev.ErrNoNamespace) {
		return nil // some program holds it in a place we do not see
	}
	if err != nil {
		return err
	}
	if r.NS, err = netdev.NamespaceAt(path); err != nil {
		return err
	}
	r.NetNS = path
	err = netdev.Do(path, func() error {
		peer, err := netdev.DeviceByIndex(d.PeerIndex)
		if err != nil {
			return err
		}
		r.PeerIf, r.MAC = peer.Name, peer.MAC
		r.Addrs, err = netdev.Addrs(peer.Name)
		return err
	})
	if err != nil {
		return fmt.Errorf("device %s of %s: %w", d.Name, id, err)
	}
	m.cfg.Log.Warn("found attached without a journal entry", "id", id, "addrs", r.Addrs)
	if err := m.save(r); err != nil {
		return err
	}
	return m.adopt(r, d, bridge)
}

func ownName(dev string) bool {
	return strings.HasPrefix(dev, containerPrefix) || strings.HasPrefix(dev, endpointPrefix)
}

// restoreHost brings exposed addresses back, after a restart of the daemon or
// of the machine. Without exposures a host that cannot have firewall rules is
// only warned of.
func (m *Manager) restoreHost(ctx context.Context, exposed []exposure) error {
	if len(exposed) > 0 {
		return m.settleHost(ctx, nil, exposed)
	}
	if err := m.cfg.Firewall.SetExposed(ctx, nil); err != nil {
		m.cfg.Log.Warn("firewall rules are not in place: containers may not reach each other if the host forwards nothing by default", "err", err)
	}
	return nil
}
