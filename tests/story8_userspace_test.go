package tests

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"weave.local/tests/lab"
)

// TestWithoutFastPath is a network of hosts of which some cannot have the fast
// path: u1 is refused BPF, on u3 the port of VXLAN is taken.
func TestWithoutFastPath(t *testing.T) {
	l := build(t, lab.Config{})
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	before := baseline(t, u1)
	launchWithoutBPF(t, u1, "u2", "u3")
	launch(t, u2, "--no-dns", "--docker-api=", "u1", "u3")
	takePort(t, u3)
	launch(t, u3, "--no-dns", "--docker-api=", "u1", "u2")
	for _, h := range l.Hosts {
		within(t, patience, "mesh", func() error { return on(t.Context(), h, 2, "sleeve") })
	}
	step(t, "reasons", func(t *testing.T) { testReasons(t, l) })
	cs := []*container{runBare(t, u1, "c1"), runBare(t, u2, "c2"), runBare(t, u3, "c3")}
	near := runBare(t, u1, "near")
	step(t, "traffic", func(t *testing.T) { testBareTraffic(t, cs); allReach(t, near, cs[0], cs[2]) })
	step(t, "isolation", func(t *testing.T) { testUserIsolation(t, l, cs) })
	step(t, "relay", func(t *testing.T) { testUserRelay(t, l, cs) })
	step(t, "expose", func(t *testing.T) {
		addr := weave(t, u1, "expose")
		within(t, patience, "host to c2", func() error {
			return u1.Run(t.Context(), "busybox", "ping", "-c", "1", "-W", "1", cs[1].addr.Addr().String()).Err()
		})
		must(t, u2, "nsenter", "--net="+cs[1].netns, "busybox", "ping", "-c", "1", "-W", "2", addr)
	})
	step(t, "restart", func(t *testing.T) {
		weave(t, u1, "stop")
		launchWithoutBPF(t, u1, "u2", "u3")
		allReach(t, cs...)
	})
	weave(t, u1, "reset")
	must(t, u1, "sh", "-c", removeNamespaces)
	asBefore(t, u1, before)
}

// testReasons: both ends of a link say what is lacking, and the log says it
// once.
func testReasons(t *testing.T, l *lab.Lab) {
	const refusal, taken = "no BPF programs: .*operation not permitted", "UDP port 6784 is taken"
	for _, c := range []struct{ at, to, want string }{
		{"u1", "u2", "no fast path on this host: .*" + refusal},
		{"u2", "u1", "no fast path on that host: .*" + refusal},
		{"u3", "u2", "no fast path on this host: .*" + taken},
		{"u2", "u3", "no fast path on that host: .*" + taken},
	} {
		within(t, patience, "reason at "+c.at, func() error {
			out, err := l.Host(c.at).Output(t.Context(), "sh", "-c", fmt.Sprintf("weave status connections | grep '(%s)' | grep %q", c.to, c.want))
			if err != nil {
				all, _ := l.Host(c.at).Output(t.Context(), "weave", "status", "connections")
				return fmt.Errorf("%w: %s\n%s", err, out, all)
			}
			t.Log(out)
			return nil
		})
	}
	for host, want := range map[string]string{"u1": "1", "u2": "0", "u3": "1"} {
		h := l.Host(host)
		if n := must(t, h, "sh", "-c", `grep -c 'level=WARN msg="no fast path' /var/lib/weave/weave.log || true`); n != want {
			t.Errorf("%s: its log says %s times that there is no fast path, want %s", host, n, want)
		}
	}
}

