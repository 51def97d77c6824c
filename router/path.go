package router

import (
	"cmp"
	"fmt"
	"sort"
	"time"
)

// Timing of probes. A path that stops carrying frames is left after deadAfter
// plus one probe interval, below the five seconds users are promised; one that
// comes back is used again after recoverAcks answers. One that fell again soon
// after it was used must answer for a while first, twice as long each time but
// never longer than trialMost: together with probeSlow that stays below the ten
// seconds in which users are promised the better path again.
const (
	probeEvery    = time.Second            // on a path in good order
	probeFast     = 200 * time.Millisecond // while something is being found out
	probeSlow     = time.Second            // on a path that has been down for a while
	fastPhase     = 5 * time.Second        // how long a path is probed fast before it counts as down for a while
	deadAfter     = 2500 * time.Millisecond
	answerIn      = 600 * time.Millisecond // a probe without answer for so long is lost
	recoverAcks   = 3
	trialFirst    = time.Second
	trialMost     = 6 * time.Second
	trialGap      = 1500 * time.Millisecond // a trial begins anew after so long without answer
	calmAfter     = time.Minute             // a path that fell after so long a use is trusted as any
	sizeTries     = 3                       // lost probes before a size is given up
	raiseInterval = 60 * time.Second        // how often a larger size is tried again (RFC 8899 PMTU_RAISE_TIMER is 600 s; an overlay's paths change faster)
)

// smallProbe tells "the path is dead" from "the path is narrower than we
// think": it fits any underlay that can carry IPv6 (RFC 8200 §5).
const smallProbe = 1200

// commonSizes are inner packet sizes that real underlays leave room for,
// largest first: jumbo frames, FDDI, Ethernet, PPPoE, common clouds and
// tunnels, and the IPv6 minimum (RFC 8899 §5.3.2).
func commonSizes() []int {
	return []int{8951, 8950, 8931, 8450, 4302, 1950, 1450, 1442, 1430, 1422, 1410, 1400, 1390, 1376, 1358, 1330, 1300, 1270, 1230, smallProbe}
}

// sizesBelow are the common sizes below limit, largest first.
func sizesBelow(limit int) []int {
	all := commonSizes()
	return all[sort.Search(len(all), func(i int) bool { return all[i] < limit }):]
}

// nextSize is the largest common size below limit, or 0.
func nextSize(limit int) int {
	if s := sizesBelow(limit); len(s) > 0 {
		return s[0]
	}
	return 0
}

type sentProbe struct {
	size      int
	at        time.Time
	overtaken bool // a smaller one that was not sent earlier was answered
}

// wait is how long an answer may take.
func (s sentProbe) wait() time.Duration {
	if s.overtaken {
		return probeFast
	}
	return answerIn
}

// pathState finds out whether one data path carries frames to one neighbour
// and how large they may be. It is pure: events and the time come in, sizes of
// probes to send go out.
//
// Invariant: up implies mtu > 0.
type pathState struct {
	name   string
	up     bool // frames we send arrive
	peerUp bool // the neighbour says the same of its direction
	mtu    int  // largest IP packet proven to pass, bytes; 0 when none
	limit  int  // largest size worth trying, from the underlay device and its errors
	trying int  // size under test; equals mtu when nothing is searched
	found  int  // largest size below trying that was answered meanwhile

	pending   map[uint64]sentProbe
	lost      int // lost probes of size trying, in a row
	acks      int // answers in a row
	begun     time.Time
	lastSent  time.Time
	lastAck   time.Time
	lastSmall time.Time
	lastRaise time.Time
	spread    time.Time // since when all sizes below trying are sent with it; zero: not yet
	wasUp     bool
	upSince   time.Time
	falls     int       // in a row, each less than calmAfter after the path was used again
	trial     time.Time // since when answers come again; zero when none do, or the path is up
	loss      loss
	sendErr   string // of a probe that could not be sent, for deadAfter
	erredAt   time.Time
	barred    string // why it must not be used at all; empty when it may
	absent    string // what this host lacks to have the path; empty when it has it
	peerLacks string // the same of the other host, as that says
}

