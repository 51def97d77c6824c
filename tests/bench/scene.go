package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
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
//	s1 ── s2         sleeve; likewise e1, e2 sealed and w1, w2 wireguard
//	t1 ── t2 ── t3   sleeve-relay; likewise g1, g2, g3 sealed-relay and m1, m2, m3 wireguard-relay
type scene struct {
	lab       *lab.Lab
	weave     string
	wireguard string // the program
	paths     []path
	mesh      meshFigures
	full      *crowds // of fastdp-full
}

// hostNames are the hosts between whose containers a path lies, in a row, and
// those that only make the mesh larger.
func hostNames(path string) []string {
	switch path {
	case "relay":
		return []string{"r1", "r2", "r3"}
	case "sleeve":
		return []string{"s1", "s2"}
	case "sealed":
		return []string{"e1", "e2"}
	case "wireguard":
		return []string{"w1", "w2"}
	case "sleeve-relay":
		return []string{"t1", "t2", "t3"}
	case "sealed-relay":
		return []string{"g1", "g2", "g3"}
	case "wireguard-relay":
		return []string{"m1", "m2", "m3"}
	default:
		return []string{"f1", "f2", "f3"}
	}
}

// hosts are those of a path.
func (s *scene) hosts(path string) []*lab.Host {
	var out []*lab.Host
	for _, name := range hostNames(path) {
		out = append(out, s.lab.Host(name))
	}
	return out
}

// launchFlags make the daemons of a path of ours serve it.
func launchFlags(path string) []string {
	flags := []string{"--no-dns", "--docker-api", ""}
	switch path {
	case "sleeve", "sleeve-relay":
		flags = append(flags, "--no-fastdp")
	case "sealed", "sealed-relay":
		flags = append(flags, "--password", "only for the bench")
	}
	return flags
}

// carrier is the data path that carries a path of ours.
func carrier(path string) string {
	if path == "fastdp" || path == "relay" {
		return "fastdp"
	}
	return "sleeve"
}

// meshFigures are about the daemons of fastdp.
type meshFigures struct {
	LaunchSeconds float64 `json:"launch_seconds"` // slowest `weave launch`, until it returned
	MeshSeconds   float64 `json:"mesh_seconds"`   // from the first launch until each sees all
	RSSBytes      int64   `json:"rss_bytes"`      // largest, idle
}

func buildScene(ctx context.Context, underlay string, o options) (s *scene, err error) {
	var hosts []string
	for _, name := range o.only.paths {
		for _, h := range hostNames(name) {
			if !slices.Contains(hosts, h) {
				hosts = append(hosts, h)
			}
		}
	}
	l, err := lab.New(ctx, lab.Config{Hosts: hosts, MTU: rawMTU, Wire: underlay == "wire"})
	if err != nil {
		return nil, err
	}
	s = &scene{lab: l, weave: o.weave, wireguard: o.wireguard}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for _, name := range o.only.paths {
		p, err := s.lay(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("path %s: %w", name, err)
		}
		p.name = name
		s.paths = append(s.paths, p)
	}
	return s, nil
}

