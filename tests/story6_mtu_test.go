package tests

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// vxlanOver4 is what VXLAN adds to the IP packet inside, over IPv4.
const vxlanOver4 = 50

// narrowBar is how long traffic may stand still when a path narrows and nobody
// says so.
const narrowBar = 5 * time.Second

// TestMTU is about underlays of all sizes, on which nothing may vanish because
// it is too large, and nothing but its size may change.
func TestMTU(t *testing.T) {
	l := build(t, lab.Config{MTU: 9000, Wire: true})
	for _, mtu := range []int{1280, 1500, 9000} {
		step(t, fmt.Sprint(mtu), func(t *testing.T) { testUnderlay(t, l, mtu) })
	}
	step(t, "small device", func(t *testing.T) { testSmallDevice(t, l) })
	step(t, "sleeve", func(t *testing.T) { testSleeveSizes(t, l) })
	step(t, "mixed", func(t *testing.T) { testMixedUnderlay(t, l) })
}

// begin launches two hosts, connected by that path, on an underlay of that size, the
// second with flags. All ends with the test.
func begin(t *testing.T, l *lab.Lab, path string, mtu int, flags ...string) (a, b *container) {
	t.Helper()
	u1, u2 := l.Host("u1"), l.Host("u2")
	for _, h := range []*lab.Host{u1, u2} {
		must(t, h, "ip", "link", "set", "eth0", "mtu", fmt.Sprint(mtu))
		t.Cleanup(func() {
			r := h.Run(context.WithoutCancel(t.Context()), "sh", "-c", "weave reset; "+removeNamespaces)
			if err := r.Err(); err != nil {
				t.Error(err)
			}
		})
	}
	launch(t, u1, "--no-dns", "u2")
	launch(t, u2, slices.Concat([]string{"--no-dns"}, flags, []string{"u1"})...)
	for _, h := range []*lab.Host{u1, u2} {
		within(t, patience, "connection", func() error { return on(t.Context(), h, 1, path) })
	}
	return joined(t, u1), joined(t, u2)
}

func testUnderlay(t *testing.T, l *lab.Lab, mtu int) {
	a, b := begin(t, l, "fastdp", mtu)
	wantDeviceMTU(t, a, mtu-vxlanOver4)
	wantConnection(t, a.Host, "u2", mtu-vxlanOver4)
	wantSteps(t, a, b, mtu-vxlanOver4)
}

// A device that takes less than its path is met by the same errors.
func testSmallDevice(t *testing.T, l *lab.Lab) {
	a, b := begin(t, l, "fastdp", 1500, "--mtu", "1300")
	wantDeviceMTU(t, b, 1300)
	wantConnection(t, a.Host, "u2", 1300)
	wantSteps(t, a, b, 1300)
}

// Sleeve carries every size that the containers' devices take, whatever becomes of the
// underlay, and so has no use for errors.
func testSleeveSizes(t *testing.T, l *lab.Lab) {
	const device, underlay = 1500 - vxlanOver4, 1300
	a, b := begin(t, l, "sleeve", 1500, "--no-fastdp")
	wantDeviceMTU(t, a, device)
	for _, c := range []*container{a, b} {
		must(t, c.Host, "ip", "link", "set", "eth0", "mtu", fmt.Sprint(underlay))
	}
	linkLocal := b.linkLocal(t) + "%ethwe"
	for _, to := range []string{b.addr.Addr().String(), linkLocal} {
		within(t, patience, "ping", func() error { return a.pingDF(t, to, device-48).Err() })
	}
	for size := underlay - 73; size <= device; size++ { // one datagram holds underlay - 70
		if size == underlay-66 {
			size = device - 3
		}
		for to, headers := range map[string]int{b.addr.Addr().String(): 28, linkLocal: 48} {
			if r := a.pingDF(t, to, size-headers); r.Code != 0 || strings.Contains(r.Stdout+r.Stderr, "mtu") {
				t.Errorf("%d bytes to %s: exit %d, %s%s", size, to, r.Code, r.Stdout, r.Stderr)
			}
		}
	}
	if err := exchange(t.Context(), a, b, 10<<20); err != nil {
		t.Errorf("10 MB: %v", err)
	}
}

