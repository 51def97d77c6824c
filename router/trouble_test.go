package router

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/peer/link"
	"weave.local/router/overlay"
)

// good says whether the path would be taken although there is another good one.
func (w *wire) good() bool { return w.p.usable() && !w.p.loss.heavy }

// watch lets d pass and tells how often the path was left and for how long it
// was in use.
func (w *wire) watch(d time.Duration) (left int, used time.Duration) {
	was := w.good()
	for end := w.now.Add(d); w.now.Before(end); {
		w.run(tickEvery)
		if now := w.good(); now != was {
			was = now
			if !now {
				left++
			}
		}
		if was {
			used += tickEvery
		}
	}
	return left, used
}

// lossOf loses a share of what passes, the same probes in every run.
func lossOf(share float64) func() bool {
	r := rand.New(rand.NewPCG(1, 2))
	return func() bool { return r.Float64() < share }
}

func TestPathThatLosesMuchIsLeft(t *testing.T) {
	for _, c := range []struct {
		share float64
		found time.Duration // in which it is left
		used  float64       // share of the time that it may be used all the same
		left  int           // how often it may be left in an hour
	}{
		{0.15, 10 * time.Minute, 0.6, 6},
		{0.2, 2 * time.Minute, 0.6, 6},
		{0.25, time.Minute, 0.25, 6},
		{0.3, 30 * time.Second, 0.1, 6},
		{0.5, 15 * time.Second, 0.05, 6},
		{0.7, 15 * time.Second, 0.05, 6},
		{0.9, 15 * time.Second, 0.05, 6},
	} {
		w := newWire(t, 1500, 1450)
		w.run(time.Minute)
		w.loses = lossOf(c.share)
		took := w.until("left", c.found, func() bool { return !w.good() })
		why := w.p.why(w.now)
		left, used := w.watch(time.Hour)
		t.Logf("loss of %.0f%%: left after %v (%s), in the next hour %d times, used for %v", 100*c.share, took, why, left, used)
		if why == "" || used > time.Duration(c.used*float64(time.Hour)) || left > c.left {
			t.Errorf("loss of %.0f%%: left %d times in an hour, used for %v, reason %q", 100*c.share, left, used, why)
		}
		w.loses = nil
		w.until("good again", time.Minute, w.good)
		if left, _ := w.watch(time.Hour); left > 0 || w.p.why(w.now) != "" || w.p.mtu != 1450 {
			t.Errorf("in good order left %d times, mtu %d, reason %q", left, w.p.mtu, w.p.why(w.now))
		}
	}
}

func TestPathThatLosesLittleIsUsed(t *testing.T) {
	for _, share := range []float64{0.001, 0.01, 0.03} {
		w := newWire(t, 1500, 1450)
		w.run(time.Minute)
		w.loses = lossOf(share)
		for range 1000 {
			if w.run(10 * time.Second); !w.good() {
				t.Fatalf("loss of %.1f%%: left: %s", 100*share, w.p.why(w.now))
			}
			if w.p.mtu != 1450 {
				t.Fatalf("loss of %.1f%%: taken for a path of %d bytes", 100*share, w.p.mtu)
			}
		}
		if perSecond := float64(w.token) / 10000; perSecond > 2 {
			t.Errorf("loss of %.1f%%: %.1f probes a second", 100*share, perSecond)
		}
	}
}

// A hiccup costs nothing, and neither does a size that no longer passes.
func TestHiccupIsNoLoss(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.run(time.Minute)
	for range 100 {
		w.cut = true
		w.run(1200 * time.Millisecond)
		w.cut = false
		if left, _ := w.watch(20 * time.Second); left > 0 || !w.good() {
			t.Fatalf("left: %s", w.p.why(w.now))
		}
	}
	w.mtu = 1240
	if left, _ := w.watch(time.Minute); left > 0 || w.p.mtu != 1230 {
		t.Errorf("narrow path left %d times, mtu %d", left, w.p.mtu)
	}
}

