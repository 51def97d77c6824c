package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// Bars of this part.
const (
	backBar  = 10 * time.Second // the fast path is free again, until it carries
	roundBar = 6 * time.Second  // no path between two peers, until a third relays
)

// TestUpAndDown blocks and frees the ways between hosts under load. How often
// the fast path is blocked is set by TEST_CYCLES, 5 without it; 100 take a
// quarter of an hour. TEST_QUIET is how long containers are silent before it is
// blocked the first time, 1s without it.
func TestUpAndDown(t *testing.T) {
	l := hosts(t)
	launchAll(t, l)
	cs := threeContainers(t, l)
	step(t, "after quiet", func(t *testing.T) { testAfterQuiet(t, l, cs) })
	load := startIperf(t, cs[0], cs[2], 3600, "-b", "50M")
	step(t, "cycles", func(t *testing.T) { testCycles(t, l, cs, cyclesWanted(t)) })
	step(t, "cycles with a relay", func(t *testing.T) { testCyclesWithRelay(t, l, cs) })
	step(t, "heavy loss", func(t *testing.T) { testHeavyLoss(t, l, cs) })
	step(t, "no data path", func(t *testing.T) { testNoDataPath(t, l, cs) })
	load.end(t)
}

// TestOutlivesTheDaemon: what happens to daemons does not happen to traffic.
func TestOutlivesTheDaemon(t *testing.T) {
	l := hosts(t)
	var before []lab.State
	for _, h := range l.Hosts {
		must(t, h, "docker", "run", "--rm", "--net=none", "busybox", "true")
		before = append(before, state(t, h))
	}
	launchAll(t, l)
	cs := threeContainers(t, l)
	run := startIperf(t, cs[0], cs[2], 3600, "-b", "200M")
	streams := []*numbered{startNumbered(t, cs[0], cs[2]), startNumbered(t, cs[2], cs[0]), startNumbered(t, cs[1], cs[0]),
		startNumbered(t, cs[1], cs[2])} // the last has nothing to do with u1: its gaps are the machine's
	u1 := l.Host("u1")
	step(t, "killed", func(t *testing.T) {
		must(t, u1, "kill", "-9", daemonPID(t, u1))
		undisturbed(t, streams, "killed", 3*time.Second)
		launch(t, u1)
		established(t, l, patience)
		undisturbed(t, streams, "launched", 3*time.Second)
	})
	step(t, "stopped", func(t *testing.T) {
		weave(t, u1, "stop")
		undisturbed(t, streams, "stopped", 3*time.Second)
		launch(t, u1)
		established(t, l, patience)
		undisturbed(t, streams, "launched", 3*time.Second)
	})
	step(t, "other layout", func(t *testing.T) { testOtherLayout(t, l, streams) })
	step(t, "all at once", func(t *testing.T) {
		for _, h := range l.Hosts {
			must(t, h, "kill", "-9", daemonPID(t, h))
		}
		undisturbed(t, streams, "all killed", 3*time.Second)
		for _, h := range l.Hosts {
			launch(t, h)
		}
		established(t, l, patience)
		undisturbed(t, streams, "all launched", 3*time.Second)
	})
	run.end(t)
	step(t, "reset", func(t *testing.T) {
		for i, h := range l.Hosts {
			must(t, h, "docker", "rm", "-f", cs[i].name)
			weave(t, h, "reset")
			must(t, h, "docker", "network", "rm", "docker_gwbridge") // Docker's own
			asBefore(t, h, before[i])
		}
	})
}

// threeContainers runs one on each host.
func threeContainers(t *testing.T, l *lab.Lab) []*container {
	t.Helper()
	var cs []*container
	for i, h := range l.Hosts {
		cs = append(cs, run(t, h, "", "ethwe0", fmt.Sprintf("c%d", i+1), "--net=weave"))
	}
	allReach(t, cs...)
	return cs
}

func cyclesWanted(t *testing.T) int {
	t.Helper()
	s := os.Getenv("TEST_CYCLES")
	if s == "" {
		return 5
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("TEST_CYCLES=%s: want a number", s)
	}
	return n
}

