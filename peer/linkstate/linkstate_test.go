package linkstate

import (
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"weave.local/peer"
)

func info(n peer.Name) peer.Info {
	return peer.Info{Name: n, UID: peer.UID(n) << 8, ShortID: peer.ShortID(n), NickName: "host", Port: 6783}
}

// network is peers and the links between them; what is sent arrives in order.
type network struct {
	t     *testing.T
	dbs   map[peer.Name]*DB
	links map[peer.Name]map[peer.Name]bool
	sent  map[peer.Name]int // bytes, with the heads of frames and streams
	queue []parcel
	loss  func() bool
}

type parcel struct {
	from, to peer.Name
	m        Message
}

const heads = 5 + 12 // of our frame and of yamux

func newNetwork(t *testing.T, n int) *network {
	w := &network{t: t, dbs: map[peer.Name]*DB{}, links: map[peer.Name]map[peer.Name]bool{}, loss: func() bool { return false }}
	w.sent = map[peer.Name]int{}
	for i := range n {
		name := peer.Name(i + 1)
		w.dbs[name] = New(info(name), 1000)
		w.links[name] = map[peer.Name]bool{}
		w.dbs[name].Announce(info(name), nil)
	}
	return w
}

func (w *network) send(from, to peer.Name, list []Message) {
	for _, m := range list {
		w.sent[from] += heads + len(m.Body)
		if !w.loss() {
			w.queue = append(w.queue, parcel{from, to, m})
		}
	}
}

func (w *network) flood(from, except peer.Name, list []Message) {
	var links []peer.Name
	for n := range w.links[from] {
		links = append(links, n)
	}
	for _, to := range w.dbs[from].Flood(links, except) {
		w.send(from, to, list)
	}
}

func (w *network) announce(n peer.Name) {
	var adj []peer.Adjacency
	for to := range w.links[n] {
		at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(to)}), 6783)
		adj = append(adj, peer.Adjacency{Name: to, Outbound: n > to, Addr: at})
	}
	w.flood(n, 0, w.dbs[n].Announce(info(n), adj))
}

// link makes or breaks a link; both ends see it.
func (w *network) link(a, b peer.Name, up bool) {
	if up {
		w.links[a][b], w.links[b][a] = true, true
		w.hello(a, b)
	} else {
		delete(w.links[a], b)
		delete(w.links[b], a)
	}
	w.announce(a)
	w.announce(b)
}

func (w *network) hello(a, b peer.Name) {
	if w.dbs[a].Snapshot().Digest() != w.dbs[b].Snapshot().Digest() {
		w.send(min(a, b), max(a, b), w.dbs[min(a, b)].Summary())
	}
}

// settle delivers all that is under way, in some order between links.
func (w *network) settle() {
	for len(w.queue) > 0 {
		p := w.queue[0]
		w.queue = w.queue[1:]
		if !w.links[p.from][p.to] {
			continue
		}
		res, err := w.dbs[p.to].Receive(p.m.Type, p.m.Body)
		if err != nil {
			w.t.Fatal(err)
		}
		w.send(p.to, p.from, res.Reply)
		w.flood(p.to, p.from, res.Forward)
	}
}

// differing is how many peers do not hold what the first of their part holds.
func (w *network) differing() (n int) {
	for name, db := range w.dbs {
		for other := range w.links[name] {
			if db.Snapshot().Digest() != w.dbs[other].Snapshot().Digest() {
				n++
				break
			}
		}
	}
	return n
}

// mesh is n peers of which all have a link to all, and know so.
func mesh(t *testing.T, n int) *network {
	w := newNetwork(t, n)
	for a := range n {
		for b := range a {
			w.links[peer.Name(a+1)][peer.Name(b+1)], w.links[peer.Name(b+1)][peer.Name(a+1)] = true, true
		}
	}
	for name := range w.dbs {
		w.announce(name)
	}
	for _, db := range w.dbs {
		for other := range w.dbs {
			r, _ := w.dbs[other].Record(other)
			db.Merge(r)
		}
	}
	w.queue = nil
	return w
}

