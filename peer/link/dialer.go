package link

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"weave.local/peer"
)

const (
	firstWait     = time.Second
	longestWait   = time.Minute
	waitFactor    = 1.5
	provenAfter   = 10 * time.Second        // a link that lived so long lets the waits begin anew
	politeWait    = 1500 * time.Millisecond // the end with the higher UID leaves discovery to the other for so long
	maxBusy       = 32                      // attempts at one time
	maxCollisions = 5                       // refusals because of a name, in a row, before an address is left alone
)

// dialer decides what is dialled when. It is pure: the time and what happened
// come in, attempts to make go out. It is not safe for use by several
// goroutines.
type dialer struct {
	port  uint16 // of targets without one
	dials map[dialKey]*dial
	busy  int
}

// dialKey is a target as the user wrote it or, for what was discovered, a
// peer.
type dialKey struct {
	target string
	peer   peer.Name
}

// dial is one thing to dial. While there is a link to its peer it rests.
type dial struct {
	key   dialKey
	host  string // of a target
	port  uint16
	peer  peer.Name        // who answers there; 0 while that is not known
	addrs []netip.AddrPort // where it was dialled last, or may be
	busy  bool
	left  bool // it leads to ourselves
	never bool // not tried again until asked to
	tries int  // since the last success
	wrong int  // refusals because of a name, in a row
	wait  time.Duration
	due   time.Time
	err   string // of the last attempt or link
}

func newDialer(port uint16) *dialer {
	return &dialer{port: port, dials: make(map[dialKey]*dial)}
}

// add makes target due at once, whether it was known or not.
func (ds *dialer) add(target string, now time.Time) error {
	host, port, err := splitTarget(target, ds.port)
	if err != nil {
		return err
	}
	key := dialKey{target: target}
	d := ds.dials[key]
	if d == nil {
		d = &dial{key: key, host: host, port: port}
		ds.dials[key] = d
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		d.addrs = []netip.AddrPort{netip.AddrPortFrom(addr.Unmap(), port)}
	}
	d.left, d.never, d.wrong, d.wait, d.due = false, false, 0, 0, now
	return nil
}

func (ds *dialer) forget(target string) { delete(ds.dials, dialKey{target: target}) }

// lose forgets a discovered peer that is gone for good.
func (ds *dialer) lose(name peer.Name) { delete(ds.dials, dialKey{peer: name}) }

// targets returns what the user gave, sorted.
func (ds *dialer) targets() []string {
	var out []string
	for key := range ds.dials {
		if key.target != "" {
			out = append(out, key.target)
		}
	}
	slices.Sort(out)
	return out
}

// discover notes where a peer may be reached. The polite end leaves it to the
// other to dial first, so that usually only one does.
func (ds *dialer) discover(name peer.Name, addrs []netip.AddrPort, now time.Time, first bool) {
	key := dialKey{peer: name}
	if ds.covered(name, addrs) {
		delete(ds.dials, key)
		return
	}
	if len(addrs) == 0 {
		return
	}
	d := ds.dials[key]
	if d == nil {
		d = &dial{key: key, peer: name, due: now}
		if !first {
			d.due = now.Add(politeWait)
		}
		ds.dials[key] = d
	}
	d.addrs = addrs
}

// covered says whether a target leads to the peer.
func (ds *dialer) covered(name peer.Name, addrs []netip.AddrPort) bool {
	for key, d := range ds.dials {
		if key.target == "" {
			continue
		}
		if d.peer == name {
			return true
		}
		for _, a := range d.addrs {
			if d.peer == 0 && slices.Contains(addrs, a) {
				return true
			}
		}
	}
	return false
}

// job is an attempt to make. It is not changed while the attempt runs.
type job struct {
	dial  *dial
	host  string // to resolve, when addrs do not come from discovery
	port  uint16
	addrs []netip.AddrPort
}

// start returns the attempts to begin now.
func (ds *dialer) start(now time.Time, linked func(peer.Name) bool, room bool) []job {
	var jobs []job
	for _, d := range ds.dials {
		if d.busy || d.left || d.never || d.due.After(now) || linked(d.peer) || ds.busy >= maxBusy {
			continue
		}
		if d.key.target == "" && !room {
			continue
		}
		d.busy = true
		ds.busy++
		d.tries++
		j := job{dial: d, host: d.host, port: d.port}
		if d.key.target == "" {
			j.addrs = slices.Clone(d.addrs)
		}
		jobs = append(jobs, j)
	}
	return jobs
}

// outcome is how an attempt ended.
type outcome struct {
	peer      peer.Name        // who answered; 0 when nobody did
	addrs     []netip.AddrPort // what the name resolved to
	err       error            // nil: there is a link to peer now
	self      bool             // we answered ourselves
	collision bool             // refused because of a name
}

// finish takes the outcome of an attempt.
func (ds *dialer) finish(d *dial, o outcome, now time.Time) {
	ds.busy--
	d.busy = false
	if len(o.addrs) > 0 {
		d.addrs = o.addrs
	}
	if o.peer != 0 && d.key.target != "" {
		d.peer = o.peer
	}
	switch {
	case o.self:
		d.left = true
	case o.err == nil && d.key.target == "" && o.peer != d.peer:
		d.fail(fmt.Errorf("another peer, %s, answers there", o.peer), now)
	case o.err == nil:
		d.tries, d.wrong, d.err = 0, 0, ""
		d.due = now.Add(jitter(firstWait))
	default:
		d.fail(o.err, now)
		if !o.collision {
			d.wrong = 0
		} else if d.wrong++; d.wrong >= maxCollisions {
			d.never = true
		}
	}
}

func (d *dial) fail(err error, now time.Time) {
	d.err = err.Error()
	d.wait = min(max(firstWait, time.Duration(float64(d.wait)*waitFactor)), longestWait)
	d.due = now.Add(jitter(d.wait))
}

// jitter spreads d by a quarter to both sides.
func jitter(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2) }

// down says that the link to a peer ended.
func (ds *dialer) down(name peer.Name, reason error, lived time.Duration, now time.Time) {
	for _, d := range ds.dials {
		if d.peer != name {
			continue
		}
		if lived > provenAfter {
			d.wait = 0
		}
		d.fail(reason, now)
	}
}

// rows describes what has no link, targets first.
func (ds *dialer) rows(linked func(peer.Name) bool) []Connection {
	var out []Connection
	keys := slices.Collect(maps.Keys(ds.dials))
	slices.SortFunc(keys, func(a, b dialKey) int {
		return cmp.Or(int(a.peer)-int(b.peer), cmp.Compare(a.target, b.target))
	})
	for _, key := range keys {
		d := ds.dials[key]
		if d.left || linked(d.peer) {
			continue
		}
		out = append(out, d.row())
	}
	return out
}

func (d *dial) row() Connection {
	c := Connection{Addr: d.key.target, Outbound: true, Err: d.err, Peer: peer.Info{Name: d.peer}}
	if len(d.addrs) > 0 {
		c.Addr = d.addrs[0].String()
	}
	switch {
	case d.tries == 0 && d.err == "", d.busy && d.tries <= 1:
		c.State = Connecting
	case d.busy:
		c.State = Retrying
	default:
		c.State = Failed
		if !d.never {
			c.Retry = d.due
		}
	}
	return c
}