// block is a way to block the fast path between two hosts.
type block struct {
	name   string
	reject bool   // by the receiving host, which lets frames on the direct way pass; else dropped underway
	to, fr bool   // what u1 sends to u3; what u3 sends to u1
	reason string // that u1 shows
}

func blocks() []block {
	return []block{
		{"drop", false, true, true, "no answer to probes for"},
		{"reject", true, true, true, "closed, or rejected by a firewall"},
		{"drop from u1", false, true, false, "no answer to probes for"},
		{"drop to u1", false, false, true, "probes from the other side get no answer"},
		{"reject from u1", true, true, false, "closed, or rejected by a firewall"},
	}
}

// set blocks, or frees, the ports between the hosts.
func (b block) set(t *testing.T, l *lab.Lab, ports string, on bool) {
	t.Helper()
	u1, u3 := l.Host("u1"), l.Host("u3")
	for _, w := range []struct {
		on       bool
		from, to *lab.Host
	}{{b.to, u1, u3}, {b.fr, u3, u1}} {
		if !w.on {
			continue
		}
		match := fmt.Sprintf("udp dport { %s }", ports)
		var err error
		switch reject := fmt.Sprintf("ip saddr %s %s reject", w.from.Addr, match); {
		case b.reject && on:
			err = w.to.Block(t.Context(), reject)
		case b.reject:
			err = w.to.Unblock(t.Context(), reject)
		case on:
			err = l.Drop(t.Context(), w.from, w.to, match)
		default:
			err = l.Undrop(t.Context(), w.from, w.to, match)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// onPath returns an error unless a host has its connection to another on a
// path, with a reason in which words stand if that is not the best path.
func onPath(ctx context.Context, h, to *lab.Host, path, reason string) error {
	cs, err := connections(ctx, h)
	if err != nil {
		return err
	}
	for _, c := range cs {
		if c.nick == to.Name && c.state == "established" && c.path == path &&
			strings.Contains(c.attrs, "reason=") == (path == "sleeve") && strings.Contains(c.attrs, reason) {
			return nil
		}
	}
	return fmt.Errorf("%s: no connection to %s on %s with reason %q: %v", h.Name, to.Name, path, reason, cs)
}

// times are how long something took, time after time.
type times []time.Duration

func (ts times) String() string {
	s := slices.Sorted(slices.Values(ts))
	return fmt.Sprintf("median %s, most %s", s[len(s)/2].Round(time.Millisecond), s[len(s)-1].Round(time.Millisecond))
}

// testCycles blocks and frees the fast path between u1 and u3.
func testCycles(t *testing.T, l *lab.Lab, cs []*container, cycles int) {
	streams := []*numbered{startNumbered(t, cs[0], cs[2]), startNumbered(t, cs[2], cs[0]), startBroadcasts(t, cs[0], cs[2])}
	untouched := startNumbered(t, cs[0], cs[1])
	cycle(t, l, streams, []*numbered{untouched}, cycles)
}

// fallsBack waits until both ends use sleeve.
func (b block) fallsBack(t *testing.T, u1, u3 *lab.Host) {
	t.Helper()
	within(t, fallbackBar, b.name+": u1 on sleeve", func() error { return onPath(t.Context(), u1, u3, "sleeve", b.reason) })
	within(t, fallbackBar, b.name+": u3 on sleeve", func() error { return onPath(t.Context(), u3, u1, "sleeve", "") })
}

// returns waits until both ends use the fast path.
func (b block) returns(t *testing.T, u1, u3 *lab.Host) {
	t.Helper()
	within(t, backBar, b.name+": u1 on fastdp", func() error { return onPath(t.Context(), u1, u3, "fastdp", "") })
	within(t, backBar, b.name+": u3 on fastdp", func() error { return onPath(t.Context(), u3, u1, "fastdp", "") })
}

// testAfterQuiet blocks the fast path, and frees it, after containers have been
// silent: what they send then comes as soon as in the middle of a stream.
func testAfterQuiet(t *testing.T, l *lab.Lab, cs []*container) {
	u1, u3 := l.Host("u1"), l.Host("u3")
	b := blocks()[0]
	quiet := func() {
		select {
		case <-time.After(quietWanted(t)):
		case <-t.Context().Done():
		}
	}
	quiet()
	begin := time.Now()
	b.set(t, l, "6784", true)
	s := startNumbered(t, cs[0], cs[2])
	first := time.Since(begin)
	b.fallsBack(t, u1, u3)
	s.end()
	t.Logf("after %s of quiet: a first datagram after %s, sleeve after %s", quietWanted(t), first.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	if first > fallbackBar {
		t.Errorf("nothing arrives for %s", first)
	}
	quiet()
	begin = time.Now()
	b.set(t, l, "6784", false)
	b.returns(t, u1, u3)
	t.Logf("free again after as long: fastdp after %s", time.Since(begin).Round(time.Millisecond))
}

func quietWanted(t *testing.T) time.Duration {
	t.Helper()
	s := os.Getenv("TEST_QUIET")
	if s == "" {
		return time.Second
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatalf("TEST_QUIET=%s: want a time such as 10m", s)
	}
	return d
}

func cycle(t *testing.T, l *lab.Lab, streams, untouched []*numbered, cycles int) {
	t.Helper()
	u1, u3 := l.Host("u1"), l.Host("u3")
	var down, up, gaps, calm times
	for i := range cycles {
		b := blocks()[i%len(blocks())]
		begin := time.Now()
		b.set(t, l, "6784", true)
		b.fallsBack(t, u1, u3)
		down = append(down, time.Since(begin))
		begin = time.Now()
		b.set(t, l, "6784", false)
		b.returns(t, u1, u3)
		up = append(up, time.Since(begin))
		for _, s := range streams {
			gap := s.mark()
			gaps = append(gaps, gap)
			if gap > fallbackBar {
				t.Errorf("%s: stream %s: nothing for %s", b.name, s.name, gap)
			}
		}
		for _, s := range untouched {
			calm = append(calm, s.mark())
		}
	}
	t.Logf("%d cycles: sleeve after %v; fastdp after %v; gaps %v", cycles, down, up, gaps)
	if len(calm) > 0 {
		t.Logf("untouched streams: gaps %v", calm)
	}
}

// testCyclesWithRelay does the same while u2 reaches u3 only through u1.
func testCyclesWithRelay(t *testing.T, l *lab.Lab, cs []*container) {
	u2, u3 := l.Host("u2"), l.Host("u3")
	if err := l.Cut(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	within(t, patience, "u2 with one connection", func() error { return on(t.Context(), u2, 1, "fastdp") })
	streams := []*numbered{startNumbered(t, cs[1], cs[2]), startNumbered(t, cs[2], cs[1]), startNumbered(t, cs[0], cs[2])}
	cycle(t, l, streams, []*numbered{startNumbered(t, cs[1], cs[0])}, 3)
	testBroadcast(t, []*container{cs[1], cs[2], cs[0]})
	if err := l.Heal(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	weave(t, u2, "connect", "u3")
	established(t, l, patience)
}

// testHeavyLoss: the fast path loses 40 % of what u1 sends to u3, and only that.
func testHeavyLoss(t *testing.T, l *lab.Lab, cs []*container) {
	u1, u3 := l.Host("u1"), l.Host("u3")
	const some = "udp dport 6784 numgen random mod 100 < 40"
	s := startNumbered(t, cs[0], cs[2])
	begin := time.Now()
	if err := l.Drop(t.Context(), u1, u3, some); err != nil {
		t.Fatal(err)
	}
	within(t, time.Minute, "u1 on sleeve", func() error { return onPath(t.Context(), u1, u3, "sleeve", "% of probes are lost") })
	t.Logf("left after %s, gap %s", time.Since(begin).Round(time.Millisecond), s.mark())
	if err := onPath(t.Context(), u3, u1, "fastdp", ""); err != nil {
		t.Errorf("the other direction loses nothing: %v", err)
	}
	begin = time.Now()
	if err := l.Undrop(t.Context(), u1, u3, some); err != nil {
		t.Fatal(err)
	}
	within(t, time.Minute, "u1 on fastdp", func() error { return onPath(t.Context(), u1, u3, "fastdp", "") })
	t.Logf("used again after %s, gap %s", time.Since(begin).Round(time.Millisecond), s.mark())
}

// testNoDataPath: between u1 and u3 messages pass and frames do not, on any
// path. u2 relays.
func testNoDataPath(t *testing.T, l *lab.Lab, cs []*container) {
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	streams := []*numbered{startNumbered(t, cs[0], cs[2]), startNumbered(t, cs[2], cs[0]), startBroadcasts(t, cs[0], cs[2])}
	untouched := startNumbered(t, cs[0], cs[1])
	for _, b := range blocks()[:3] {
		begin := time.Now()
		b.set(t, l, "6783, 6784", true)
		for _, ends := range [][2]*lab.Host{{u1, u3}, {u3, u1}} {
			within(t, patience, "relayed", func() error { return relayedBy(t.Context(), ends[0], ends[1], u2) })
		}
		within(t, patience, "relayed", func() error { return cs[0].reaches(t.Context(), cs[2].addr.Addr(), 1200) })
		t.Logf("%s: shown as relayed after %s", b.name, time.Since(begin).Round(time.Millisecond))
		gapsAtMost(t, streams, b.name, roundBar)
		testBroadcast(t, cs)
		if err := exchange(t.Context(), cs[0], cs[2], 10<<20); err != nil {
			t.Errorf("10 MB through u2: %v", err)
		}
		gapsAtMost(t, streams, "relayed", smooth)

		begin = time.Now()
		b.set(t, l, "6783, 6784", false)
		established(t, l, backBar)
		t.Logf("%s: direct again after %s", b.name, time.Since(begin).Round(time.Millisecond))
		allReach(t, cs...)
		gapsAtMost(t, streams, "direct again", smooth)
	}
	gapsAtMost(t, []*numbered{untouched}, "untouched", smooth)
}

// relayedBy returns an error unless a host shows that frames to another go
// through a third, and why.
func relayedBy(ctx context.Context, h, to, by *lab.Host) error {
	out, err := h.Output(ctx, "weave", "status", "connections")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "("+to.Name+") ") && strings.Contains(line, " pending ") && strings.Contains(line, "fastdp: ") &&
			strings.Contains(line, "sleeve: ") && strings.Contains(line, "relay=") && strings.Contains(line, "("+by.Name+")") {
			return nil
		}
	}
	return fmt.Errorf("%s: no connection to %s with relay %s:\n%s", h.Name, to.Name, by.Name, out)
}

// gapsAtMost checks how long streams were silent since the last time.
func gapsAtMost(t *testing.T, ss []*numbered, when string, limit time.Duration) {
	t.Helper()
	for _, s := range ss {
		gap := s.mark()
		t.Logf("%s: stream %s: longest gap %s", when, s.name, gap.Round(time.Millisecond))
		if gap > limit {
			t.Errorf("%s: stream %s: nothing for %s, want at most %s", when, s.name, gap.Round(time.Millisecond), limit)
		}
	}
}

// undisturbed watches streams for a while: none pauses.
func undisturbed(t *testing.T, ss []*numbered, when string, watch time.Duration) {
	t.Helper()
	select {
	case <-time.After(watch):
	case <-t.Context().Done():
	}
	gapsAtMost(t, ss, when, smooth)
}

// testOtherLayout: the daemon of u1 is followed by one whose maps are laid out
// otherwise. The maps of the first one get the name that another layout would
// have.
func testOtherLayout(t *testing.T, l *lab.Lab, ss []*numbered) {
	u1 := l.Host("u1")
	programs := programsOf(t, u1)
	weave(t, u1, "stop")
	old := strings.Fields(must(t, u1, "sh", "-c", "find /sys/fs/bpf /run/weave -maxdepth 3 -type d -name 'maps-*'"))
	if len(old) != 1 {
		t.Fatalf("pinned maps: %v, want one set", old)
	}
	must(t, u1, "mv", old[0], path.Join(path.Dir(old[0]), "maps-of-old"))
	launch(t, u1)
	established(t, l, patience)
	within(t, patience, "new maps", func() error {
		if r := u1.Run(t.Context(), "test", "-e", path.Join(path.Dir(old[0]), "maps-of-old")); r.Code == 0 {
			return fmt.Errorf("the old maps are still there")
		}
		return nil
	})
	must(t, u1, "test", "-d", old[0])
	if got := programsOf(t, u1); !slices.Equal(got, programs) {
		t.Errorf("programs in the kernel before: %q, after: %q", programs, got)
	}
	undisturbed(t, ss, "other layout", 3*time.Second)
	// The new maps count from zero: programs that met frames with empty
	// tables would show here.
	for _, name := range []string{"dropped_no_path", "dropped_not_neighbour", "dropped_unknown_mac"} {
		if n := weave(t, u1, "report", "-f", fmt.Sprintf("{{index .Router.OverlayDiagnostics.FastDP %q}}", name)); n != "0" {
			t.Errorf("%s: %s of the new programs, want 0", name, n)
		}
	}
}

// iperf is a TCP connection between two containers over which iperf3 sends.
type iperf struct {
	client, server *exec.Cmd
	out            *strings.Builder
}

// startIperf sends for some seconds, or until end.
func startIperf(t *testing.T, a, b *container, seconds int, flags ...string) *iperf {
	t.Helper()
	start := func(c *container, args ...string) (*exec.Cmd, *strings.Builder) {
		t.Helper()
		out := &strings.Builder{}
		cmd := exec.Command("nsenter", append([]string{"--net=" + c.netns, "iperf3"}, args...)...)
		cmd.Stdout, cmd.Stderr = out, out
		if err := c.Start(cmd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if cmd.ProcessState == nil {
				_ = cmd.Process.Kill()
				_ = cmd.Wait()
			}
		})
		return cmd, out
	}
	r := &iperf{}
	addr := b.addr.Addr().String()
	r.server, _ = start(b, "-s", "-B", addr)
	within(t, patience, "iperf3 listens", func() error {
		return b.RunCmd(exec.CommandContext(t.Context(), "nsenter", "--net="+b.netns, "sh", "-c", "ss -Hltn sport = 5201 | grep -q LISTEN")).Err()
	})
	r.client, r.out = start(a, append([]string{"-J", "-i", "0.1", "-c", addr, "-t", strconv.Itoa(seconds)}, flags...)...)
	return r
}

// end ends the run and checks that its connection was never reset.
func (r *iperf) end(t *testing.T) {
	t.Helper()
	if err := r.client.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = r.client.Wait() // it was interrupted: what it says counts
	if err := r.server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = r.server.Wait()
	var said struct {
		Intervals []struct {
			Sum struct{ Bytes, Start, End float64 }
		}
		Error string
	}
	if err := json.Unmarshal([]byte(r.out.String()), &said); err != nil {
		t.Fatalf("iperf3 said %q: %v", r.out, err)
	}
	if !strings.Contains(said.Error, "interrupt") || len(said.Intervals) == 0 {
		t.Fatalf("iperf3 ended after %d intervals: %s", len(said.Intervals), said.Error)
	}
	total, silent, longest := 0.0, 0.0, 0.0
	for _, i := range said.Intervals {
		total += i.Sum.Bytes
		if silent += i.Sum.End - i.Sum.Start; i.Sum.Bytes > 0 {
			silent = 0
		}
		longest = max(longest, silent)
	}
	t.Logf("one TCP connection, %.0f MB in %.0f s, longest time with nothing sent %.1f s", total/1e6, said.Intervals[len(said.Intervals)-1].Sum.End, longest)
}
