package register

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"weave.local/ipam/space"
	"weave.local/peer"
)

// sim is some nodes and the messages between them; one message is dealt with
// at a time, in any order.
type sim struct {
	t      *testing.T
	rand   *rand.Rand
	now    time.Time
	nodes  []*simNode
	flying []flight
	chosen map[string]string
	epochs map[peer.Name]map[uint64]uint64 // by version
	grants int
}

type simNode struct {
	*Node
	cfg      Config
	state    []byte // durable
	acceptor []byte
}

type flight struct {
	from, to peer.Name
	octets   []byte
}

var testRange = netip.MustParsePrefix("10.32.0.0/24") //nolint:gochecknoglobals // a constant

func newSim(t *testing.T, seed uint64, n, quorum int) *sim {
	s := &sim{
		t: t, rand: rand.New(rand.NewPCG(seed, 7)), now: time.Unix(0, 0),
		chosen: map[string]string{}, epochs: map[peer.Name]map[uint64]uint64{},
	}
	for i := range n {
		cfg := Config{Self: ID{peer.Name(i + 1), uint64(100 + i)}, Range: testRange, Quorum: quorum, Rand: s.rand}
		s.nodes = append(s.nodes, &simNode{cfg: cfg})
		s.boot(s.nodes[i])
	}
	return s
}

// boot makes a node of what is durable.
func (s *sim) boot(n *simNode) {
	var st *State
	var err error
	if n.state != nil {
		if st, err = ParseState(n.state); err != nil {
			s.t.Fatal(err)
		}
	}
	if n.Node, err = New(n.cfg, st, n.acceptor); err != nil {
		s.t.Fatal(err)
	}
}

// do carries out effects; now and then the node dies before it wrote
// anything, or after.
func (s *sim) do(n *simNode, e Effects) {
	dies := s.rand.IntN(400)
	if dies == 0 {
		s.boot(n)
		return
	}
	if e.Dirty {
		if st := n.State(); st != nil {
			n.state = st.Append(nil)
			s.note(st)
		}
		n.acceptor = n.Acceptor()
	}
	for _, env := range e.Send {
		s.flying = append(s.flying, flight{n.cfg.Self.Name, env.To, env.Append(nil)})
	}
	if dies == 1 {
		s.boot(n)
	}
}

// note checks I1 and I4.
func (s *sim) note(st *State) {
	if err := st.Validate(); err != nil {
		s.t.Fatal(err)
	}
	key := fmt.Sprint(st.Term, st.Version)
	text := string(st.Append(nil))
	if was, ok := s.chosen[key]; ok && was != text {
		s.t.Fatalf("version %s has two values", key)
	}
	s.chosen[key] = text
	s.grants = max(s.grants, len(st.Grants))
	for _, m := range st.Members {
		if s.epochs[m.Name] == nil {
			s.epochs[m.Name] = map[uint64]uint64{}
		}
		s.epochs[m.Name][st.Version] = m.Epoch
		for v, e := range s.epochs[m.Name] {
			if v < st.Version && e > m.Epoch || v > st.Version && e < m.Epoch {
				s.t.Fatalf("%v: epoch %d in version %d, %d in version %d", m.Name, e, v, m.Epoch, st.Version)
			}
		}
	}
}

func (s *sim) step() {
	if len(s.flying) > 300 { // an overfull network forgets
		s.flying = s.flying[len(s.flying)-300:]
	}
	if len(s.flying) > 0 && s.rand.IntN(10) > 0 {
		i := s.rand.IntN(len(s.flying))
		f := s.flying[i]
		switch s.rand.IntN(10) {
		case 0: // doubled: it stays
		case 1: // lost
			s.drop(i)
			return
		default:
			s.drop(i)
		}
		m, err := ParseMessage(f.octets)
		if err != nil {
			s.t.Fatal(err)
		}
		n := s.nodes[f.to-1]
		s.do(n, n.Receive(s.now, f.from, m))
		return
	}
	s.now = s.now.Add(time.Duration(s.rand.IntN(100)) * time.Millisecond)
	n := s.nodes[s.rand.IntN(len(s.nodes))]
	switch s.rand.IntN(8) {
	case 0: // who is reachable decides whom it asks: let keepers compete
		n.SetPeers(s.some(n))
	case 1:
		s.do(n, n.Found(s.now))
	case 2, 3:
		s.do(n, n.Demand(s.now, true, s.ops(n), nil))
	case 4:
		if st := s.nodes[s.rand.IntN(len(s.nodes))].State(); st != nil && s.rand.IntN(20) == 0 {
			s.do(n, n.Merge(s.now, 1, st))
		}
	default:
		s.do(n, n.Tick(s.now))
	}
}

func (s *sim) drop(i int) {
	last := len(s.flying) - 1
	s.flying[i] = s.flying[last]
	s.flying = s.flying[:last]
}

