package link

import (
	"time"

	"weave.local/peer"
)

const (
	jumpEvery = time.Second      // least time between two answers to records that bear our name
	jumpMost  = 30 * time.Second // while they come again and again
	twinTimes = 3                // answers after which these are no remains of an earlier run
	keepTwin  = 2 * time.Minute  // without a further one
)

// twin is another live peer with our name, from which we have no link: a host
// cloned with its state, say. Each of both supersedes the record of the other;
// so that this disturbs nobody else, they do it less and less often.
type twin struct {
	info     peer.Info
	answered int // its records, in a row
	last     time.Time
}

// wait is for how long our next answer has to follow what we said before.
func (w *twin) wait() time.Duration {
	wait := jumpEvery
	for i := 0; i < w.answered && wait < jumpMost; i++ {
		wait *= 2
	}
	return min(wait, jumpMost)
}

// met notes a record of it that supersedes ours.
func (w *twin) met(info peer.Info, now time.Time) {
	if !w.last.IsZero() && now.Sub(w.last) > keepTwin {
		w.answered = 0
	}
	if info.NickName == "" && info.UID == w.info.UID {
		info = w.info // a delta does not tell all
	}
	w.info, w.last = info, now
}

// alive says that what bears our name is no remains of an earlier run.
func (w *twin) alive(now time.Time) bool {
	return w.answered >= twinTimes && now.Sub(w.last) <= keepTwin
}

// rows describes it, if it is there.
func (w *twin) rows(now time.Time) []Connection {
	if !w.alive(now) {
		return nil
	}
	return []Connection{{
		Addr: w.info.Name.String(), State: Failed, Peer: w.info,
		Err: "this live peer has the same name as we: start one of them with another --name",
	}}
}
