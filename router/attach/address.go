package attach

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"weave.local/ipam"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// obtain gets the addresses asked for, in order and each once. Those that the
// owner did not hold before are freed by the undo.
func (m *Manager) obtain(ctx context.Context, owner string, reqs []Request, u *undo) ([]netip.Prefix, error) {
	var held []netip.Prefix
	if m.cfg.Alloc != nil {
		held = m.cfg.Alloc.Lookup(owner, netip.Prefix{})
	}
	var got []netip.Prefix
	for _, r := range reqs {
		p, err := m.obtainOne(ctx, owner, r)
		if err != nil {
			return nil, err
		}
		if m.cfg.Alloc != nil && indexAddr(held, p.Addr()) < 0 && indexAddr(got, p.Addr()) < 0 {
			u.add(func() error { return m.cfg.Alloc.Free(owner, p.Addr()) })
		}
		if err := m.checkHolder(owner, p); err != nil {
			return nil, err
		}
		if !slices.Contains(got, p) {
			got = append(got, p)
		}
	}
	return got, nil
}

func (m *Manager) obtainOne(ctx context.Context, owner string, r Request) (netip.Prefix, error) {
	if !r.IP.IsValid() {
		if m.cfg.Alloc == nil {
			return netip.Prefix{}, errNoAllocation(r)
		}
		p, err := m.cfg.Alloc.Allocate(ctx, owner, r.Net)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("address for %s: %w", r, err)
		}
		return p, nil
	}
	if m.cfg.Alloc == nil { // else it knows, and says by whom
		if err := m.checkHolder(owner, r.IP); err != nil {
			return netip.Prefix{}, err
		}
	}
	if route, overlaps, err := netdev.OverlappingRoute(r.IP.Masked(), m.cfg.Bridge); err == nil && overlaps {
		m.cfg.Log.Warn("address overlaps a route of the host", "addr", r.IP, "route", route.Dst, "dev", route.Dev)
	}
	if m.cfg.Alloc != nil {
		if err := m.cfg.Alloc.Claim(ctx, owner, r.IP); err != nil {
			return netip.Prefix{}, fmt.Errorf("address %s: %w", r.IP, err)
		}
	}
	return r.IP, nil
}

// checkCount refuses what no port can have.
func checkCount(id string, addrs []netip.Prefix) error {
	if len(addrs) > overlay.MaxAddrs {
		return fmt.Errorf("%s would have %d addresses: at most %d are possible, so detach some first", id, len(addrs), overlay.MaxAddrs)
	}
	return nil
}

func (m *Manager) checkHolder(owner string, p netip.Prefix) error {
	switch id, as := m.holder(p.Addr()); {
	case id == "":
		return nil
	case id != owner:
		return fmt.Errorf("address %s is held by %s on this host: choose another one", p.Addr(), ipam.InWords(id))
	case as != p:
		return fmt.Errorf("address %s is attached already, as %s: detach it first", p, as)
	}
	return nil
}

// held returns the addresses that requests speak of among those an owner
// holds or has attached. It asks nobody else and never waits.
func (m *Manager) held(owner string, reqs []Request, attached []netip.Prefix) ([]netip.Prefix, error) {
	var found []netip.Prefix
	add := func(p netip.Prefix) {
		if indexAddr(found, p.Addr()) < 0 {
			found = append(found, p)
		}
	}
	all := slices.Clone(attached)
	if m.cfg.Alloc != nil {
		all = append(all, m.cfg.Alloc.Lookup(owner, netip.Prefix{})...)
	}
	for _, r := range reqs {
		if r.IP.IsValid() {
			if i := indexAddr(all, r.IP.Addr()); i >= 0 {
				add(all[i])
			}
			continue
		}
		subnet := r.Net
		if !subnet.IsValid() {
			if m.cfg.Alloc == nil {
				return nil, errNoAllocation(r)
			}
			subnet = m.cfg.Alloc.DefaultSubnet()
		}
		for _, p := range all {
			if p.Masked() == subnet.Masked() {
				add(p)
			}
		}
	}
	return found, nil
}

// free gives back those addresses that the allocator knows to be the owner's.
func (m *Manager) free(owner string, addrs []netip.Prefix) error {
	if m.cfg.Alloc == nil {
		return nil
	}
	known := m.cfg.Alloc.Lookup(owner, netip.Prefix{})
	for _, p := range addrs {
		if indexAddr(known, p.Addr()) < 0 {
			continue
		}
		if err := m.cfg.Alloc.Free(owner, p.Addr()); err != nil {
			return fmt.Errorf("free %s: %w", p.Addr(), err)
		}
	}
	return nil
}

// freeAll gives back every address of an owner.
func (m *Manager) freeAll(owner string) error {
	if m.cfg.Alloc == nil || len(m.cfg.Alloc.Lookup(owner, netip.Prefix{})) == 0 {
		return nil
	}
	return m.cfg.Alloc.FreeAll(owner)
}

func orDefault(reqs []Request) []Request {
	if len(reqs) == 0 {
		return []Request{{}}
	}
	return reqs
}
