package attach

import (
	"context"
	"errors"
	"maps"
	"slices"

	"weave.local/router/netdev"
)

// RemoveAll takes everything off the host that this package or an earlier run
// of it has put there, the bridge included, and frees the addresses. It goes
// on after an error and returns all of them. It may be called without
// Reconcile.
func (m *Manager) RemoveAll(ctx context.Context) error {
	records, exposed := m.readJournal()
	m.mu.Lock()
	for _, r := range records {
		if m.records[r.ID] == nil {
			m.records[r.ID] = r
		}
	}
	m.exposed = exposed
	ids := slices.Sorted(maps.Keys(m.records))
	m.mu.Unlock()
	var errs []error
	for _, id := range ids {
		errs = append(errs, m.removeOne(ctx, id))
	}
	errs = append(errs, m.removeHost(ctx), m.cfg.Firewall.Remove(ctx), m.removeStrays(), m.unforward(),
		netdev.DeleteLink(m.cfg.Bridge))
	return errors.Join(errs...)
}

func (m *Manager) removeOne(ctx context.Context, id string) error {
	unlock, err := m.keys.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	m.cancelRelease(id)
	r := m.get(id)
	if r == nil {
		return nil
	}
	if r.Kind == KindContainer {
		return m.drop(id, r)
	}
	return errors.Join(m.unplug(r), m.forget(r))
}

func (m *Manager) removeHost(ctx context.Context) error {
	unlock, err := m.keys.lock(ctx, HostID)
	if err != nil {
		return err
	}
	defer unlock()
	if old := m.exposures(); len(old) > 0 {
		err = m.settleHost(ctx, old, nil)
	}
	return errors.Join(err, m.freeAll(HostID))
}

func (m *Manager) removeStrays() error {
	devices, err := netdev.Devices()
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range devices {
		if _, _, ours := parseAlias(d.Alias); ours && d.Kind == "veth" && ownName(d.Name) {
			errs = append(errs, netdev.DeleteLink(d.Name))
		}
	}
	return errors.Join(errs...)
}
