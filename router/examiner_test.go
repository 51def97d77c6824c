package router

import (
	"log/slog"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// examiner is a data path with probes of its own.
type examiner struct {
	table
	from  peer.ShortID
	token uint64
}

func (x *examiner) Answered(from peer.ShortID, token uint64) { x.from, x.token = from, token }
func (x *examiner) Remark(to peer.ShortID) string {
	if to == 7 {
		return "a remark"
	}
	return ""
}

// Answers to probes that are not the router's go to the data path; what that has
// to say shows as the reason.
func TestExaminer(t *testing.T) {
	const name = peer.Name(7)
	now := time.Now()
	x := &examiner{}
	r := &Router{
		cfg: Config{Log: slog.New(slog.DiscardHandler)}, paths: []overlay.Overlay{x}, plan: newPlan(),
		neighbours: map[peer.Name]*neighbour{},
	}
	n := r.newNeighbour(now)
	n.Neighbour = overlay.Neighbour{Info: peer.Info{Name: name, ShortID: 7}}
	r.neighbours[name] = n
	n.paths[0].sent(1, smallProbe, now)
	r.receive(name, answer(overlay.FastDP, 1))
	if x.token != 0 {
		t.Error("the answer to a probe of the router went to the data path")
	}
	r.receive(name, answer(overlay.Sleeve, 2))
	if x.token != 0 {
		t.Error("an answer by another path went to the data path")
	}
	r.receive(name, answer(overlay.FastDP, 3))
	if x.from != 7 || x.token != 3 {
		t.Errorf("told of an answer by %d to %d", x.from, x.token)
	}
	if s := r.Paths()[name]; s.Reason == "a remark" {
		t.Error("a remark about a path that is not used")
	}
	n.chosen = overlay.FastDP
	if s := r.Paths()[name]; s.Reason != "a remark" {
		t.Errorf("status %+v", s)
	}
}