func testMixedUnderlay(t *testing.T, l *lab.Lab) {
	for name, mtu := range map[string]string{"u1": "9000", "u2": "9000", "u3": "1500"} {
		must(t, l.Host(name), "ip", "link", "set", "eth0", "mtu", mtu)
	}
	launchAll(t, l)
	var cs []*container
	for _, h := range l.Hosts {
		cs = append(cs, joined(t, h))
	}
	u1, u2 := l.Host("u1"), l.Host("u2")
	wantDeviceMTU(t, cs[0], 9000-vxlanOver4)
	wantDeviceMTU(t, cs[2], 1500-vxlanOver4)
	wantConnection(t, u1, "u2", 9000-vxlanOver4)
	wantConnection(t, u1, "u3", 1500-vxlanOver4)
	wantSteps(t, cs[0], cs[1], 9000-vxlanOver4)
	wantSteps(t, cs[0], cs[2], 1500-vxlanOver4)
	for _, c := range cs[1:] {
		if err := exchange(t.Context(), cs[0], c, 10<<20); err != nil {
			t.Errorf("10 MB between %s and %s: %v", cs[0].name, c.name, err)
		}
	}

	s := startStream(t, cs[0], cs[1])
	begin := time.Now()
	if err := l.Narrow(t.Context(), u1, u2, 1400); err != nil {
		t.Fatal(err)
	}
	within(t, 2*narrowBar, "smaller size", func() error { return hasMTU(t.Context(), u1, "u2", 1330) })
	t.Logf("smaller size after %s", time.Since(begin).Round(time.Millisecond))
	within(t, patience, "the stream goes on", func() error { return s.movedIn(time.Second) })
	gap := s.gap(begin)
	t.Logf("the stream stood still for %s", gap.Round(time.Millisecond))
	if gap > narrowBar {
		t.Errorf("the stream stood still for %s, want at most %s", gap, narrowBar)
	}
	wantConnection(t, u1, "u2", 1330)
	wantConnection(t, u2, "u1", 1330) // which finds out by itself
	wantSteps(t, cs[1], cs[0], 1330)
}

// joined attaches a namespace of a host.
func joined(t *testing.T, h *lab.Host) *container {
	t.Helper()
	must(t, h, "ip", "netns", "add", "plain")
	must(t, h, "ip", "-n", "plain", "link", "set", "lo", "up")
	addr := weave(t, h, "attach", "--netns", "/run/netns/plain")
	return &container{Host: h, name: h.Name, netns: "/run/netns/plain", addr: netip.PrefixFrom(netip.MustParseAddr(addr), 12)}
}

func wantDeviceMTU(t *testing.T, c *container, mtu int) {
	t.Helper()
	if text := must(t, c.Host, "ip", "-n", "plain", "-o", "link", "show", "ethwe"); !strings.Contains(text, fmt.Sprintf(" mtu %d ", mtu)) {
		t.Errorf("%s: want an MTU of %d: %s", c.name, mtu, text)
	}
}

// hasMTU returns an error unless the connection to a peer is on the fast path
// with that MTU and nothing to say.
func hasMTU(ctx context.Context, h *lab.Host, to string, mtu int) error {
	cs, err := connections(ctx, h)
	if err != nil {
		return err
	}
	for _, c := range cs {
		if c.nick != to {
			continue
		}
		if c.path != "fastdp" || !strings.Contains(c.attrs+" ", fmt.Sprintf("mtu=%d ", mtu)) || strings.Contains(c.attrs, "reason=") {
			return fmt.Errorf("%s: %q, want fastdp with mtu=%d", h.Name, c.line, mtu)
		}
		return nil
	}
	return fmt.Errorf("%s: no connection to %s", h.Name, to)
}

func wantConnection(t *testing.T, h *lab.Host, to string, mtu int) {
	t.Helper()
	within(t, patience, "MTU", func() error { return hasMTU(t.Context(), h, to, mtu) })
}

// wantSteps sends IPv4 packets that must not be fragmented, and IPv6 packets where
// there may be such, in steps of one byte around mtu: what fits arrives, what does
// not is answered with the size.
func wantSteps(t *testing.T, from, to *container, mtu int) {
	t.Helper()
	const headers, headers6, least6 = 28, 48, 1280 // of IP and ICMP
	wantStepsTo(t, from, to.addr.Addr().String(), headers, mtu)
	if mtu >= least6 {
		wantStepsTo(t, from, to.linkLocal(t)+"%ethwe", headers6, mtu)
	}
}

