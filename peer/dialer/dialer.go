// Package dialer decides which targets and discovered peers are dialled when,
// and what status shows of those without a link. It is pure: no I/O, no clock.
package dialer

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"weave.local/peer"
	"weave.local/peer/target"
)

const (
	firstWait     = time.Second
	longestWait   = 8 * time.Second // 10 s with jitter: what heals is linked again soon
	refusedWait   = time.Minute     // longest where somebody answers who does not want us
	waitFactor    = 1.5
	provenAfter   = 10 * time.Second        // a link that lived so long lets the waits begin anew
	politeWait    = 1500 * time.Millisecond // the end with the higher UID leaves discovery to the other for so long
	maxBusy       = 32                      // attempts at one time
	maxRepeats    = maxBusy / 2             // of them, such as follow a failure
	repeatRate    = 16                      // attempts per second that follow a failure, over all there is to dial
	maxCollisions = 5                       // refusals because of a name, in a row, before an address is tried rarely
	wakeSpread    = time.Second             // over which peers that came back into reach are dialled
	// MeshMost is of how many peers at most discovery links all to all.
	MeshMost    = 100
	enoughLinks = 10              // of more, each to so many; who cannot be reached is dialled anyhow
	growWait    = 2 * time.Second // for which a cluster may not have grown by an eighth before it counts as small
)

// Dialer decides what is dialled when. It is pure: the time and what happened
// come in, attempts to make go out. It is not safe for use by several
// goroutines.
type Dialer struct {
	port    uint16 // of targets without one
	dials   map[dialKey]*dial
	targets map[string]*dial // those of dials that the user gave
	busy    int              // attempts that run

	known   int       // peers, as of when their number last went up much
	grown   time.Time // when that was
	spare   int       // links that discovery wants besides those to peers out of reach
	repeats int       // of what runs, such as follow a failure
	credit  float64   // attempts of that kind that may begin now
	counted time.Time
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
	again bool          // the attempt that runs follows a failure
	left  bool          // it leads to ourselves
	near  bool          // there was a route to the peer when we last looked
	found time.Time     // when it was discovered
	tries int           // since the last success
	wrong int           // refusals because of a name, in a row
	wait  time.Duration // 0: no failure yet, or none that counts
	due   time.Time
	err   string // of the last attempt or link
}

// New is a Dialer without anything to dial; port is that of targets without one.
func New(port uint16) *Dialer {
	return &Dialer{port: port, dials: make(map[dialKey]*dial), targets: make(map[string]*dial)}
}

// Add makes target due at once, whether it was known or not.
func (ds *Dialer) Add(name string, now time.Time) error {
	host, port, err := target.Split(name, ds.port)
	if err != nil {
		return err
	}
	d := ds.targets[name]
	if d == nil {
		d = &dial{key: dialKey{target: name}, host: host, port: port}
		ds.dials[d.key], ds.targets[name] = d, d
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		d.addrs = []netip.AddrPort{netip.AddrPortFrom(addr.Unmap(), port)}
	}
	d.left, d.wrong, d.wait, d.due = false, 0, 0, now
	return nil
}

// Forget drops a target.
func (ds *Dialer) Forget(target string) {
	delete(ds.dials, dialKey{target: target})
	delete(ds.targets, target)
}

// Lose forgets a discovered peer that is gone for good.
func (ds *Dialer) Lose(name peer.Name) { delete(ds.dials, dialKey{peer: name}) }

// Targets returns what the user gave, sorted.
func (ds *Dialer) Targets() []string { return slices.Sorted(maps.Keys(ds.targets)) }

// Discover notes where a peer may be reached. The polite end leaves it to the
// other to dial first, so that usually only one does.
func (ds *Dialer) Discover(name peer.Name, addrs []netip.AddrPort, now time.Time, first bool) {
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
		d = &dial{key: key, peer: name, due: now, found: now}
		if !first {
			d.due = now.Add(politeWait)
		}
		ds.dials[key] = d
	}
	d.addrs = addrs
}

