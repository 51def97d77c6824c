// Package overlaytest is the conformance suite of overlay.Overlay: what the
// router relies on, whatever the data path. A data path's own tests build two
// of it, joined by an underlay, and hand them to Run.
package overlaytest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// End is one of the two data paths under test. Nothing is applied to it yet,
// and it does not run.
type End struct {
	Path       overlay.Overlay
	Probes     *Recorder          // its OnProbe is that of Path
	Forwarding overlay.Forwarding // has the other end as its only neighbour
}

// Pair is two ends that can send to each other.
type Pair struct {
	A, B End
	MTU  int // largest IP packet, in bytes, that one frame carries between them
}

// Probe is the arrival of a probe.
type Probe struct {
	Path  string
	From  peer.ShortID
	Token uint64
	Size  int
}

// Recorder keeps the latest probes that arrive.
type Recorder struct{ arrived chan Probe }

// NewRecorder returns an empty Recorder.
func NewRecorder() *Recorder { return &Recorder{arrived: make(chan Probe, 256)} }

// OnProbe is an overlay.ProbeFunc.
func (r *Recorder) OnProbe(path string, from peer.ShortID, token uint64, size int) {
	select {
	case r.arrived <- Probe{path, from, token, size}:
	default: // nobody reads: the oldest are enough to tell
	}
}

const (
	patience = 10 * time.Second       // until a probe must have arrived
	again    = 250 * time.Millisecond // until it is sent once more
	unknown  = peer.ShortID(4000)     // short id of nobody
)

// Run tests the data paths that build makes; it is called once for each test,
// and what it opens must end with t.
func Run(t *testing.T, build func(t *testing.T) Pair) {
	t.Helper()
	for _, c := range []struct {
		name string
		test func(*testing.T, Pair)
	}{
		{"Name", testName},
		{"UnknownNeighbour", testUnknown},
		{"ProbeArrives", testProbe},
		{"MTU", testMTU},
		{"TooBig", testTooBig},
		{"NeighbourRemoved", testRemoved},
		{"ApplyAgain", testApplyAgain},
		{"Concurrent", testConcurrent},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := build(t)
			serve(t, p.A.Path)
			serve(t, p.B.Path)
			c.test(t, p)
		})
	}
}

// serve runs a path until the test ends, and sees that it then ends too.
func serve(t *testing.T, o overlay.Overlay) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- o.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Errorf("Run goes on %v after its context ended", patience)
		}
	})
}

func apply(t *testing.T, e End) {
	t.Helper()
	if err := e.Path.Apply(e.Forwarding); err != nil {
		t.Fatalf("Apply: %v", err)
	}
}

func applyBoth(t *testing.T, p Pair) {
	t.Helper()
	apply(t, p.A)
	apply(t, p.B)
}

// expect sends a probe until it arrives: a datagram may be lost.
func expect(t *testing.T, from, to End, token uint64, size int) {
	t.Helper()
	want := Probe{to.Path.Name(), from.Forwarding.Self, token, size}
	late := time.After(patience)
	for {
		if err := from.Path.Probe(to.Forwarding.Self, token, size); err != nil {
			t.Fatalf("Probe of %d bytes: %v", size, err)
		}
		if arrives(t, to.Probes, want, time.After(again)) {
			return
		}
		select {
		case <-late:
			t.Fatalf("probe of %d bytes has not arrived in %v", size, patience)
		default:
		}
	}
}

// arrives waits for the probe want. Earlier ones may come a second time; one
// with the token of want and anything else different is an error.
func arrives(t *testing.T, r *Recorder, want Probe, end <-chan time.Time) bool {
	t.Helper()
	for {
		select {
		case got := <-r.arrived:
			if got == want {
				return true
			}
			if got.Token == want.Token {
				t.Fatalf("arrived %+v, sent %+v", got, want)
			}
		case <-end:
			return false
		}
	}
}

func testName(t *testing.T, p Pair) {
	if name := p.A.Path.Name(); name != overlay.FastDP && name != overlay.Sleeve {
		t.Errorf("Name is %q", name)
	}
}

