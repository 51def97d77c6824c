package dialer

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
)

// scene drives a dialer: links says which peers are linked.
type scene struct {
	*Dialer
	t     *testing.T
	now   time.Time
	links map[peer.Name]bool
}

func newScene(t *testing.T, targets ...string) *scene {
	t.Helper()
	s := &scene{Dialer: New(6783), t: t, now: time.Unix(1000, 0), links: map[peer.Name]bool{}}
	for _, target := range targets {
		if err := s.Add(target, s.now); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *scene) linked(n peer.Name) bool { return s.links[n] }

func (s *scene) begin() []Job { return s.Start(s.now, s.linked, true, 1000) }

// fail lets the only due attempt fail and returns the wait until the next.
func (s *scene) fail(o Outcome) time.Duration {
	s.t.Helper()
	jobs := s.begin()
	if len(jobs) != 1 {
		s.t.Fatalf("%d attempts due", len(jobs))
	}
	s.Finish(jobs[0], o, s.now)
	return jobs[0].dial.due.Sub(s.now)
}

func TestWaitsGrow(t *testing.T) {
	s := newScene(t, "192.0.2.1")
	want := firstWait
	for i := range 20 {
		got := s.fail(Outcome{Err: errors.New("no answer")})
		if got < want*3/4 || got > want*5/4 {
			t.Errorf("wait %d is %v, want %v by a quarter more or less", i, got, want)
		}
		if rows := s.Rows(s.linked); len(rows) != 1 || rows[0].State != Failed || rows[0].Err != "no answer" ||
			!rows[0].Retry.Equal(s.now.Add(got)) || rows[0].Addr != "192.0.2.1:6783" {
			t.Errorf("rows %+v", rows)
		}
		s.now = s.now.Add(got)
		want = min(want*3/2, longestWait)
	}
	if got := s.fail(Outcome{Err: errors.New("no answer")}); got > 10*time.Second {
		t.Errorf("what heals after a long time is dialled only %v later", got)
	}
	if err := s.Add("192.0.2.1", s.now); err != nil || len(s.begin()) != 1 {
		t.Errorf("not dialled at once when asked to: %v", err)
	}
	if rows := s.Rows(s.linked); rows[0].State != Retrying || rows[0].Err != "no answer" {
		t.Errorf("rows %+v", rows)
	}
}

func TestLinkedTargetRests(t *testing.T) {
	s := newScene(t, "192.0.2.1")
	if rows := s.Rows(s.linked); len(rows) != 1 || rows[0].State != Connecting {
		t.Errorf("rows %+v", rows)
	}
	s.fail(Outcome{Peer: 7})
	s.links[7] = true
	s.now = s.now.Add(time.Hour)
	if jobs, rows := s.begin(), s.Rows(s.linked); len(jobs) != 0 || len(rows) != 0 {
		t.Errorf("dialled or shown although linked: %v %v", jobs, rows)
	}
	delete(s.links, 7)
	s.Down(7, errors.New("cut"), time.Hour, s.now)
	if len(s.begin()) != 0 {
		t.Error("dialled in the very moment of the loss")
	}
	s.now = s.now.Add(2 * firstWait)
	if len(s.begin()) != 1 {
		t.Error("not dialled again after the loss")
	}
}

// A link that dies as soon as it is up must not be redialled every second.
func TestFlappingLinkIsDialledLessAndLess(t *testing.T) {
	s := newScene(t, "192.0.2.1")
	var last time.Duration
	for range 15 {
		jobs := s.begin()
		if len(jobs) != 1 {
			t.Fatalf("%d attempts due", len(jobs))
		}
		s.Finish(jobs[0], Outcome{Peer: 7}, s.now)
		s.Down(7, errors.New("broken"), time.Second, s.now)
		last = jobs[0].dial.due.Sub(s.now)
		s.now = s.now.Add(last)
	}
	if last < longestWait*3/4 {
		t.Errorf("still dialled after %v", last)
	}
}

func TestOurselvesAreLeftSilently(t *testing.T) {
	s := newScene(t, "192.0.2.1")
	s.fail(Outcome{Peer: 1, Self: true, Err: errors.New("self")})
	s.now = s.now.Add(time.Hour)
	if len(s.begin()) != 0 || len(s.Rows(s.linked)) != 0 {
		t.Error("dialled or shown again")
	}
	if got := s.Targets(); !slices.Equal(got, []string{"192.0.2.1"}) {
		t.Errorf("targets %v", got)
	}
}

// Whoever answers and does not want us is shown with the reason and dialled
// rarely, but not left for ever: the other may be restarted under another name.
func TestRefusalsAreRepeatedRarely(t *testing.T) {
	for name, o := range map[string]Outcome{
		"collision": {Err: errors.New("taken"), Refused: true, Collision: true},
		"password":  {Err: errors.New("passwords differ"), Refused: true},
	} {
		s := newScene(t, "192.0.2.1")
		begin := s.now
		tries := 0
		for s.now.Sub(begin) < time.Hour {
			s.now = s.now.Add(s.fail(o))
			tries++
		}
		if tries < 40 || tries > 90 {
			t.Errorf("%s: %d attempts in an hour", name, tries)
		}
		if rows := s.Rows(s.linked); rows[0].State != Failed || rows[0].Err != o.Err.Error() || rows[0].Retry.IsZero() {
			t.Errorf("%s: %+v", name, rows)
		}
	}
}

// However many peers are gone, few dials go out, and those who come back into
// reach do not wait behind the others.
func TestManyDeadPeers(t *testing.T) {
	const dead = 1000
	s := newScene(t)
	for i := range dead {
		addr := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		s.Discover(peer.Name(i+1), []netip.AddrPort{netip.AddrPortFrom(addr, 6783)}, s.now, true)
	}
	reach := map[peer.Name]bool{}
	reaches := func(n peer.Name) bool { return reach[n] }
	tried := map[peer.Name]int{}
	second := func() (n int, woken bool) { // in which all attempts fail at once
		for range 10 {
			s.now = s.now.Add(100 * time.Millisecond)
			s.Wake(reaches, s.linked, s.now)
			for _, j := range s.begin() {
				n++
				tried[j.dial.peer]++
				woken = woken || reach[j.dial.peer]
				s.Finish(j, Outcome{Err: errors.New("refused")}, s.now)
			}
		}
		return n, woken
	}
	for range 60 {
		_, _ = second()
	}
	for range 120 {
		if n, _ := second(); n > repeatRate+1 {
			t.Fatalf("%d dials in a second", n)
		}
	}
	if len(tried) != dead {
		t.Errorf("only %d were tried", len(tried))
	}
	reach[500] = true
	for i := 0; ; i++ {
		if _, woken := second(); woken {
			break
		}
		if i > 1 {
			t.Fatal("who came back into reach was not dialled soon")
		}
	}

	// Attempts that hang leave room for others.
	s.now = s.now.Add(time.Hour)
	for range 20 {
		s.now = s.now.Add(time.Second)
		_ = s.begin()
	}
	if s.busy > maxRepeats {
		t.Errorf("%d attempts hang", s.busy)
	}
	if err := s.Add("192.0.2.1", s.now); err != nil || len(s.begin()) != 1 {
		t.Errorf("no room for a new target: %v", err)
	}
}

func TestDiscovery(t *testing.T) {
	at := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:6783")}
	s := newScene(t)
	s.Discover(7, at, s.now, true)
	s.Discover(8, []netip.AddrPort{netip.MustParseAddrPort("192.0.2.8:6783")}, s.now, false)
	jobs := s.begin()
	if len(jobs) != 1 || jobs[0].dial.peer != 7 || !slices.Equal(jobs[0].Addrs, at) {
		t.Fatalf("jobs %+v", jobs)
	}
	s.Finish(jobs[0], Outcome{Peer: 9}, s.now)
	if rows := s.Rows(s.linked); !strings.Contains(rows[0].Err, "another peer") {
		t.Errorf("rows %+v", rows)
	}
	s.now = s.now.Add(politeWait)
	if got := s.Start(s.now, s.linked, false, 1000); len(got) != 0 {
		t.Error("dialled over the limit of links")
	}
	if got := s.begin(); len(got) != 2 {
		t.Errorf("%d attempts", len(got))
	}

	// A target that leads there replaces what was discovered.
	s = newScene(t, "192.0.2.7")
	s.Discover(7, at, s.now, true)
	if len(s.dials) != 1 {
		t.Error("dialled twice")
	}
	s = newScene(t)
	s.Discover(7, at, s.now, true)
	s.Lose(7)
	if len(s.begin()) != 0 {
		t.Error("dialled although it is gone for good")
	}
}

func TestForgottenDuringAttempt(t *testing.T) {
	s := newScene(t, "192.0.2.1")
	jobs := s.begin()
	s.Forget("192.0.2.1")
	s.Finish(jobs[0], Outcome{Err: errors.New("no answer")}, s.now)
	s.now = s.now.Add(time.Hour)
	if len(s.begin()) != 0 || len(s.Rows(s.linked)) != 0 || s.busy != 0 {
		t.Error("came back")
	}
}

// Links all to all are for a cluster that is small and does not grow.
func TestLinksWanted(t *testing.T) {
	ds, now := New(6783), time.Unix(1000, 0)
	for _, x := range []struct {
		wait         time.Duration
		links, peers int
		want         int
	}{
		{0, 0, 3, enoughLinks},
		{0, 5, 40, enoughLinks - 5},
		{growWait, 5, 40, 40},
		{time.Second, enoughLinks, 44, 44}, // one more now and then
		{0, enoughLinks, MeshMost, 0},
		{growWait, enoughLinks, MeshMost, MeshMost},
		{growWait, enoughLinks, MeshMost + 1, 0},
		{growWait, 3, MeshMost + 1, enoughLinks - 3},
		{growWait, 3, 50, 50},
		{0, 3, 90, enoughLinks - 3},
	} {
		now = now.Add(x.wait)
		if got := ds.Wanted(x.links, x.peers, now); got != x.want {
			t.Errorf("%d wanted besides %d among %d peers, want %d", got, x.links, x.peers, x.want)
		}
	}
	var first [2]int // of whoever has the highest UID, and the lowest
	for range 1000 {
		u := peer.UID(rand.Uint64()>>2) + 1
		if First(u, 1) == First(1, u) || First(u, 1<<63) == First(1<<63, u) {
			t.Fatal("both ends dial first, or none")
		}
		if First(1<<63, u) {
			first[0]++
		}
		if First(1, u) {
			first[1]++
		}
	}
	if min(first[0], first[1]) < 400 || max(first[0], first[1]) > 600 {
		t.Errorf("of 1,000 peers the one with the highest UID dials %d, the one with the lowest %d", first[0], first[1])
	}
}

// Of many peers discovery dials some, and all that cannot be reached; what it
// leaves alone is not shown.
func TestManyPeersAreLinkedSparsely(t *testing.T) {
	s := newScene(t)
	const far = 280
	for n := peer.Name(1); n <= 300; n++ {
		s.Discover(n, []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}), 6783)}, s.now, true)
	}
	s.Wake(func(n peer.Name) bool { return n <= far }, s.linked, s.now)
	for range 100 {
		jobs := s.Start(s.now, s.linked, true, 3-len(s.links))
		near := 0
		for _, j := range jobs {
			if j.dial.peer <= far {
				near++
			}
		}
		if most := max(0, 3-len(s.links)); near > most {
			t.Fatalf("%d attempts for %d links", near, most)
		}
		if more := s.Start(s.now, s.linked, true, 3-len(s.links)); slices.ContainsFunc(more, func(j Job) bool { return j.dial.peer <= far }) {
			t.Fatal("what runs is not counted")
		}
		for _, j := range jobs {
			if s.Finish(j, Outcome{Peer: j.dial.peer}, s.now); len(s.links) < 3 || j.dial.peer > far {
				s.links[j.dial.peer] = true
			}
		}
		if s.now = s.now.Add(time.Second); s.busy != 0 {
			s.busy = 0
			for _, d := range s.dials {
				d.busy = false
			}
		}
	}
	for n := peer.Name(far + 1); n <= 300; n++ {
		if !s.links[n] {
			t.Errorf("no link to %v, which is out of reach", n)
		}
	}
	if rows := s.Rows(s.linked); len(rows) != 0 {
		t.Errorf("%d rows of peers that need no link", len(rows))
	}
}
