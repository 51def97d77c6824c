package ipam

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"weave.local/peer"
)

const (
	// offWait is how long RemovePeer waits for the links of a peer that was
	// just switched off to be found dead.
	offWait = 5 * time.Second
	// keeperWait is how long a change may take before missing keepers are
	// held to be the reason.
	keeperWait = 5 * time.Second
	// leaveWait bounds Leave, and tellWait the part of it in which the others
	// are told.
	leaveWait = 10 * time.Second
	tellWait  = 2 * time.Second
)

// RemovePeer takes over all addresses of a peer that is off for good, and
// returns how many those are: 0 when it has none or is not known. The caller
// vouches that the peer is off: its containers' addresses are handed out
// again.
func (a *Allocator) RemovePeer(ctx context.Context, name peer.Name) (uint64, error) {
	if name == a.self.Name {
		return 0, errors.New("this peer cannot remove itself; weave reset leaves the network")
	}
	if err := a.awaitOff(ctx, name); err != nil {
		return 0, err
	}
	a.mu.Lock()
	if a.state == nil {
		a.mu.Unlock()
		return 0, nil
	}
	if _, ok := a.state.Member(name); !ok {
		a.mu.Unlock()
		return 0, nil
	}
	had := a.state.Owned(name)
	a.removing[name] = true
	a.mu.Unlock()
	a.poke()
	nick := a.nick(name)
	var n uint64
	gone := func() (bool, error) {
		if _, ok := a.state.Member(name); !ok {
			n = 0 // what another peer was quicker to take over is not ours
			for _, r := range had.Ranges() {
				n += a.state.Owned(a.self.Name).SizeIn(r)
			}
			return true, nil
		}
		if !a.removing[name] {
			return false, fmt.Errorf("peer %s is connected again; it was not removed", nick)
		}
		return false, nil
	}
	for {
		short, cancel := context.WithTimeout(ctx, keeperWait)
		err := a.until(short, gone)
		cancel()
		if err == nil {
			return n, nil
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return 0, err
		}
		if missing := a.missingKeepers(); len(missing) > 0 {
			return 0, fmt.Errorf("peer %s is not removed yet: %s keep the register with it and cannot be reached; if they are off for good too, run weave rmpeer %[2]s",
				nick, strings.Join(missing, " "))
		}
	}
}

// awaitOff waits a little for a peer to be unreachable.
func (a *Allocator) awaitOff(ctx context.Context, name peer.Name) error {
	end := time.NewTimer(offWait)
	defer end.Stop()
	tick := time.NewTicker(poll / 5)
	defer tick.Stop()
	for slices.Contains(a.cfg.Reachable(), name) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end.C:
			return fmt.Errorf("peer %s is connected: its addresses are in use; run weave reset there, or switch it off first", a.nick(name))
		case <-tick.C:
		}
	}
	return nil
}

// missingKeepers are the keepers without which nothing is agreed on, as far as
// nobody said that they are off.
func (a *Allocator) missingKeepers() []string {
	up := a.cfg.Reachable()
	a.mu.Lock()
	keepers := a.state.Keepers
	removing := maps.Clone(a.removing)
	a.mu.Unlock()
	var missing []string
	have := 0
	for _, k := range keepers {
		switch {
		case k == a.self.Name || slices.Contains(up, k):
			have++
		case !removing[k]:
			missing = append(missing, a.nick(k))
		}
	}
	if 2*have > len(keepers) {
		return nil
	}
	return missing
}

// Leave hands this peer's addresses back and ends its membership, for good:
// afterwards nothing is handed out here. It is done when those who stay know,
// at once when there are none or none can be reached; an error says that the
// others have to remove this peer.
func (a *Allocator) Leave(ctx context.Context) error {
	up := a.cfg.Reachable()
	a.mu.Lock()
	a.leaving = true
	var stay []peer.Name
	if a.state != nil && a.member {
		for _, m := range a.state.Members {
			if slices.Contains(up, m.Name) {
				stay = append(stay, m.Name)
				a.tell[m.Name] = false
			}
		}
	}
	a.ownLocked()
	a.changedLocked()
	a.mu.Unlock()
	if len(stay) == 0 {
		return nil
	}
	a.poke()
	ctx, cancel := context.WithTimeout(ctx, leaveWait)
	defer cancel()
	if err := a.until(ctx, func() (bool, error) { return !a.member || len(a.state.Members) == 1, nil }); err != nil {
		return fmt.Errorf("addresses not handed back; run weave rmpeer %s on another host: %w", a.self.Name, err)
	}
	a.mu.Lock()
	last := a.member
	a.mu.Unlock()
	if last {
		return nil
	}
	a.poke()
	ctx, cancelTell := context.WithTimeout(ctx, tellWait)
	defer cancelTell()
	heard := 0
	err := a.until(ctx, func() (bool, error) {
		heard = 0
		for _, knows := range a.tell {
			if knows {
				heard++
			}
		}
		return heard == len(a.tell), nil
	})
	if err == nil || heard > 0 { // those who know tell the others
		return nil
	}
	return fmt.Errorf("this peer has left, but no other one has confirmed that it knows; if weave status ipam lists %s on another host, run weave rmpeer %[1]s there: %w",
		a.self.Name, err)
}
