package register

import (
	"cmp"
	"slices"
	"time"

	"weave.local/peer"
)

const (
	// resend is how long a round waits for answers before it asks again those
	// that have not given any; twice as long each time, up to resendMax.
	resend    = 150 * time.Millisecond
	resendMax = 2 * time.Second
	// setback is how long at most a proposer waits after its first lost round
	// before it tries again; as long more after each further one, up to eight.
	setback = 60 * time.Millisecond
	// listen is how long founding waits for reachable peers that say nothing.
	listen = time.Second
	// finish is how long an acceptor waits to learn what became of what it
	// accepted before it sees to that itself.
	finish = 2 * time.Second
	// patience is after how many resends the word of a person replaces the
	// missing keepers.
	patience = 2
)

// round is one attempt of this peer to have the next version agreed.
type round struct {
	ballot   Ballot
	began    time.Time
	value    *State             // set: second phase
	seen     Ballot             // highest accepted ballot among the promises
	seenVal  *State             // and what was accepted
	answered map[peer.Name]bool // in this phase, in whatever way
	yes      map[ID]bool        // promised, or accepted, in this phase
	frozen   map[Tenancy][]ID   // by whom, of those who promised
	forced   bool               // no majority promised; all keepers not off did
	resends  int
	next     time.Time // of the next resend
}

// startRound begins a round if there is something to agree on, this peer may
// propose, and none is under way.
func (n *Node) startRound(now time.Time) {
	if n.round != nil || now.Before(n.notNow) {
		return
	}
	if n.state == nil {
		if !n.founding || n.cfg.Quorum == 0 {
			return
		}
	} else if !n.state.Keeper(n.cfg.Self) || !n.unfinished(now) && n.state.Apply(n.requests(), n.due(now), n.live(), nil) == nil {
		n.notNow = time.Time{}
		return
	}
	// Above all that this peer promised, itself included: no ballot is ever
	// used for two values, since its promise is durable before it is sent.
	if n.acc.version == n.next() {
		n.top = max(n.top, n.acc.promised.N)
	}
	n.round = &round{
		ballot: Ballot{n.top + 1, n.cfg.Self.Name}, began: now,
		answered: map[peer.Name]bool{}, yes: map[ID]bool{}, frozen: map[Tenancy][]ID{},
	}
	n.ask(now)
}

// unfinished says whether this peer accepted a version and has waited long
// enough to learn what became of it: it may be agreed without anybody knowing.
func (n *Node) unfinished(now time.Time) bool {
	return n.acc.version == n.next() && n.acc.state != nil && now.Sub(n.accepted) >= finish
}

// requests are those in the queue, by sender.
func (n *Node) requests() []Request {
	out := make([]Request, 0, len(n.queue))
	for _, q := range n.queue {
		out = append(out, q)
	}
	slices.SortFunc(out, func(a, b Request) int { return cmp.Compare(a.From.Name, b.From.Name) })
	return out
}

func (n *Node) live() []peer.Name { return append(slices.Clone(n.peers), n.cfg.Self.Name) }

// acceptors are the peers a round asks.
func (n *Node) acceptors() []peer.Name {
	if n.state != nil {
		return n.state.Keepers
	}
	return n.live()
}

// ask sends the present phase's question to all who have not answered it.
func (n *Node) ask(now time.Time) {
	r := n.round
	r.next = now.Add(min(resend<<min(r.resends, 8), resendMax))
	m := Message{Kind: KindPrepare, Version: n.next(), Ballot: r.ballot}
	if r.value != nil {
		m.Kind, m.State = KindAccept, r.value
	}
	for _, to := range n.acceptors() {
		if to != n.cfg.Self.Name && !r.answered[to] {
			n.send(now, to, m)
		}
	}
	if !r.answered[n.cfg.Self.Name] { // last: its answer may end the phase
		n.send(now, n.cfg.Self.Name, m)
	}
}

// answer takes an answer to the round that is under way.
func (n *Node) answer(now time.Time, from peer.Name, m *Message) {
	r := n.round
	if r == nil || m.Version != n.next() || m.Ballot != r.ballot {
		return
	}
	switch m.Kind {
	case KindRefuse:
		if r.ballot.less(m.Accepted) {
			n.lose(now, m.Accepted.N)
		}
		return
	case KindBehind:
		if n.state != nil {
			n.send(now, from, Message{Kind: KindChosen, State: n.state})
		}
		return
	case KindAbstain:
		r.answered[from] = true
	case KindPromise:
		if r.value != nil {
			return
		}
		r.answered[from], r.yes[ID{from, m.Store}] = true, true
		for _, t := range m.Frozen {
			if !slices.Contains(r.frozen[t], ID{from, m.Store}) {
				r.frozen[t] = append(r.frozen[t], ID{from, m.Store})
			}
		}
		if m.State != nil && r.seen.less(m.Accepted) {
			r.seen, r.seenVal = m.Accepted, m.State
		}
	case KindAccepted:
		if r.value == nil {
			return
		}
		r.answered[from], r.yes[ID{from, m.Store}] = true, true
	default:
		return
	}
	n.advance(now)
}

