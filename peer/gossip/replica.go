package gossip

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"time"

	"weave.local/peer"
)

// Entry is one entry of a table.
type Entry struct {
	Origin peer.Name
	Key    string
	Value  []byte // must not be modified
}

// keepDeleted is how many deletions a replica remembers in any case; beyond it
// only as many as there are entries.
const keepDeleted = 256

// replica is what is known of one origin.
type replica struct {
	origin  peer.Name
	epoch   uint64
	seq     uint64
	floor   uint64 // deletions up to this number may be forgotten
	items   map[ident]item
	deleted int                // of items
	size    int                // of items, in bytes as they travel
	views   map[string][]Entry // entries by table, by key; made when asked for
	dead    time.Time          // since when it is dead; zero: it is not
}

func newReplica(origin peer.Name, epoch uint64) *replica {
	return &replica{origin: origin, epoch: epoch, items: make(map[ident]item), views: make(map[string][]Entry)}
}

// put takes over one change and says whether an entry differs now.
func (r *replica) put(c change) bool {
	old, known := r.items[c.ident]
	if known {
		r.size -= change{c.ident, old}.size()
	}
	if known && old.deleted {
		r.deleted--
	}
	if c.deleted {
		r.deleted++
	}
	r.size += c.size()
	r.items[c.ident] = c.item
	was := known && !old.deleted
	if was == !c.deleted && bytes.Equal(old.value, c.value) {
		return false
	}
	delete(r.views, c.table)
	return true
}

// compact forgets the older half of the deletions when there are many.
func (r *replica) compact() {
	if r.deleted <= keepDeleted || r.deleted <= len(r.items)-r.deleted {
		return
	}
	gone := make([]change, 0, r.deleted)
	for id, it := range r.items {
		if it.deleted {
			gone = append(gone, change{id, it})
		}
	}
	slices.SortFunc(gone, func(a, b change) int { return cmp.Compare(a.seq, b.seq) })
	for _, c := range gone[:len(gone)/2] {
		delete(r.items, c.ident)
		r.deleted--
		r.size -= c.size()
		r.floor = max(r.floor, c.seq)
	}
}

// view returns the entries of one table.
func (r *replica) view(table string) []Entry {
	v, ok := r.views[table]
	if ok {
		return v
	}
	for id, it := range r.items {
		if id.table == table && !it.deleted {
			v = append(v, Entry{Origin: r.origin, Key: id.key, Value: it.value})
		}
	}
	slices.SortFunc(v, func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
	r.views[table] = v
	return v
}

// since returns what a replica that stands at h lacks; false when that is
// nothing.
func (r *replica) since(h head) (set, bool) {
	if h.epoch > r.epoch || h.epoch == r.epoch && h.seq >= r.seq {
		return set{}, false
	}
	s := set{origin: r.origin, epoch: r.epoch, seq: r.seq}
	if h.epoch == r.epoch && h.seq >= r.floor {
		s.base = h.seq
	} else {
		s.complete = true
	}
	for id, it := range r.items {
		if it.seq > s.base && (!s.complete || !it.deleted) {
			s.items = append(s.items, change{id, it})
		}
	}
	return s, true
}

// differs returns the tables in which two replicas of one origin do not agree.
func differs(a, b *replica, changed tables) {
	one := func(a, b *replica) {
		for id, it := range a.items {
			other, ok := b.items[id]
			if !it.deleted && (!ok || other.deleted || !bytes.Equal(it.value, other.value)) {
				changed.add(id.table)
			}
		}
	}
	one(a, b)
	one(b, a)
}

// tables is a set of names of tables.
type tables map[string]struct{}

func (t tables) add(name string) { t[name] = struct{}{} }
