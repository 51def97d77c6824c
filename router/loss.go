package router

import (
	"fmt"
	"math/bits"
	"time"
)

// A path that loses much is left for one that does not. Loss is counted on
// small probes only, since large ones may be lost for their size; they are sent
// from the moment on when any probe is lost.
const (
	lossWindow = 20               // probes that are judged by
	lossHeavy  = 5                // lost ones among them, from which on the path loses heavily: 25 %
	lossLight  = 1                // lost ones among them, down to which it no longer does
	lossWatch  = time.Second      // how long a loss makes probes frequent, until the window is full
	lossForget = 10 * time.Second // after so long without a loss the path is as good as any

	// A path that was found to lose heavily again has to lose little for so many
	// probes more each time, so that frames do not change to and fro.
	lossStreak     = 15
	lossMostStreak = 30
	lossCalm       = 10 * time.Minute // after so long it is not "again" any more
)

// loss judges a path by what became of the last small probes. It is pure.
type loss struct {
	bits  uint32 // the newest is bit 0: set when lost
	n     int    // probes in bits, at most lossWindow
	last  time.Time
	heavy bool

	times  int       // how often it was found heavy, with less than lossCalm between
	lately time.Time // when it was heavy last
	streak int       // probes in a row by which it loses little
}

// count is how many probes of the window were lost.
func (l *loss) count() int { return bits.OnesCount32(l.bits) }

// add takes in what became of a small probe.
func (l *loss) add(lost bool) {
	l.bits = l.bits << 1 & (1<<lossWindow - 1)
	if lost {
		l.bits |= 1
	}
	if l.n < lossWindow {
		l.n++
		return
	}
	c := l.count()
	if c > lossLight {
		l.streak = 0
	} else {
		l.streak++
	}
	switch {
	case c >= lossHeavy && !l.heavy:
		l.heavy = true
		l.times++
	case l.heavy && l.streak > min((l.times-1)*lossStreak, lossMostStreak):
		l.heavy = false
	}
}

// String says how much is lost.
func (l *loss) String() string {
	if l.n < lossWindow {
		return "many probes were lost"
	}
	return fmt.Sprintf("%d%% of probes are lost", 100*l.count()/lossWindow)
}

// settle forgets what is long ago.
func (l *loss) settle(now time.Time) {
	if l.heavy {
		l.lately = now
	} else if now.Sub(l.lately) > lossCalm {
		l.times = 0
	}
	if !l.heavy && now.Sub(l.last) > lossForget {
		*l = l.anew()
	}
}

// anew is what stays when what became of the last probes does not count any more.
func (l *loss) anew() loss { return loss{heavy: l.heavy, times: l.times, lately: l.lately} }

// watched says that small probes are to be sent to find out more; often, that
// they shall be frequent.
func (l *loss) watched(now time.Time) (watched, often bool) {
	often = !l.heavy && l.n < lossWindow && now.Sub(l.last) < lossWatch
	return often || l.heavy || l.n == lossWindow, often
}
