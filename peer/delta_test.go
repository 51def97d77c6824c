package peer

import (
	"encoding/hex"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

func TestDeltaLayout(t *testing.T) {
	d := Delta{
		Name: 0xa1, UID: 2, Base: 8, Seq: 10, Gone: []Name{0xc3},
		Put: []Adjacency{{Name: 0xb2, NoData: true, Addr: netip.MustParseAddrPort("192.0.2.1:6783")}},
	}
	const want = "002f" + "01" + "0000000000a1" + "0000000000000002" + "000000000000000a" + "0002" +
		"01" + "0000000000b2" + "02" + "04" + "c0000201" + "1a7f" + "01" + "0000000000c3"
	b := AppendDelta(nil, d)
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	got, rest, err := ParseDelta(append(b, 1))
	if err != nil || len(rest) != 1 || !reflect.DeepEqual(got, d) {
		t.Errorf("read back as %+v %v", got, err)
	}
	for n := range b {
		if _, _, err := ParseDelta(b[:n]); err == nil {
			t.Errorf("accepted although cut to %d bytes", n)
		}
	}
}

// A delta makes of the first record what the second is, flags and addresses
// included, and leaves the first as it was.
func TestDeltasAgainstRecords(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	some := func() (out []Adjacency) {
		for n := Name(2); n < 12; n++ {
			if random.IntN(2) == 0 {
				out = append(out, Adjacency{Name: n, NoData: random.IntN(4) == 0, spare: byte(random.IntN(2)) << 7})
			}
		}
		return out
	}
	for range 1000 {
		before, after := Record{Info: Info{Name: 1, UID: 1}, Seq: 5, Neighbours: some()}, Record{Info: Info{Name: 1, UID: 1}, Seq: 6, Neighbours: some()}
		d, ok := Diff(before, after)
		if !ok {
			t.Fatal("no delta")
		}
		topo := NewTopology(Info{Name: 9, UID: 9}, 1)
		old := slices.Clone(before.Neighbours)
		topo.Merge(before)
		if got := topo.MergeDelta(d); got != Newer {
			t.Fatalf("merged: %v", got)
		}
		if got, _ := topo.Record(1); got.Seq != 6 || !slices.Equal(got.Neighbours, after.Neighbours) {
			t.Fatalf("%+v\nmade by %+v\ninto %+v", before, d, got)
		}
		if !slices.Equal(old, before.Neighbours) {
			t.Fatal("the old record changed")
		}
	}
}

func TestMergeDelta(t *testing.T) {
	topo := NewTopology(Info{Name: 1, UID: 10}, 100)
	topo.Merge(Record{Info: Info{Name: 2, UID: 5}, Seq: 50})
	for i, c := range []struct {
		d    Delta
		want Merged
	}{
		{Delta{Name: 3, UID: 5, Base: 1, Seq: 2}, Gap},
		{Delta{Name: 2, UID: 5, Base: 49, Seq: 50}, Unchanged},
		{Delta{Name: 2, UID: 5, Base: 48, Seq: 49}, Older},
		{Delta{Name: 2, UID: 5, Base: 51, Seq: 52}, Gap},
		{Delta{Name: 2, UID: 6, Base: 50, Seq: 51}, Gap},
		{Delta{Name: 2, UID: 5, Base: 50, Seq: 51}, Newer},
		{Delta{Name: 1, UID: 10, Base: 99, Seq: 100}, Unchanged},
		{Delta{Name: 1, UID: 11, Base: 99, Seq: 100}, Overtaken},
		{Delta{Name: 1, UID: 10, Base: 199, Seq: 200}, Overtaken},
	} {
		if got := topo.MergeDelta(c.d); got != c.want {
			t.Errorf("%d: %v, want %v", i, got, c.want)
		}
	}
	if _, ok := Diff(Record{Seq: 1}, Record{Seq: 2, Info: Info{NickName: "x"}}); ok {
		t.Error("a delta hides that the nickname changed")
	}
}

// A graph made from the one before is the one made from nothing.
func TestGraphGoesOn(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	topo := NewTopology(Info{Name: 1, UID: 1}, 1)
	for i := range 2000 {
		r := Record{Info: Info{Name: Name(random.IntN(80) + 2), UID: 1}, Seq: uint64(i + 1)}
		for n := Name(1); n < 82; n++ {
			if n != r.Name && random.IntN(3) == 0 {
				r.Neighbours = append(r.Neighbours, Adjacency{Name: n, NoData: n%7 == 0})
			}
		}
		topo.Merge(r)
		if i%5 == 0 {
			topo.SetLocal(Info{Name: 1, UID: 1}, []Adjacency{{Name: Name(random.IntN(80) + 2)}, {Name: 90}})
		}
		got, want := topo.Snapshot().g, newGraph(1, slices.Clone(topo.Snapshot().Records()), nil)
		if !slices.Equal(got.adj, want.adj) || !slices.Equal(got.first, want.first) || got.digest != want.digest {
			t.Fatalf("after %d records another graph", i)
		}
	}
}

// The tree is the same for all, spans all that can be reached, and is narrow
// where links allow.
func TestSpanning(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for round := range 60 {
		n, dead := 2+random.IntN(60), random.IntN(10)
		if round == 0 {
			n, dead = 100, 0
		}
		records := make([]Record, n)
		for i := range records {
			records[i].Info = Info{Name: Name(i + 1), UID: 1}
		}
		for i := range records {
			for j := range i {
				if random.IntN(10) >= dead {
					records[i].Neighbours = append(records[i].Neighbours, Adjacency{Name: Name(j + 1)})
					records[j].Neighbours = append(records[j].Neighbours, Adjacency{Name: Name(i + 1)})
				}
			}
		}
		few, most := map[Name][]Name{}, 0
		edges := 0
		for i := range records {
			s := Snapshot{newGraph(Name(i+1), slices.Clone(records), nil)}
			few[Name(i+1)] = s.Spanning()
			most, edges = max(most, len(s.Spanning())), edges+len(s.Spanning())
		}
		for a, list := range few {
			for _, b := range list {
				if !slices.Contains(few[b], a) {
					t.Fatalf("round %d: %d - %d is seen from one end only", round, a, b)
				}
			}
		}
		s := Snapshot{newGraph(1, slices.Clone(records), nil)}
		if want := len(s.Reachable()); len(reach(few, 1)) != want+1 {
			t.Fatalf("round %d: spans %d of %d", round, len(reach(few, 1)), want+1)
		}
		if dead == 0 && (most > branches+1 || edges != 2*(n-1)) {
			t.Errorf("full mesh of %d: up to %d links each, %d in all", n, most, edges/2)
		}
	}
}

func reach(few map[Name][]Name, from Name) map[Name]bool {
	seen, queue := map[Name]bool{from: true}, []Name{from}
	for len(queue) > 0 {
		for _, n := range few[queue[0]] {
			if !seen[n] {
				seen[n] = true
				queue = append(queue, n)
			}
		}
		queue = queue[1:]
	}
	return seen
}

func FuzzParseDelta(f *testing.F) {
	f.Add(AppendDelta(nil, Delta{Name: 1, UID: 1, Seq: 2, Base: 1, Put: []Adjacency{{Name: 2}}, Gone: []Name{3}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, rest, err := ParseDelta(b)
		if err != nil {
			return
		}
		again, _, err := ParseDelta(AppendDelta(nil, d))
		if err != nil || !reflect.DeepEqual(again, d) {
			t.Errorf("%+v is read back as %+v, %v", d, again, err)
		}
		if len(rest) >= len(b) {
			t.Error("nothing was consumed")
		}
	})
}
