package link

import (
	"cmp"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"
)

const (
	maxTurned  = 32
	keepTurned = 2 * time.Minute // longer than a peer waits before it tries again
)

// turned are the connections lately turned away because of the password or a
// name, by address: whoever dials in vain shall be seen here, too.
type turned map[netip.Addr]turnedAway

type turnedAway struct {
	from   netip.AddrPort
	reason string
	at     time.Time
}

// add notes one and says whether it is news.
func (t turned) add(from netip.AddrPort, reason string, now time.Time) bool {
	maps.DeleteFunc(t, func(_ netip.Addr, a turnedAway) bool { return now.Sub(a.at) >= keepTurned })
	old, known := t[from.Addr()]
	if known || len(t) < maxTurned {
		t[from.Addr()] = turnedAway{from: from, reason: reason, at: now}
	}
	return !known || old.reason != reason
}

// forget drops what is known of an address, from which there is a link now.
func (t turned) forget(from netip.AddrPort) { delete(t, from.Addr()) }

// rows describes those whose address is not in others.
func (t turned) rows(others []Connection, now time.Time) []Connection {
	var out []Connection
	for _, a := range slices.SortedFunc(maps.Values(t), func(a, b turnedAway) int {
		return cmp.Compare(a.from.String(), b.from.String())
	}) {
		same := func(c Connection) bool {
			host, _, err := net.SplitHostPort(c.Addr)
			return err == nil && host == a.from.Addr().String()
		}
		if now.Sub(a.at) < keepTurned && !slices.ContainsFunc(others, same) {
			out = append(out, Connection{Addr: a.from.String(), State: Failed, Err: a.reason})
		}
	}
	return out
}
