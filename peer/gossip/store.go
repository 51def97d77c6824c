package gossip

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"slices"
	"time"

	"weave.local/peer"
)

const (
	maxPending = 8192             // own changes waiting to be broadcast
	keepDead   = 60 * time.Second // what a dead origin owned
)

// verdict is what became of a set.
type verdict int

const (
	known    verdict = iota // nothing new
	applied                 // taken over
	behind                  // it builds on what is not known here: pull from the origin
	outdated                // we know a later epoch: the origin's clock went back, and it should learn so
)

// store holds the tables. It is pure: no I/O, no clock, no lock. Methods that
// change entries note the names of their tables in changed.
type store struct {
	self     peer.Name
	replicas map[peer.Name]*replica // holds self
	reach    map[peer.Name]bool     // reachable peers
	changed  tables
	anew     bool // a new epoch of ours has to be told in full

	pending []uint64         // numbers of own changes not broadcast yet, ascending
	what    map[uint64]ident // which entries they are of
	sent    uint64           // own changes up to this one are broadcast, or given up
}

func newStore(self peer.Name, epoch uint64) *store {
	return &store{
		self:     self,
		replicas: map[peer.Name]*replica{self: newReplica(self, epoch)},
		reach:    make(map[peer.Name]bool),
		changed:  make(tables),
		what:     make(map[uint64]ident),
	}
}

func (s *store) own() *replica { return s.replicas[s.self] }

// set changes an own entry; nothing happens when it is like that already.
func (s *store) set(id ident, value []byte, deleted bool) error {
	own := s.own()
	old, ok := own.items[id]
	was := ok && !old.deleted
	switch {
	case deleted && !was, was && !deleted && string(old.value) == string(value):
		return nil
	case len(id.key) > MaxKey || len(value) > MaxValue:
		return fmt.Errorf("entry with a key of %d and a value of %d bytes: at most %d and %d fit", len(id.key), len(value), MaxKey, MaxValue)
	case !deleted && (!ok && len(own.items) >= maxItems || own.size >= maxOwned):
		return fmt.Errorf("no room for a further entry: there are %d of %d bytes", len(own.items), own.size)
	}
	own.seq++
	c := change{id, item{seq: own.seq, deleted: deleted}}
	if !deleted {
		c.value = append([]byte{}, value...)
	}
	if own.put(c) {
		s.changed.add(id.table)
	}
	own.compact()
	s.pending = append(s.pending, own.seq)
	s.what[own.seq] = id
	if len(s.pending) > maxPending {
		s.giveUp()
	}
	return nil
}

// giveUp leaves the telling of all changes so far to pulls.
func (s *store) giveUp() {
	s.sent = s.own().seq
	s.pending = nil
	clear(s.what)
}

// load makes entries the only own ones of a table.
func (s *store) load(table string, entries map[string][]byte) error {
	var firstErr error
	for id := range s.own().items {
		if id.table != table {
			continue
		}
		if _, ok := entries[id.key]; !ok {
			firstErr = cmp.Or(firstErr, s.set(id, nil, true))
		}
	}
	for key, value := range entries {
		firstErr = cmp.Or(firstErr, s.set(ident{table, key}, value, false))
	}
	return firstErr
}

// delta returns the next own changes to broadcast, as many as fit.
func (s *store) delta() (set, bool) {
	own := s.own()
	if s.sent == own.seq {
		return set{}, false
	}
	d := set{origin: s.self, epoch: own.epoch, base: s.sent, seq: own.seq}
	n, size := 0, setFixed
	for _, seq := range s.pending {
		id := s.what[seq]
		it, ok := own.items[id]
		if c := (change{id, it}); ok && it.seq == seq { // else a later change tells
			if size += c.size(); size > setLimit {
				d.seq = s.pending[n-1]
				break
			}
			d.items = append(d.items, c)
		}
		delete(s.what, seq)
		n++
	}
	s.pending = s.pending[n:]
	s.sent = d.seq
	return d, true
}

// everything returns all own entries to broadcast or, when these are too many,
// only how far we are. Nothing is left to broadcast then.
func (s *store) everything() set {
	own := s.own()
	all := set{origin: s.self, epoch: own.epoch, seq: own.seq, complete: true}
	size := setFixed
	for id, it := range own.items {
		if it.deleted {
			continue
		}
		c := change{id, it}
		if size += c.size(); size > setLimit {
			all = set{origin: s.self, epoch: own.epoch, base: own.seq, seq: own.seq}
			break
		}
		all.items = append(all.items, c)
	}
	s.giveUp()
	s.anew = false
	return all
}

