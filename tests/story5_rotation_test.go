package tests

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// Bars of this part: how long a flow may stand still, on a machine that does
// other things, too.
const (
	runningBar = 500 * time.Millisecond // the daemons run on, or the kernel forwards meanwhile
	rejoinBar  = 3 * time.Second        // on top of the time without a daemon
)

// TestPasswordRotation changes the password of a network under load, first that
// of running daemons, then by restarting one after the other. u1 and u2 trust
// the network between them, and nobody that to u3.
func TestPasswordRotation(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3"}})
	for _, h := range l.Hosts {
		launch(t, h, withPasswords(l, h, "one", "")...)
	}
	settled := func(t *testing.T) {
		t.Helper()
		for h, clear := range map[string]int{"u1": 1, "u2": 1, "u3": 0} {
			within(t, patience, h, func() error {
				return errOr(on(t.Context(), l.Host(h), clear, "unencrypted fastdp"), on(t.Context(), l.Host(h), 2-clear, "encrypted   sleeve"))
			})
		}
	}
	settled(t)
	cs := []*container{runBare(t, l.Host("u1"), "c1"), runBare(t, l.Host("u2"), "c2"), runBare(t, l.Host("u3"), "c3")}
	allReach(t, cs...)
	flows := rotationFlows{
		inClear: []*numbered{startNumbered(t, cs[0], cs[1]), startNumbered(t, cs[1], cs[0])},
		sealed:  []*numbered{startNumbered(t, cs[0], cs[2]), startNumbered(t, cs[2], cs[1])},
	}

	step(t, "running", func(t *testing.T) {
		for _, round := range [][]string{{"--password-next", "two"}, {"--finish"}} {
			for _, h := range l.Hosts {
				weave(t, h, append([]string{"rotate-password"}, round...)...)
				settled(t)
			}
		}
		flows.hold(t, "running", runningBar, runningBar)
		for _, h := range l.Hosts {
			if out := weave(t, h, "status"); strings.Contains(out, "being changed") {
				t.Errorf("%s: %s", h.Name, out)
			}
		}
	})
	step(t, "restarted", func(t *testing.T) {
		var away time.Duration
		for _, round := range [][2]string{{"two", "three"}, {"three", ""}} {
			for _, h := range l.Hosts {
				begin := time.Now()
				weave(t, h, "stop")
				launch(t, h, withPasswords(l, h, round[0], round[1])...)
				away = max(away, time.Since(begin))
				settled(t)
			}
		}
		t.Logf("longest time without a daemon %s", away.Round(time.Millisecond))
		flows.hold(t, "restarted", runningBar, away+rejoinBar)
	})
	step(t, "the old one is refused", func(t *testing.T) {
		u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
		for _, round := range [][]string{{"--password-next", "four"}, {"--finish"}} {
			for _, h := range []*lab.Host{u1, u2} {
				weave(t, h, append([]string{"rotate-password"}, round...)...)
			}
		}
		refusedBy(t, u3, "passwords differ")
		refusedBy(t, u1, "passwords differ")
		within(t, patience, "exclusion", func() error {
			if cs[0].reaches(t.Context(), cs[2].addr.Addr(), 56) == nil {
				return errors.New("frames still pass to a host without the password")
			}
			return nil
		})
		refused(t, u3, 1, []string{"--password-next"}, "weave", "rotate-password", "--finish")
		// It is given the new one without a restart.
		weave(t, u3, "rotate-password", "--password-next", "four")
		settled(t)
		weave(t, u3, "rotate-password", "--finish")
		settled(t)
	})
	step(t, "other trust", func(t *testing.T) {
		// Nobody is trusted any more: what the kernel forwards ends with the
		// launch, not when the peer is there.
		u1, u2 := l.Host("u1"), l.Host("u2")
		weave(t, u2, "stop")
		weave(t, u1, "stop")
		flows.inClear[0].awaitNext(t) // the kernel goes on
		launch(t, u1, "--docker-api", "", "--password", "four", "u2", "u3")
		flows.inClear[0].mark()
		select {
		case <-time.After(20 * numberedInterval):
		case <-t.Context().Done():
		}
		if gap := flows.inClear[0].mark(); gap < 20*numberedInterval {
			t.Errorf("after the launch frames went on in clear: no gap longer than %s", gap)
		}
		launch(t, u2, withPasswords(l, u2, "four", "")...)
		within(t, patience, "sealed", func() error { return on(t.Context(), u1, 2, "encrypted   sleeve") })
		if seenInClear(t, cs[0], u2, cs[1].addr.Addr().String()) {
			t.Error("frames go in clear to a host that is trusted no more")
		}
	})
}

func withPasswords(l *lab.Lab, h *lab.Host, now, next string) []string {
	args := []string{"--docker-api", "", "--trusted-subnets", "192.0.2.1/32,192.0.2.2/32", "--password", now}
	if next != "" {
		args = append(args, "--password-next", next)
	}
	return slices.Concat(args, others(l, h))
}

func errOr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// rotationFlows are those that must not end, by how their frames travel.
type rotationFlows struct{ inClear, sealed []*numbered }

func (f *rotationFlows) hold(t *testing.T, what string, clear, sealed time.Duration) {
	t.Helper()
	for _, fs := range []struct {
		flows []*numbered
		limit time.Duration
	}{{f.inClear, clear}, {f.sealed, sealed}} {
		for _, s := range fs.flows {
			gap := s.mark()
			t.Logf("%s: %s: longest gap %s", what, s.name, gap.Round(time.Millisecond))
			if gap > fs.limit {
				t.Errorf("%s: %s: no datagram for %s, want at most %s", what, s.name, gap.Round(time.Millisecond), fs.limit)
			}
		}
	}
}
