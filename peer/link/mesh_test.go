package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
)

// 1 - 2 - 3 - 4
func TestLineRelays(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(4)
	first, last := nodes[0], nodes[3]
	if hop, ok := first.Topology().NextHop(4); !ok || hop != 2 {
		t.Errorf("next hop %v %v", hop, ok)
	}

	if err := first.Send(4, testKind, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	until(t, "message", time.Second, func() bool { return slices.Equal(last.messages(), []string{"1 hello"}) })
	big := bytes.Repeat([]byte("x"), MaxPayload)
	if err := last.Send(1, testKind, big); err != nil {
		t.Fatal(err)
	}
	until(t, "big message", 2*time.Second, func() bool { return slices.Equal(first.messages(), []string{"4 " + string(big)}) })

	if err := first.Send(4, testKind, append(big, 'x')); !errors.Is(err, ErrTooBig) {
		t.Errorf("too big a message: %v", err)
	}
	if err := first.Send(77, testKind, nil); !errors.Is(err, ErrNoRoute) {
		t.Errorf("message to nobody: %v", err)
	}

	for i := range 20 {
		nodes[1].Broadcast(testKind, fmt.Append(nil, "all", i))
	}
	until(t, "broadcasts", time.Second, func() bool {
		return len(first.messages()) == 21 && len(nodes[2].messages()) == 20 && len(last.messages()) == 21
	})
	if n := len(nodes[1].messages()); n != 0 {
		t.Errorf("%d broadcasts came back to their source", n)
	}
	if got := nodes[2].messages()[19]; got != "2 all19" {
		t.Errorf("got %q", got)
	}
}

func TestStreamOverRelays(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(4)
	c, err := nodes[0].Dial(t.Context(), 4)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	s := <-nodes[3].Streams()
	defer func() { _ = s.Close() }()
	if s.From != 1 {
		t.Errorf("from %v", s.From)
	}
	// More than any window, in one direction, then an answer after our end
	// is closed.
	sent := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	go func() {
		_, _ = c.Write(sent)
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(s)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d of %d bytes, %v", len(got), len(sent), err)
	}
	if _, err := s.Write([]byte("thanks")); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	answer, err := io.ReadAll(c)
	if err != nil || string(answer) != "thanks" {
		t.Errorf("answer %q, %v", answer, err)
	}
	if _, err := nodes[0].Dial(t.Context(), 99); !errors.Is(err, ErrNoRoute) {
		t.Errorf("stream to nobody: %v", err)
	}
}

func TestStreamEndsWithItsRelay(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(3)
	c, err := nodes[0].Dial(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	s := <-nodes[2].Streams()
	nodes[1].stop()
	for _, x := range []net.Conn{c, s} {
		_ = x.SetReadDeadline(time.Now().Add(3 * time.Second))
		if _, err := x.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("read after the relay ended: %v", err)
		}
		_ = x.Close()
	}
}

func TestDialHonoursContext(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(2)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := nodes[0].Dial(ctx, 2); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestStreamsThatNobodyTakesAreRefused(t *testing.T) {
	t.Parallel()
	nodes := newHosts(t).line(2)
	for i := range maxStreams {
		c, err := nodes[0].Dial(t.Context(), 2)
		if err != nil {
			t.Fatalf("stream %d: %v", i, err)
		}
		defer func() { _ = c.Close() }()
	}
	until(t, "refusal", 2*time.Second, func() bool {
		c, err := nodes[0].Dial(t.Context(), 2)
		if err == nil {
			_ = c.Close()
		}
		return errors.Is(err, ErrBusy)
	})
}

// 2 - 1 - 3    and 2, 3 find each other
func TestDiscoveryFromOneTarget(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	nodes := []*node{h.start(1, nil), h.start(2, []peer.Name{1}), h.start(3, []peer.Name{1}), h.start(4, []peer.Name{3})}
	took := until(t, "full mesh", 6*time.Second, meshed(3, nodes...))
	t.Logf("full mesh of four after %v", took)
	ids := make(map[peer.ShortID]peer.Name)
	for _, n := range nodes {
		id := n.Self().ShortID
		if other := ids[id]; id == 0 || other != 0 {
			t.Errorf("short id %d of %v and %v", id, n.Self().Name, other)
		}
		ids[id] = n.Self().Name
		for _, c := range n.Connections() {
			if c.State != Connected {
				t.Errorf("on %v: %+v", n.Self(), c)
			}
		}
	}
	for _, x := range nodes[3].Neighbours() {
		if want := addrOf(x.Name); x.Remote.Addr() != want || x.Local.Addr() != nodes[3].addr {
			t.Errorf("link %v - %v, want to %v", x.Local, x.Remote, want)
		}
		if other := sessionOf(nodes[x.Name-1], 4); x.Session == 0 || other != x.Session {
			t.Errorf("session %x here, %x at the other end", x.Session, other)
		}
	}
}

func sessionOf(n *node, with peer.Name) uint64 {
	for _, x := range n.Neighbours() {
		if x.Name == with {
			return x.Session
		}
	}
	return 0
}

// Peers that dial each other at the same time end up with one link, and with
// the same.
func TestSimultaneousDials(t *testing.T) {
	t.Parallel()
	for range 5 {
		h := newHosts(t)
		all := []peer.Name{1, 2, 3}
		nodes := []*node{h.start(1, all), h.start(2, all), h.start(3, all)}
		until(t, "mesh", 5*time.Second, meshed(2, nodes...))
		before := map[string]uint64{}
		for _, n := range nodes {
			for _, x := range n.Neighbours() {
				before[n.Self().String()+x.String()] = x.Session
			}
		}
		// Whatever dials were still on their way must change nothing.
		hold := time.NewTimer(1500 * time.Millisecond)
		<-hold.C
		for _, n := range nodes {
			if lost := n.Counters()["links_lost"]; lost != 0 {
				t.Errorf("%v lost %d links", n.Self(), lost)
			}
			for _, x := range n.Neighbours() {
				if before[n.Self().String()+x.String()] != x.Session {
					t.Errorf("link %v - %v was replaced", n.Self(), x.Info)
				}
				if other := sessionOf(nodes[x.Name-1], n.Self().Name); other != x.Session {
					t.Errorf("%v and %v keep different links", n.Self(), x.Info)
				}
			}
			if rows := n.Connections(); len(rows) != 2 {
				t.Errorf("%v shows %d connections, itself included?: %+v", n.Self(), len(rows), rows)
			}
		}
		for _, n := range nodes {
			n.stop()
		}
	}
}

// A restarted peer has another UID; its neighbours drop the old link at once
// and take the new one.
func TestRestart(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a, b := h.start(1, nil), h.start(2, []peer.Name{1})
	until(t, "link", 3*time.Second, meshed(1, a, b))
	b.stop()
	until(t, "loss", time.Second, func() bool { return len(a.Neighbours()) == 0 })
	again := h.start(2, []peer.Name{1}, withUID(4711))
	until(t, "link again", 2*time.Second, meshed(1, a, again))
	if got := a.Neighbours()[0].UID; got != 4711 {
		t.Errorf("UID %d", got)
	}
	if r, ok := a.Topology().Record(2); !ok || r.UID != 4711 {
		t.Errorf("record %+v %v", r, ok)
	}
}

// A target that comes up later is found by retrying.
func TestTargetNotUpYet(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, []peer.Name{2})
	until(t, "failure", 2*time.Second, func() bool {
		c := a.Connections()
		return len(c) == 1 && c[0].State == Failed && c[0].Err == "connection refused" && !c[0].Retry.IsZero() &&
			c[0].Addr == netip.AddrPortFrom(addrOf(2), h.port).String()
	})
	b := h.start(2, nil)
	until(t, "link", 3*time.Second, meshed(1, a, b))
}

// 1 - (cable) - 2 - 3: the cable is cut without a word. Both ends notice, and
// so does 3.
func TestSilentCutIsNoticed(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	b := h.start(2, nil, noDiscovery)
	c := h.start(3, []peer.Name{2}, noDiscovery)
	cable := newProxy(t, netip.AddrPortFrom(b.addr, h.port))
	a := h.start(1, nil, noDiscovery)
	if err := a.Connect([]string{cable.addr.String()}); err != nil {
		t.Fatal(err)
	}
	until(t, "mesh", 3*time.Second, func() bool { return len(a.Topology().Reachable()) == 2 && len(c.Topology().Reachable()) == 2 })
	a.Forget([]string{cable.addr.String()})
	// Idle links stay up by hellos alone.
	hold := time.NewTimer(deadAfter + time.Second)
	<-hold.C
	if lost := a.Counters()["links_lost"]; lost != 0 {
		t.Fatalf("an idle link was dropped")
	}
	close(cable.cut)
	took := until(t, "both ends drop the link", deadAfter+500*time.Millisecond, func() bool {
		return len(a.Neighbours()) == 0 && len(b.Neighbours()) == 1
	})
	until(t, "routes", time.Second, func() bool { return len(c.Topology().Reachable()) == 1 })
	t.Logf("noticed after %v", took)
	if err := a.Send(3, testKind, nil); !errors.Is(err, ErrNoRoute) {
		t.Errorf("send over a dead link: %v", err)
	}
}

// Someone connects and says nothing, or nonsense.
func TestMuteAndStrangeConnections(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	a := h.start(1, nil)
	to := netip.AddrPortFrom(a.addr, h.port).String()
	for _, words := range []string{"", "GET / HTTP/1.0\r\n\r\n", "weave\x01\x02", "weave/\x02\x02\x00\x00\x00", "weave/\x02\x02\xff\xff\x01aaaa"} {
		c, err := net.Dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, words)
		defer func() { _ = c.Close() }()
	}
	b := h.start(2, []peer.Name{1})
	until(t, "link beside them", 2*time.Second, meshed(1, a, b))
	c, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetReadDeadline(time.Now().Add(handshakeWait + 2*time.Second))
	if _, err := io.Copy(io.Discard, c); err != nil {
		t.Errorf("a mute connection is kept: %v", err)
	}
}

