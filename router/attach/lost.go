package attach

import (
	"context"
	"errors"
	"net/netip"
)

// Lose says that an address that an owner has here is another host's by now. It
// is taken away and freed, before long. It never waits.
func (m *Manager) Lose(owner string, addr netip.Prefix) {
	m.mu.Lock()
	m.lost = append(m.lost, claim{owner, addr})
	m.mu.Unlock()
	select {
	case m.lostAny <- struct{}{}:
	default:
	}
}

// takeLost takes lost addresses away, and tries again what goes wrong.
func (m *Manager) takeLost(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.lostAny:
		}
		m.mu.Lock()
		list := m.lost
		m.lost = nil
		m.mu.Unlock()
		for _, c := range list {
			err := m.take(ctx, c)
			if err == nil {
				continue
			}
			m.cfg.Log.Warn("an address that is another host's is not taken away, will be tried again", "id", c.owner, "addr", c.addr, "err", err)
			if !pause(ctx, retry) {
				return nil
			}
			m.Lose(c.owner, c.addr)
		}
	}
}

// take takes one lost address away from whoever has it here. An endpoint of a
// Docker network loses its interface: Docker cannot be told of another address.
func (m *Manager) take(ctx context.Context, c claim) error {
	id, as := m.holder(c.addr.Addr())
	switch id {
	case "":
	case HostID:
		if _, err := m.Hide(ctx, []Request{{IP: as}}); err != nil {
			return err
		}
	default:
		if err := m.takeFrom(ctx, id, as); err != nil {
			return err
		}
	}
	return m.cfg.Alloc.Free(c.owner, c.addr.Addr())
}

func (m *Manager) takeFrom(ctx context.Context, id string, addr netip.Prefix) error {
	unlock, err := m.keys.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	r := m.get(id)
	switch {
	case r == nil || indexAddr(r.Addrs, addr.Addr()) < 0:
		return nil
	case r.Kind == KindEndpoint:
		return errors.Join(m.unplug(r), m.forget(r))
	}
	return m.withdraw(r, []netip.Prefix{addr})
}