// linkLocal is the IPv6 address that the kernel gives a device.
func (c *container) linkLocal(t *testing.T) string {
	t.Helper()
	fields := strings.Fields(must(t, c.Host, "ip", "-n", "plain", "-6", "-o", "addr", "show", "dev", "ethwe", "scope", "link"))
	i := slices.Index(fields, "inet6")
	if i < 0 || i+1 == len(fields) {
		t.Fatalf("%s: no link-local address: %q", c.name, fields)
	}
	addr, _, _ := strings.Cut(fields[i+1], "/")
	return addr
}

func wantStepsTo(t *testing.T, from *container, to string, headers, mtu int) {
	t.Helper()
	ping := func(size int) lab.Result {
		for _, family := range []string{"-4", "-6"} { // forgets what was learnt
			must(t, from.Host, "ip", "-n", "plain", family, "route", "flush", "cache")
		}
		return from.pingDF(t, to, size-headers)
	}
	within(t, patience, "ping", func() error { return ping(mtu - 3).Err() })
	for size := mtu - 3; size <= mtu+3; size++ {
		r := ping(size)
		told := false
		for _, words := range []string{"mtu = %d", "mtu=%d", "mtu: %d"} {
			told = told || strings.Contains(r.Stdout+r.Stderr, fmt.Sprintf(words, mtu))
		}
		if (r.Code == 0) != (size <= mtu) || told != (size > mtu) {
			t.Errorf("%s to %s, %d bytes where %d fit: exit %d, %s%s", from.name, to, size, mtu, r.Code, r.Stdout, r.Stderr)
		}
	}
}

// pingDF sends one packet with that payload which must not be fragmented.
func (c *container) pingDF(t *testing.T, to string, payload int) lab.Result {
	return c.Run(t.Context(), "nsenter", "--net="+c.netns, "ping", "-M", "do", "-c", "1", "-W", "2", "-s", fmt.Sprint(payload), to)
}

// stream is a TCP connection that sends all the time.
type stream struct {
	mu   sync.Mutex
	came []time.Time // when something arrived, at most every streamStep
}

const streamStep = 10 * time.Millisecond

// startStream runs until the test ends.
func startStream(t *testing.T, from, to *container) *stream {
	t.Helper()
	var listener net.Listener
	var out net.Conn
	err := to.DoIn(to.netns, func() (err error) {
		listener, err = new(net.ListenConfig).Listen(t.Context(), "tcp4", net.JoinHostPort(to.addr.Addr().String(), "0"))
		return err
	})
	if err == nil {
		err = from.DoIn(from.netns, func() (err error) {
			out, err = new(net.Dialer).DialContext(t.Context(), "tcp4", listener.Addr().String())
			return err
		})
	}
	if err != nil {
		t.Fatalf("stream: %v", err)
	}
	in, err := listener.Accept()
	_ = listener.Close()
	if err != nil {
		t.Fatalf("stream: %v", err)
	}
	s := &stream{}
	var wait sync.WaitGroup
	t.Cleanup(func() { _ = out.Close(); _ = in.Close(); wait.Wait() })
	wait.Go(func() {
		b := make([]byte, 1<<16)
		for {
			if _, err := out.Write(b); err != nil {
				return
			}
		}
	})
	wait.Go(func() {
		b := make([]byte, 1<<20)
		for {
			if _, err := in.Read(b); err != nil {
				return
			}
			s.mu.Lock()
			if n := len(s.came); n == 0 || time.Since(s.came[n-1]) > streamStep {
				s.came = append(s.came, time.Now())
			}
			s.mu.Unlock()
		}
	})
	within(t, patience, "stream", func() error { return s.movedIn(time.Second) })
	return s
}

// movedIn returns an error unless something arrived in the last while.
func (s *stream) movedIn(d time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.came); n == 0 || time.Since(s.came[n-1]) > d {
		return fmt.Errorf("nothing arrived in the last %s", d)
	}
	return nil
}

// gap is the longest time from then to now in which nothing arrived.
func (s *stream) gap(then time.Time) (longest time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range append(s.came, time.Now()) {
		if c.After(then) {
			longest, then = max(longest, c.Sub(then)), c
		}
	}
	return longest
}
