package link

import (
	"net"
	"net/netip"
	"slices"
	"time"

	"weave.local/peer"
	"weave.local/router/seal"
)

// outdatedWait is how long a link lives on whose password is good no more, so
// that another can take its place meanwhile.
const outdatedWait = 5 * time.Second

// SetKeys changes which passwords are good, as in Config.Keys; from none to some
// or from some to none it cannot. Links made with others are made anew, and end
// where that fails; those that stay serve until then.
func (m *Mesh) SetKeys(keys []*seal.Key) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keys = slices.Clone(keys)
	for name, l := range m.links {
		if !m.outdateLocked(l, now) {
			continue
		}
		if m.cfg.Discovery {
			m.dials.Discover(name, []netip.AddrPort{listening(l.outbound, l.remote, l.peer.Port)}, now, true)
		}
		m.dials.Renew(name, now)
	}
	signal(m.kick)
}

// outdateLocked says whether the password of a link is good no more, and ends
// the link after a while if so.
func (m *Mesh) outdateLocked(l *link, now time.Time) bool {
	if l.expires = (time.Time{}); l.key == nil || m.rankLocked(l.key) > 0 {
		return false
	}
	l.expires = now.Add(outdatedWait)
	return true
}

// excludeLocked excludes peers that made no link with a good password while one
// with another would have been let live. Whichever end closed that one: the new
// link's other end does so before our handshake is through.
func (m *Mesh) excludeLocked(now time.Time) {
	for name, at := range m.outdated {
		if now.After(at) {
			delete(m.outdated, name)
			m.excluded = append(m.excluded, name)
			m.changedLocked()
		}
	}
}

// TakeExcluded returns, each once, the peers that are members no longer: their
// last link's password is good no more and there was no other in time.
func (m *Mesh) TakeExcluded() []peer.Name {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := m.excluded
	m.excluded = nil
	return out
}

func (m *Mesh) goodKeys() []*seal.Key {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.keys
}

// rankLocked is the higher the more a key is preferred, and 0 when it is not
// good.
func (m *Mesh) rankLocked(k *seal.Key) int {
	i := slices.IndexFunc(m.keys, func(good *seal.Key) bool { return k != nil && *good == *k })
	if i < 0 {
		return 0
	}
	return len(m.keys) - i
}

// servedLocked says whether a peer has a link and needs no other.
func (m *Mesh) servedLocked(name peer.Name) bool {
	return m.linkedLocked(name) && m.links[name].expires.IsZero()
}

// trusts says whether an address is in a trusted subnet.
func (m *Mesh) trusts(remote net.Addr) bool {
	addr := addrPort(remote).Addr().Unmap()
	return slices.ContainsFunc(m.cfg.Trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
}
