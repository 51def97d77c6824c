package router

import (
	"time"

	"weave.local/peer"
	"weave.local/peer/gossip"
)

// memory holds the endpoints that each peer announced last. The table drops
// those of a peer that is dead to the control plane, but when only its daemon
// ended, its kernel and its containers still serve: they are forwarded to until
// the peer says otherwise or is removed for good.
type memory map[peer.Name]remembered

type remembered struct {
	entries []gossip.Entry
	back    time.Time // since when the peer is reached again without entries
}

// tellWait is what a peer that is reached again gets to announce its
// endpoints.
const tellWait = 5 * time.Second

// recall returns the entries of the table and, of peers that are silent and
// have none there, those they had.
func (m memory) recall(entries []gossip.Entry, reaches func(peer.Name) bool, now time.Time) []gossip.Entry {
	fresh := make(map[peer.Name][]gossip.Entry)
	for _, e := range entries {
		fresh[e.Origin] = append(fresh[e.Origin], e)
	}
	for origin, list := range fresh {
		m[origin] = remembered{entries: list}
	}
	for origin, r := range m {
		switch {
		case fresh[origin] != nil:
			continue
		case !reaches(origin):
			r.back = time.Time{}
		case r.back.IsZero():
			r.back = now
		case now.Sub(r.back) > tellWait:
			delete(m, origin)
			continue
		}
		m[origin] = r
		entries = append(entries, r.entries...)
	}
	return entries
}
