// Package linkstate spreads link-state records: what to send to whom when a
// link comes or goes, and what two neighbours whose databases differ send each
// other. It is pure: messages in, messages out.
//
// A change is told as a delta, to few neighbours: to those in a spanning tree
// that all peers compute alike, to those who are not known to be linked to us
// yet, and to the next ones by name until it is four. Whoever gets news hands them
// on by the same rule. What gets lost that way, in a moment in which peers
// disagree about the tree, shows in the digests of hellos: then one of the two
// sends a summary, and each gets from the other what it lacks and nothing else.
//
// Bodies of the messages, integers big endian:
//
//	2  records  link-state records, see package peer
//	6  deltas   deltas, see package peer
//	7  summary  for each reachable peer: 6 bytes name, 8 bytes UID, 8 bytes
//	            sequence number. Answered with the records that are newer or
//	            missing there, and a want of those that are newer or missing here
//	8  want     6 bytes name each. Answered with records
package linkstate

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"

	"weave.local/peer"
)

// Types of messages.
const (
	TypeRecords = 2
	TypeDeltas  = 6
	TypeSummary = 7
	TypeWant    = 8
)

const (
	batchSize   = 64 << 10 // of a message of records, more only for a single large one
	floodLinks  = 4
	summarySize = peer.NameSize + 8 + 8
)

var errLength = errors.New("summary or want of odd length")

// Message is one message to a neighbour.
type Message struct {
	Type byte
	Body []byte
}

// DB is the link-state database of one peer, and what it tells others. It is
// not safe for use by several goroutines.
type DB struct {
	*peer.Topology
	self peer.Name
	told peer.Record // ours as others were told
}

// New is a database that knows only self. Seq is the sequence number of its
// first record: the Unix time in nanoseconds.
func New(self peer.Info, seq uint64) *DB {
	return &DB{Topology: peer.NewTopology(self, seq), self: self.Name}
}

// Announce makes our record say what is, and returns what to flood: nothing if
// that is known. Neighbours may come in any order; it takes them over.
func (db *DB) Announce(self peer.Info, neighbours []peer.Adjacency) []Message {
	own, _ := db.Record(db.self)
	known := db.told.Seq == own.Seq // else others hold what somebody else told
	slices.SortFunc(neighbours, func(a, b peer.Adjacency) int { return int(a.Name) - int(b.Name) })
	if known && db.told.Info == self && slices.Equal(db.told.Neighbours, neighbours) {
		return nil
	}
	rec := db.SetLocal(self, neighbours)
	delta, ok := peer.Diff(db.told, rec)
	db.told = rec
	if known && ok {
		return []Message{{TypeDeltas, peer.AppendDelta(nil, delta)}}
	}
	return records([]peer.Record{rec})
}

// Flood picks from our links those to flood over; except is where the news
// came from, 0 if they are ours.
func (db *DB) Flood(links []peer.Name, except peer.Name) []peer.Name {
	snap := db.Snapshot()
	tree := snap.Spanning()
	var must, may []peer.Name
	for _, n := range links {
		switch {
		case n == except:
		case slices.Contains(tree, n) || !snap.Connected(db.self, n):
			must = append(must, n)
		default:
			may = append(may, n)
		}
	}
	// The same ones each time, so that what comes over a link comes in order.
	slices.SortFunc(may, func(a, b peer.Name) int { return cmp.Compare(uint64(a-db.self)<<16, uint64(b-db.self)<<16) })
	return append(must, may[:min(len(may), max(0, floodLinks-len(must)))]...)
}

// Result is what to do about a message.
type Result struct {
	Reply   []Message
	Forward []Message   // news, to flood
	Twins   []peer.Info // whose records bear our name; of a delta only with the UID
}

// Receive takes a message of one of the types above. It does what it can with
// one that is partly bad, and returns the first error.
func (db *DB) Receive(typ byte, body []byte) (Result, error) {
	switch typ {
	case TypeRecords:
		return db.takeRecords(body)
	case TypeDeltas:
		return db.takeDeltas(body)
	case TypeSummary:
		return db.compare(body)
	case TypeWant:
		return db.answer(body)
	}
	return Result{}, nil
}