func testUnknown(t *testing.T, p Pair) {
	check := func() {
		t.Helper()
		if mtu := p.A.Path.MTU(unknown); mtu != 0 {
			t.Errorf("MTU to an unknown neighbour is %d", mtu)
		}
		err := p.A.Path.Probe(unknown, 1, 100)
		var big *overlay.TooBigError
		if err == nil || errors.As(err, &big) {
			t.Errorf("probe to an unknown neighbour: %v", err)
		}
	}
	check() // nothing is applied
	applyBoth(t, p)
	check()
}

func testProbe(t *testing.T, p Pair) {
	applyBoth(t, p)
	for i, size := range []int{0, 1, 28, 100, 576, 1000, p.MTU} {
		expect(t, p.A, p.B, uint64(i)<<40|1, size)
		expect(t, p.B, p.A, uint64(i)<<40|2, size)
	}
	expect(t, p.A, p.B, ^uint64(0), 64)
}

func testMTU(t *testing.T, p Pair) {
	applyBoth(t, p)
	if mtu := p.A.Path.MTU(p.B.Forwarding.Self); mtu != p.MTU {
		t.Errorf("MTU is %d, want %d", mtu, p.MTU)
	}
	if mtu := p.B.Path.MTU(p.A.Forwarding.Self); mtu != p.MTU {
		t.Errorf("MTU of the other end is %d, want %d", mtu, p.MTU)
	}
}

func testTooBig(t *testing.T, p Pair) {
	applyBoth(t, p)
	for _, size := range []int{p.MTU + 1, p.MTU + 100, 9000, 65535} {
		if size <= p.MTU {
			continue
		}
		err := p.A.Path.Probe(p.B.Forwarding.Self, 77, size)
		var big *overlay.TooBigError
		if !errors.As(err, &big) {
			t.Errorf("probe of %d bytes where %d fit: %v, want a TooBigError", size, p.MTU, err)
			continue
		}
		if big.MTU != 0 && big.MTU != p.MTU {
			t.Errorf("probe of %d bytes: %d fit, says the error, not %d", size, big.MTU, p.MTU)
		}
	}
	// Nothing of those may come before this one.
	expect(t, p.A, p.B, 78, p.MTU)
}

func testRemoved(t *testing.T, p Pair) {
	applyBoth(t, p)
	expect(t, p.A, p.B, 1, 100)
	if err := p.A.Path.Apply(overlay.Forwarding{Self: p.A.Forwarding.Self}); err != nil {
		t.Fatalf("Apply of nothing: %v", err)
	}
	if err := p.A.Path.Probe(p.B.Forwarding.Self, 2, 100); err == nil {
		t.Error("a probe goes to a neighbour that is removed")
	}
	if mtu := p.A.Path.MTU(p.B.Forwarding.Self); mtu != 0 {
		t.Errorf("MTU to a neighbour that is removed is %d", mtu)
	}
	apply(t, p.A)
	expect(t, p.A, p.B, 3, 100)
}

func testApplyAgain(t *testing.T, p Pair) {
	for i := range 5 {
		applyBoth(t, p)
		expect(t, p.A, p.B, uint64(i), 100)
		expect(t, p.B, p.A, uint64(i)+100, 100)
	}
}

// testConcurrent calls everything at once, for the race detector.
func testConcurrent(t *testing.T, p Pair) {
	applyBoth(t, p)
	var wg sync.WaitGroup
	for _, e := range []struct{ at, other End }{{p.A, p.B}, {p.B, p.A}} {
		wg.Go(func() {
			for range 20 {
				if err := e.at.Path.Apply(e.at.Forwarding); err != nil {
					t.Errorf("Apply: %v", err)
				}
			}
		})
		wg.Go(func() {
			for i := range 100 {
				if e.at.Path.MTU(e.other.Forwarding.Self) == 0 {
					t.Error("MTU is 0 while a forwarding is replaced by the same")
				}
				// Refusal is no matter here: a queue may be full.
				_ = e.at.Path.Probe(e.other.Forwarding.Self, uint64(i), 100)
			}
		})
	}
	wg.Wait()
	for len(p.B.Probes.arrived) > 0 {
		<-p.B.Probes.arrived
	}
	expect(t, p.A, p.B, 1<<50, 200)
}
