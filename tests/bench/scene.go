package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"weave.local/tests/lab"
)

const (
	rawMTU   = 1500
	vxlanMTU = 1450
	// idleTime is how long daemons are left alone before their memory is read.
	idleTime = 2 * time.Second
	// meshTimeout bounds the time until all daemons are connected.
	meshTimeout = 20 * time.Second
)

// end is where a measurement starts or ends: the network namespace with the
// file netns on a host, or the host's own when that is empty.
type end struct {
	host  *lab.Host
	netns string
	addr  netip.Addr
}

// command makes a command run at the end, on its host.
func (e end) command(args ...string) []string {
	if e.netns == "" {
		return args
	}
	return append([]string{"nsenter", "--net=" + e.netns, "--"}, args...)
}

// commandOn is command on one processor.
func (e end) commandOn(cpu int, args ...string) []string {
	return append([]string{"taskset", "-c", strconv.Itoa(cpu)}, e.command(args...)...)
}

// The processors of both ends. Where the scheduler puts them decides more than
// the path does, so it is not left to chance: what streams has one processor
// for each end, and what waits for answers has both ends on one, since waking
// an idle processor of a virtual machine takes longer than the whole way.
const senderCPU = 0

func receiverCPU() int { return runtime.NumCPU() - 1 }

// path is a way of packets from one end to another.
type path struct {
	name     string
	mtu      int
	from, to end
}

// scene is a lab with all paths laid:
//
//	f1 ── f2 ── f3   raw, vxlan and fastdp between f1 and f2; f3 makes them three peers
//	r1 ── r2 ── r3   relay: from r1 to r3, which do not know each other
//	s1 ── s2         sleeve
type scene struct {
	lab   *lab.Lab
	weave string
	paths []path
	mesh  meshFigures
	full  *crowds // of fastdp-full
}

// meshFigures are about the daemons of fastdp.
type meshFigures struct {
	LaunchSeconds float64 `json:"launch_seconds"` // slowest `weave launch`, until it returned
	MeshSeconds   float64 `json:"mesh_seconds"`   // from the first launch until each sees all
	RSSBytes      int64   `json:"rss_bytes"`      // largest, idle
}

func buildScene(ctx context.Context, underlay, weave string, names []string) (s *scene, err error) {
	l, err := lab.New(ctx, lab.Config{Hosts: []string{"f1", "f2", "f3", "r1", "r2", "r3", "s1", "s2"}, MTU: rawMTU, Wire: underlay == "wire"})
	if err != nil {
		return nil, err
	}
	s = &scene{lab: l, weave: weave}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for _, name := range names {
		var p path
		switch name {
		case "raw":
			p = path{mtu: rawMTU, from: end{host: l.Host("f1"), addr: l.Host("f1").Addr}, to: end{host: l.Host("f2"), addr: l.Host("f2").Addr}}
		case "vxlan":
			p, err = s.layVXLAN(ctx, l.Host("f1"), l.Host("f2"))
		case "fastdp":
			p, err = s.layOurs(ctx, "fastdp", l.Host("f1"), l.Host("f2"), l.Host("f3"))
		case fullPath:
			p = s.paths[len(s.paths)-1]
		case "relay":
			p, err = s.layRelay(ctx, l.Host("r1"), l.Host("r2"), l.Host("r3"))
		case "sleeve":
			p, err = s.layOurs(ctx, "sleeve", l.Host("s1"), l.Host("s2"))
		}
		if err != nil {
			return nil, fmt.Errorf("path %s: %w", name, err)
		}
		p.name = name
		s.paths = append(s.paths, p)
	}
	return s, nil
}

// layVXLAN joins a namespace on each of two hosts by the kernel's own means.
func (s *scene) layVXLAN(ctx context.Context, a, b *lab.Host) (path, error) {
	ends := []end{
		{a, "/run/netns/k", netip.AddrFrom4([4]byte{10, 99, 0, 1})},
		{b, "/run/netns/k", netip.AddrFrom4([4]byte{10, 99, 0, 2})},
	}
	mac := func(i int) string { return fmt.Sprintf("02:00:00:00:99:%02x", i+1) }
	for i, e := range ends {
		j := 1 - i
		script := fmt.Sprintf(`
set -e
ip netns add k
ip link add brk type bridge
ip link add vxk mtu %[1]d type vxlan id 7 dstport 4789 local %[2]s nolearning
ip link add k0 mtu %[1]d type veth peer name eth0 mtu %[1]d address %[4]s netns k
for d in vxk k0; do ip link set $d master brk up; done
ip link set brk up
bridge fdb append %[5]s dev vxk dst %[3]s self
bridge fdb append 00:00:00:00:00:00 dev vxk dst %[3]s self
ip -n k link set lo up
ip -n k addr add %[6]s/24 dev eth0
ip -n k link set eth0 up
`, vxlanMTU, e.host.Addr, ends[j].host.Addr, mac(i), mac(j), e.addr)
		if err := e.host.Run(ctx, "sh", "-c", script).Err(); err != nil {
			return path{}, err
		}
	}
	return path{mtu: vxlanMTU, from: ends[0], to: ends[1]}, nil
}

