package tests

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"weave.local/tests/lab"
)

const (
	stormKills   = 3
	stormNetNS   = 24
	stormWorkers = 8
	// stormSize is how many addresses are handed out before the next kill; each
	// attachment takes one of each of stormSubnets.
	stormSize = 200
)

func stormSubnets() []string {
	return []string{"net:10.32.2.0/24", "net:10.32.3.0/24", "net:10.32.4.0/24", "net:10.32.5.0/24", "net:10.32.6.0/24", "net:10.32.7.0/25"}
}

// testKilledInStorm: a daemon dies, time after time, while containers are
// attached and detached as fast as it can. Each time the next one finds what is
// attached, and knows of no address but of those.
func testKilledInStorm(t *testing.T, l *lab.Lab, h *handedOut) {
	before := activeIPs(t, h.Host)
	script := &strings.Builder{}
	for i := range stormNetNS {
		fmt.Fprintf(script, "ip netns add storm%d\n", i)
	}
	must(t, h.Host, "sh", "-ec", script.String())
	for range stormKills {
		n, took := storm(t, h)
		launch(t, h.Host)
		attached := map[netip.Addr]string{}
		for i := range stormNetNS {
			name := fmt.Sprint("storm", i)
			c := &container{Host: h.Host, name: name, netns: "/run/netns/" + name, bare: true}
			for _, a := range c.addresses(t, "ethwe") {
				if other, twice := attached[a.Addr()]; twice {
					t.Errorf("%s is in %s and in %s", a, other, name)
				}
				attached[a.Addr()] = name
			}
		}
		if got := activeIPs(t, h.Host); got != before+len(attached) {
			t.Errorf("%d addresses are in use, want %d: %d in containers of the storm, %d others", got, before+len(attached), len(attached), before)
		}
		for line := range strings.Lines(weave(t, h.Host, "ps")) {
			for _, f := range strings.Fields(line) {
				if a, err := netip.ParsePrefix(f); err == nil && strings.Contains(line, "storm") {
					if name := attached[a.Addr()]; !strings.Contains(line, "/"+name+" ") {
						t.Errorf("weave ps has %s in %q, and it is in %q", a, line, name)
					}
					delete(attached, a.Addr())
				}
			}
		}
		if len(attached) > 0 {
			t.Errorf("weave ps knows nothing of %v", attached)
		}
		t.Logf("killed after %d addresses in %s, %.0f a second", n, took.Round(time.Millisecond), float64(n)/took.Seconds())
	}
	established(t, l, patience)
}

// storm attaches and detaches until enough addresses were handed out and the
// daemon is killed in the middle of it.
func storm(t *testing.T, h *handedOut) (handed int64, took time.Duration) {
	t.Helper()
	pid := daemonPID(t, h.Host)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var n atomic.Int64
	enough := make(chan struct{})
	var wg sync.WaitGroup
	begin := time.Now()
	for w := range stormWorkers {
		wg.Go(func() {
			for i := w; ctx.Err() == nil; i = (i + stormWorkers) % stormNetNS {
				subnets := stormSubnets()
				// In two goes, so that an attachment grows, too.
				for _, part := range [][]string{subnets[:2], subnets[2:]} {
					var got struct{ CIDRs []string }
					err := post(ctx, h.control, "attach", map[string]any{"NetNS": fmt.Sprint("/run/netns/storm", i), "Addresses": part}, &got)
					if err != nil {
						return
					}
					more := int64(len(got.CIDRs))
					if now := n.Add(more); now >= stormSize && now-more < stormSize {
						close(enough)
					}
				}
				var gone struct{}
				if post(ctx, h.control, "detach", map[string]any{"NetNS": fmt.Sprint("/run/netns/storm", i), "Addresses": subnets[i%3:]}, &gone) != nil {
					return
				}
			}
		})
	}
	select {
	case <-enough:
	case <-time.After(patience):
		t.Errorf("only %d addresses", n.Load())
	}
	took = time.Since(begin)
	must(t, h.Host, "kill", "-9", pid)
	cancel()
	wg.Wait()
	within(t, patience, "the daemon is gone", func() error {
		if h.Run(t.Context(), "test", "-e", "/proc/"+pid).Code == 0 {
			return fmt.Errorf("it is there")
		}
		return nil
	})
	return n.Load(), took
}

// activeIPs is how many addresses are in use on a host, as it knows.
func activeIPs(t *testing.T, h *lab.Host) int {
	t.Helper()
	var n int
	if _, err := fmt.Sscan(weave(t, h, "report", "-f", "{{.IPAM.ActiveIPs}}"), &n); err != nil {
		t.Fatal(err)
	}
	return n
}
