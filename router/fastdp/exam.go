package fastdp

import (
	"slices"
	"time"

	"weave.local/router/bpf"
)

// An exam finds out whether the devices on the way to a neighbour do what is left
// to them with frames in tunnels: complete checksums, cut super-frames. Beside
// each frame of which something is left to them goes one of which nothing is, so
// that nothing else that is wrong with the way is taken for their fault.
const (
	examRounds = 8                      // of one frame of each kind
	examEvery  = 100 * time.Millisecond // between rounds
	examWait   = time.Second            // for the last answers
	examEnough = 6                      // answers to complete frames, out of one for each round, to go by
	examAgain  = 5 * time.Minute        // after one that told something
	examSoon   = 10 * time.Second       // after one that did not
)

// kinds of frames in an exam
const (
	complete    = iota // nothing is left to devices
	withoutSum         // the checksum is
	superFrame         // cutting it into segments is as well
	examKinds          // how many there are
	examCutInto = 2    // segments of a super-frame
)

// exam is pure: the time and tokens of answers come in, probes to send go out.
type exam struct {
	token   uint64 // its upper 32 bits; those of all probes
	sent    int    // rounds
	last    time.Time
	arrived [examKinds]int    // frames
	cut     [examCutInto]bool // segments of super-frames that arrived
}

// newExam takes a random number that no other exam has.
func newExam(random uint64) *exam { return &exam{token: random &^ 0xffffffff} }

// due returns the probes that are to be sent now.
func (x *exam) due(now time.Time) []segments {
	if x.sent == examRounds || now.Sub(x.last) < examEvery {
		return nil
	}
	x.sent++
	x.last = now
	probes := make([]segments, examKinds)
	for kind := range probes {
		probes[kind] = segments{token: x.token | uint64(kind)<<16, n: 1, left: kind != complete}
	}
	probes[superFrame].n = examCutInto
	return probes
}

// answered takes in the token of an answer, and says whether it was to this exam.
func (x *exam) answered(token uint64) bool {
	for kind := range x.arrived {
		n := 1
		if kind == superFrame {
			n = examCutInto
		}
		for first := range n {
			for end := first + 1; end <= n; end++ {
				if token != bpf.SegmentToken(x.token|uint64(kind)<<16, first, end) {
					continue
				}
				x.arrived[kind]++
				for i := first; i < end && kind == superFrame; i++ {
					x.cut[i] = true
				}
				return true
			}
		}
	}
	return false
}

// over says whether the exam has ended.
func (x *exam) over(now time.Time) bool { return x.sent == examRounds && now.Sub(x.last) > examWait }

// verdict says what devices do not do, "" when they do all; told is false when
// the exam tells nothing, since the complete frames did not arrive either.
func (x *exam) verdict() (fault string, told bool) {
	cut := !slices.Contains(x.cut[:], false)
	switch {
	case x.arrived[withoutSum] > 0 && cut:
		return "", true
	case x.arrived[complete] < examEnough:
		return "", false
	case x.arrived[withoutSum] == 0:
		return "checksums inside tunnels are not completed right", true
	}
	return "super-frames inside tunnels are not cut right", true
}
