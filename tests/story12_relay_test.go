package tests

import (
	"errors"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// TestRelay: u1 and u4 talk over u2 or u3. The host in between falls silent,
// and the other takes over; it comes back, and nothing of note is lost.
func TestRelay(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3", "u4"}})
	names := map[string]*lab.Host{}
	for host, targets := range map[string][]string{"u1": nil, "u2": {"u1"}, "u3": {"u1"}, "u4": {"u2", "u3"}} {
		args := append([]string{"--docker-api", "", "--no-discovery", "--ipalloc-init", "consensus=4"}, targets...)
		name, _ := launch(t, l.Host(host), args...)
		names[name] = l.Host(host)
	}
	for _, h := range l.Hosts {
		within(t, patience, "ring", func() error { return on(t.Context(), h, 2, "fastdp") })
	}
	near, far := exposed(t, l.Host("u1")), exposed(t, l.Host("u4"))
	f := startFlow(t, near, far)
	relay := relayTo(t, near.Host, far.Host, names)

	begin := time.Now()
	for _, h := range []*lab.Host{near.Host, far.Host} {
		if err := l.Cut(t.Context(), relay, h); err != nil {
			t.Fatal(err)
		}
	}
	within(t, fallbackBar, "the other way", func() error {
		if len(f.since(begin.Add(time.Second))) == 0 {
			return errors.New("no answer")
		}
		return nil
	})
	holds(t, []*flow{f}, begin, 3*time.Second, fallbackBar)
	if other := relayTo(t, near.Host, far.Host, names); other == relay {
		t.Errorf("%s relays, which is silent", other.Name)
	}

	begin = time.Now()
	for _, h := range []*lab.Host{near.Host, far.Host} {
		if err := l.Heal(t.Context(), relay, h); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range l.Hosts {
		within(t, patience, "ring again", func() error { return on(t.Context(), h, 2, "fastdp") })
	}
	t.Logf("all linked %s after the repair", time.Since(begin).Round(time.Millisecond))
	holds(t, []*flow{f}, begin, 2*time.Second, time.Second)
}

// relayTo is the host over which frames go from one to another.
func relayTo(t *testing.T, from, to *lab.Host, names map[string]*lab.Host) *lab.Host {
	t.Helper()
	for line := range strings.Lines(weave(t, from, "report", "-f", "{{range .Router.UnicastRoutes}}{{.Dest}} {{.Via}}\n{{end}}")) {
		if f := strings.Fields(line); len(f) == 2 && names[f[0]] == to && names[f[1]] != nil {
			return names[f[1]]
		}
	}
	t.Fatalf("%s has no route to %s", from.Name, to.Name)
	return nil
}
