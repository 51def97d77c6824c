// Package netdevtest gives tests of devices and rules a host of their own: the
// whole test process moves into fresh network and mount namespaces, which end
// with it.
package netdevtest

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// marker is set in the environment of a process that has moved.
const marker = "WEAVE_TEST_NAMESPACE"

// Main runs the tests of a package in namespaces of their own; call it as the
// only statement of TestMain. Without root they run where they are, and Need
// skips those that must not.
func Main(m *testing.M) {
	if os.Geteuid() != 0 {
		m.Run()
		return
	}
	if os.Getenv(marker) == "" {
		panic(move())
	}
	if err := exec.Command("ip", "link", "set", "lo", "up").Run(); err != nil {
		panic(fmt.Errorf("set lo up: %w", err))
	}
	m.Run()
}

// move starts the process anew in namespaces of its own; it returns on failure
// only.
func move() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new namespaces: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("private /run: %w", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), marker+"=1"))
}

// Need skips a test that is not in a namespace of its own. Where TEST_STRICT=1
// it fails instead.
func Need(t *testing.T) {
	t.Helper()
	if os.Getenv(marker) != "" {
		return
	}
	if os.Getenv("TEST_STRICT") == "1" {
		t.Fatal("needs root for a network namespace")
	}
	t.Skip("needs root for a network namespace")
}

// Namespace makes a network namespace that lasts as long as the test, and
// returns a path to it.
func Namespace(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- bindNew(path) }()
	if err := <-done; err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	In(t, path, "ip", "link", "set", "lo", "up")
	return path
}

// bindNew makes a namespace, keeps it at path, and goes back.
func bindNew(path string) error {
	const own = "/proc/thread-self/ns/net"
	runtime.LockOSThread()
	fd, err := unix.Open(own, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	defer func() {
		if unix.Setns(fd, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return unix.Mount(own, path, "", unix.MS_BIND, "")
}

// End ends a namespace before the test does, as when its container dies.
func End(t *testing.T, path string) {
	t.Helper()
	if err := unix.Unmount(path, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// Try runs a program in the namespace at path, "" for the test's own, and
// returns what it printed.
func Try(t *testing.T, path string, args ...string) (string, error) {
	t.Helper()
	if path != "" {
		args = append([]string{"nsenter", "--net=" + path}, args...)
	}
	out, err := exec.CommandContext(context.WithoutCancel(t.Context()), args[0], args[1:]...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// In is Try for a program that must succeed.
func In(t *testing.T, path string, args ...string) string {
	t.Helper()
	out, err := Try(t, path, args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// Host describes everything of the test's own host that a tidy program leaves
// as it was: devices, addresses, routes, rules and settings.
func Host(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, cmd := range [][]string{
		{"ip", "-br", "link"},
		{"ip", "-br", "addr"},
		{"ip", "route", "show", "table", "all"},
		{"iptables-save", "-t", "filter"},
		{"iptables-save", "-t", "nat"},
	} {
		fmt.Fprintf(&b, "== %s\n", strings.Join(cmd, " "))
		for line := range strings.Lines(In(t, "", cmd...) + "\n") {
			if !strings.HasPrefix(line, "#") { // a date
				b.WriteString(line)
			}
		}
	}
	settings, err := filepath.Glob("/proc/sys/net/ipv4/conf/*/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range append(settings, "/proc/sys/net/ipv4/ip_forward") {
		v, err := os.ReadFile(s)
		if err == nil {
			fmt.Fprintf(&b, "%s %s", s, v)
		}
	}
	return b.String()
}

// Changes compares two results of Host: lines that went, behind a minus, and
// lines that came, behind a plus; "" when they are equal.
func Changes(before, after string) string {
	if before == after {
		return ""
	}
	count := make(map[string]int)
	for line := range strings.Lines(before) {
		count[line]--
	}
	for line := range strings.Lines(after) {
		count[line]++
	}
	var b strings.Builder
	for _, line := range slices.Sorted(maps.Keys(count)) {
		switch n := count[line]; {
		case n < 0:
			b.WriteString("-" + line)
		case n > 0:
			b.WriteString("+" + line)
		}
	}
	if b.Len() == 0 {
		return "another order"
	}
	return b.String()
}
