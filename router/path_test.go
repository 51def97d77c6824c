package router

import (
	"errors"
	"testing"
	"time"
)

// wire is an underlay for one pathState: it answers probes that fit, after
// rtt, unless it is cut.
type wire struct {
	t     *testing.T
	p     *pathState
	now   time.Time
	mtu   int
	limit int
	cut   bool
	rtt   time.Duration
	late  map[uint64]time.Time // answers on their way
	loses func() bool          // a probe; nil: it does not
	token uint64
}

func newWire(t *testing.T, mtu, limit int) *wire {
	t.Helper()
	now := time.Unix(1000, 0)
	p := newPathState("fastdp", now)
	p.peerUp = true
	return &wire{t: t, p: p, now: now, mtu: mtu, limit: limit, late: map[uint64]time.Time{}}
}

// run lets d pass in ticks.
func (w *wire) run(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(tickEvery) {
		for _, size := range w.p.tick(w.now, w.limit) {
			w.token++
			w.p.sent(w.token, size, w.now)
			if !w.cut && size <= w.mtu && (w.loses == nil || !w.loses()) {
				w.late[w.token] = w.now.Add(w.rtt)
			}
		}
		for token, at := range w.late {
			if !w.now.Before(at) {
				delete(w.late, token)
				w.p.ack(token, w.now)
			}
		}
		if w.p.up && w.p.mtu == 0 {
			w.t.Fatal("up without a proven size")
		}
	}
}

// until lets time pass until cond holds and returns how long it took.
func (w *wire) until(what string, atMost time.Duration, cond func() bool) time.Duration {
	w.t.Helper()
	begin := w.now
	for !cond() {
		if w.now.Sub(begin) > atMost {
			w.t.Fatalf("%s: not within %v", what, atMost)
		}
		w.run(tickEvery)
	}
	return w.now.Sub(begin)
}

func TestPathComesUpAtOnceWithFullSize(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.until("up", 200*time.Millisecond, w.p.usable)
	if w.p.mtu != 1450 {
		t.Errorf("mtu %d, want the limit of the device, 1450", w.p.mtu)
	}
}

func TestPathNeedsBothDirections(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.p.peerUp = false
	w.run(time.Second)
	if w.p.usable() {
		t.Error("usable although the other side's frames do not arrive")
	}
	if w.p.why(w.now) == "" {
		t.Error("no reason given")
	}
}

func TestCutPathFallsAndReturns(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.run(10 * time.Second)
	w.cut = true
	w.until("down", 4*time.Second, func() bool { return !w.p.usable() })
	if w.p.why(w.now) == "" {
		t.Error("down without a reason")
	}
	w.run(10 * time.Minute)
	w.cut = false
	took := w.until("up again", 8*time.Second, w.p.usable)
	if took < probeFast {
		t.Errorf("up again after %v: one answer is not enough for a path that failed", took)
	}
	if w.p.mtu != 1450 || w.p.why(w.now) != "" {
		t.Errorf("after return: mtu %d, reason %q", w.p.mtu, w.p.why(w.now))
	}
}

func TestNarrowPathIsUsedWithTheSizeItCarries(t *testing.T) {
	for _, mtu := range []int{1449, 1400, 1376, 1300, 1230, 1200} {
		w := newWire(t, mtu, 1450)
		w.until("up", 2*time.Second, w.p.usable)
		if w.p.mtu > mtu {
			t.Errorf("path of %d: claims %d", mtu, w.p.mtu)
		}
		if next := nextSize(mtu + 1); w.p.mtu != next {
			t.Errorf("path of %d: found %d, want %d, the next common size", mtu, w.p.mtu, next)
		}
	}
}

func TestShrinkingPathStaysUp(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.run(5 * time.Second)
	w.mtu = 1380
	w.until("narrower", 2200*time.Millisecond, func() bool {
		if !w.p.usable() {
			t.Fatal("a narrower path cost the path itself")
		}
		if w.p.mtu < 1376 {
			t.Fatalf("fell to %d, which senders would remember for minutes", w.p.mtu)
		}
		return w.p.mtu == 1376
	})
	w.mtu = 1450
	w.until("raised", 2*raiseInterval, func() bool { return w.p.mtu == 1450 })
}

// The size is found as well where answers take long.
func TestNarrowPathFarAway(t *testing.T) {
	for _, rtt := range []time.Duration{100, 300, 500} {
		w := newWire(t, 1380, 1450)
		w.rtt = rtt * time.Millisecond
		w.until("up", 4*time.Second, w.p.usable)
		if w.p.mtu != 1376 {
			t.Errorf("answers after %v: found %d, want 1376", w.rtt, w.p.mtu)
		}
		w.run(time.Second)
		w.mtu = 1330
		w.until("narrower", 4*time.Second, func() bool { return w.p.mtu == 1330 })
		w.run(5 * time.Second)
		if !w.p.usable() || w.p.mtu != 1330 {
			t.Errorf("answers after %v: usable %v with %d at the end", w.rtt, w.p.usable(), w.p.mtu)
		}
	}
}

// A path that comes back narrower is used again with the size it has now.
func TestPathReturnsNarrower(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.run(5 * time.Second)
	w.cut = true
	w.run(time.Minute)
	w.cut, w.mtu = false, 1380
	w.until("up again", 8*time.Second, w.p.usable)
	if w.p.mtu != 1376 {
		t.Errorf("mtu %d, want 1376", w.p.mtu)
	}
}

func TestUnderlayErrorNarrowsAtOnce(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.run(5 * time.Second)
	w.p.refused(1450, 1400, nil)
	if w.p.limit != 1400 || w.p.mtu != 1400 || !w.p.up {
		t.Errorf("limit %d mtu %d up %v after EMSGSIZE with 1400", w.p.limit, w.p.mtu, w.p.up)
	}
}

func TestSendErrorIsTheReason(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.cut = true
	w.run(time.Second)
	w.p.refused(1450, 0, errors.New("network is unreachable"))
	if got := w.p.why(w.now); got != "network is unreachable" {
		t.Errorf("reason %q", got)
	}
}

func TestLateAndForeignAnswersAreIgnored(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.cut = true
	w.run(time.Second)
	w.p.ack(12345, w.now)
	w.p.ack(1, w.now.Add(time.Minute))
	if w.p.up {
		t.Error("up by an answer that belongs to no probe in flight")
	}
}

// A path that is barred is not probed and not used, whatever it was before, and
// proves itself anew when it is allowed again.
func TestBarredPath(t *testing.T) {
	w := newWire(t, 1500, 1450)
	w.until("up", time.Second, w.p.usable)
	w.p.bar("because", w.now)
	sent := w.token
	w.run(10 * time.Second)
	if w.p.usable() || w.p.up || w.token != sent || w.p.why(w.now) != "because" {
		t.Errorf("usable %v, up %v, %d probes, %q", w.p.usable(), w.p.up, w.token-sent, w.p.why(w.now))
	}
	w.p.bar("", w.now)
	if w.p.usable() {
		t.Error("usable without proof")
	}
	w.until("up again", 2*time.Second, w.p.usable)
}