// One link of a full mesh of 50 breaks and comes back: what a peer sends for it
// stays below 2 kB, and no hello is needed for all to know.
func TestLinkEvent(t *testing.T) {
	const peers, bound = 50, 2000
	w := mesh(t, peers)
	if n := w.differing(); n != 0 {
		t.Fatalf("%d peers differ", n)
	}
	for _, up := range []bool{false, true} {
		clear(w.sent)
		w.link(7, 31, up)
		w.settle()
		most, sum := 0, 0
		for _, n := range w.sent {
			most, sum = max(most, n), sum+n
		}
		full, _ := w.dbs[1].Record(7)
		t.Logf("link up %v: %d bytes per peer, at most %d; whole records to all: %d", up, sum/peers, most, 2*(peers-2)*(heads+len(peer.AppendRecord(nil, full))))
		if most > bound {
			t.Errorf("a peer sent %d bytes, want at most %d", most, bound)
		}
		if n := w.differing(); n != 0 {
			t.Errorf("%d peers differ", n)
		}
		for name, db := range w.dbs {
			if db.Snapshot().Connected(7, 31) != up {
				t.Errorf("%v does not know", name)
			}
		}
	}
}

// However links change and whatever is lost, hellos make all agree in the end.
func TestConvergence(t *testing.T) {
	for seed := range uint64(10) {
		random := rand.New(rand.NewPCG(seed, 0))
		n := 2 + random.IntN(20)
		w := newNetwork(t, n)
		w.loss = func() bool { return random.IntN(5) == 0 }
		for range 150 {
			a, b := peer.Name(random.IntN(n)+1), peer.Name(random.IntN(n)+1)
			if a != b {
				w.link(a, b, !w.links[a][b])
			}
			if random.IntN(3) == 0 {
				w.settle()
			}
		}
		w.settle()
		w.loss = func() bool { return false }
		for round := 0; ; round++ {
			for a := range w.links {
				for b := range w.links[a] {
					if a < b {
						w.hello(a, b)
					}
				}
			}
			w.settle()
			if w.differing() == 0 {
				break
			}
			if round > n {
				t.Fatalf("seed %d: %d peers still differ", seed, w.differing())
			}
		}
		for a, db := range w.dbs {
			for b := range w.links[a] {
				if !db.Snapshot().Connected(a, b) {
					t.Fatalf("seed %d: %d does not know its link to %d", seed, a, b)
				}
			}
		}
	}
}

// The hub of a star reaches everybody although only few are flooded to
// elsewhere, and a line passes on from end to end.
func TestFloodReachesAll(t *testing.T) {
	for what, links := range map[string]func(a, b int) bool{
		"star":    func(_, b int) bool { return b == 1 },
		"line":    func(a, b int) bool { return a == b+1 },
		"cliques": func(a, b int) bool { return b == 1 || a <= 11 || b > 11 },
	} {
		w := newNetwork(t, 21)
		for a := 2; a <= 21; a++ {
			for b := 1; b < a; b++ {
				if links(a, b) {
					w.link(peer.Name(a), peer.Name(b), true)
					w.settle()
				}
			}
		}
		w.dbs[21].told.NickName = "" // a record as a whole this time
		w.announce(21)
		w.settle()
		if n := w.differing(); n != 0 {
			t.Errorf("%s: %d peers differ", what, n)
		}
	}
}

func TestNothingNewIsNotTold(t *testing.T) {
	db := New(info(1), 5)
	adj := func() []peer.Adjacency { return []peer.Adjacency{{Name: 3}, {Name: 2}} }
	if m := db.Announce(info(1), adj()); len(m) != 1 || m[0].Type != TypeRecords {
		t.Errorf("first %v", m)
	}
	if m := db.Announce(info(1), adj()); m != nil {
		t.Errorf("the same again %v", m)
	}
	if m := db.Announce(info(1), append(adj(), peer.Adjacency{Name: 4, NoData: true})); len(m) != 1 || m[0].Type != TypeDeltas {
		t.Errorf("one more link %v", m)
	}
}