func newPathState(name string, now time.Time) *pathState {
	return &pathState{name: name, pending: make(map[uint64]sentProbe), begun: now}
}

// usable says that frames pass in both directions.
func (p *pathState) usable() bool { return p.barred == "" && p.up && p.peerUp }

// bar forbids the path for a reason, or allows it when there is none. One that
// was forbidden has to prove itself again.
func (p *pathState) bar(reason string, now time.Time) {
	if p.barred == "" && reason != "" {
		p.fall(now)
		p.lastAck = time.Time{}
		clear(p.pending)
	}
	p.barred = reason
}

// why says in words why the path is not usable, or only when there is no
// better one; empty when it is good.
func (p *pathState) why(now time.Time) string {
	switch {
	case p.barred != "":
		return p.barred
	case !p.up && p.peerLacks != "":
		return "no fast path on that host: " + p.peerLacks
	case !p.up && p.sendErr != "":
		return p.sendErr
	case !p.up && !p.trial.IsZero():
		return fmt.Sprintf("on trial: probes are answered for %s, want %s", seconds(now.Sub(p.trial)), seconds(p.trialTime()))
	case !p.up && p.lastAck.IsZero():
		return "not yet answered"
	case !p.up:
		return "no answer to probes for " + seconds(now.Sub(p.lastAck))
	case !p.peerUp:
		return "probes from the other side get no answer"
	case p.loss.heavy:
		return p.loss.String()
	}
	return ""
}

// seconds writes a time with a tenth of a second below a minute.
func seconds(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Truncate(time.Second).String()
}

// trialTime is how long a path that fell has to answer before it is used.
func (p *pathState) trialTime() time.Duration {
	t := time.Duration(0)
	for i := 0; i < p.falls && t < trialMost; i++ {
		t = max(trialFirst, 2*t)
	}
	return min(t, trialMost)
}

func (p *pathState) interval(now time.Time) time.Duration {
	_, often := p.loss.watched(now)
	switch {
	case p.up && p.loss.heavy, p.up && p.trying == p.mtu && p.lost == 0 && !often:
		return probeEvery
	case !p.up && now.Sub(p.begun) > fastPhase && p.trial.IsZero():
		return probeSlow
	}
	return probeFast
}

// tick returns the sizes of the probes that are due. limit is what the path
// itself believes it can carry now; 0 when it does not know the neighbour.
func (p *pathState) tick(now time.Time, limit int) []int {
	if p.barred != "" {
		return nil
	}
	p.setLimit(limit)
	p.expire(now)
	if p.up && now.Sub(p.lastAck) > deadAfter {
		p.fall(now)
	}
	if !p.trial.IsZero() && now.Sub(p.lastAck) > trialGap {
		p.trial = time.Time{}
	}
	if now.Sub(p.erredAt) > deadAfter {
		p.sendErr = ""
	}
	p.loss.settle(now)
	if p.limit == 0 || now.Sub(p.lastSent) < p.interval(now) {
		return nil
	}
	p.lastSent = now
	if p.up && p.mtu < p.limit && p.trying == p.mtu && now.Sub(p.lastRaise) > raiseInterval {
		p.lastRaise = now
		p.try(p.limit)
	}
	return append([]int{p.trying}, p.company(now)...)
}

// company is what is sent with a probe whose answer is in doubt: a small one,
// and as soon as it looks as if only the size were the trouble, all common
// sizes below, so that the one that passes is known when the other is given up.
// Where small ones are lost as well it looks so later.
func (p *pathState) company(now time.Time) []int {
	watched, _ := p.loss.watched(now)
	switch {
	case p.trying <= smallProbe, p.up && p.trying == p.mtu && p.lost == 0 && !watched:
		return nil
	case p.up && p.trying == p.mtu && p.lost <= p.loss.count():
	case p.lost > 0 && p.up || now.Sub(p.lastSmall) < deadAfter:
		if p.spread.IsZero() {
			p.spread = now
		}
		return sizesBelow(p.trying)
	}
	return []int{smallProbe}
}

// try begins to test a size.
func (p *pathState) try(size int) {
	p.trying, p.lost, p.found, p.spread = size, 0, 0, time.Time{}
}

