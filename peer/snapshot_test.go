package peer

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// A way around a link is what is left when the link is not there.
func TestReachesAround(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 7))
	for range 200 {
		size := Name(2 + random.IntN(140))
		w, links := world{1: nil}, random.IntN(2*int(size))
		for range links {
			a, b := 1+Name(random.IntN(int(size))), 1+Name(random.IntN(int(size)))
			if a != b && !slices.Contains(w[a], b) {
				w.link(a, b)
			}
		}
		s := w.topology(1).Snapshot()
		for n := range size + 2 {
			less := world{}
			for a, list := range w {
				less[a] = slices.DeleteFunc(slices.Clone(list), func(b Name) bool { return a == 1 && b == n || a == n && b == 1 })
			}
			want := n != 1 && less.topology(1).Snapshot().Reaches(n)
			if got := s.ReachesAround(n); got != want {
				t.Fatalf("%v is reached around its link: %v, want %v; links %v", n, got, want, w)
			}
		}
	}
}