func (s *sim) some(n *simNode) []peer.Name {
	var out []peer.Name
	for _, p := range s.nodes {
		if p != n && s.rand.IntN(2) == 0 {
			out = append(out, p.cfg.Self.Name)
		}
	}
	return out
}

func (s *sim) ops(n *simNode) []Op {
	st := n.State()
	if st == nil {
		return nil
	}
	own := st.Owned(n.cfg.Self.Name)
	switch s.rand.IntN(6) {
	case 0, 1:
		return []Op{{Kind: OpGrant, Subnet: testRange, Peers: uint64(len(s.nodes))}}
	case 2:
		a := testRange.Addr().As4()
		a[3] = byte(s.rand.IntN(256))
		return []Op{{Kind: OpBlock, Range: space.Single(netip.AddrFrom4(a))}}
	case 3:
		if r := own.Ranges(); len(r) > 0 {
			return []Op{{Kind: OpRelease, Range: r[s.rand.IntN(len(r))], To: peer.Name(s.rand.IntN(len(s.nodes) + 1))}}
		}
	case 4:
		if s.rand.IntN(5) == 0 {
			return []Op{{Kind: OpLeave}}
		}
	}
	return nil
}

// TestOneValuePerVersion drives competing proposers through loss, doubling,
// any order of messages and crashes, and wants one value for each version and
// epochs that only grow.
func TestOneValuePerVersion(t *testing.T) {
	runs, steps := uint64(40), 6000
	if testing.Short() {
		runs = 8
	}
	versions, grants := 0, 0
	for seed := range runs {
		s := newSim(t, seed, 3+int(seed%4), 3+int(seed%4))
		for _, n := range s.nodes {
			n.SetPeers(s.some(n))
		}
		for range steps {
			s.step()
		}
		versions += len(s.chosen)
		grants += s.grants
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if versions < 20*int(runs) || grants == 0 {
		t.Fatalf("only %d versions in %d runs, %d grants", versions, runs, grants)
	}
	t.Logf("%d versions", versions)
}

// acceptorAfterRestart is a keeper of three that took messages, wrote what it was
// told to write, and came back from that.
func acceptorAfterRestart(t *testing.T, took ...Message) (*Node, Effects) {
	t.Helper()
	st := found(t, "10.32.0.0/24", 3)
	cfg := Config{Self: ID{1, 100}, Range: st.Range, Quorum: 3, Rand: rand.New(rand.NewPCG(1, 1))}
	n, err := New(cfg, st, nil)
	if err != nil {
		t.Fatal(err)
	}
	var record []byte
	var e Effects
	for _, m := range took {
		m.Cluster, m.Range, m.Store, m.Version = st.Cluster, st.Range, 101, st.Version+1
		e = n.Receive(time.Unix(0, 0), 2, &m)
		if e.Dirty {
			record = n.Acceptor()
		}
	}
	back, err := New(cfg, st, record)
	if err != nil {
		t.Fatal(err)
	}
	return back, e
}

func TestPromiseOutlivesTheProcess(t *testing.T) {
	n, e := acceptorAfterRestart(t, Message{Kind: KindPrepare, Ballot: Ballot{5, 2}})
	if len(e.Send) != 1 || e.Send[0].Kind != KindPromise {
		t.Fatalf("answer %+v", e.Send)
	}
	st := n.State()
	m := Message{Kind: KindAccept, Cluster: st.Cluster, Range: st.Range, Store: 102, Version: st.Version + 1, Ballot: Ballot{4, 3}, State: st}
	e = n.Receive(time.Unix(0, 0), 3, &m)
	if len(e.Send) != 1 || e.Send[0].Kind != KindRefuse || e.Send[0].Accepted != (Ballot{5, 2}) {
		t.Fatalf("a lower ballot after the restart: %+v", e.Send)
	}
}

func TestAcceptanceOutlivesTheProcess(t *testing.T) {
	value := found(t, "10.32.0.0/24", 3)
	value = apply(t, value, ask(value, 2, Op{Kind: OpGrant, Subnet: value.Range}))
	n, e := acceptorAfterRestart(t,
		Message{Kind: KindPrepare, Ballot: Ballot{5, 2}},
		Message{Kind: KindAccept, Ballot: Ballot{5, 2}, State: value})
	if len(e.Send) != 1 || e.Send[0].Kind != KindAccepted {
		t.Fatalf("answer %+v", e.Send)
	}
	st := n.State()
	m := Message{Kind: KindPrepare, Cluster: st.Cluster, Range: st.Range, Store: 102, Version: st.Version + 1, Ballot: Ballot{6, 3}}
	e = n.Receive(time.Unix(0, 0), 3, &m)
	if len(e.Send) != 1 || e.Send[0].Kind != KindPromise || e.Send[0].Accepted != (Ballot{5, 2}) || e.Send[0].State == nil {
		t.Fatalf("the promise after the restart does not tell: %+v", e.Send)
	}
}
