package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// build makes a lab for a test and watches that nothing is left of it.
func build(t *testing.T, cfg Config) *Lab {
	t.Helper()
	if why := Missing(cfg.Docker); why != "" {
		if os.Getenv("TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	begin := time.Now()
	l, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("up in %s", time.Since(begin).Round(time.Millisecond))
	t.Cleanup(func() {
		begin := time.Now()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		t.Logf("down in %s", time.Since(begin).Round(time.Millisecond))
		if left := traces(l.id); len(left) > 0 {
			t.Errorf("left of the lab: %s", strings.Join(left, "\n"))
		}
	})
	return l
}

// traces lists what bears the lab's id on this machine: files, control groups,
// mounts, processes.
func traces(id string) []string {
	var out []string
	for _, pattern := range []string{filepath.Join(os.TempDir(), id+"*"), "/sys/fs/cgroup/" + id + "*", "/sys/fs/cgroup/*/" + id + "*"} {
		found, _ := filepath.Glob(pattern)
		out = append(out, found...)
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(b, []byte(id)) {
		out = append(out, "a mount")
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if b, _ := os.ReadFile(p); bytes.Contains(b, []byte(id)) {
			out = append(out, string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	return out
}

func must(t *testing.T, h *Host, args ...string) string {
	t.Helper()
	out, err := h.Output(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func ping(ctx context.Context, from *Host, to fmt.Stringer) error {
	return from.Run(ctx, "busybox", "ping", "-c", "1", "-W", "1", to.String()).Err()
}

func TestHostsOnASwitch(t *testing.T) {
	before := must2(t, "ip", "-o", "link")
	l := build(t, Config{})
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	for _, h := range l.Hosts {
		if got := must(t, h, "hostname"); got != h.Name {
			t.Errorf("%s calls itself %q", h.Name, got)
		}
		if got := must(t, h, "cat", "/proc/1/comm"); got != "tini-static" {
			t.Errorf("process 1 is %q", got)
		}
		for _, to := range l.Hosts {
			if err := h.Run(t.Context(), "busybox", "ping", "-c", "1", "-W", "1", to.Name).Err(); err != nil {
				t.Error(err)
			}
		}
		must(t, h, "touch", "/run/only-"+h.Name, "/var/lib/only-"+h.Name, "/etc/only-"+h.Name)
	}
	for _, dir := range []string{"/run", "/var/lib", "/etc"} {
		if files, _ := filepath.Glob(dir + "/only-*"); len(files) > 0 {
			t.Errorf("on the machine itself: %v", files)
		}
		if got := must(t, u1, "sh", "-c", "echo "+dir+"/only-*"); got != dir+"/only-u1" {
			t.Errorf("u1 sees %s", got)
		}
	}
	if got := must2(t, "ip", "-o", "link"); got != before {
		t.Errorf("devices of the machine:\n%s\nbefore:\n%s", got, before)
	}
	testSwitchIsBare(t, l)

	t.Run("cut", func(t *testing.T) {
		if err := l.Cut(t.Context(), u2, u3); err != nil {
			t.Fatal(err)
		}
		if ping(t.Context(), u2, u3.Addr) == nil || ping(t.Context(), u3, u2.Addr) == nil {
			t.Error("u2 and u3 still reach each other")
		}
		for _, h := range []*Host{u2, u3} {
			if err := ping(t.Context(), h, u1.Addr); err != nil {
				t.Error(err)
			}
		}
		if err := l.Heal(t.Context(), u3, u2); err != nil {
			t.Fatal(err)
		}
		if err := Wait(t.Context(), 5*time.Second, func() error { return ping(t.Context(), u2, u3.Addr) }); err != nil {
			t.Error(err)
		}
	})
	t.Run("unplug", func(t *testing.T) {
		if err := u3.Unplug(t.Context()); err != nil {
			t.Fatal(err)
		}
		if ping(t.Context(), u3, u1.Addr) == nil {
			t.Error("u3 still reaches u1")
		}
		if err := u3.Plug(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := Wait(t.Context(), 5*time.Second, func() error { return ping(t.Context(), u3, u1.Addr) }); err != nil {
			t.Error(err)
		}
	})
	t.Run("block", func(t *testing.T) { testBlock(t, u1, u2) })
	t.Run("frames", func(t *testing.T) { testFrames(t, u1, u2) })
	t.Run("behind", func(t *testing.T) {
		m, err := l.Behind(t.Context(), u1, "m")
		if err != nil {
			t.Fatal(err)
		}
		must(t, u1, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
		if err := Wait(t.Context(), 5*time.Second, func() error { return ping(t.Context(), m, u1.Addr) }); err != nil {
			t.Error(err)
		}
		if err := l.Unbehind(t.Context(), u1, m); err != nil {
			t.Error(err)
		}
	})
}

func must2(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// testSwitchIsBare looks at the settings of br_netfilter, where it is loaded:
// they are off in the switch.
func testSwitchIsBare(t *testing.T, l *Lab) {
	const pattern = "/proc/sys/net/bridge/bridge-nf-call-*"
	machine, _ := filepath.Glob(pattern)
	err := enter([]string{l.sw.ns("net")}, func() error {
		files, err := filepath.Glob(pattern)
		if err == nil && len(files) != len(machine) {
			err = fmt.Errorf("settings %v, on the machine %v", files, machine)
		}
		for _, f := range files {
			b, e := os.ReadFile(f)
			if string(b) != "0\n" {
				err = errors.Join(err, e, fmt.Errorf("%s of the switch is %q", f, b))
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// testBlock sends datagrams to a port that is open, blocked, and open again.
func testBlock(t *testing.T, from, to *Host) {
	var in, out net.PacketConn
	listen := func(h *Host, addr string, conn *net.PacketConn) {
		t.Helper()
		if err := h.Do(func() error {
			var err error
			*conn, err = net.ListenPacket("udp4", addr)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = (*conn).Close() })
	}
	listen(to, ":6784", &in)
	listen(from, ":0", &out)
	send := func(word string) error {
		if _, err := out.WriteTo([]byte(word), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.Addr, 6784))); err != nil {
			return err
		}
		_ = in.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		buf := make([]byte, 100)
		n, _, err := in.ReadFrom(buf)
		if err == nil && string(buf[:n]) != word {
			return fmt.Errorf("%q came in place of %q", buf[:n], word)
		}
		return err
	}
	if err := send("open"); err != nil {
		t.Fatal(err)
	}
	if err := to.BlockUDP(t.Context(), 6784); err != nil {
		t.Fatal(err)
	}
	if err := send("blocked"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the port is not blocked: %v", err)
	}
	if err := to.UnblockUDP(t.Context(), 6784); err != nil {
		t.Fatal(err)
	}
	if err := send("open again"); err != nil {
		t.Error(err)
	}
	if strings.Contains(must(t, to, "nft", "list", "ruleset"), "lab") {
		t.Error("a rule stays")
	}
}

func testFrames(t *testing.T, u1, u2 *Host) {
	must(t, u2, "ip", "netns", "add", "x")
	must(t, u2, "ip", "link", "add", "veth-a", "type", "veth", "peer", "name", "veth-b", "netns", "x")
	must(t, u2, "ip", "link", "set", "veth-a", "up")
	must(t, u2, "ip", "-n", "x", "link", "set", "veth-b", "up")
	out, err := u2.Tap("", "veth-a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	in, err := u2.Tap("/run/netns/x", "veth-b")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	frame := slices.Concat(bytes.Repeat([]byte{0xff}, 6), out.MAC(), []byte{0x88, 0xb5}, make([]byte, 50))
	if err := out.Send(frame); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Receive(5*time.Second, func(f []byte) bool { return bytes.Equal(f, frame) }); err != nil {
		t.Error(err)
	}
	if _, err := in.Receive(50*time.Millisecond, func(f []byte) bool { return bytes.Equal(f, frame) }); err == nil {
		t.Error("a frame came that nobody sent")
	}
	if _, err := u1.Tap("", "veth-a"); err == nil {
		t.Error("a device of another host is found")
	}
	must(t, u2, "ip", "link", "del", "veth-a")
	must(t, u2, "ip", "netns", "del", "x")
}

func TestCommands(t *testing.T) {
	l := build(t, Config{Hosts: []string{"a"}})
	h := l.Host("a")
	r := h.Run(t.Context(), "sh", "-c", "echo out; echo problem >&2; exit 3")
	if r.Code != 3 || r.Stdout != "out\n" || r.Stderr != "problem\n" || r.Err() == nil || !strings.Contains(r.Err().Error(), "problem") {
		t.Errorf("got %+v (%v)", r, r.Err())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r := h.Run(ctx, "sleep", "60"); r.Err() == nil || r.Code == 0 {
		t.Errorf("a command that takes too long: %+v", r)
	}
	if n := must(t, h, "sh", "-c", "ls -d /proc/[0-9]* | wc -l"); n != "4" && n != "5" {
		t.Errorf("%s processes run, want tini, sleep and what counts them", n)
	}
	h.Crash()
	if h.Run(t.Context(), "true").Err() == nil {
		t.Error("a command runs on a host that is off")
	}
}

func TestState(t *testing.T) {
	l := build(t, Config{Hosts: []string{"a"}})
	h := l.Host("a")
	state := func() State {
		s, err := h.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := state()
	if diff := before.Diff(state()); len(diff) > 0 {
		t.Errorf("nothing was changed, yet: %q", diff)
	}
	for _, c := range []struct{ section, do, undo string }{
		{"link", "ip link add x type bridge", "ip link del x"},
		{"address", "ip addr add 203.0.113.1/32 dev lo", "ip addr del 203.0.113.1/32 dev lo"},
		{"route4", "ip route add 203.0.113.0/24 via 192.0.2.254", "ip route del 203.0.113.0/24"},
		{"iptables", "iptables -N X", "iptables -X X; nft delete table ip filter"},
		{"nft", "nft add table inet x", "nft delete table inet x"},
		{"sysctl", "echo 7 >/proc/sys/net/ipv4/neigh/eth0/base_reachable_time_ms", "echo 30000 >/proc/sys/net/ipv4/neigh/eth0/base_reachable_time_ms"},
		{"file", "mkdir -p /run/docker/plugins && touch /run/docker/plugins/x", "rm -r /run/docker"},
		{"file", "mkdir /var/lib/weave && touch /var/lib/weave/db", "rm -r /var/lib/weave"},
		{"file", "touch /etc/x", "rm /etc/x"},
		{"mount", "mkdir /run/x && mount -t bpf bpf /run/x", "umount /run/x && rmdir /run/x"},
		{"qdisc", "tc qdisc add dev eth0 clsact", "tc qdisc del dev eth0 clsact"},
		{"process", "busybox sleep 60 </dev/null >/dev/null 2>&1 & echo $! >/tmp/$$; mv /tmp/$$ /run/x", "kill $(cat /run/x); rm /run/x"},
	} {
		must(t, h, "sh", "-c", c.do)
		if diff := before.Diff(state()); !slices.ContainsFunc(diff, func(s string) bool { return strings.HasPrefix(s[1:], c.section+": ") }) {
			t.Errorf("%s: not seen: %q", c.do, diff)
		}
		must(t, h, "sh", "-c", c.undo)
		if err := Wait(t.Context(), 2*time.Second, func() error {
			if diff := before.Diff(state()); len(diff) > 0 {
				return fmt.Errorf("%s: stays: %q", c.undo, diff)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

// childEnv makes the test a program that builds a lab and waits to be killed.
const childEnv = "LAB_TEST_CHILD"

// TestProgramKilled kills a program that has a lab: nothing may stay.
func TestProgramKilled(t *testing.T) {
	if os.Getenv(childEnv) != "" {
		l := build(t, Config{Hosts: []string{"a", "b"}})
		scratch, _, err := Scratch(l.id + "-scratch-")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(scratch, "file"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		must(t, l.Host("a"), "sh", "-c", "setsid sleep 300 >/dev/null 2>&1 &")
		fmt.Println("lab " + l.id)
		select {}
	}
	if why := Missing(false); why != "" {
		if os.Getenv("TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProgramKilled$", "-test.v", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id := ""
	var said []byte
	buf := make([]byte, 4096)
	for id == "" {
		n, err := out.Read(buf)
		said = append(said, buf[:n]...)
		if _, rest, ok := bytes.Cut(said, []byte("lab weave-lab-")); ok {
			if number, _, ok := bytes.Cut(rest, []byte("\n")); ok {
				id = "weave-lab-" + string(number)
			}
		}
		if err != nil {
			t.Fatalf("%v: %s", err, said)
		}
	}
	if len(traces(id)) == 0 {
		t.Error("no trace of the lab while it stands")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err := Wait(t.Context(), 15*time.Second, func() error {
		if left := traces(id); len(left) > 0 {
			return fmt.Errorf("left: %s", strings.Join(left, "\n"))
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestDocker(t *testing.T) {
	l := build(t, Config{Docker: true})
	u1 := l.Host("u1")
	for _, h := range l.Hosts {
		name := must(t, h, "docker", "run", "-d", "--name", "cc", "busybox", "sleep", "600")
		if _, err := h.ContainerNetNS(t.Context(), name); err != nil {
			t.Error(err)
		}
		// The outside is reached through Docker's own network.
		must(t, h, "docker", "exec", "cc", "ping", "-c", "1", "-W", "2", Outside().String())
	}
	must(t, u1, "docker", "run", "--rm", "--privileged", "busybox", "true")
	if err := u1.KillDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := u1.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	must(t, u1, "docker", "start", "cc")
	if err := u1.StopDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := u1.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out := must(t, u1, "docker", "ps", "-a", "--format", "{{.Names}}"); out != "cc" {
		t.Errorf("containers after a restart: %q", out)
	}
}