// Somebody else told a record under our name: ours comes whole, as no base of a
// delta is known to others.
func TestSupersedingIsWhole(t *testing.T) {
	db := New(info(1), 5)
	db.Announce(info(1), nil)
	twin := info(1)
	twin.UID = 99
	res, err := db.Receive(TypeRecords, peer.AppendRecord(nil, peer.Record{Info: twin, Seq: 50}))
	if err != nil || len(res.Twins) != 1 || len(res.Forward) != 0 {
		t.Fatalf("%+v %v", res, err)
	}
	m := db.Announce(info(1), nil)
	if len(m) != 1 || m[0].Type != TypeRecords {
		t.Fatalf("answered with %v", m)
	}
	if own, _ := db.Record(1); own.Seq != 51 || own.UID != info(1).UID {
		t.Errorf("record %+v", own)
	}
	delta := peer.AppendDelta(nil, peer.Delta{Name: 1, UID: 99, Base: 60, Seq: 61})
	if res, _ = db.Receive(TypeDeltas, delta); len(res.Twins) != 1 || res.Twins[0].UID != 99 {
		t.Errorf("a delta under our name: %+v", res)
	}
}

// The layouts are a promise to peers of other versions.
func TestLayouts(t *testing.T) {
	db := New(info(0xa1), 4)
	db.Announce(info(0xa1), nil)
	if got := hex.EncodeToString(db.Summary()[0].Body); got != "0000000000a1"+"000000000000a100"+"0000000000000005" {
		t.Errorf("summary %s", got)
	}
	b := peer.AppendDelta(nil, peer.Delta{Name: 0xb2, UID: 7, Base: 8, Seq: 9})
	res, err := db.Receive(TypeDeltas, b)
	if err != nil || len(res.Reply) != 1 || res.Reply[0].Type != TypeWant || hex.EncodeToString(res.Reply[0].Body) != "0000000000b2" {
		t.Errorf("want %+v %v", res, err)
	}
}

func TestRecordsAreSplit(t *testing.T) {
	var list []peer.Record
	for i := range peer.Name(2000) {
		list = append(list, peer.Record{
			Info:       peer.Info{Name: i + 1, UID: 1, NickName: strings.Repeat("n", 50)},
			Neighbours: []peer.Adjacency{{Name: 5000}, {Name: 5001}},
		})
	}
	var got []peer.Record
	parts := records(list)
	for _, m := range parts {
		for b := m.Body; len(b) > 0; {
			r, rest, err := peer.ParseRecord(b)
			if err != nil {
				t.Fatal(err)
			}
			got, b = append(got, r), rest
		}
	}
	if len(parts) < 2 || !reflect.DeepEqual(got, list) {
		t.Errorf("%d records in %d messages", len(got), len(parts))
	}
	if records(nil) != nil {
		t.Error("no records make a message")
	}
}

// A bad record does not cost the good ones beside it.
func TestBadRecordIsSkipped(t *testing.T) {
	b := peer.AppendRecord(nil, peer.Record{Info: peer.Info{Name: 2}})
	b = append(b, peer.AppendRecord(nil, peer.Record{Info: peer.Info{Name: 3, UID: 1}})...)
	db := New(info(1), 1)
	if res, err := db.Receive(TypeRecords, b); err == nil || len(res.Forward) != 1 {
		t.Errorf("%+v %v", res, err)
	}
	if _, ok := db.Record(3); !ok {
		t.Error("the good one is lost")
	}
}

func FuzzReceive(f *testing.F) {
	db := New(info(2), 1)
	db.Announce(info(2), []peer.Adjacency{{Name: 1}})
	rec, _ := db.Record(2)
	f.Add(byte(TypeRecords), peer.AppendRecord(nil, rec))
	f.Add(byte(TypeDeltas), peer.AppendDelta(nil, peer.Delta{Name: 2, UID: 1, Base: 1, Seq: 2, Gone: []peer.Name{1}}))
	f.Add(byte(TypeSummary), db.Summary()[0].Body)
	f.Add(byte(TypeWant), peer.AppendName(nil, 1))
	f.Fuzz(func(t *testing.T, typ byte, body []byte) {
		db := New(info(1), 1)
		db.Announce(info(1), []peer.Adjacency{{Name: 2}})
		res, _ := db.Receive(typ, body)
		for _, m := range append(res.Reply, res.Forward...) {
			if _, err := New(info(3), 1).Receive(m.Type, m.Body); err != nil {
				t.Errorf("what we send is not understood: %v", err)
			}
		}
		db.Snapshot().Spanning()
	})
}