func (db *DB) takeRecords(body []byte) (res Result, first error) {
	var news, answers []peer.Record
	for len(body) > 0 {
		r, rest, err := peer.ParseRecord(body)
		body = rest
		if err != nil {
			first = keep(first, err)
			continue
		}
		switch db.Merge(r) {
		case peer.Newer:
			news = append(news, r)
		case peer.Older:
			if ours, ok := db.Record(r.Name); ok {
				answers = append(answers, ours)
			}
		case peer.Overtaken:
			res.Twins = append(res.Twins, r.Info)
		case peer.Unchanged, peer.Gap:
		}
	}
	res.Reply, res.Forward = records(answers), records(news)
	return res, first
}

func (db *DB) takeDeltas(body []byte) (res Result, first error) {
	var news, want []byte
	for len(body) > 0 {
		d, rest, err := peer.ParseDelta(body)
		body = rest
		if err != nil {
			first = keep(first, err)
			continue
		}
		switch db.MergeDelta(d) {
		case peer.Newer:
			news = peer.AppendDelta(news, d)
		case peer.Gap:
			want = peer.AppendName(want, d.Name)
		case peer.Overtaken:
			res.Twins = append(res.Twins, peer.Info{Name: d.Name, UID: d.UID})
		case peer.Unchanged, peer.Older: // an older one is on its way elsewhere, or the digests will tell
		}
	}
	res.Reply, res.Forward = message(TypeWant, want), message(TypeDeltas, news)
	return res, first
}

// Summary says what we have of each reachable peer.
func (db *DB) Summary() []Message {
	var b []byte
	for _, r := range db.Snapshot().ReachableRecords() {
		b = peer.AppendName(b, r.Name)
		b = binary.BigEndian.AppendUint64(b, uint64(r.UID))
		b = binary.BigEndian.AppendUint64(b, r.Seq)
	}
	return message(TypeSummary, b)
}

// compare answers a summary.
func (db *DB) compare(body []byte) (res Result, err error) {
	if len(body)%summarySize != 0 {
		return res, errLength
	}
	var want []byte
	same := make(map[peer.Name]bool, len(body)/summarySize) // or newer there
	for ; len(body) > 0; body = body[summarySize:] {
		name := peer.NameFromMAC([peer.NameSize]byte(body))
		uid, seq := peer.UID(binary.BigEndian.Uint64(body[peer.NameSize:])), binary.BigEndian.Uint64(body[peer.NameSize+8:])
		r, ok := db.Record(name)
		switch {
		case ok && r.UID == uid && r.Seq == seq:
			same[name] = true
		case !ok || seq > r.Seq || seq == r.Seq && uid > r.UID:
			same[name] = true
			want = peer.AppendName(want, name)
		}
	}
	lacks := db.Snapshot().ReachableRecords()
	lacks = slices.DeleteFunc(lacks, func(r peer.Record) bool { return same[r.Name] })
	res.Reply = append(records(lacks), message(TypeWant, want)...)
	return res, nil
}

// answer answers a want.
func (db *DB) answer(body []byte) (res Result, err error) {
	if len(body)%peer.NameSize != 0 {
		return res, errLength
	}
	var out []peer.Record
	told := make(map[peer.Name]bool)
	for ; len(body) > 0; body = body[peer.NameSize:] {
		name := peer.NameFromMAC([peer.NameSize]byte(body))
		if r, ok := db.Record(name); ok && !told[name] {
			told[name] = true
			out = append(out, r)
		}
	}
	res.Reply = records(out)
	return res, nil
}

// records packs records into as few messages as is reasonable.
func records(list []peer.Record) (out []Message) {
	var b []byte
	for i, r := range list {
		b = peer.AppendRecord(b, r)
		if len(b) >= batchSize || i == len(list)-1 {
			out = append(out, Message{TypeRecords, b})
			b = nil
		}
	}
	return out
}

func message(typ byte, body []byte) []Message {
	if len(body) == 0 {
		return nil
	}
	return []Message{{typ, body}}
}

func keep(first, err error) error {
	if first != nil {
		return first
	}
	return err
}
