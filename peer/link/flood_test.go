package link

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
)

// While links come and go, peers disagree about trees for moments. A broadcast
// may then be lost, but nobody gets it twice, and once all is quiet everybody
// gets everything.
func TestBroadcastsWhileLinksChange(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	var nodes []*node
	for name := peer.Name(1); name <= 5; name++ {
		nodes = append(nodes, h.start(name, []peer.Name{1, 2}))
	}
	until(t, "mesh", 6*time.Second, meshed(4, nodes...))
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	sent := 0
	for begin := time.Now(); time.Since(begin) < 2*time.Second; sent++ {
		<-tick.C
		nodes[0].Broadcast(testKind, fmt.Append(nil, "b", sent))
		if sent%40 == 0 {
			nodes[rand.N(5)].breakLink()
		}
	}
	until(t, "mesh again", 20*time.Second, meshed(4, nodes...))
	for range 50 {
		nodes[0].Broadcast(testKind, fmt.Append(nil, "quiet", sent))
		sent++
	}
	until(t, "the last broadcast", 2*time.Second, func() bool {
		for _, n := range nodes[1:] {
			if got := n.messages(); len(got) == 0 || got[len(got)-1] != fmt.Sprintf("1 quiet%d", sent-1) {
				return false
			}
		}
		return true
	})
	for _, n := range nodes[1:] {
		got := n.messages()
		all := len(got)
		slices.Sort(got)
		if got = slices.Compact(got); len(got) != all {
			t.Errorf("%v got %d broadcasts twice", n.Self(), all-len(got))
		}
		quiet := 0
		for _, m := range got {
			if m[:3] == "1 q" {
				quiet++
			}
		}
		if quiet != 50 {
			t.Errorf("%v got %d of 50 broadcasts in a stable mesh", n.Self(), quiet)
		}
		t.Logf("%v got %d of %d", n.Self(), all, sent)
	}
}

func (n *node) breakLink() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.Mesh.mu.Lock()
	defer n.Mesh.mu.Unlock()
	for _, l := range n.links {
		l.stop(errors.New("broken by the test"))
		return
	}
}

// 1 - 2 - 3: a peer that lost records gets them again because digests differ.
func TestDigestsRepairTheDatabase(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(3)
	a := nodes[0]
	a.Mesh.mu.Lock()
	own, _ := a.topo.Record(1)
	a.topo = peer.NewTopology(a.self, own.Seq)
	a.topo.SetLocal(a.self, slices.Clone(own.Neighbours))
	a.Mesh.mu.Unlock()
	if len(a.Topology().Reachable()) != 0 {
		t.Fatal("the database is not empty")
	}
	until(t, "repair", 4*helloEvery, func() bool { return len(a.Topology().Reachable()) == 2 })
	until(t, "agreement", 4*helloEvery, func() bool {
		return a.Topology().Digest() == nodes[2].Topology().Digest() && a.Topology().Digest() == nodes[1].Topology().Digest()
	})
}

// A peer whose clock was put back restarts with a lower sequence number than
// others remember; it learns so from them and goes beyond it.
func TestRestartWithClockBehind(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil)
	later := uint64(time.Now().Add(time.Hour).UnixNano())
	a.Mesh.mu.Lock()
	a.topo.Merge(peer.Record{Info: peer.Info{Name: 2, UID: 5}, Seq: later, Neighbours: []peer.Adjacency{{Name: 1}}})
	a.Mesh.mu.Unlock()
	b := h.start(2, []peer.Name{1}, withUID(77))
	until(t, "the new record stands", 3*time.Second, func() bool {
		r, _ := a.Topology().Record(2)
		return r.UID == 77 && r.Seq > later && meshed(1, a, b)()
	})
}

func TestChangesAreTold(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil)
	more, cancel := a.Subscribe()
	b := h.start(2, []peer.Name{1})
	limit := time.After(3 * time.Second)
	for !meshed(1, a, b)() {
		select {
		case <-more:
		case <-limit:
			t.Fatal("a neighbour came without a word")
		}
	}
	select {
	case <-a.Changes():
	default:
		t.Error("the first reader was not told")
	}
	cancel()
	b.stop()
	for len(a.Neighbours()) != 0 {
		select {
		case <-a.Changes():
		case <-limit:
			t.Fatal("a neighbour went without a word")
		}
	}
}
