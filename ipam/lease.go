package ipam

import (
	"fmt"
	"net/netip"
	"time"

	"weave.local/ipam/register"
	"weave.local/peer"
)

const (
	// leaseKept is the part of a lease by which the record of it may lag behind.
	leaseKept = 20
	// lossesShown is how many lost addresses are remembered for people.
	lossesShown = 16
)

// loadLease takes over the lease of an earlier run in the same boot. Of one that
// is not known nothing is left.
func (a *Allocator) loadLease(b []byte, st *register.State) {
	a.lease = register.Lease{Self: a.self, Want: a.cfg.Lease}
	a.lease.Load(b, a.cfg.Boot, st)
	a.leaseEnd, a.leaseKept = a.lease.Until(), a.lease.Until()
}

// keepLease sends a renewal when one is due.
func (a *Allocator) keepLease(now time.Time) {
	s := a.node.State()
	if r, ok := a.lease.Renew(a.cfg.Uptime(), a.rand.Uint64(), s); ok {
		a.collect(a.node.Renew(now, r))
	}
}

// nextLease is how long it is until keepLease has something to do.
func (a *Allocator) nextLease() time.Duration {
	if a.lease.Length(a.node.State()) == 0 {
		return time.Hour
	}
	return max(0, a.lease.Next()-a.cfg.Uptime())
}

// saveLease notes the lease for a later run in this boot. It may lag behind a
// lease that was made longer, never behind one that was made shorter.
func (a *Allocator) saveLease() {
	until := a.lease.Until()
	if until == a.leaseKept || until > a.leaseKept && a.leaseKept != 0 && until-a.leaseKept < a.cfg.Lease/leaseKept {
		return
	}
	a.leaseKept = until
	a.writes[keyLease] = a.lease.Append(nil, a.cfg.Boot)
}

// fence has the containers here cut off from when the lease is over, or at once
// as long as one of them has an address that is not ours: without a register,
// as after its loss, none is.
func (a *Allocator) fence() error {
	a.mu.Lock()
	was := a.leaseEnd
	a.leaseEnd = a.lease.Until()
	if up := a.cfg.Uptime(); was != 0 && up >= was && (a.leaseEnd == 0 || up < a.leaseEnd) {
		a.changedLocked()
	}
	s, stray := a.state, a.disputed
	a.mu.Unlock()
	if a.cfg.Fence == nil || s == nil && (!stray || a.cfg.Lease == 0) {
		return nil // without a register what the kernel was told last holds
	}
	until := a.lease.Fence(s, stray)
	if a.fenced == until {
		return nil
	}
	if err := a.cfg.Fence(until); err != nil {
		return err
	}
	a.fenced = until
	return nil
}

// FenceNow calls Config.Fence with what is known from an earlier run. It is for
// before Run, when containers are attached already.
func (a *Allocator) FenceNow() error { return a.fence() }

// overLocked says whether the lease is over.
func (a *Allocator) overLocked() bool { return a.leaseEnd != 0 && a.cfg.Uptime() >= a.leaseEnd }

// disputeLocked looks for addresses in use here that are not ours.
func (a *Allocator) disputeLocked() {
	a.disputed = false
	if a.leaving {
		return
	}
	for addr := range a.records {
		a.disputed = a.disputed || a.cfg.Range.Contains(addr) && !a.space.Owns(addr)
	}
}

// Adopt notes that owner uses addr already, whatever the register says. An
// address that is not this peer's is asked for; see Config.Lost for when it is
// another's.
func (a *Allocator) Adopt(owner string, addr netip.Prefix) error {
	ip := addr.Addr()
	for {
		a.mu.Lock()
		r := a.records[ip]
		switch {
		case r == nil:
			return a.takeAndUnlock(owner, addr)
		case r.owner == Unknown && !r.busy:
			delete(a.records, ip) // its owner is back
			return a.takeAndUnlock(owner, addr)
		case r.owner != owner:
			a.mu.Unlock()
			return fmt.Errorf("%s is %w by %s on this host", ip, ErrHeld, InWords(r.owner))
		case !r.busy:
			a.mu.Unlock()
			return nil
		}
		changed := a.changed
		a.mu.Unlock()
		<-changed // a write under way ends soon
	}
}

// lose gives an address up that is in use here and another peer's.
func (a *Allocator) lose(addr netip.Addr, to peer.Name) {
	a.mu.Lock()
	r := a.records[addr]
	if r == nil || r.lost || a.leaseEnd == 0 || a.cfg.Lost == nil {
		a.mu.Unlock()
		return
	}
	r.lost = true
	owner, prefix := r.owner, r.prefix
	text := fmt.Sprintf("%s of %s went to %s while this host was cut off, and was taken from it; restart or attach it for another address",
		addr, InWords(owner), a.nick(to))
	a.losses = append(a.losses, text)
	if len(a.losses) > lossesShown {
		a.losses = a.losses[1:]
	}
	a.mu.Unlock()
	a.cfg.Log.Warn("address lost", "addr", addr, "owner", owner, "to", to, "text", text)
	a.cfg.Lost(owner, prefix)
}

// Granted is a snapshot of whose addresses are whose, as a function that says
// whether a peer may have an address: not when the register grants it to
// another.
func (a *Allocator) Granted() func(peer.Name, netip.Addr) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state.Allows
}
