package link

import (
	"errors"
	"net/netip"
	"time"

	"weave.local/peer"
	"weave.local/peer/handshake"
)

// unwanted is a peer with which we want no link, in this run of it.
type unwanted struct {
	uid    peer.UID
	reason string
}

// Refuse ends the link to a peer that is known and takes none to it any more;
// the reason is told to the other end and shown by Connections. That holds
// until one of both starts anew, or until Connect or ReplaceTargets.
func (m *Mesh) Refuse(name peer.Name, reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, known := m.topo.Record(name)
	if l := m.links[name]; l != nil {
		r.UID, known = l.peer.UID, true
	}
	if !known || len(m.strangers) >= int(peer.MaxShortID) {
		return
	}
	m.strangers[name] = unwanted{r.UID, reason}
	m.dials.Lose(name)
	signal(m.kick)
}

// strangeLocked says why we want no link to a peer; nil: nothing is wrong.
func (m *Mesh) strangeLocked(p peer.Info) *handshake.Refusal {
	s, ok := m.strangers[p.Name]
	if !ok || s.uid != p.UID {
		return nil
	}
	return &handshake.Refusal{Code: handshake.RefuseStranger, Reason: s.reason}
}

// partLocked ends a link to a stranger, and shows why.
func (m *Mesh) partLocked(l *link, now time.Time) bool {
	r := m.strangeLocked(l.peer)
	if r != nil && !l.ended() {
		m.turned.add(netip.AddrPortFrom(l.remote.Addr(), listening(l.outbound, l.remote, l.peer.Port).Port()), r.Reason, now)
		l.stop(errors.New(r.Reason))
	}
	return r != nil
}
