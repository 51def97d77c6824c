package gossip

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"time"

	"github.com/hashicorp/memberlist"

	"weave.local/peer"
)

const (
	memberLabel   = "weave"
	suspicionMult = 6
	pushPullEvery = 5 * time.Minute // of whole member lists; who is missing is seen by the routes

	joinCheck   = 250 * time.Millisecond
	joinAgain   = 10 * time.Second
	joinTargets = 3
)

// openMembers starts memberlist.
func (g *Gossip) openMembers(ctx context.Context) (*memberlist.Memberlist, error) {
	cfg := memberlist.DefaultLANConfig()
	cfg.Name = g.self.String()
	cfg.Label = memberLabel
	cfg.Transport = g.wire
	cfg.BindPort, cfg.AdvertisePort = virtualPort, virtualPort
	cfg.EnableCompression = false // costs far more time and memory than it saves
	cfg.SuspicionMult = suspicionMult
	cfg.PushPullInterval = pushPullEvery
	cfg.RequireNodeNames = true
	cfg.DisableTcpPings = true // packets already travel over TCP
	cfg.LogOutput = logWriter{g}
	d := delegate{g}
	cfg.Delegate, cfg.Events, cfg.Ping = d, d, d
	g.wire.open(ctx)
	return memberlist.Create(cfg)
}

// keepJoined joins peers that can be reached but are not members, for ever:
// memberlist alone never finds back together after a longer partition.
func (g *Gossip) keepJoined(ctx context.Context, ml *memberlist.Memberlist) error {
	tick := time.NewTicker(joinCheck)
	defer tick.Stop()
	j := &joiner{}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		strangers, members := g.strangers()
		targets := j.step(time.Now(), strangers, members)
		for _, name := range targets {
			_, err := ml.Join([]string{joinAddr(name)})
			if err != nil {
				g.log.Debug("not joined", "peer", name, "err", err)
			}
			j.joined(err == nil, time.Now())
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
}

// strangers returns the peers that can be reached but are not members, and the
// members without ourselves.
func (g *Gossip) strangers() (strangers, members []peer.Name) {
	reachable := g.mesh.Topology().Reachable()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, name := range reachable {
		if !g.members[name] {
			strangers = append(strangers, name)
		}
	}
	for name := range g.members {
		if name != g.self {
			members = append(members, name)
		}
	}
	return strangers, members
}

// joiner decides whom to join when. It is pure.
type joiner struct {
	due   time.Time // zero: nobody to join
	extra time.Time // when to join some member once more, which completes the view of a large cluster
	done  bool      // extra was set
}

// step returns whom to join now.
func (j *joiner) step(now time.Time, strangers, members []peer.Name) []peer.Name {
	if !j.extra.IsZero() && now.After(j.extra) && len(members) > 0 {
		j.extra = time.Time{}
		return []peer.Name{members[rand.IntN(len(members))]}
	}
	switch {
	case len(strangers) == 0:
		j.due = time.Time{}
		return nil
	case j.due.IsZero() && len(members) > 0:
		// Whoever is new joins somebody, and the news of it is on its way.
		j.due = now.Add(time.Second + rand.N(2*time.Second))
		return nil
	case now.Before(j.due):
		return nil
	}
	j.due = now.Add(joinAgain*3/4 + rand.N(joinAgain/2))
	rand.Shuffle(len(strangers), func(a, b int) { strangers[a], strangers[b] = strangers[b], strangers[a] })
	return strangers[:min(joinTargets, len(strangers))]
}

// joined says how a join went.
func (j *joiner) joined(ok bool, now time.Time) {
	if !ok {
		return
	}
	j.due = now.Add(time.Second + rand.N(time.Second)) // for those still missing
	if !j.done {
		j.done = true
		j.extra = now.Add(5*time.Second + rand.N(5*time.Second))
	}
}

// delegate is what memberlist calls. Its methods must not call memberlist.
type delegate struct{ g *Gossip }

// NodeMeta says nothing of us: names are all that peers need.
func (d delegate) NodeMeta(int) []byte { return nil }

// NotifyMsg is for messages that we do not send.
func (d delegate) NotifyMsg([]byte) {}

// GetBroadcasts has nothing: we broadcast along trees instead.
func (d delegate) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState is our name and root.
func (d delegate) LocalState(bool) []byte {
	return binary.BigEndian.AppendUint64(peer.AppendName(nil, d.g.self), d.g.root())
}

// MergeRemoteState takes another peer's name and root.
func (d delegate) MergeRemoteState(b []byte, _ bool) {
	r := reader{b: b}
	name, root := r.peer(), r.uint64()
	if !r.bad && name != 0 && name != d.g.self {
		d.g.compare(name, root)
	}
}

// AckPayload is our root.
func (d delegate) AckPayload() []byte {
	return binary.BigEndian.AppendUint64(nil, d.g.root())
}

// NotifyPingComplete takes the root of who answered a ping.
func (d delegate) NotifyPingComplete(other *memberlist.Node, _ time.Duration, payload []byte) {
	r := reader{b: payload}
	root := r.uint64()
	if name, err := peer.ParseName(other.Name); err == nil && !r.bad {
		d.g.compare(name, root)
	}
}

// NotifyJoin notes that a peer is alive.
func (d delegate) NotifyJoin(n *memberlist.Node) { d.note(n, true) }

// NotifyLeave notes that a peer is not alive any more.
func (d delegate) NotifyLeave(n *memberlist.Node) { d.note(n, false) }

// NotifyUpdate is about meta data, which we do not use.
func (d delegate) NotifyUpdate(*memberlist.Node) {}

func (d delegate) note(n *memberlist.Node, alive bool) {
	name, err := peer.ParseName(n.Name)
	if err != nil {
		return
	}
	d.g.mu.Lock()
	if alive {
		d.g.members[name] = true
	} else {
		delete(d.g.members, name)
	}
	d.g.mu.Unlock()
	if name != d.g.self {
		d.g.log.Debug("member", "peer", name, "alive", alive)
	}
}
