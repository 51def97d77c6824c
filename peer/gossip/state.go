package gossip

import (
	"fmt"

	"weave.local/peer"
)

// State is a value that all peers share and change as a whole. Its methods are
// called from several goroutines and must not call the Gossip, but for
// Announce.
type State interface {
	// Digest tells two values apart; it is called often.
	Digest() uint64
	// Encode is the value in a form that Merge understands, at most 16 MiB;
	// empty when there is nothing to tell.
	Encode() []byte
	// Merge takes the value of another peer. It must not take long. An error
	// says that b makes no sense; it is counted and logged.
	Merge(from peer.Name, b []byte) error
}

const maxComplaints = 1000 // kinds of errors logged

type shared struct {
	State
	announce bool   // to be broadcast
	last     uint64 // digest of the value last broadcast, by whomever
	any      bool   // there was a broadcast
}

type complaint struct {
	from peer.Name
	text string
}

// Register adds a state of a name of 1 to 32 bytes. Call it before Run.
func (g *Gossip) Register(name string, s State) {
	checkName(name)
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.states) >= maxStates {
		panic(fmt.Sprintf("gossip: more than %d states", maxStates))
	}
	g.states[name] = &shared{State: s}
}

// Announce says that a state changed: it is broadcast soon, unless it is too
// large for that or was just received so. It does not block.
func (g *Gossip) Announce(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.states[name]; s != nil {
		s.announce = true
		signal(g.send)
	}
}

// digests asks all states. The lock must not be held: states have locks of
// their own, under which they call Announce.
func (g *Gossip) digests() map[string]uint64 {
	out := make(map[string]uint64)
	for name, s := range g.shared() {
		out[name] = s.Digest()
	}
	return out
}

func (g *Gossip) shared() map[string]State {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make(map[string]State, len(g.states))
	for name, s := range g.states {
		out[name] = s.State
	}
	return out
}

// merge hands a state of another peer on.
func (g *Gossip) merge(from peer.Name, name string, b []byte) {
	s := g.shared()[name]
	if s == nil || len(b) == 0 {
		return
	}
	err := s.Merge(from, append([]byte(nil), b...))
	if err == nil {
		return
	}
	g.count.mergeErrors.Add(1)
	g.complain(from, fmt.Sprintf("state %s: %v", name, err))
}

// complain logs what is wrong with what a peer sent, once.
func (g *Gossip) complain(from peer.Name, text string) {
	c := complaint{from, text}
	g.mu.Lock()
	_, known := g.complaints[c]
	full := len(g.complaints) >= maxComplaints
	if !full {
		g.complaints[c] = struct{}{}
	}
	g.mu.Unlock()
	if !known && !full {
		g.log.Warn("gossip ignored; repetitions are only counted", "from", from, "err", text)
	}
}

// receiveState takes a broadcast state.
func (g *Gossip) receiveState(from peer.Name, b []byte) error {
	p, err := parsePush(b)
	if err != nil {
		return err
	}
	g.mu.Lock()
	s := g.states[p.name]
	if s != nil {
		s.last, s.any = p.digest, true
	}
	g.mu.Unlock()
	if s != nil && s.Digest() != p.digest {
		g.merge(from, p.name, p.state)
	}
	return nil
}

// sendStates broadcasts what was announced.
func (g *Gossip) sendStates() {
	g.mu.Lock()
	due := make(map[string]State)
	for name, s := range g.states {
		if s.announce {
			s.announce = false
			due[name] = s.State
		}
	}
	g.mu.Unlock()
	for name, s := range due {
		p := push{name: name, digest: s.Digest(), state: s.Encode()}
		if len(p.state) == 0 || len(p.state) > stateLimit {
			continue
		}
		g.mu.Lock()
		sh := g.states[name]
		stale := sh.any && sh.last == p.digest
		sh.last, sh.any = p.digest, true
		g.mu.Unlock()
		if stale {
			continue
		}
		g.count.sent.Add(1)
		g.mesh.Broadcast(BroadcastKind, appendPush([]byte{wireVersion, castState}, p))
	}
}