// covered says whether a target leads to the peer.
func (ds *Dialer) covered(name peer.Name, addrs []netip.AddrPort) bool {
	for _, d := range ds.targets {
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

// Job is an attempt to make. It is not changed while the attempt runs.
type Job struct {
	Target string           // as the user wrote it; empty: it was discovered
	Peer   peer.Name        // that was discovered; 0 for a target
	Host   string           // to resolve, when Addrs do not come from discovery
	Port   uint16           // of the target
	Addrs  []netip.AddrPort // of what was discovered

	dial *dial
}

// Start returns the attempts to begin now. Those that follow a failure are
// bounded in number and rate, the longest due first, so that however many
// peers are gone, dialling them costs little and holds up no others.
func (ds *Dialer) Start(now time.Time, linked func(peer.Name) bool, room bool, spare int) []Job {
	ds.credit = min(repeatRate, ds.credit+repeatRate*now.Sub(ds.counted).Seconds())
	ds.counted = now
	ds.spare = spare
	var due []*dial
	for _, d := range ds.dials {
		if d.busy && d.optional(now) {
			ds.spare--
		}
		switch {
		case d.busy, d.left, d.due.After(now), d.key.target == "" && !room, spare <= 0 && d.optional(now), linked(d.peer):
			continue
		}
		due = append(due, d)
	}
	slices.SortFunc(due, func(a, b *dial) int { return a.due.Compare(b.due) })
	var jobs []Job
	for _, again := range []bool{false, true} {
		for _, d := range due {
			if d.wait > 0 != again || ds.busy >= maxBusy || again && (ds.repeats >= maxRepeats || ds.credit < 1) {
				continue
			}
			if d.optional(now) {
				if ds.spare <= 0 {
					continue
				}
				ds.spare--
			}
			jobs = append(jobs, ds.begin(d))
		}
	}
	return jobs
}

// Wanted is how many more links discovery makes among so many peers. While a
// cluster grows nobody knows how large it is going to be, and a few links do
// until then: a thousand peers that start at one moment would else link all to
// all of the first hundred they hear of.
func (ds *Dialer) Wanted(links, peers int, now time.Time) int {
	switch {
	case peers > ds.known+ds.known/8+1:
		ds.known, ds.grown = peers, now
	case peers < ds.known:
		ds.known = peers
	}
	if peers <= MeshMost && now.Sub(ds.grown) >= growWait {
		return peers
	}
	return enoughLinks - links
}

// First says which of two peers that discover each other dials first. The
// order of the UIDs alone would have the highest one dialled by all.
func First(self, other peer.UID) bool {
	return (self < other) == ((self^other)&1 == 0)
}

// optional says whether we do without a link to the peer when we have enough.
// To whom there is no route yet there will be one soon if he is new.
func (d *dial) optional(now time.Time) bool {
	return d.key.target == "" && (d.near || now.Sub(d.found) < politeWait)
}

func (ds *Dialer) begin(d *dial) Job {
	if d.again = d.wait > 0; d.again {
		ds.repeats++
		ds.credit--
	}
	d.busy = true
	ds.busy++
	d.tries++
	j := Job{Target: d.key.target, Peer: d.key.peer, Host: d.host, Port: d.port, dial: d}
	if d.key.target == "" {
		j.Addrs = slices.Clone(d.addrs)
	}
	return j
}

// Wake takes note of who can be reached over others. Whoever comes back into
// reach is worth a dial soon, however long the wait had become.
func (ds *Dialer) Wake(reaches, linked func(peer.Name) bool, now time.Time) {
	for _, d := range ds.dials {
		near := d.peer != 0 && reaches(d.peer)
		if near && !d.near && !linked(d.peer) && d.wait > 0 {
			d.wait = 0
			if soon := now.Add(rand.N(wakeSpread)); soon.Before(d.due) {
				d.due = soon
			}
		}
		d.near = near
	}
}

// Renew makes what leads to a peer due at once.
func (ds *Dialer) Renew(name peer.Name, now time.Time) {
	for _, d := range ds.dials {
		if d.peer == name {
			d.wait, d.due = 0, now
		}
	}
}

// Outcome is how an attempt ended.
type Outcome struct {
	Peer      peer.Name        // who answered; 0 when nobody did
	Addrs     []netip.AddrPort // what the name resolved to
	Err       error            // nil: there is a link to the peer now
	Self      bool             // we answered ourselves
	Refused   bool             // by somebody who will do so again
	Collision bool             // because of a name
}

// Finish takes how an attempt ended.
func (ds *Dialer) Finish(j Job, o Outcome, now time.Time) {
	d := j.dial
	ds.busy--
	if d.again {
		ds.repeats--
	}
	d.busy, d.again = false, false
	if len(o.Addrs) > 0 {
		d.addrs = o.Addrs
	}
	if o.Peer != 0 && d.key.target != "" {
		d.peer = o.Peer
	}
	switch {
	case o.Self:
		d.left = true
	case o.Err == nil && d.key.target == "" && o.Peer != d.peer:
		d.fail(fmt.Errorf("another peer, %s, answers there", o.Peer), now, refusedWait)
	case o.Err == nil:
		d.tries, d.wrong, d.err = 0, 0, ""
		d.due = now.Add(jitter(firstWait))
	default:
		ds.missed(d, o, now)
	}
}

// missed takes the outcome of an attempt that made no link.
func (ds *Dialer) missed(d *dial, o Outcome, now time.Time) {
	most := longestWait
	if o.Refused {
		most = refusedWait
	}
	if !o.Collision {
		d.wrong = 0
	} else if d.wrong++; d.wrong >= maxCollisions {
		d.wait = refusedWait // whoever has the name will hardly give it up soon
	}
	d.fail(o.Err, now, most)
}

func (d *dial) fail(err error, now time.Time, most time.Duration) {
	d.err = err.Error()
	d.wait = min(max(firstWait, time.Duration(float64(d.wait)*waitFactor)), most)
	d.due = now.Add(jitter(d.wait))
}

// jitter spreads d by a quarter to both sides.
func jitter(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2) }

// Down says that the link to a peer ended.
func (ds *Dialer) Down(name peer.Name, reason error, lived time.Duration, now time.Time) {
	for _, d := range ds.dials {
		if d.peer != name {
			continue
		}
		if lived > provenAfter {
			d.wait = 0
		}
		d.fail(reason, now, longestWait)
	}
}

// Rows describes what has no link, targets first.
func (ds *Dialer) Rows(linked func(peer.Name) bool) []Connection {
	var out []Connection
	keys := slices.Collect(maps.Keys(ds.dials))
	slices.SortFunc(keys, func(a, b dialKey) int {
		return cmp.Or(int(a.peer)-int(b.peer), cmp.Compare(a.target, b.target))
	})
	for _, key := range keys {
		d := ds.dials[key]
		if d.left || linked(d.peer) || d.optional(ds.counted) && ds.spare <= 0 && !d.busy {
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
		c.State, c.Retry = Failed, d.due
	}
	return c
}
