package tests

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"weave.local/tests/lab"
)

// TestLeases: two of five hosts are lost. The others take over their addresses
// by themselves, and when the two are back, nothing is there twice.
func TestLeases(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3", "u4", "u5"}})
	for _, h := range l.Hosts {
		launch(t, h, leaseFlags(l, h)...)
	}
	established(t, l, patience)
	var cs []*container
	for i, h := range l.Hosts {
		cs = append(cs, runBare(t, h, fmt.Sprintf("c%d", i+1)))
	}
	allReach(t, cs...)
	u1, u4, u5 := l.Host("u1"), l.Host("u4"), l.Host("u5")
	names := map[*lab.Host]string{u4: weave(t, u4, "report", "-f", "{{.Router.Name}}"), u5: weave(t, u5, "report", "-f", "{{.Router.Name}}")}
	within(t, patience, "leases", func() error { return says(t, u4, "Lease: ends in") })
	must(t, u4, "kill", "-9", daemonPID(t, u4))
	if err := cs[0].reaches(t.Context(), cs[3].addr.Addr(), 56); err != nil {
		t.Errorf("before the lease of a dead daemon is over: %v", err)
	}
	apart(t, l, u5)
	within(t, patience, "taken over", func() error {
		for h, name := range names {
			if strings.Contains(weave(t, u1, "status", "ipam"), name) {
				return fmt.Errorf("%s still holds addresses", h.Name)
			}
		}
		return nil
	})
	if cs[0].reaches(t.Context(), cs[3].addr.Addr(), 56) == nil {
		t.Error("a container is heard though its host's lease is over and its daemon dead")
	}
	if err := says(t, u5, "lease over"); err != nil {
		t.Error(err)
	}
	step(t, "the whole range", func(t *testing.T) { testWholeRange(t, l.Hosts[:3]) })
	taker := runBare(t, u1, "taker", "ip:"+cs[3].addr.String())
	step(t, "back", func(t *testing.T) { testBack(t, l, cs, taker) })
}

func leaseFlags(l *lab.Lab, h *lab.Host) []string {
	return append([]string{"--no-dns", "--docker-api=/run/none.sock", "--ipalloc-range=" + fullSubnet, "--ipalloc-lease=6s"}, others(l, h)...)
}

// testWholeRange: what the lost hosts had can be handed out to the last address,
// without a command. One container runs on each of the hosts.
func testWholeRange(t *testing.T, hosts []*lab.Host) {
	var hs []*handedOut
	for _, h := range hosts {
		hs = append(hs, newHandedOut(h))
	}
	for _, h := range hs {
		for err := error(nil); err == nil; {
			if _, err = h.request(t.Context(), ""); err != nil && !strings.Contains(err.Error(), "254 of 254 in use") {
				t.Fatal(err)
			}
		}
	}
	if n := once(t, hs) + len(hosts); n != 254 {
		t.Errorf("%d of 254 addresses were handed out", n)
	}
	for _, h := range hs {
		for a := range maps.Clone(h.addrs) {
			if err := h.release(t.Context(), a); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// testBack: u4, whose container's address has another one by now, and u5, whose
// container's nobody took.
func testBack(t *testing.T, l *lab.Lab, cs []*container, taker *container) {
	u4, u5 := l.Host("u4"), l.Host("u5")
	launch(t, u4, leaseFlags(l, u4)...)
	for _, h := range l.Hosts[:4] {
		if err := l.Heal(t.Context(), h, u5); err != nil {
			t.Fatal(err)
		}
	}
	established(t, l, patience)
	within(t, patience, "u4 told", func() error { return says(t, u4, cs[3].addr.Addr().String()+" of .* went to u1") })
	within(t, patience, "u4's container without its address", func() error {
		if left := cs[3].addresses(t, cs[3].device); len(left) > 0 {
			return fmt.Errorf("it has %v", left)
		}
		return nil
	})
	within(t, patience, "the others", func() error {
		for _, c := range []*container{cs[1], cs[2], cs[4]} {
			if err := c.reaches(t.Context(), taker.addr.Addr(), 56); err != nil {
				return err
			}
		}
		return taker.reaches(t.Context(), cs[4].addr.Addr(), 56)
	})
	again := runBare(t, u4, "again")
	within(t, patience, "u4 anew", func() error { return again.reaches(t.Context(), cs[4].addr.Addr(), 56) })
}

// says looks for a line in the status of a host.
func says(t *testing.T, h *lab.Host, want string) error {
	t.Helper()
	out, err := h.Output(t.Context(), "sh", "-c", fmt.Sprintf("weave status | grep %q", want))
	if err != nil {
		all, _ := h.Output(t.Context(), "weave", "status")
		return fmt.Errorf("%s says nothing of %q (%s): %w\n%s", h.Name, want, out, err, all)
	}
	return nil
}

// apart cuts a host off from all others, and waits until they know.
func apart(t *testing.T, l *lab.Lab, off *lab.Host) {
	t.Helper()
	for _, h := range l.Hosts {
		if h != off {
			if err := l.Cut(t.Context(), h, off); err != nil {
				t.Fatal(err)
			}
		}
	}
}