func TestOtherVersionIsRefusedInWords(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	l, err := net.Listen("tcp", netip.AddrPortFrom(addrOf(9), h.port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("weave/\x07\x09"))
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	a := h.start(1, []peer.Name{9})
	until(t, "words", 2*time.Second, func() bool {
		c := a.Connections()
		return len(c) == 1 && strings.Contains(c[0].Err, "versions 7 to 9, this one 2 to 2")
	})
}

// A link without data path is one for messages only; all peers learn it, and
// also when it is over.
//
//	1 - 2 - 3 and 1 - 3
func TestNoDataIsToldToAll(t *testing.T) {
	t.Parallel()
	h := newHosts(t)
	one := h.start(1, nil)
	two := h.start(2, []peer.Name{1})
	three := h.start(3, []peer.Name{1, 2})
	until(t, "links", 5*time.Second, meshed(2, one, two, three))
	frames := func(n *node, to, via peer.Name) func() bool {
		return func() bool {
			got, ok := n.Topology().FrameHop(to)
			return ok && got == via
		}
	}
	three.SetNoData(map[peer.Name]bool{1: true})
	until(t, "frames of 1 go through 2", time.Second, frames(one, 3, 2))
	until(t, "frames of 3 go through 2", time.Second, frames(three, 1, 2))
	until(t, "2 knows", time.Second, func() bool {
		r, _ := two.Topology().Record(3)
		return len(r.Neighbours) == 2 && r.Neighbours[0].NoData && !r.Neighbours[1].NoData
	})
	if via, _ := one.Topology().NextHop(3); via != 3 {
		t.Errorf("messages for 3 go to %v", via)
	}
	three.SetNoData(nil)
	until(t, "frames of 1 go directly", time.Second, frames(one, 3, 3))
}
