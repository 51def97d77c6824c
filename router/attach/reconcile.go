package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"weave.local/ipam"
	"weave.local/router/netdev"
)

// claim is an address and whose it is.
type claim struct {
	owner string
	addr  netip.Prefix
}

// Reconcile compares the journal with what is there. Devices that exist are
// adopted and their ports set again, those that are gone are forgotten and
// their addresses freed, exposed addresses come back, and what a crash left
// half made is removed. What goes wrong with a single one is logged and keeps
// nothing else back. Call it once, before anything else.
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
	for _, r := range records {
		i := slices.IndexFunc(devices, func(d netdev.Device) bool { return d.Name == r.HostIf && d.Kind == "veth" })
		if i < 0 {
			m.warn("cannot be forgotten", r.ID, m.vanished(r))
			continue
		}
		m.warn("not fully attached", r.ID, m.adopt(r, devices[i], bridge.Index))
	}
	for _, d := range devices {
		m.warn("device not adopted", d.Name, m.stray(d, bridge.Index))
	}
	err = m.restoreHost(ctx, exposed)
	m.freeUnattached(devices)
	return err
}

// freeUnattached frees the addresses that nothing here has: a crash came
// between the allocator's record and the journal. Those of Docker's networks
// are the plugin's to free.
func (m *Manager) freeUnattached(devices []netdev.Device) {
	if m.cfg.Alloc == nil {
		return
	}
	attached := map[string][]netip.Prefix{}
	for _, e := range m.exposures() {
		attached[HostID] = append(attached[HostID], e.Addr)
	}
	m.mu.Lock()
	for id, r := range m.records {
		attached[id] = r.Addrs
	}
	m.mu.Unlock()
	for owner, list := range m.cfg.Alloc.Owned() {
		if owner == ipam.Unknown || strings.HasPrefix(owner, ipam.Anonymous) {
			continue
		}
		if _, known := attached[owner]; !known && slices.ContainsFunc(devices, func(d netdev.Device) bool {
			_, id, ours := parseAlias(d.Alias)
			return ours && id == owner // attached, though we do not see where
		}) {
			continue
		}
		for _, a := range list {
			if indexAddr(attached[owner], a.Addr()) >= 0 {
				continue
			}
			m.cfg.Log.Info("address freed, it is not attached", "id", owner, "addr", a)
			m.warn("address not freed", owner, m.cfg.Alloc.Free(owner, a.Addr()))
		}
	}
}

func (m *Manager) warn(what, id string, err error) {
	if err != nil {
		m.cfg.Log.Warn("adopting what is attached", "what", what, "id", id, "err", err)
	}
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
	m.known(r.ID, r.Addrs)
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

// known sees to it that IPAM knows of addresses that are in use.
func (m *Manager) known(owner string, addrs []netip.Prefix) {
	if m.cfg.Alloc == nil {
		return
	}
	for _, p := range addrs {
		m.warn("address in use cannot be claimed", owner, m.cfg.Alloc.Adopt(owner, p))
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
// of the machine. Addresses on the bridge that the journal does not know are
// taken for exposed ones.
func (m *Manager) restoreHost(ctx context.Context, exposed []exposure) error {
	present, err := netdev.Addrs(m.cfg.Bridge)
	if err != nil {
		return err
	}
	for _, p := range present {
		if !slices.ContainsFunc(exposed, func(e exposure) bool { return e.Addr.Addr() == p.Addr() }) {
			m.cfg.Log.Warn("found exposed without a journal entry", "addr", p)
			exposed = append(exposed, exposure{Addr: p})
		}
	}
	for _, e := range exposed {
		m.known(HostID, []netip.Prefix{e.Addr})
	}
	if len(exposed) > 0 {
		m.warn("exposed addresses are not all in place", HostID, m.settleHost(ctx, nil, exposed))
		return nil
	}
	if err := m.cfg.Firewall.SetExposed(ctx, nil); err != nil {
		m.cfg.Log.Warn("firewall rules are not in place: where the host forwards nothing by default, containers may not reach each other", "err", err)
	}
	return nil
}
