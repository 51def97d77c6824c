package register

import (
	"slices"
	"time"

	"weave.local/peer"
)

const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 2 * time.Second
)

// want is what this peer wants of the register, and how far its asking is.
type want struct {
	ops   []Op
	off   []peer.Name
	join  bool // be a member, with whatever else
	wait  time.Duration
	next  time.Time // zero: nothing is under way
	tries int
}

// Demand says all that this peer wants of the register at present: the
// operations, to be carried out in one request, and whether to be a member
// even without any. It replaces what was demanded before, and is asked of the
// keepers until it is carried out or no longer demanded; the caller sees in
// the next State which of it was, and demands the rest anew.
func (n *Node) Demand(now time.Time, join bool, ops []Op, off []peer.Name) Effects {
	if len(ops) > maxOps {
		ops = ops[:maxOps]
	}
	if len(off) > maxOff {
		off = off[:maxOff]
	}
	if n.want.join != join || !slices.Equal(n.want.ops, ops) || !slices.Equal(n.want.off, off) {
		n.want = want{ops: ops, off: off, join: join}
	}
	if n.want.next.IsZero() {
		n.wake(now)
	}
	return n.take()
}

// wake asks at once, after a change.
func (n *Node) wake(now time.Time) {
	n.want.wait, n.want.tries, n.want.next = 0, 0, time.Time{}
	n.pursue(now)
}

// answeredBy says whether s carried out the request that is under way, or made
// it void.
func (n *Node) answeredBy(s *State) bool {
	if n.state == nil {
		return false
	}
	before, was := n.state.Member(n.cfg.Self.Name)
	after, is := s.Member(n.cfg.Self.Name)
	return was != is || before != after
}

// own is the request that stands for what is wanted; false when nothing is.
func (n *Node) own() (Request, bool) {
	q := Request{From: n.cfg.Self, Ops: n.want.ops, Off: n.want.off}
	m, ok := n.state.Member(n.cfg.Self.Name)
	if !ok || !m.Is(n.cfg.Self) {
		return q, n.want.join || len(q.Ops) > 0
	}
	q.Epoch, q.Serial = m.Epoch, m.Serial+1
	return q, len(q.Ops) > 0
}

// pursue sends the request to a keeper: to the first reachable one, so that
// keepers seldom propose against each other, and to the others in turn when
// no answer comes.
func (n *Node) pursue(now time.Time) {
	if n.state == nil || now.Before(n.want.next) {
		return
	}
	q, ok := n.own()
	if !ok {
		n.want.next = time.Time{}
		return
	}
	if n.alone(&q) {
		if next := n.state.Apply([]Request{q}, nil, n.live(), nil); next != nil {
			next.force()
			n.chosen(now, next)
		}
		return
	}
	var up, down []peer.Name
	for _, k := range n.state.Keepers {
		if slices.Contains(n.live(), k) {
			up = append(up, k)
		} else {
			down = append(down, k)
		}
	}
	all := append(up, down...)
	n.want.wait = min(max(firstRetry, 2*n.want.wait), lastRetry)
	n.want.next = now.Add(n.want.wait)
	to := all[(n.want.tries/2)%len(all)]
	n.want.tries++
	if to == n.cfg.Self.Name {
		n.request(now, to, &q)
		return
	}
	n.send(now, to, Message{Kind: KindRequest, Request: &q})
}

// alone says whether every keeper is declared off: the sender's own word is
// then all there is.
func (n *Node) alone(q *Request) bool {
	for _, k := range n.state.Keepers {
		if k == n.cfg.Self.Name && n.state.Keeper(n.cfg.Self) || !slices.Contains(q.Off, k) {
			return false
		}
	}
	return q.Epoch != 0
}

// Tick is to be called at Next, and may be at any time.
func (n *Node) Tick(now time.Time) Effects {
	n.tick(now)
	return n.take()
}

func (n *Node) tick(now time.Time) {
	if n.founding && n.state == nil && n.cfg.Quorum == 0 && !now.Before(n.notNow) {
		n.notNow = now.Add(listen)
		for _, p := range n.peers {
			n.send(now, p, Message{Kind: KindStart})
		}
	}
	if r := n.round; r != nil && !now.Before(r.next) {
		r.resends++
		n.ask(now)
		n.advance(now)
	}
	if !n.want.next.IsZero() {
		n.pursue(now)
	}
	n.count(now)
	n.startRound(now)
}

// Next is when Tick has something to do; zero: not before the next event.
func (n *Node) Next() time.Time {
	var at time.Time
	soonest := func(t time.Time) {
		if !t.IsZero() && (at.IsZero() || t.Before(at)) {
			at = t
		}
	}
	if n.round != nil {
		soonest(n.round.next)
	} else if n.founding || len(n.queue) > 0 {
		soonest(n.notNow)
	} else if n.state != nil && n.state.Keeper(n.cfg.Self) && n.acc.state != nil {
		soonest(later(n.accepted.Add(finish), n.notNow))
	}
	soonest(n.want.next)
	soonest(n.nextLook())
	return at
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
