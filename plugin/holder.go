package plugin

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"weave.local/ipam"
	"weave.local/router/attach"
)

// Holder is the id of the container that has an address of the engine's
// networks here, "" when there is none or the engine does not tell. It never
// waits: false says to ask again soon.
func (p *Plugin) Holder(addr netip.Addr) (id string, known bool) {
	list := p.cfg.Attach.List()
	i := slices.IndexFunc(list, func(a attach.Attachment) bool {
		return slices.ContainsFunc(a.Addrs, func(x netip.Prefix) bool { return x.Addr() == addr })
	})
	if i < 0 || list[i].Kind != attach.KindEndpoint {
		return "", true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	id, now := p.holders[list[i].ID], time.Now()
	switch {
	case id != "" || now.Sub(p.looked) < lookupLimit:
		return id, true
	case p.asked.IsZero():
		p.asked = now
		select {
		case p.look <- struct{}{}:
		default:
		}
	case now.Sub(p.asked) > 2*lookupLimit: // nobody looks
		p.asked = time.Time{}
		return "", true
	}
	return "", false
}

// findHolders asks the engine, whenever Holder wants to know, whose endpoints are
// whose.
func (p *Plugin) findHolders(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.look:
		}
		users, err := p.endpointUsers(ctx)
		if err != nil {
			p.cfg.Log.Warn("plugin: containers of endpoints", "err", err)
		}
		p.mu.Lock()
		p.holders, p.asked, p.looked = users, time.Time{}, time.Now()
		p.mu.Unlock()
	}
}

// endpointUsers asks the engine, for no longer than lookupLimit, which containers
// endpoints are of.
func (p *Plugin) endpointUsers(ctx context.Context) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()
	_, users, err := p.engineState(ctx)
	return users, err
}

// user is who has an attachment, in words.
func (p *Plugin) user(ctx context.Context, a attach.Attachment) string {
	if a.Kind != attach.KindEndpoint {
		return ipam.InWords(a.ID)
	}
	if users, err := p.endpointUsers(ctx); err == nil && users[a.ID] != "" {
		return ipam.InWords(users[a.ID])
	}
	return ipam.InWords(ipam.Anonymous)
}