// lay makes a path ready for packets.
func (s *scene) lay(ctx context.Context, name string) (path, error) {
	hosts := s.hosts(name)
	switch name {
	case "raw":
		return path{mtu: rawMTU, from: end{host: hosts[0], addr: hosts[0].Addr}, to: end{host: hosts[1], addr: hosts[1].Addr}}, nil
	case "vxlan":
		return s.layVXLAN(ctx, hosts[0], hosts[1])
	case fullPath:
		return s.paths[len(s.paths)-1], nil // it follows fastdp
	case "wireguard", "wireguard-relay":
		return s.layWireGuard(ctx, hosts...)
	case "relay", "sleeve-relay", "sealed-relay":
		return s.layRelay(ctx, name, hosts[0], hosts[1], hosts[2])
	default:
		return s.layOurs(ctx, name, hosts...)
	}
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
func (s *scene) layOurs(ctx context.Context, name string, hosts ...*lab.Host) (path, error) {
	start := time.Now()
	for _, h := range hosts {
		args := append([]string{s.weave, "launch"}, launchFlags(name)...)
		for _, other := range hosts {
			if other != h {
				args = append(args, other.Name)
			}
		}
		launched := time.Now()
		if err := h.Run(ctx, args...).Err(); err != nil {
			return path{}, err
		}
		if name == "fastdp" {
			s.mesh.LaunchSeconds = max(s.mesh.LaunchSeconds, time.Since(launched).Seconds())
		}
	}
	if err := lab.Wait(ctx, meshTimeout, func() error { return s.connected(ctx, carrier(name), hosts) }); err != nil {
		return path{}, err
	}
	if name == "fastdp" {
		s.mesh.MeshSeconds = time.Since(start).Seconds()
		if err := s.readMemory(ctx, hosts); err != nil {
			return path{}, err
		}
	}
	return s.join(ctx, hosts[0], hosts[1])
}

// layRelay joins a namespace on each of two hosts that know only the one between
// them, which relays.
func (s *scene) layRelay(ctx context.Context, name string, a, relay, b *lab.Host) (path, error) {
	for _, h := range []*lab.Host{relay, a, b} {
		args := append([]string{s.weave, "launch", "--no-discovery"}, launchFlags(name)...)
		if h != relay {
			args = append(args, relay.Name)
		}
		if err := h.Run(ctx, args...).Err(); err != nil {
			return path{}, err
		}
	}
	if err := lab.Wait(ctx, meshTimeout, func() error { return s.relayed(ctx, carrier(name), a, relay, b) }); err != nil {
		return path{}, err
	}
	return s.join(ctx, a, b)
}

// relayed says whether two hosts have a path of that kind to the relay only.
func (s *scene) relayed(ctx context.Context, kind string, a, relay, b *lab.Host) error {
	for h, want := range map[*lab.Host]int{a: 1, relay: 2, b: 1} {
		text, err := h.Output(ctx, s.weave, "status", "connections")
		if err != nil {
			return err
		}
		if n := countEstablished(text, kind); n != want {
			return fmt.Errorf("%s has %d established connections by %s, want %d:\n%s", h.Name, n, kind, want, text)
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
		f := strings.Fields(line)
		// Links with a password say beforehand whether frames are encrypted.
		if i := slices.Index(f, kind); (i == 3 || i == 4) && f[2] == "established" {
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
		rss, err := memory(h, filepath.Base(s.weave), "VmRSS:")
		if err != nil {
			return fmt.Errorf("memory of the daemon on %s: %w", h.Name, err)
		}
		s.mesh.RSSBytes = max(s.mesh.RSSBytes, rss)
	}
	return nil
}

// memory is a line of the status of a host's daemon (proc_pid_status(5)), in
// bytes: VmRSS what it has in memory, VmHWM the most that it ever had.
func memory(h *lab.Host, name, line string) (int64, error) {
	dir, err := processOf(h, name)
	if err != nil {
		return 0, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) == 3 && f[0] == line {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("no %s in its status", line)
}

// forgetPeak makes VmHWM of a daemon count anew: from when it starts it tells of
// what deriving keys from a password takes.
func forgetPeak(h *lab.Host, name string) error {
	dir, err := processOf(h, name)
	if err != nil {
		return err
	}
	const highWater = "5" // see clear_refs in proc(5)
	return os.WriteFile(filepath.Join(dir, "clear_refs"), []byte(highWater), 0)
}

// processOf is the folder in /proc of the process on a host whose name begins so.
func processOf(h *lab.Host, name string) (string, error) {
	files, err := filepath.Glob(h.Path("/proc") + "/[0-9]*/comm")
	if err != nil {
		return "", err
	}
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(b), name) {
			return filepath.Dir(file), nil
		}
	}
	return "", fmt.Errorf("%s does not run on %s", name, h.Name)
}