// Of two bad paths the preferred one stays.
func TestLossyPathIsBetterThanNone(t *testing.T) {
	n := &neighbour{}
	for _, name := range []string{overlay.FastDP, overlay.Sleeve} {
		p := newPathState(name, time.Unix(1000, 0))
		p.up, p.peerUp, p.mtu = true, true, 1450
		n.paths = append(n.paths, p)
	}
	fast, slow := n.paths[0], n.paths[1]
	for _, c := range []struct {
		fast, slow bool // lossy
		up         bool // slow
		want       string
	}{
		{false, false, true, overlay.FastDP},
		{true, false, true, overlay.Sleeve},
		{true, true, true, overlay.FastDP},
		{true, false, false, overlay.FastDP},
		{false, true, true, overlay.FastDP},
	} {
		fast.loss.heavy, slow.loss.heavy, slow.up = c.fast, c.slow, c.up
		if got, _ := n.best(); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// A path that comes and goes is used less and less, and yet never later than
// ten seconds after it came back for good.
func TestFlappingPathIsTrustedLess(t *testing.T) {
	for _, every := range []time.Duration{3 * time.Second, 4 * time.Second, 5 * time.Second} {
		w := newWire(t, 1500, 1450)
		w.run(time.Minute)
		left := 0
		for range 100 {
			w.cut = !w.cut
			n, _ := w.watch(every)
			left += n
		}
		t.Logf("up and down every %v for %v: left %d times", every, 100*every, left)
		if left > 5 {
			t.Errorf("up and down every %v: left %d times in 50", every, left)
		}
		w.cut = false
		w.until("good again", 9*time.Second, w.good)
		w.run(2 * calmAfter)
		w.cut = true
		w.until("down", 4*time.Second, func() bool { return !w.good() })
		w.cut = false
		w.until("trusted as before", 2*time.Second, w.good)
	}
}

// A thousand falls, each as soon as the path is used again, and after hours of
// quiet: down and up again in time, never stuck.
func TestThousandFalls(t *testing.T) {
	w := newWire(t, 1500, 1450)
	var down, up time.Duration
	for i := range 1000 {
		quiet := time.Duration(rand.Int64N(int64(5 * time.Second)))
		if i%100 == 0 {
			quiet = 10 * time.Minute
		}
		w.run(quiet)
		w.cut = true
		down = max(down, w.until("down", 4*time.Second, func() bool { return !w.good() }))
		w.run(quiet)
		w.cut = false
		up = max(up, w.until("up", 9*time.Second, w.good))
	}
	t.Logf("down after %v, up after %v at most", down, up)
}

// A path that comes back carries at once what it carried before.
func TestNarrowPathReturnsWithItsSize(t *testing.T) {
	w := newWire(t, 1400, 1450)
	w.until("up", 40*time.Second, func() bool { return w.p.usable() && w.p.mtu == 1400 })
	w.run(time.Minute)
	w.cut = true
	w.run(time.Minute)
	w.cut = false
	w.until("up again", 3*time.Second, w.good)
	if w.p.mtu != 1400 {
		t.Errorf("mtu %d", w.p.mtu)
	}
}

// What status says of a path is so at that moment.
func TestReasons(t *testing.T) {
	w := newWire(t, 1500, 1450)
	says := func(want string) {
		t.Helper()
		if got := w.p.why(w.now); !strings.Contains(got, want) || (want == "") != (got == "") {
			t.Errorf("reason %q, want %q", got, want)
		}
	}
	says("not yet answered")
	w.run(2 * calmAfter)
	says("")
	w.cut = true
	w.until("down", 4*time.Second, func() bool { return !w.good() })
	says("no answer to probes for 2.")
	w.run(10 * time.Minute)
	says("no answer to probes for 10m")
	w.p.refused(1450, 0, errors.New("network is unreachable"))
	says("network is unreachable")
	w.run(deadAfter + time.Second)
	says("no answer to probes for 10m")
	w.cut = false
	w.until("up", 9*time.Second, w.good)
	w.cut = true
	w.until("down", 4*time.Second, func() bool { return !w.good() })
	w.cut = false
	w.run(700 * time.Millisecond)
	says("on trial")
	w.until("up", 9*time.Second, w.good)
	w.p.peerUp = false
	says("from the other side")
}

// named is a data path that has only a name.
type named struct {
	overlay.Overlay
	name string
}

func (n named) Name() string { return n.name }

// Whichever path loses a neighbour is told first: else a flood would reach the
// neighbour over both.
func TestPathThatLosesANeighbourIsTheFirst(t *testing.T) {
	r := &Router{all: []overlay.Overlay{named{name: overlay.FastDP}, named{name: overlay.Sleeve}}}
	hops := func(path string) map[peer.ShortID]overlay.Hop {
		return map[peer.ShortID]overlay.Hop{2: {Via: 2, Path: path}}
	}
	for _, c := range []struct{ before, now, first string }{
		{"", overlay.FastDP, overlay.FastDP},
		{overlay.FastDP, overlay.Sleeve, overlay.FastDP},
		{overlay.Sleeve, overlay.FastDP, overlay.Sleeve},
		{overlay.Sleeve, overlay.Sleeve, overlay.FastDP},
	} {
		r.applied = hops(c.before)
		if got := r.inOrder(hops(c.now)); got[0].Name() != c.first || len(got) != 2 {
			t.Errorf("from %q to %q: %s first", c.before, c.now, got[0].Name())
		}
	}
}

// A link that is replaced may be gone for a moment: what is known of the paths
// stays. A peer that was away for longer, or began anew, has to be probed again.
func TestReplacedLinkKeepsThePaths(t *testing.T) {
	r := &Router{paths: []overlay.Overlay{&table{}}, neighbours: map[peer.Name]*neighbour{}, parted: map[peer.Name]*neighbour{}}
	now := time.Unix(1e9, 0)
	kept := func(away time.Duration, uid peer.UID) bool {
		r.linkedLocked([]link.Neighbour{{Info: peer.Info{Name: 7, UID: 1}}}, now)
		r.neighbours[7].paths[0].up = true
		r.linkedLocked(nil, now)
		if len(r.neighbours) != 0 {
			t.Error("a neighbour without a link")
		}
		now = now.Add(away)
		r.linkedLocked([]link.Neighbour{{Info: peer.Info{Name: 7, UID: uid}}}, now)
		if len(r.parted) != 0 {
			t.Error("a neighbour is with us and away")
		}
		return r.neighbours[7].paths[0].up
	}
	if !kept(keepParted, 1) {
		t.Error("the paths of a neighbour whose link was replaced are forgotten")
	}
	if kept(keepParted+1, 1) {
		t.Error("the paths of a neighbour are remembered for ever")
	}
	if kept(0, 2) {
		t.Error("a peer that began anew has the paths of the one before")
	}
	r.linkedLocked(nil, now)
	r.linkedLocked(nil, now.Add(keepParted+1))
	if len(r.parted) != 0 {
		t.Error("a neighbour that does not come back is kept")
	}
}
