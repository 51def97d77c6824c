package link

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/peer/linkstate"
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
	until(t, "mesh again", 20*time.Second, func() bool { return meshed(4, nodes...)() && agreed(nodes) })
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

// agreed says whether all peers know that everybody is linked to everybody.
func agreed(nodes []*node) bool {
	for _, n := range nodes {
		s := n.Topology()
		for _, a := range nodes {
			for _, b := range nodes {
				if a != b && !s.Connected(a.Self().Name, b.Self().Name) {
					return false
				}
			}
		}
	}
	return true
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
	a.topo = linkstate.New(a.self, own.Seq)
	a.topo.Announce(a.self, slices.Clone(own.Neighbours))
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

// 1 - 2 - 3: a broadcast of 1 is accepted at 2 from 1 only, and once.
func TestBroadcastOffItsTreeIsRefused(t *testing.T) {
	t.Parallel()
	b := newHosts(t).line(3)[1]
	c := broadcast{ttl: maxTTL, src: 1, seq: 1 << 63, kind: testKind}
	for i, step := range []struct {
		from, src peer.Name
		accept    bool
	}{{3, 1, false}, {1, 1, true}, {1, 1, false}, {1, 2, false}, {3, 3, true}, {1, 99, false}} {
		c.src = step.src
		if got := b.acceptBroadcast(b.hop(step.from), c); got != step.accept {
			t.Errorf("step %d: of %d from %d: accepted %v", i, step.src, step.from, got)
		}
	}
}

// Messages do not go back to where they came from, nor on for ever.
func TestDatagramsDoNotCircle(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(3)
	b := nodes[1]
	b.handleDatagram(b.hop(3), datagram{ttl: 5, dst: 3, src: 1, kind: testKind})
	b.handleDatagram(b.hop(1), datagram{ttl: 1, dst: 3, src: 1, kind: testKind})
	if n := b.Counters(); n["messages_relayed"] != 0 || n["messages_without_route"] != 1 || n["messages_over_hop_limit"] != 1 {
		t.Errorf("counters %v", n)
	}
	b.handleDatagram(b.hop(1), datagram{ttl: 2, dst: 3, src: 1, kind: testKind, payload: []byte("x")})
	until(t, "message", time.Second, func() bool { return slices.Equal(nodes[2].messages(), []string{"1 x"}) })
}
