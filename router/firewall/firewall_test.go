package firewall

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"weave.local/router/netdev/netdevtest"
)

func TestMain(m *testing.M) { netdevtest.Main(m) }

func newFirewall(t *testing.T) *Firewall {
	t.Helper()
	netdevtest.Need(t)
	f, err := New(Config{Bridge: "weave", VXLAN: 6784, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Remove(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	// Rules of others, which must survive everything.
	netdevtest.In(t, "", "iptables", "-P", "FORWARD", "DROP")
	netdevtest.In(t, "", "iptables", "-A", "FORWARD", "-i", "eth9", "-j", "ACCEPT")
	netdevtest.In(t, "", "iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth9", "-j", "MASQUERADE")
	t.Cleanup(func() {
		netdevtest.In(t, "", "iptables", "-D", "FORWARD", "-i", "eth9", "-j", "ACCEPT")
		netdevtest.In(t, "", "iptables", "-t", "nat", "-D", "POSTROUTING", "-o", "eth9", "-j", "MASQUERADE")
		netdevtest.In(t, "", "iptables", "-P", "FORWARD", "ACCEPT")
	})
	return f
}

// rules returns both tables without counters and comments.
func rules(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, table := range []string{"filter", "nat"} {
		b.WriteString(netdevtest.In(t, "", "iptables", "-t", table, "-S") + "\n")
	}
	return b.String()
}

func TestExposeAndHideLeaveNoTrace(t *testing.T) {
	f := newFirewall(t)
	before := rules(t)
	if err := f.SetExposed(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	launched := rules(t)
	if !strings.Contains(launched, "-P FORWARD DROP\n") || !strings.Contains(launched, "-A FORWARD -j WEAVE-FORWARD\n-A FORWARD -i eth9 -j ACCEPT") {
		t.Errorf("after launch:\n%s", launched)
	}
	exposed := []Exposure{exposure("10.32.0.0/12", false), exposure("10.2.0.0/16", true)}
	if err := f.SetExposed(t.Context(), exposed); err != nil {
		t.Fatal(err)
	}
	got := rules(t)
	for _, c := range desired(f.cfg, exposed) {
		for _, r := range c.rules {
			if !strings.Contains(got, "-A "+c.name+" "+r+"\n") {
				t.Errorf("missing: %s %s", c.name, r)
			}
		}
	}
	// As iptables prints our rules, so we write them: nothing to do twice.
	if changed, err := f.converge(t.Context()); err != nil || changed {
		t.Errorf("converged rules changed again: %v, %v", changed, err)
	}
	if len(f.printed) != 0 {
		t.Errorf("rules are spelled otherwise here: %v", f.printed)
	}
	if err := f.SetExposed(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if after := rules(t); after != launched {
		t.Errorf("after hide:\n%s\nwant:\n%s", after, launched)
	}
	for range 2 {
		if err := f.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		if after := rules(t); after != before {
			t.Errorf("after removal:\n%s\nbefore:\n%s", after, before)
		}
	}
}

func TestFlushedRulesComeBack(t *testing.T) {
	f := newFirewall(t)
	f.every = 20 * time.Millisecond
	if err := f.SetExposed(t.Context(), []Exposure{exposure("10.32.0.0/12", true)}); err != nil {
		t.Fatal(err)
	}
	want := rules(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- f.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	for _, harm := range [][]string{
		{"iptables", "-F", "WEAVE-FORWARD"},
		{"iptables", "-D", "FORWARD", "-j", "WEAVE-FORWARD"},
		{"iptables", "-D", "WEAVE-EXPOSE", "1"},
	} {
		netdevtest.In(t, "", harm...)
		deadline := time.After(10 * time.Second)
		for tick := time.NewTicker(10 * time.Millisecond); rules(t) != want; {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("after %v:\n%s\nwant:\n%s", harm, rules(t), want)
			}
		}
	}
}

// A version of iptables that prints a rule with its words in another order must
// not be mistaken for somebody who changes the rules.
func TestOtherSpelling(t *testing.T) {
	f := newFirewall(t)
	f.cfg.VXLAN = 0
	f.cfg.Untrusted = []string{"docker0 -m comment --comment x"} // iptables-save puts the comment behind -o
	if err := f.SetExposed(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if len(f.printed) != 1 {
		t.Fatalf("spellings learnt: %v", f.printed)
	}
	if changed, err := f.converge(t.Context()); err != nil || changed {
		t.Errorf("changed again: %v, %v", changed, err)
	}
	netdevtest.In(t, "", "iptables", "-D", "WEAVE-FORWARD", "1")
	if changed, err := f.converge(t.Context()); err != nil || !changed {
		t.Errorf("a deleted rule was not missed: %v, %v", changed, err)
	}
}

func TestNoIPTables(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	f, err := New(Config{Bridge: "weave", VXLAN: 6784, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.SetExposed(t.Context(), nil); !errors.Is(err, ErrNoIPTables) {
		t.Errorf("SetExposed: %v", err)
	}
	if err := f.Remove(t.Context()); err != nil {
		t.Errorf("Remove: %v", err)
	}
}
