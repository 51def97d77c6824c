package peer

import (
	"slices"
	"time"
)

// Merged says what a record did to a Topology.
type Merged int

// The outcomes of Topology.Merge.
const (
	Unchanged Merged = iota // known already
	Newer                   // taken over; hand it on
	Older                   // we hold a newer one, which the sender should get
	// Overtaken: the record bears our own name and is not older than our
	// own: that of an earlier run under a faster clock, or of somebody
	// else with our name. SetLocal makes a record that supersedes it.
	Overtaken
	Gap // of a delta: what it builds on is not known; get the whole record
)

// Topology is the link-state database of one peer. It is not safe for use by
// several goroutines.
type Topology struct {
	self    Name
	records map[Name]*entry // holds self
	snap    *graph          // nil when a record changed since it was made
	last    *graph          // the one before; nil when peers came or went since
}

type entry struct {
	Record
	reached time.Time // last time Expire found a route to it
}

// NewTopology is a database that knows only self. Seq is the sequence number
// of its first record: the Unix time in nanoseconds.
func NewTopology(self Info, seq uint64) *Topology {
	return &Topology{
		self:    self.Name,
		records: map[Name]*entry{self.Name: {Record: Record{Info: self, Seq: seq}}},
	}
}

// SetLocal replaces our own record by one with the next sequence number and
// returns it. Neighbours may come in any order; it takes them over.
func (t *Topology) SetLocal(self Info, neighbours []Adjacency) Record {
	slices.SortFunc(neighbours, func(a, b Adjacency) int { return int(a.Name) - int(b.Name) })
	own := t.records[t.self]
	own.Record = Record{Info: self, Seq: own.Seq + 1, Neighbours: neighbours}
	t.snap = nil
	return own.Record
}

// Merge takes a record of another peer over if it is newer than what is known.
func (t *Topology) Merge(r Record) Merged {
	old := t.records[r.Name]
	switch {
	case old == nil && len(t.records) >= int(MaxShortID):
		return Unchanged // nobody more could have a short id
	case old == nil:
		t.records[r.Name] = &entry{Record: r}
		t.last = nil
	default:
		if m := t.against(old, r.UID, r.Seq); m != Newer {
			return m
		}
		old.Record = r
	}
	t.snap = nil
	return Newer
}

// against says what news of a peer are beside what is known of it.
func (t *Topology) against(old *entry, uid UID, seq uint64) Merged {
	switch {
	case seq == old.Seq && uid == old.UID:
		return Unchanged
	case seq < old.Seq, seq == old.Seq && uid < old.UID:
		return Older
	case old.Name == t.self:
		old.Seq = seq
		return Overtaken
	}
	return Newer
}

// MergeDelta takes over what changed in the record of another peer.
func (t *Topology) MergeDelta(d Delta) Merged {
	old := t.records[d.Name]
	if old == nil {
		return Gap
	}
	if m := t.against(old, d.UID, d.Seq); m != Newer {
		return m
	}
	if d.UID != old.UID || d.Base != old.Seq {
		return Gap
	}
	next := d.apply(old.Neighbours)
	if len(next) > int(MaxShortID) {
		return Unchanged // no record may have so many
	}
	old.Seq, old.Neighbours = d.Seq, next
	t.snap = nil
	return Newer
}

// Record returns what is known of a peer.
func (t *Topology) Record(name Name) (Record, bool) {
	e := t.records[name]
	if e == nil {
		return Record{}, false
	}
	return e.Record, true
}

// Snapshot is the state as it is now. It is cheap when nothing changed.
func (t *Topology) Snapshot() Snapshot {
	if t.snap == nil {
		records := make([]Record, 0, len(t.records))
		if t.last != nil {
			for _, r := range t.last.records {
				records = append(records, t.records[r.Name].Record)
			}
		} else {
			for _, e := range t.records {
				records = append(records, e.Record)
			}
		}
		t.snap = newGraph(t.self, records, t.last)
		t.last = t.snap
	}
	return Snapshot{t.snap}
}

// Expire drops records of peers to which there has been no route for longer
// than keep and returns their names. Call it from time to time.
func (t *Topology) Expire(now time.Time, keep time.Duration) []Name {
	snap := t.Snapshot()
	var gone []Name
	for name, e := range t.records {
		switch {
		case name == t.self || snap.Reaches(name) || e.reached.IsZero():
			e.reached = now
		case now.Sub(e.reached) > keep:
			gone = append(gone, name)
		}
	}
	for _, name := range gone {
		delete(t.records, name)
		t.snap, t.last = nil, nil
	}
	slices.Sort(gone)
	return gone
}

// MustChangeShortID says whether our short id is none, or belongs to a
// reachable peer of lower name, which may keep it.
func (t *Topology) MustChangeShortID() bool {
	own := t.records[t.self].ShortID
	if own == 0 {
		return true
	}
	snap := t.Snapshot()
	for name, e := range t.records {
		if name < t.self && e.ShortID == own && snap.Reaches(name) {
			return true
		}
	}
	return false
}

// FreeShortID returns the first short id from start on, going round, that no
// known peer uses, or 0 when all are taken.
func (t *Topology) FreeShortID(start ShortID) ShortID {
	var used [MaxShortID + 1]bool
	for name, e := range t.records {
		if name != t.self {
			used[e.ShortID] = true
		}
	}
	for i := range MaxShortID {
		if id := (start-1+i)%MaxShortID + 1; !used[id] {
			return id
		}
	}
	return 0
}