// apply takes over a whole set.
func (s *store) apply(x set) verdict {
	if x.origin == s.self {
		s.overtake(head{x.epoch, x.seq})
		return known
	}
	r := s.replicas[x.origin]
	switch {
	case r == nil && len(s.replicas) >= maxOrigins:
		return known
	case r != nil && x.epoch < r.epoch:
		return outdated
	case r != nil && x.epoch == r.epoch && x.seq <= r.seq:
		return known
	case x.complete:
		s.replace(x, r)
		return applied
	case r == nil || x.epoch > r.epoch || x.base > r.seq:
		return behind
	case len(r.items)+len(x.items) > 2*maxItems || r.size > 2*maxOwned:
		return known // more than an origin may have; it stays out of date
	}
	for _, c := range x.items {
		if c.seq > r.seq && r.put(c) {
			s.changed.add(c.table)
		}
	}
	r.seq = x.seq
	r.compact()
	return applied
}

// replace makes a complete set all that is known of its origin.
func (s *store) replace(x set, old *replica) {
	r := newReplica(x.origin, x.epoch)
	r.seq, r.floor = x.seq, x.seq
	for _, c := range x.items {
		r.put(c)
	}
	if old == nil {
		old = newReplica(x.origin, x.epoch)
	}
	r.dead = old.dead
	differs(old, r, s.changed)
	s.replicas[x.origin] = r
}

// overtake begins a new epoch when others know more of us than we do: they
// remember an earlier run under a faster clock.
func (s *store) overtake(h head) {
	own := s.own()
	if h.epoch > own.epoch || h.epoch == own.epoch && h.seq > own.seq {
		own.epoch = min(h.epoch+1, maxEpoch)
		s.anew = true
	}
}

// heads says how far each origin is known.
func (s *store) heads() map[peer.Name]head {
	out := make(map[peer.Name]head, len(s.replicas))
	for name, r := range s.replicas {
		out[name] = head{r.epoch, r.seq}
	}
	return out
}

// lacking returns what someone lacks who knows origins up to heads, and whether
// he knows something that we do not. Origins that cannot be reached are left
// out: others forget them at other times.
func (s *store) lacking(heads map[peer.Name]head) (sets []set, ahead bool) {
	if h, ok := heads[s.self]; ok {
		s.overtake(h)
	}
	for name, r := range s.replicas {
		if name != s.self && !s.reach[name] {
			continue
		}
		if x, ok := r.since(heads[name]); ok {
			sets = append(sets, x)
		}
	}
	for name, h := range heads {
		r := s.replicas[name]
		if r == nil {
			ahead = ahead || s.reach[name]
		} else if h.epoch > r.epoch || h.epoch == r.epoch && h.seq > r.seq {
			ahead = true
		}
	}
	return sets, ahead
}

// root tells two stores apart by how far they know the reachable origins.
func (s *store) root() uint64 {
	var x uint64
	for name, r := range s.replicas {
		if name == s.self || s.reach[name] {
			x ^= mix(uint64(name), r.epoch, r.seq)
		}
	}
	return x
}

// mix spreads some numbers over 64 bits; it is part of the protocol (the
// finalizer of SplitMix64, applied to each number in turn).
func mix(numbers ...uint64) uint64 {
	h := uint64(0x9e3779b97f4a7c15)
	for _, v := range numbers {
		h ^= v
		h ^= h >> 30
		h *= 0xbf58476d1ce4e5b9
		h ^= h >> 27
		h *= 0x94d049bb133111eb
		h ^= h >> 31
	}
	return h
}

// mixState is the part of a state in the root.
func mixState(name string, digest uint64) uint64 {
	f := fnv.New64a()
	_, _ = f.Write([]byte(name)) // never an error
	return mix(f.Sum64(), digest)
}

// expire forgets origins that have been dead for long.
func (s *store) expire(now time.Time, alive func(peer.Name) bool) {
	for name, r := range s.replicas {
		switch {
		case name == s.self || alive(name):
			r.dead = time.Time{}
		case r.dead.IsZero():
			r.dead = now
		case now.Sub(r.dead) > keepDead:
			for id, it := range r.items {
				if !it.deleted {
					s.changed.add(id.table)
				}
			}
			delete(s.replicas, name)
		}
	}
}

// all returns the entries of a table, by origin and key.
func (s *store) all(table string) []Entry {
	views := make([][]Entry, 0, len(s.replicas))
	for _, r := range s.replicas {
		if v := r.view(table); len(v) > 0 {
			views = append(views, v)
		}
	}
	slices.SortFunc(views, func(a, b []Entry) int { return cmp.Compare(a[0].Origin, b[0].Origin) })
	return slices.Concat(views...)
}
