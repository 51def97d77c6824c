package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"weave.local/ipam/message"
	"weave.local/ipam/register"
	"weave.local/ipam/space"
	"weave.local/peer"
)

const (
	// askAgain is how long an asked peer has for its answer before it is asked
	// again; each further time twice as long, askTimes in all.
	askAgain = 300 * time.Millisecond
	askTimes = 3
	// givenWait is how long a promised block may take to come.
	givenWait = time.Second
	// laterWait is how long to wait with a peer that could not say yet.
	laterWait = 50 * time.Millisecond
	// roundWait is how long to wait when every reachable owner was asked and
	// others could not be.
	roundWait = time.Second
	// claimWait is how long a claim waits for an unreachable owner.
	claimWait = 5 * time.Second
)

// search is the quest for addresses that other peers own: for any of a subnet
// or for one address.
type search struct {
	since         time.Time
	term, version uint64               // what denied refers to
	denied        map[peer.Name]uint64 // with how many of them are in use there
	silent        map[peer.Name]bool
	asked         peer.Name
	id            uint64
	tries         int
	next          time.Time // nothing to do before
}

// plan works out what this peer wants of the register and of other peers now,
// and says whether anything is wanted.
func (a *Allocator) plan(now time.Time, peers []peer.Name) bool {
	a.mu.Lock()
	a.reach = peers
	st, member, leaving := a.state, a.member, a.leaving
	needs := a.needsLocked()
	ops, off := a.dutiesLocked(st, peers)
	found := st == nil && (a.primed || len(needs) > 0) && !leaving
	a.mu.Unlock()

	if found {
		a.collect(a.node.Found(now))
	}
	wanted := found || len(needs) > 0 || len(ops) > 0
	if st == nil {
		return wanted
	}
	if leaving && !member {
		wanted = a.tellAll(now) || wanted
	}
	if op, ok := a.lease.Demand(a.cfg.Uptime(), st); ok && !leaving {
		ops = append([]register.Op{op}, ops...)
	}
	pool := st.Pool()
	for key := range a.searches {
		if !slices.Contains(needs, key) {
			delete(a.searches, key)
		}
	}
	for _, key := range needs {
		op, ok := fromPool(pool, key, uint64(len(peers)+1))
		if !ok && member {
			a.pursue(now, key, st, peers)
			continue
		}
		delete(a.searches, key) // there is nobody to ask, or nothing to ask for
		if ok {
			ops = append(ops, op)
		}
	}
	a.collect(a.node.Demand(now, !leaving, ops, off))
	return wanted || !member && !leaving
}

// fromPool is what to ask the register for; false when the pool has nothing.
func fromPool(pool *space.Set, key netip.Prefix, peers uint64) (register.Op, bool) {
	if key.IsSingleIP() {
		return register.Op{Kind: register.OpBlock, Range: space.Single(key.Addr())}, pool.Has(key.Addr())
	}
	hosts, _ := space.Hosts(key)
	return register.Op{Kind: register.OpGrant, Subnet: key, Peers: peers}, len(pool.In(hosts)) > 0
}

