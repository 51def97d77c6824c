package peer

import "testing"

// Whoever may link, which without a password is anybody, could otherwise make
// up peers until memory ends.
func TestPeersAreNotWithoutEnd(t *testing.T) {
	topo := NewTopology(infoOf(1), 1)
	for n := Name(2); n < Name(2*MaxShortID); n++ {
		topo.Merge(Record{Info: infoOf(n), Seq: 1})
	}
	if n := len(topo.Snapshot().Records()); n != int(MaxShortID) {
		t.Errorf("%d peers known, want at most %d", n, MaxShortID)
	}
	if topo.Merge(Record{Info: infoOf(2), Seq: 2}) != Newer {
		t.Error("a known peer has no news any more")
	}
}

// FuzzTopology merges records of others in any order and number: routes lead
// over our own links only, and every tree has us where routes say.
func FuzzTopology(f *testing.F) {
	line := AppendRecord(nil, Record{Info: Info{Name: 2, UID: 1}, Seq: 1, Neighbours: []Adjacency{{Name: 1}, {Name: 3}}})
	line = AppendRecord(line, Record{Info: Info{Name: 3, UID: 1}, Seq: 1, Neighbours: []Adjacency{{Name: 2, NoData: true}}})
	f.Add(line)
	f.Add(AppendRecord(line, Record{Info: Info{Name: 1, UID: 9}, Seq: 1<<64 - 1}))
	f.Fuzz(func(t *testing.T, b []byte) {
		topo := NewTopology(Info{Name: 1, UID: 1, ShortID: 1}, 5)
		topo.SetLocal(Info{Name: 1, UID: 1, ShortID: 1}, []Adjacency{{Name: 2}})
		for len(b) > 0 {
			r, rest, err := ParseRecord(b)
			if err == nil {
				topo.Merge(r)
			}
			if len(rest) >= len(b) {
				t.Fatal("nothing was consumed")
			}
			b = rest
		}
		s := topo.Snapshot()
		for _, r := range s.Records() {
			for _, next := range []func(Name) (Name, bool){s.NextHop, s.FrameHop} {
				if hop, ok := next(r.Name); ok && (hop != 2 || !s.Reaches(r.Name)) {
					t.Errorf("to %s through %s", r.Name, hop)
				}
			}
			if parent, kids, ok := s.Tree(r.Name); ok != s.Reaches(r.Name) || ok && r.Name != 1 && parent != 2 || len(kids) > 1 {
				t.Errorf("tree of %s: %s, %v, %v", r.Name, parent, kids, ok)
			}
		}
		if topo.SetLocal(Info{Name: 1, UID: 1}, nil); len(topo.Snapshot().Reachable()) > 0 {
			t.Error("without links somebody is reached")
		}
	})
}
