package gossip

import (
	"errors"
	"testing"
	"time"

	"weave.local/peer"
)

// at is a time after the beginning of a script.
func at(seconds float64) time.Time {
	return time.Unix(1000, 0).Add(time.Duration(seconds * float64(time.Second)))
}

func started(p *pulls, seconds float64) int { return len(p.start(at(seconds))) }

func TestPullsAreTriedAgain(t *testing.T) {
	t.Parallel()
	p := newPulls()
	p.want(1, at(1), false)
	p.want(1, at(2), false)
	if started(p, 0.9) != 0 || started(p, 1) != 1 || started(p, 5) != 0 {
		t.Error("not begun once, at the earlier time")
	}
	p.want(1, at(5), false) // while it runs
	p.done(1, false, nil, true, at(6))
	if started(p, 6) != 1 {
		t.Error("what was wanted meanwhile is forgotten")
	}
	tries := 0
	for now := 6.0; now < 100; now++ {
		p.done(1, false, errors.New("lost"), true, at(now))
		if len(p.jobs) == 0 {
			break
		}
		tries++
		for started(p, now) == 0 {
			now += 0.25
		}
	}
	if tries != pullTries-1 || p.busy != 0 {
		t.Errorf("tried again %d times; %d run", tries, p.busy)
	}
	p.want(2, at(100), false)
	started(p, 100)
	p.done(2, false, errors.New("lost"), false, at(100))
	if len(p.jobs) != 0 {
		t.Error("an unreachable peer is tried again")
	}
}

func TestPullsAreFew(t *testing.T) {
	t.Parallel()
	p := newPulls()
	for i := range 10 {
		p.want(peer.Name(i+1), at(0), false)
	}
	if n := started(p, 0); n != maxPulls {
		t.Errorf("%d at one time", n)
	}
}

func TestAnswersAreNotAnswered(t *testing.T) {
	t.Parallel()
	p := newPulls()
	p.want(1, at(0), true)
	if answer := p.start(at(0))[1]; !answer {
		t.Error("not marked as an answer")
	}
	p.done(1, true, nil, true, at(0))
	p.want(1, at(2), false)
	p.want(1, at(1), true)
	if answer := p.start(at(1))[1]; answer {
		t.Error("a pull wanted for itself too is marked as an answer")
	}
}

func TestComparedRoots(t *testing.T) {
	t.Parallel()
	p := newPulls()
	step := func(name peer.Name, theirs, ours uint64, seconds float64, want int) {
		t.Helper()
		p.compare(name, theirs, ours, at(seconds))
		jobs := p.start(at(seconds))
		if len(jobs) != want {
			t.Errorf("at %.1f s: %d pulls, want %d", seconds, len(jobs), want)
		}
		for name := range jobs {
			p.done(name, false, nil, true, at(seconds))
		}
	}
	// While ours changes, a difference is most likely on its way: it takes
	// three in a row.
	step(2, 7, 5, 0, 0)
	step(2, 7, 6, 1, 0)
	step(2, 7, 7, 2, 0)
	step(2, 7, 8, 3, 0)
	step(3, 7, 9, 4, 0)
	step(2, 7, 10, 5, 1)
	step(2, 10, 10, 6, 0)
	// Ours stands still: at once, though not more than every 5 s.
	step(2, 11, 10, 9, 0)
	step(2, 11, 10, 10, 1)
	// That did not help: less and less often.
	step(2, 11, 10, 15, 1)
	step(2, 11, 10, 21, 0)
	step(2, 11, 10, 25, 1)
	step(2, 11, 10, 40, 0)
	step(2, 11, 10, 46, 1)
	// Something else differs: at once again.
	step(2, 12, 10, 47, 1)
	step(2, 13, 10, 48, 0)
	step(2, 13, 10, 52, 1)
}

func TestJoiner(t *testing.T) {
	t.Parallel()
	j := &joiner{}
	many := []peer.Name{1, 2, 3, 4, 5}
	if got := j.step(at(0), nil, nil); got != nil {
		t.Errorf("joins %v", got)
	}
	if got := j.step(at(0), many, nil); len(got) != joinTargets {
		t.Errorf("alone: joins %v", got)
	}
	if got := j.step(at(7), many, nil); got != nil {
		t.Errorf("joins %v too soon", got)
	}
	if got := j.step(at(13), many, nil); len(got) != joinTargets {
		t.Errorf("joins %v instead of trying again", got)
	}
	j.joined(true, at(13))
	if got := j.step(at(14), nil, many); got != nil {
		t.Errorf("joins %v without a stranger", got)
	}
	if got := j.step(at(24), nil, many); len(got) != 1 {
		t.Errorf("joins %v, want one more member", got)
	}
	if got := j.step(at(25), []peer.Name{9}, many); got != nil {
		t.Errorf("joins %v although news may be on the way", got)
	}
	if got := j.step(at(29), []peer.Name{9}, many); len(got) != 1 {
		t.Errorf("joins %v, want the stranger", got)
	}
	j.joined(true, at(29))
	if got := j.step(at(60), nil, many); got != nil {
		t.Errorf("joins %v once more", got)
	}
}
