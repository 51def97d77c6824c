package link

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/seal"
)

func password(t *testing.T, p string) option {
	t.Helper()
	k := key(t, p)
	return func(c *Config) { c.Keys = []*seal.Key{k} }
}

func key(t *testing.T, p string) *seal.Key {
	t.Helper()
	k, err := seal.NewKey(p, "")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func trusting(c *Config) { c.Trusted = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} }

func TestMeshWithPassword(t *testing.T) {
	t.Parallel()
	h, p := newHosts(t), password(t, "x")
	a := h.start(1, nil, p, noDiscovery)
	b := h.start(2, []peer.Name{1}, p, noDiscovery)
	c := h.start(3, []peer.Name{2}, p, noDiscovery)
	until(t, "line", 5*time.Second, func() bool {
		return len(a.Topology().Reachable()) == 2 && len(c.Topology().Reachable()) == 2
	})
	if err := a.Send(3, testKind, []byte(strings.Repeat("m", MaxPayload))); err != nil {
		t.Fatal(err)
	}
	until(t, "message", 2*time.Second, func() bool { return len(c.messages()) == 1 })
	s, err := c.Dial(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	in := <-a.Streams()
	defer func() { _ = in.Close() }()
	go func() {
		_, _ = io.WriteString(s, strings.Repeat("stream", 100000))
		_ = s.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if got, err := io.ReadAll(in); err != nil || len(got) != 600000 {
		t.Errorf("%d bytes by stream, %v", len(got), err)
	}
	ka, kb := keysOf(a, 2), keysOf(b, 1)
	if ka == nil || kb == nil {
		t.Fatal("neighbours without keys")
	}
	if _, err := kb.Open(ka.Seal(append(make([]byte, seal.HeaderLen, 64), "x"...), 1)); err != nil {
		t.Errorf("keys of the two ends: %v", err)
	}
	for _, conn := range b.Connections() {
		if !conn.Sealed {
			t.Errorf("connection %+v", conn)
		}
	}
}

func keysOf(n *node, other peer.Name) *seal.Session {
	for _, x := range n.Neighbours() {
		if x.Name == other {
			return x.Keys
		}
	}
	return nil
}

func TestTrustedSubnets(t *testing.T) {
	t.Parallel()
	p := password(t, "x")
	for _, both := range []bool{false, true} {
		h := newHosts(t)
		opts := []option{p}
		if both {
			opts = append(opts, trusting)
		}
		a := h.start(1, nil, p, trusting)
		b := h.start(2, []peer.Name{1}, opts...)
		until(t, "link", 5*time.Second, meshed(1, a, b))
		for _, n := range []*node{a, b} {
			x := n.Neighbours()[0]
			if x.Trusted != both || (x.Keys == nil) != both {
				t.Errorf("both trust: %v; %+v", both, x)
			}
		}
	}
}

// reasons are what Connections says of links that failed, with the direction.
func (n *node) reasons() []string {
	var out []string
	for _, c := range n.Connections() {
		if c.State == Failed {
			out = append(out, fmt.Sprintf("%v %s", c.Outbound, c.Err))
		}
	}
	return out
}

func TestPasswordRefusals(t *testing.T) {
	t.Parallel()
	x, y := password(t, "x"), password(t, "y")
	none := func(*Config) {}
	for name, c := range map[string]struct {
		listener, dialler option
		atL, atD          string
	}{
		"listener only": {x, none, "false peer has no password, and we have one", "true peer has a password, and we have none"},
		"dialler only":  {none, x, "false peer has a password, and we have none", "true peer has no password, and we have one"},
		"other":         {x, y, "false passwords differ", "true passwords differ"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHosts(t)
			l := h.start(1, nil, c.listener)
			d := h.start(2, []peer.Name{1}, c.dialler)
			until(t, "reasons", 3*time.Second, func() bool {
				return slices.Contains(l.reasons(), c.atL) && slices.Contains(d.reasons(), c.atD)
			})
			if len(l.Neighbours())+len(d.Neighbours()) > 0 {
				t.Error("a link although passwords differ")
			}
			if r := l.reasons(); len(r) != 1 {
				t.Errorf("the listener shows %v", r)
			}
		})
	}
}

// Peers change their password one after the other, keep their links all the
// time, and have links made with the new one at the end.
func TestPasswordChange(t *testing.T) {
	t.Parallel()
	was, now := key(t, "x"), key(t, "y")
	h, p := newHosts(t), func(c *Config) { c.Keys = []*seal.Key{was} }
	nodes := []*node{h.start(1, nil, p), h.start(2, []peer.Name{1}, p), h.start(3, []peer.Name{1}, p)}
	until(t, "mesh", 5*time.Second, meshed(2, nodes...))
	sessions := func() map[uint64]bool {
		out := make(map[uint64]bool)
		for _, n := range nodes {
			for _, x := range n.Neighbours() {
				out[x.Session] = true
			}
		}
		return out
	}
	first := sessions()
	for _, n := range nodes {
		n.SetKeys([]*seal.Key{now, was})
	}
	if !meshed(2, nodes...)() || !maps.Equal(sessions(), first) {
		t.Error("a second password disturbs links")
	}
	for _, n := range nodes {
		n.SetKeys([]*seal.Key{now})
		until(t, "mesh", 5*time.Second, meshed(2, nodes...))
	}
	until(t, "new links", 5*time.Second, func() bool {
		for s := range sessions() {
			if first[s] {
				return false
			}
		}
		return meshed(2, nodes...)()
	})
}

// outdated are two peers with a link whose password is good no more at the first,
// and since when about.
func outdated(t *testing.T) (a, b *node, since time.Time) {
	t.Helper()
	h := newHosts(t)
	a = h.start(1, nil, password(t, "x"))
	b = h.start(2, []peer.Name{1}, password(t, "x"))
	until(t, "link", 5*time.Second, meshed(1, a, b))
	since = time.Now()
	a.SetKeys([]*seal.Key{key(t, "y")})
	return a, b, since
}

// A link whose password is good no more ends, when the other end has no other.
func TestPasswordNoMore(t *testing.T) {
	t.Parallel()
	a, b, _ := outdated(t)
	until(t, "end of the link", 2*outdatedWait, func() bool { return len(a.Neighbours()) == 0 && len(b.Neighbours()) == 0 })
	until(t, "exclusion", 5*time.Second, func() bool { return slices.Equal(a.TakeExcluded(), []peer.Name{2}) })
	if len(b.TakeExcluded()) != 0 {
		t.Error("the end whose password is good excludes the other")
	}
	until(t, "reason", 5*time.Second, func() bool { return slices.Contains(b.reasons(), "true passwords differ") })
}

// A link whose password is good no more may be closed by the other end, as that
// has a newer one already: nobody is excluded then, unless no link is made.
func TestClosedBeforeItsPasswordEnds(t *testing.T) {
	t.Parallel()
	a, b, begin := outdated(t)
	b.mu.Lock()
	b.links[1].stop(errors.New("closed by the test"))
	b.mu.Unlock()
	until(t, "end of the link", outdatedWait, func() bool { return len(a.Neighbours()) == 0 })
	var excluded []peer.Name
	until(t, "exclusion", 2*outdatedWait, func() bool { excluded = a.TakeExcluded(); return len(excluded) > 0 })
	if took := time.Since(begin); took < outdatedWait || !slices.Equal(excluded, []peer.Name{2}) {
		t.Errorf("excluded %v after %s, want peer 2 after %s", excluded, took, outdatedWait)
	}
}

func TestTurned(t *testing.T) {
	now := time.Unix(1e9, 0)
	all := make(turned)
	at := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 1000)
	}
	if !all.add(at(1), "a", now) || all.add(at(1), "a", now) || !all.add(at(1), "b", now) {
		t.Error("news are not told from what is known")
	}
	for i := range 100 {
		all.add(at(i), "a", now)
	}
	if len(all) > maxTurned || len(all.rows(nil, now)) != len(all) {
		t.Errorf("%d kept, %d shown", len(all), len(all.rows(nil, now)))
	}
	if n := len(all.rows([]Connection{{Addr: "192.0.2.1:6783"}}, now)); n != len(all)-1 {
		t.Errorf("%d shown, although one is in the list already", n)
	}
	all.forget(at(2))
	if n := len(all.rows(nil, now)); n != maxTurned-1 {
		t.Errorf("%d shown after one is linked", n)
	}
	if n := len(all.rows(nil, now.Add(keepTurned))); n > 0 {
		t.Errorf("%d shown for ever", n)
	}
	all.add(at(200), "a", now.Add(keepTurned))
	if len(all) != 1 {
		t.Errorf("%d kept for ever", len(all))
	}
}
