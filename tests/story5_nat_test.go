package tests

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// natTimeout is for how many seconds the router below remembers a UDP flow that
// is silent: much less than any real one.
const natTimeout = 3

// movedBar is how long a flow may stand still when an address changes: less than
// it takes until a link counts as dead, so that it hangs on no new link.
const movedBar = 2200 * time.Millisecond

// TestBehindNAT has a host m behind a router, u1, that gives it addresses and
// ports of its own choice, so that nobody can open a connection to it and the
// fast path has no way back; and hosts whose addresses change under load.
func TestBehindNAT(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3"}})
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	m, err := l.Behind(t.Context(), u1, "m")
	if err != nil {
		t.Fatal(err)
	}
	must(t, u1, "sh", "-c", fmt.Sprintf(`
		sysctl -qw net.ipv4.ip_forward=1 &&
		nft 'table ip nat { chain post { type nat hook postrouting priority 100; oifname "eth0" masquerade fully-random; }; chain f { type filter hook forward priority 0; iifname "eth0" ct state new drop; }; }' &&
		sysctl -qw net.netfilter.nf_conntrack_udp_timeout=%d net.netfilter.nf_conntrack_udp_timeout_stream=%[1]d`, natTimeout))
	secret := []string{"--docker-api", "", "--password", "correct horse"}
	launch(t, u2, append(secret, u3.Addr.String())...)
	launch(t, u3, append(secret, u2.Addr.String())...)
	launch(t, m, append(secret, u2.Addr.String())...)
	for _, h := range []*lab.Host{u2, u3, m} {
		within(t, patience, "mesh", func() error { return on(t.Context(), h, 2, "encrypted   sleeve") })
	}
	cs := []*container{runBare(t, m, "c1"), runBare(t, u2, "c2"), runBare(t, u3, "c3")}
	allReach(t, cs...)

	step(t, "the way in stays open", func(t *testing.T) {
		select { // nothing but what the daemons do themselves
		case <-time.After(2 * natTimeout * time.Second):
		case <-t.Context().Done():
		}
		for _, from := range cs[1:] {
			if err := from.reaches(t.Context(), cs[0].addr.Addr(), 56); err != nil {
				t.Errorf("%s to the host behind NAT, after a while without traffic: %v", from.name, err)
			}
		}
	})
	flows := []*numbered{startNumbered(t, cs[0], cs[1]), startNumbered(t, cs[1], cs[0]), startNumbered(t, cs[1], cs[2]), startNumbered(t, cs[2], cs[1])}
	step(t, "the router gets another address", func(t *testing.T) {
		renumber(t, u1, "192.0.2.1", "192.0.2.101")
		stillFlow(t, flows)
		linkedTo(t, u2, "192.0.2.101")
	})
	step(t, "a host gets another address", func(t *testing.T) {
		renumber(t, u3, "192.0.2.3", "192.0.2.103")
		stillFlow(t, flows)
		linkedTo(t, u2, "192.0.2.103")
		for _, h := range []*lab.Host{u2, u3, m} {
			within(t, patience, "mesh", func() error { return on(t.Context(), h, 2, "encrypted   sleeve") })
		}
		allReach(t, cs...)
	})
}

// linkedTo waits until a host has a link to an address.
func linkedTo(t *testing.T, h *lab.Host, addr string) {
	t.Helper()
	within(t, patience, "link to "+addr, func() error {
		cs, err := connections(t.Context(), h)
		if err != nil {
			return err
		}
		for _, c := range cs {
			if c.state == "established" && strings.HasPrefix(c.address, addr+":") {
				return nil
			}
		}
		return errNotShown(cs)
	})
}

// renumber gives a host another address on the underlay, and only that.
func renumber(t *testing.T, h *lab.Host, was, now string) {
	t.Helper()
	must(t, h, "sh", "-c", fmt.Sprintf("ip addr del %s/24 dev eth0 && ip addr add %s/24 dev eth0 && ip route replace default via %s", was, now, lab.Outside()))
}

// stillFlow checks that flows went on over the change before.
func stillFlow(t *testing.T, flows []*numbered) {
	t.Helper()
	for _, s := range flows {
		s.awaitNext(t)
	}
	for _, s := range flows {
		gap := s.mark()
		t.Logf("%s: longest gap %s", s.name, gap.Round(time.Millisecond))
		if gap > movedBar {
			t.Errorf("%s: no datagram for %s, want at most %s", s.name, gap.Round(time.Millisecond), movedBar)
		}
	}
	for _, s := range flows {
		s.mark()
	}
}

// awaitNext waits for datagrams sent from now on.
func (s *numbered) awaitNext(t *testing.T) {
	t.Helper()
	count := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.seen)
	}
	begun := count()
	within(t, patience, "stream "+s.name, func() error {
		if n := count() - begun; n < 100 {
			return fmt.Errorf("%d datagrams since", n)
		}
		return nil
	})
}