// needsLocked are the subnets, and the single addresses, of which this peer
// owns nothing free though somebody waits for it; with the addresses that are
// in use here but not granted to us, which it wants back.
func (a *Allocator) needsLocked() []netip.Prefix {
	if a.leaving {
		return nil
	}
	set := map[netip.Prefix]bool{}
	for w := range a.waiters {
		if w.err != nil {
			continue
		}
		if w.want.IsSingleIP() {
			set[w.want] = !a.space.Owns(w.want.Addr())
		} else if _, ok := a.space.Lowest(w.want); !ok {
			set[w.want] = true
		}
	}
	for addr := range a.records {
		if a.cfg.Range.Contains(addr) && !a.space.Owns(addr) {
			set[netip.PrefixFrom(addr, addr.BitLen())] = true
		}
	}
	var out []netip.Prefix
	for key, need := range set {
		if need {
			out = append(out, key)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// dutiesLocked are the operations that do not depend on what callers wait
// for, and the peers that are off for good.
func (a *Allocator) dutiesLocked(st *register.State, peers []peer.Name) (ops []register.Op, off []peer.Name) {
	if st == nil {
		return nil, nil
	}
	for name := range a.removing {
		if _, ok := st.Member(name); !ok || slices.Contains(peers, name) {
			delete(a.removing, name)
			a.changedLocked()
			continue
		}
		off = append(off, name)
	}
	slices.Sort(off)
	if a.leaving {
		if a.member && len(st.Members) > 1 {
			ops = []register.Op{{Kind: register.OpLeave}}
		}
		return ops, off
	}
	for _, r := range sortedGiving(a.giving) {
		ops = append(ops, register.Op{Kind: register.OpRelease, Range: r, To: a.giving[r]})
	}
	for _, name := range off {
		ops = append(ops, register.Op{Kind: register.OpRemove, To: name})
	}
	return ops, off
}

// pursue asks, one after the other, the owners of what is sought.
func (a *Allocator) pursue(now time.Time, key netip.Prefix, st *register.State, peers []peer.Name) {
	s := a.searches[key]
	if s == nil {
		s = &search{since: now}
		a.searches[key] = s
	}
	if s.denied == nil || s.term != st.Term || s.version != st.Version {
		s.term, s.version = st.Term, st.Version
		s.denied, s.silent = map[peer.Name]uint64{}, map[peer.Name]bool{}
	}
	if now.Before(s.next) {
		return
	}
	s.next = time.Time{}
	if s.asked != 0 {
		if s.tries < askTimes && slices.Contains(peers, s.asked) {
			a.ask(now, key, s)
			return
		}
		s.silent[s.asked] = true
		s.asked = 0
	}
	var reachable, lost []peer.Name
	for _, owner := range st.Owners(key) {
		_, denied := s.denied[owner]
		switch {
		case owner == a.self.Name || denied:
		case s.silent[owner] || !slices.Contains(peers, owner):
			lost = append(lost, owner)
		default:
			reachable = append(reachable, owner)
		}
	}
	switch {
	case len(reachable) > 0:
		s.asked, s.tries = reachable[a.rand.IntN(len(reachable))], 0
		a.lastID++
		s.id = a.lastID
		a.ask(now, key, s)
	case a.inTransit(key):
		s.next = now.Add(laterWait)
	default:
		a.giveUp(now, key, s, st, lost)
	}
}

// inTransit says whether this peer is itself giving some of it away.
func (a *Allocator) inTransit(key netip.Prefix) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for r := range a.giving {
		if _, ok := r.Intersect(space.FromPrefix(key)); ok {
			return true
		}
	}
	return false
}

// ask sends the question, once more.
func (a *Allocator) ask(now time.Time, key netip.Prefix, s *search) {
	s.next = now.Add(askAgain << s.tries)
	s.tries++
	q := message.Ask{Cluster: a.node.State().Cluster, ID: s.id, Term: s.term, Version: s.version, Want: key}
	a.post(s.asked, q.Append())
}

// giveUp ends a search in which nobody is left to ask: for good when every
// owner has said no, else until some that are lost may have come back.
func (a *Allocator) giveUp(now time.Time, key netip.Prefix, s *search, st *register.State, lost []peer.Name) {
	switch {
	case len(lost) == 0 && key.IsSingleIP():
		s.next = now.Add(laterWait) // the owner changes just now
	case len(lost) == 0:
		a.fail(key, fmt.Errorf("%w in %s: %s", ErrExhausted, key, a.shares(st, key, s)))
	case key.IsSingleIP() && now.Sub(s.since) > claimWait:
		a.lose(key.Addr(), lost[0])
		a.fail(key, fmt.Errorf("%s belongs to %s, which is not reachable; if it is off for good, run weave rmpeer %[2]s", key.Addr(), a.nick(lost[0])))
		s.next = now.Add(roundWait)
	default:
		clear(s.silent)
		s.next = now.Add(roundWait)
	}
}

// shares says in words who uses how many addresses of a subnet.
func (a *Allocator) shares(st *register.State, key netip.Prefix, s *search) string {
	hosts, _ := space.Hosts(key)
	var parts []string
	used := uint64(0)
	for _, name := range st.Owners(key) {
		n := s.denied[name]
		if name == a.self.Name {
			n = a.usedIn(key)
		}
		used += n
		parts = append(parts, fmt.Sprintf("%s %d", a.nick(name), n))
	}
	text := fmt.Sprintf("%d of %d in use (%s)", used, hosts.Size(), strings.Join(parts, ", "))
	if in, _ := hosts.Intersect(space.FromPrefix(a.cfg.Range)); in.Size() < hosts.Size() {
		text += fmt.Sprintf("; the rest is outside the range %s", a.cfg.Range)
	}
	return text
}

// usedIn is how many addresses of a subnet are in use here.
func (a *Allocator) usedIn(subnet netip.Prefix) (n uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for addr := range a.records {
		if subnet.Contains(addr) && a.space.Owns(addr) {
			n++
		}
	}
	return n
}

// fail ends every call that waits for key.
func (a *Allocator) fail(key netip.Prefix, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for w := range a.waiters {
		if w.want == key && w.err == nil {
			w.err = err
		}
	}
	a.changedLocked()
	delete(a.searches, key)
}

// tellAll tells those who stay that this peer has left, and says whether any
// is left that may not know.
func (a *Allocator) tellAll(now time.Time) bool {
	a.mu.Lock()
	var to []peer.Name
	for name, knows := range a.tell {
		if !knows {
			to = append(to, name)
		}
	}
	a.mu.Unlock()
	if len(to) > 0 && !now.Before(a.tellNext) {
		a.tellNext = now.Add(poll / 2)
		a.collect(a.node.Tell(now, to))
	}
	return len(to) > 0
}
