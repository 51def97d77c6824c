package link

import (
	"fmt"
	"time"

	"weave.local/peer"
)

const (
	maxGuests = 16              // links over the limit
	guestStay = 2 * time.Second // at least, for peers to find others
	trimEvery = time.Second
)

// roomLocked says whether there may be one more link.
func (m *Mesh) roomLocked() bool {
	return m.cfg.ConnLimit <= 0 || len(m.links) < m.cfg.ConnLimit
}

// guestLocked says whether a peer may have a link over the limit. The limit is
// about links, not about who belongs to the cluster: whoever has no other way
// to us stays until there is one.
func (m *Mesh) guestLocked(name peer.Name) bool {
	return len(m.links) < m.cfg.ConnLimit+maxGuests && !m.viewLocked().Reaches(name)
}

// trimLocked ends a link when there are more than the limit: the newest of
// those whose peers can be reached without.
func (m *Mesh) trimLocked(now time.Time) {
	if m.cfg.ConnLimit <= 0 || len(m.links) <= m.cfg.ConnLimit || now.Sub(m.trimmed) < trimEvery {
		return
	}
	m.trimmed = now
	var last *link
	for name, l := range m.links {
		if l.ended() {
			return // one at a time
		}
		if now.Sub(l.began) >= guestStay && (last == nil || l.began.After(last.began)) && m.viewLocked().ReachesAround(name) {
			last = l
		}
	}
	if last != nil {
		last.stop(fmt.Errorf("limit of %d links reached, and there is another way", m.cfg.ConnLimit))
	}
}
