package ipam

import (
	"context"
	"slices"
	"time"

	"weave.local/ipam/message"
	"weave.local/ipam/register"
	"weave.local/peer"
)

const (
	inboxLen    = 512
	inboxOctets = 16 << 20
	// batch is how many messages are dealt with before what they changed is
	// written down, at once.
	batch = 128
	// poll is how often Run looks at who is reachable while somebody waits.
	poll = 500 * time.Millisecond
	// writeRetry is how long after a failed write the next attempt is made.
	writeRetry = time.Second
)

// event is what comes in: a message or a register met by gossip.
type event struct {
	from    peer.Name
	payload []byte
	state   *register.State
	octets  int64
}

// envelope is what goes out.
type envelope struct {
	to      peer.Name
	payload []byte
}

func (a *Allocator) enqueue(ev event) {
	if a.held.Add(ev.octets) > inboxOctets {
		a.held.Add(-ev.octets)
		return
	}
	select {
	case a.inbox <- ev:
	default:
		a.held.Add(-ev.octets)
	}
}

// Run deals with messages and with what callers wait for until ctx ends.
func (a *Allocator) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev := <-a.inbox:
			a.handle(ev)
			a.drain()
		case <-a.kick:
		case <-timer.C:
		}
		timer.Reset(time.Until(a.turn()))
	}
}

// drain takes what else has come, up to a batch.
func (a *Allocator) drain() {
	for range batch {
		select {
		case ev := <-a.inbox:
			a.handle(ev)
		default:
			return
		}
	}
}

// turn brings the register and the searches forward until nothing more can be
// done now, and says when to come back.
func (a *Allocator) turn() time.Time {
	now := time.Now()
	peers := a.cfg.Reachable()
	slices.Sort(peers)
	a.node.SetPeers(peers)
	a.collect(a.node.Tick(now))
	a.keepLease(now)
	again := now.Add(time.Hour)
	for pass := 0; ; pass++ {
		if !a.flush(now) {
			return a.retry
		}
		wanted := a.plan(now, peers)
		if !a.pending.Dirty && len(a.writes) == 0 && len(a.out) == 0 && a.lease.Until() == a.leaseEnd {
			if wanted {
				again = now.Add(poll)
			}
			break
		}
		if pass == 64 { // let others have the processor
			again = now.Add(10 * time.Millisecond)
			break
		}
	}
	if at := a.node.Next(); !at.IsZero() && at.Before(again) {
		again = at
	}
	if at := now.Add(a.nextLease()); at.Before(again) {
		again = at
	}
	for _, s := range a.searches {
		if !s.next.IsZero() && s.next.Before(again) {
			again = s.next
		}
	}
	return again
}

// collect keeps effects of the node until they are flushed.
func (a *Allocator) collect(e register.Effects) {
	a.pending.Dirty = a.pending.Dirty || e.Dirty
	a.pending.Learned = a.pending.Learned || e.Learned
	for _, env := range e.Send {
		a.post(env.To, env.Append([]byte{message.KindRegister}))
	}
	for _, name := range e.Told {
		a.mu.Lock()
		if _, ok := a.tell[name]; ok {
			a.tell[name] = true
		}
		a.changedLocked()
		a.mu.Unlock()
	}
	for _, f := range e.Foreign {
		a.foreign(f)
	}
	for _, n := range e.Answers {
		a.lease.Answered(n, a.node.State())
	}
}

// post puts a message among those that go out with the next flush.
func (a *Allocator) post(to peer.Name, payload []byte) {
	a.out = append(a.out, envelope{to, payload})
}

// flush makes durable what changed, lets it be seen, then sends. When the
// file cannot be written nothing is seen or sent: to the others that is a peer
// whose messages get lost.
func (a *Allocator) flush(now time.Time) bool {
	if now.Before(a.retry) {
		a.out = nil
		return false
	}
	if err := a.save(); err != nil {
		a.cfg.Log.Error("address allocator stands still: its state cannot be written", "err", err)
		a.mu.Lock()
		a.lastWord = "state cannot be written: " + err.Error()
		a.mu.Unlock()
		a.out, a.retry = nil, now.Add(writeRetry)
		return false
	}
	clear(a.writes)
	a.publish()
	if err := a.fence(); err != nil {
		a.cfg.Log.Error("address allocator stands still: the end of its lease cannot be told to the data path", "err", err)
		a.out, a.retry = nil, now.Add(writeRetry)
		return false
	}
	for _, env := range a.out {
		if err := a.cfg.Send(env.to, env.payload); err != nil {
			a.cfg.Log.Debug("message of the address allocator not sent", "peer", env.to, "err", err)
		}
	}
	a.out = nil
	return true
}

// publish lets callers see what has become durable.
func (a *Allocator) publish() {
	learned := a.pending.Learned
	a.pending = register.Effects{}
	working, quorum, known := a.node.Founding()
	a.mu.Lock()
	a.lastWord = ""
	a.founding = founding{working, quorum, known}
	if learned {
		before := a.state
		a.applyLocked(a.node.State())
		if before == nil || before.Cluster != a.state.Cluster {
			a.cfg.Log.Info("address space: in a cluster", "cluster", a.state.Cluster, "version", a.state.Version)
		}
	}
	a.mu.Unlock()
	if learned && a.cfg.Changed != nil {
		a.cfg.Changed()
	}
}

// handle takes one event.
func (a *Allocator) handle(ev event) {
	a.held.Add(-ev.octets)
	now := time.Now()
	if ev.state != nil {
		a.collect(a.node.Merge(now, ev.from, ev.state))
		return
	}
	if len(ev.payload) < 2 {
		return
	}
	var err error
	switch body := ev.payload[1:]; ev.payload[0] {
	case message.KindRegister:
		var m *register.Message
		if m, err = register.ParseMessage(body); err == nil {
			a.collect(a.node.Receive(now, ev.from, m))
		}
	case message.KindAsk:
		var q message.Ask
		if q, err = message.ParseAsk(body); err == nil {
			a.serve(now, ev.from, q)
		}
	case message.KindAnswer:
		var n message.Answer
		if n, err = message.ParseAnswer(body); err == nil {
			a.answered(now, ev.from, n)
		}
	case message.KindMeet:
		var m message.Meeting
		if m, err = message.ParseMeeting(body); err == nil {
			a.meet(now, ev.from, m)
		}
	}
	if err != nil {
		a.cfg.Log.Debug("message of the address allocator makes no sense", "peer", ev.from, "err", err)
	}
}