// lose gives the round up: another ballot is ahead.
func (n *Node) lose(now time.Time, top uint64) {
	n.round = nil
	n.lost, n.top = n.lost+1, max(n.top, top)
	spread := time.Duration(min(n.lost, 8)) * setback
	n.notNow = now.Add(time.Duration(n.cfg.Rand.Int64N(int64(spread))) + 5*time.Millisecond)
}

// advance ends the phase when enough have agreed.
func (n *Node) advance(now time.Time) {
	r := n.round
	if r == nil || !n.enough(now) {
		return
	}
	if r.value != nil {
		n.chosen(now, r.value)
		return
	}
	value := r.seenVal
	if value == nil {
		value = n.propose()
	}
	if value == nil { // nothing left to do
		n.round, n.retake = nil, now.Add(retake)
		return
	}
	r.value = value
	r.answered, r.yes, r.resends = map[peer.Name]bool{}, map[ID]bool{}, 0
	n.ask(now)
}

// propose is the value of this peer's own choice.
func (n *Node) propose() *State {
	if n.state != nil {
		var sound []peer.Name
		for id := range n.round.yes {
			sound = append(sound, id.Name)
		}
		next := n.state.Apply(n.requests(), n.gone(), n.live(), sound)
		if next != nil && n.round.forced {
			next.force()
		}
		return next
	}
	var members []ID
	for id := range n.round.yes {
		members = append(members, id)
	}
	return Found(n.newCluster(), n.cfg.Range, members)
}

func (n *Node) newCluster() Cluster {
	var c Cluster
	for i := range c {
		c[i] = byte(n.cfg.Rand.Uint32())
	}
	c[6] = c[6]&0x0f | 0x40
	c[8] = c[8]&0x3f | 0x80
	return c
}

// enough says whether the phase has its majority.
func (n *Node) enough(now time.Time) bool {
	r := n.round
	if n.state == nil {
		if len(r.yes) < n.foundingQuorum() {
			return false
		}
		for _, p := range n.peers {
			if r.value == nil && !r.answered[p] && now.Sub(r.began) < listen {
				return false
			}
		}
		return true
	}
	agreed, missing, off := 0, 0, n.off()
	for _, k := range n.state.Keepers {
		m, _ := n.state.Member(k)
		switch {
		case slices.ContainsFunc(yesIDs(r), m.Is):
			agreed++
		case !slices.Contains(off, k):
			missing++
		}
	}
	if 2*agreed > len(n.state.Keepers) {
		return true
	}
	if len(off) > 0 && missing == 0 && r.resends >= patience {
		r.forced = true
		return true
	}
	return false
}

func yesIDs(r *round) []ID {
	out := make([]ID, 0, len(r.yes))
	for id := range r.yes {
		out = append(out, id)
	}
	return out
}

// off are the peers that those who ask for changes declare off for good.
func (n *Node) off() []peer.Name {
	var out []peer.Name
	for _, q := range n.queue {
		out = append(out, q.Off...)
	}
	return out
}

// known is how many peers take part in founding a cluster, as far as they are
// reachable now.
func (n *Node) known() int {
	names := map[peer.Name]bool{}
	for id := range n.met {
		if id == n.cfg.Self || slices.Contains(n.peers, id.Name) {
			names[id.Name] = true
		}
	}
	return len(names)
}

// foundingQuorum is how many must agree on the first version.
func (n *Node) foundingQuorum() int { return max(n.cfg.Quorum, n.known())/2 + 1 }

// request takes a member's request, as a keeper.
func (n *Node) request(now time.Time, from peer.Name, q *Request) {
	if n.state == nil || q.From.Name != from {
		return
	}
	m, _ := n.state.Member(from)
	ahead := q.Epoch != 0 && q.Serial > m.Serial+1 // it knows more than we do, and will tell
	if ahead || n.state.stale(q) || !n.state.Keeper(n.cfg.Self) {
		n.inform(now, from)
		return
	}
	n.queue[from] = *q
	n.startRound(now)
}