// testUserIsolation: what the switch in user space keeps apart.
func testUserIsolation(t *testing.T, l *lab.Lab, cs []*container) {
	a, b := runBare(t, l.Host("u1"), "a", "net:10.33.0.0/24"), runBare(t, l.Host("u2"), "b", "net:10.33.0.0/24")
	within(t, patience, "within the subnet", func() error { return a.reaches(t.Context(), b.addr.Addr(), 56) })
	introduce(t, a, cs[1])
	introduce(t, b, cs[0])
	if cs[0].reaches(t.Context(), b.addr.Addr(), 56) == nil || cs[1].reaches(t.Context(), a.addr.Addr(), 56) == nil {
		t.Errorf("namespaces of different subnets reach each other")
	}
	// With an address that is not its own, the namespace is not heard.
	forged := cs[2].addr.Addr().Prev().String()
	must(t, cs[0].Host, "ip", "-n", cs[0].name, "addr", "add", forged+"/32", "dev", cs[0].device)
	must(t, cs[1].Host, "ip", "-n", cs[1].name, "neigh", "replace", forged, "lladdr", cs[0].mac(t), "dev", cs[1].device)
	if cs[0].exec(t.Context(), "ping", "-c", "1", "-W", "1", "-I", forged, cs[1].addr.Addr().String()).Err() == nil {
		t.Errorf("an address that is not its own is good for an answer")
	}
	if n := weave(t, l.Host("u1"), "report", "-f", "{{.Router.OverlayDiagnostics.FastDP.dropped_spoofed}}"); n == "0" {
		t.Error("nothing is counted as forged")
	}
	must(t, cs[0].Host, "ip", "-n", cs[0].name, "addr", "del", forged+"/32", "dev", cs[0].device)
}

// testUserRelay: u1, which forwards in user space, stands between the others.
func testUserRelay(t *testing.T, l *lab.Lab, cs []*container) {
	u2, u3 := l.Host("u2"), l.Host("u3")
	if err := l.Cut(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*lab.Host{u2, u3} {
		within(t, patience, "one connection left", func() error { return on(t.Context(), h, 1, "sleeve") })
	}
	within(t, patience, "relayed", func() error { return cs[1].reaches(t.Context(), cs[2].addr.Addr(), 1400) })
	if err := exchange(t.Context(), cs[1], cs[2], 4<<20); err != nil {
		t.Errorf("4 MB through u1: %v", err)
	}
	testBroadcast(t, []*container{cs[1], cs[2], cs[0]})
	testBroadcast(t, []*container{cs[1], cs[0], cs[2]})
	if err := l.Heal(t.Context(), u2, u3); err != nil {
		t.Fatal(err)
	}
	weave(t, u2, "connect", "u3")
	within(t, patience, "direct again", func() error { return on(t.Context(), u2, 2, "sleeve") })
}

// takePort listens on the port of VXLAN, on a host, until the test ends.
func takePort(t *testing.T, h *lab.Host) {
	t.Helper()
	var conn net.PacketConn
	err := h.Do(func() (err error) {
		conn, err = new(net.ListenConfig).ListenPacket(t.Context(), "udp", fmt.Sprintf(":%d", vxlanPort))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
}

// withoutBPF is set for a run of this program that takes away the right to use
// BPF and becomes the program that its arguments name.
const withoutBPF = "TEST_WITHOUT_BPF"

func launchWithoutBPF(t *testing.T, h *lab.Host, peers ...string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, append([]string{"weave", "launch", "--no-dns", "--docker-api="}, peers...)...)
	cmd.Env = append(os.Environ(), withoutBPF+"=1")
	begin := time.Now()
	if err := h.RunCmd(cmd).Err(); err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	t.Logf("%s: launch without BPF in %s", h.Name, time.Since(begin).Round(time.Millisecond))
}

// becomeWithoutBPF runs a program for which bpf(2) is not permitted, in the
// place of this one.
func becomeWithoutBPF(args []string) error {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	const numberAt = 0 // in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: numberAt},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: unix.SYS_BPF},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread() // what follows is of the thread that becomes the program
	err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
	if err != nil {
		return fmt.Errorf("system call filter: %w", err)
	}
	return syscall.Exec(path, args, os.Environ())
}