// layOurs launches a daemon on each host and joins a namespace on each of the
// first two.
func (s *scene) layOurs(ctx context.Context, kind string, hosts ...*lab.Host) (path, error) {
	start := time.Now()
	for _, h := range hosts {
		args := []string{s.weave, "launch", "--no-dns", "--docker-api", ""}
		if kind == "sleeve" {
			args = append(args, "--no-fastdp")
		}
		for _, other := range hosts {
			if other != h {
				args = append(args, other.Name)
			}
		}
		launched := time.Now()
		if err := h.Run(ctx, args...).Err(); err != nil {
			return path{}, err
		}
		if kind == "fastdp" {
			s.mesh.LaunchSeconds = max(s.mesh.LaunchSeconds, time.Since(launched).Seconds())
		}
	}
	if err := lab.Wait(ctx, meshTimeout, func() error { return s.connected(ctx, kind, hosts) }); err != nil {
		return path{}, err
	}
	if kind == "fastdp" {
		s.mesh.MeshSeconds = time.Since(start).Seconds()
		if err := s.readMemory(ctx, hosts); err != nil {
			return path{}, err
		}
	}
	return s.join(ctx, hosts[0], hosts[1])
}

// layRelay joins a namespace on each of two hosts that know only the one between
// them, which relays.
func (s *scene) layRelay(ctx context.Context, a, relay, b *lab.Host) (path, error) {
	for _, h := range []*lab.Host{relay, a, b} {
		args := []string{s.weave, "launch", "--no-dns", "--no-discovery", "--docker-api", ""}
		if h != relay {
			args = append(args, relay.Name)
		}
		if err := h.Run(ctx, args...).Err(); err != nil {
			return path{}, err
		}
	}
	if err := lab.Wait(ctx, meshTimeout, func() error { return s.relayed(ctx, a, relay, b) }); err != nil {
		return path{}, err
	}
	return s.join(ctx, a, b)
}

// relayed says whether two hosts have fastdp to the relay only.
func (s *scene) relayed(ctx context.Context, a, relay, b *lab.Host) error {
	for h, want := range map[*lab.Host]int{a: 1, relay: 2, b: 1} {
		text, err := h.Output(ctx, s.weave, "status", "connections")
		if err != nil {
			return err
		}
		if n := countEstablished(text, "fastdp"); n != want {
			return fmt.Errorf("%s has %d established connections by fastdp, want %d:\n%s", h.Name, n, want, text)
		}
	}
	return nil
}

// connected says whether each host has all others, by the path of that kind.
func (s *scene) connected(ctx context.Context, kind string, hosts []*lab.Host) error {
	for _, h := range hosts {
		text, err := h.Output(ctx, s.weave, "status", "connections")
		if err != nil {
			return err
		}
		if n := countEstablished(text, kind); n != len(hosts)-1 {
			return fmt.Errorf("%s has %d established connections by %s, want %d:\n%s", h.Name, n, kind, len(hosts)-1, text)
		}
	}
	return nil
}

func countEstablished(status, kind string) int {
	n := 0
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) > 3 && f[2] == "established" && f[3] == kind {
			n++
		}
	}
	return n
}

func (s *scene) join(ctx context.Context, a, b *lab.Host) (path, error) {
	var p path
	for i, h := range []*lab.Host{a, b} {
		const netns = "/run/netns/w"
		if err := h.Run(ctx, "ip", "netns", "add", "w").Err(); err != nil {
			return p, err
		}
		text, err := h.Output(ctx, s.weave, "attach", "--netns", netns)
		if err != nil {
			return p, err
		}
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return p, fmt.Errorf("weave attach printed %q, want an address", text)
		}
		e := end{h, netns, addr}
		if i == 0 {
			p.from = e
		} else {
			p.to = e
		}
	}
	text, err := a.Output(ctx, p.from.command("ip", "-o", "link", "show", "ethwe")...)
	if err != nil {
		return p, err
	}
	_, after, _ := strings.Cut(text, " mtu ")
	mtu, _, _ := strings.Cut(after, " ")
	p.mtu, err = strconv.Atoi(mtu)
	if err != nil {
		return p, fmt.Errorf("no MTU in %q", text)
	}
	return p, nil
}

// readMemory notes the resident memory of the largest daemon.
func (s *scene) readMemory(ctx context.Context, hosts []*lab.Host) error {
	select {
	case <-time.After(idleTime):
	case <-ctx.Done():
		return ctx.Err()
	}
	for _, h := range hosts {
		rss, err := residentMemory(h)
		if err != nil {
			return fmt.Errorf("memory of the daemon on %s: %w", h.Name, err)
		}
		s.mesh.RSSBytes = max(s.mesh.RSSBytes, rss)
	}
	return nil
}

func residentMemory(h *lab.Host) (int64, error) {
	files, err := filepath.Glob(h.Path("/proc") + "/[0-9]*/status")
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil || !strings.HasPrefix(string(b), "Name:\tweave") {
			continue // another, or gone by now
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
				kib, err := strconv.ParseInt(f[1], 10, 64)
				return kib << 10, err
			}
		}
	}
	return 0, errors.New("it does not run")
}
