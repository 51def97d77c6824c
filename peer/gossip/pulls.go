package gossip

import (
	"time"

	"weave.local/peer"
)

const (
	maxPulls      = 4 // at one time
	pullTries     = 5 // in a row, then the next reason is waited for
	pullAgain     = time.Second
	mismatchEvery = 5 * time.Second
	mismatchMost  = time.Minute
	quietAfter    = 2 * time.Second // a root that stood still so long waits for no broadcast
	strikesMost   = 3
)

// pulls decides when to pull from whom. It is pure; the caller holds the lock.
type pulls struct {
	jobs map[peer.Name]*pullJob
	busy int

	root      uint64    // ours, as last seen
	rootSince time.Time // since when
	strikes   int       // differing roots of others in a row
	again     time.Time // when the next one may make us pull
	wait      time.Duration
	seen      [2]uint64 // roots, ours and theirs, at the last pull because of them
}

type pullJob struct {
	due    time.Time // zero: not wanted
	answer bool      // because the other pulled from us
	busy   bool
	tries  int
}

func newPulls() *pulls { return &pulls{jobs: make(map[peer.Name]*pullJob)} }

// want asks for a pull at a time. An earlier one that is wanted stays.
func (p *pulls) want(name peer.Name, at time.Time, answer bool) {
	j := p.jobs[name]
	if j == nil {
		j = &pullJob{answer: true}
		p.jobs[name] = j
	}
	if j.due.IsZero() || at.Before(j.due) {
		j.answer = answer && (j.due.IsZero() || j.answer)
		j.due = at
		j.tries = 0
	}
}

// compare takes the root that another peer had just now, ours being root.
func (p *pulls) compare(name peer.Name, theirs, ours uint64, now time.Time) {
	if ours != p.root {
		p.root, p.rootSince = ours, now
	}
	if theirs == ours {
		p.strikes = 0
		return
	}
	p.strikes++
	pair := [2]uint64{ours, theirs}
	if pair != p.seen && p.wait > mismatchEvery { // something else differs now
		p.wait = mismatchEvery
		p.again = now
	}
	if now.Sub(p.rootSince) < quietAfter && p.strikes < strikesMost || now.Before(p.again) {
		return
	}
	if pair == p.seen { // the last pull did not help
		p.wait = min(2*p.wait, mismatchMost)
	} else {
		p.wait = mismatchEvery
	}
	p.seen, p.strikes, p.again = pair, 0, now.Add(p.wait)
	p.want(name, now, false)
}

// start returns the pulls to begin now; the value says whether it is an answer.
func (p *pulls) start(now time.Time) map[peer.Name]bool {
	out := make(map[peer.Name]bool)
	for name, j := range p.jobs {
		if j.busy || j.due.IsZero() || j.due.After(now) || p.busy >= maxPulls {
			continue
		}
		out[name] = j.answer
		j.busy, j.due = true, time.Time{}
		j.tries++
		p.busy++
	}
	return out
}

// done says how a pull ended.
func (p *pulls) done(name peer.Name, answer bool, err error, reachable bool, now time.Time) {
	p.busy--
	j := p.jobs[name]
	j.busy = false
	switch {
	case !j.due.IsZero(): // wanted again meanwhile
	case err != nil && reachable && j.tries < pullTries:
		j.due, j.answer = now.Add(pullAgain<<(j.tries-1)), answer
	default:
		delete(p.jobs, name)
	}
}