func (p *pathState) setLimit(limit int) {
	if limit == p.limit {
		return
	}
	p.limit = limit
	if p.trying == 0 || p.trying > limit || p.mtu == 0 {
		p.try(limit)
	}
	if p.mtu > limit {
		p.mtu = limit
	}
}

// expire counts probes that got no answer.
func (p *pathState) expire(now time.Time) {
	for token, s := range p.pending {
		if now.Sub(s.at) < s.wait() {
			continue
		}
		delete(p.pending, token)
		if s.size <= p.trying {
			p.acks = 0
		}
		if s.size == p.trying {
			p.lost++
		}
		if s.size <= max(p.mtu, smallProbe) {
			p.loss.last = now
		}
		p.judge(s, true)
	}
	searched := !p.spread.IsZero() && (p.found > smallProbe || now.Sub(p.spread) > answerIn)
	// Where small probes are lost as well, it takes more to blame the size.
	if p.lost >= sizeTries+p.loss.count() && searched && now.Sub(p.lastSmall) < deadAfter {
		p.narrow(p.trying)
	}
}

// narrow gives up size: the search ends at the largest one that was answered
// meanwhile or, when none was asked for, goes on with the next smaller one.
func (p *pathState) narrow(size int) {
	floor := min(smallProbe, p.limit)
	if p.mtu >= size {
		p.mtu = 0
		if p.up { // only small probes kept it up
			p.mtu = floor
		}
	}
	if p.found > 0 {
		p.mtu = max(p.mtu, p.found)
		p.try(p.mtu)
		return
	}
	p.try(max(nextSize(size), floor, p.mtu))
}

// sent records a probe on its way.
func (p *pathState) sent(token uint64, size int, now time.Time) {
	p.pending[token] = sentProbe{size: size, at: now}
}

// refused records that the path itself turned a probe down: fits is the size
// that would have passed (0 when unknown), err the reason when it was not size.
func (p *pathState) refused(size, fits int, err error) {
	if err != nil {
		p.sendErr, p.erredAt = err.Error(), p.lastSent
		return
	}
	if fits > 0 && fits < size {
		p.limit = fits
		p.mtu = min(p.mtu, fits)
		p.try(fits)
		return
	}
	p.narrow(size)
}

// ack records the answer to a probe; late and unknown ones are not known.
func (p *pathState) ack(token uint64, now time.Time) (known bool) {
	s, ok := p.pending[token]
	if !ok {
		return false
	}
	delete(p.pending, token)
	p.lastAck, p.sendErr = now, ""
	if s.size <= smallProbe {
		p.lastSmall = now
	}
	p.judge(s, false)
	switch {
	case s.size == p.trying:
		p.mtu = s.size
		p.try(p.mtu)
		p.acks++
	case s.size < p.trying:
		p.found = max(p.found, s.size)
		p.overtake(s)
	}
	if p.up {
		return true
	}
	if p.trial.IsZero() {
		p.trial = now
	}
	if p.mtu > 0 && (!p.wasUp || p.acks >= recoverAcks && now.Sub(p.trial) >= p.trialTime()) {
		p.up, p.wasUp, p.upSince, p.trial = true, true, now, time.Time{}
	}
	return true
}

// overtake notes that probes under test had their chance when s had.
func (p *pathState) overtake(s sentProbe) {
	for token, o := range p.pending {
		if o.size == p.trying && !o.at.After(s.at) {
			o.overtaken = true
			p.pending[token] = o
		}
	}
}

// judge counts a small probe. Those of before the path was used tell of a path
// that was down.
func (p *pathState) judge(s sentProbe, lost bool) {
	if p.up && s.size <= smallProbe && !s.at.Before(p.upSince) {
		p.loss.add(lost)
	}
}

// fall ends the use of the path. The search for its size begins with what it
// carried.
func (p *pathState) fall(now time.Time) {
	switch {
	case !p.up:
	case now.Sub(p.upSince) < calmAfter:
		p.falls++
	default:
		p.falls = 0
	}
	p.try(cmp.Or(p.mtu, p.limit))
	p.up, p.mtu, p.acks, p.begun = false, 0, 0, now
	p.trial, p.loss = time.Time{}, p.loss.anew()
}
