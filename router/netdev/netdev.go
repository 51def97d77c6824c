// Package netdev holds what is done to network devices, addresses, routes and
// their settings, as typed helpers over netlink. It decides nothing: callers
// say what should be there.
//
// Functions act in the network namespace of the calling thread; Do runs a
// function inside another one.
package netdev

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	// ErrNoNamespace says that there is no network namespace at a path:
	// what lived in it has ended.
	ErrNoNamespace = errors.New("network namespace is gone")
	// ErrOwnNamespace says that a path names the namespace that we are in
	// ourselves.
	ErrOwnNamespace = errors.New("is the network namespace of the host")
	// ErrNoDevice says that there is no device of that name.
	ErrNoDevice = errors.New("no such device")
)

// Namespace tells network namespaces apart while they live; the numbers may be
// used again for another one after that.
type Namespace struct {
	Dev, Ino uint64
}

const ownNamespace = "/proc/thread-self/ns/net"

// NamespaceAt identifies the network namespace at a path such as
// /proc/1234/ns/net. The error is ErrNoNamespace when none is there (any more)
// and ErrOwnNamespace when it is the caller's.
func NamespaceAt(path string) (Namespace, error) {
	var st unix.Statfs_t
	switch err := unix.Statfs(path, &st); {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		return Namespace{}, fmt.Errorf("%s: %w", path, ErrNoNamespace)
	case err != nil:
		return Namespace{}, fmt.Errorf("network namespace %s: %w", path, err)
	case st.Type != unix.NSFS_MAGIC:
		return Namespace{}, fmt.Errorf("%s is no network namespace: want a path such as /proc/1234/ns/net or /run/netns/blue", path)
	}
	ns, err := stat(path)
	if err != nil {
		return Namespace{}, err
	}
	own, err := stat(ownNamespace)
	if err != nil {
		return Namespace{}, err
	}
	if ns == own {
		return Namespace{}, fmt.Errorf("%s %w", path, ErrOwnNamespace)
	}
	return ns, nil
}

func stat(path string) (Namespace, error) {
	fi, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return Namespace{}, fmt.Errorf("%s: %w", path, ErrNoNamespace)
		}
		return Namespace{}, fmt.Errorf("network namespace: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return Namespace{}, fmt.Errorf("network namespace %s: not a Linux file system", path)
	}
	return Namespace{Dev: st.Dev, Ino: st.Ino}, nil
}

// Do runs f inside the network namespace at path and returns its error. f has
// an OS thread of its own, which ends with it unless it is safely back in our
// own namespace, so that nothing leaks into other goroutines whatever happens. f
// must do its work itself, not in goroutines that it starts.
func Do(path string, f func() error) error {
	fd, err := openNamespace(path)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	done := make(chan error, 1)
	go func() { done <- enter(fd, f) }()
	return <-done
}

// enter is the goroutine of Do. A goroutine that ends while locked to its
// thread takes the thread along, except for the first one of the process:
// that is why it does go back at all.
func enter(fd int, f func() error) error {
	runtime.LockOSThread()
	own, err := openNamespace(ownNamespace)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(own) }()
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	defer func() {
		if unix.Setns(own, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

func openNamespace(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return -1, fmt.Errorf("%s: %w", path, ErrNoNamespace)
	}
	if err != nil {
		return -1, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return fd, nil
}

// FindNamespace returns a path to the namespace that ours knows under a number,
// as in Device.PeerNSID. The error is ErrNoNamespace when none is in sight.
func FindNamespace(nsid int) (string, error) {
	var paths []string
	for _, pattern := range []string{"/run/netns/*", "/run/docker/netns/*", "/proc/[0-9]*/ns/net"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return "", fmt.Errorf("search network namespaces: %w", err)
		}
		paths = append(paths, found...)
	}
	seen := make(map[Namespace]bool)
	for _, path := range paths {
		ns, err := NamespaceAt(path)
		if err != nil || seen[ns] {
			continue // our own, gone meanwhile, or no namespace at all
		}
		seen[ns] = true
		fd, err := openNamespace(path)
		if err != nil {
			continue
		}
		id, err := netlink.GetNetNsIdByFd(fd)
		_ = unix.Close(fd)
		if err == nil && id == nsid {
			return path, nil
		}
	}
	return "", fmt.Errorf("number %d: %w", nsid, ErrNoNamespace)
}

// RandomMAC makes a locally administered unicast address.
func RandomMAC() [6]byte {
	var mac [6]byte
	_, _ = rand.Read(mac[:]) // never fails, says its documentation
	mac[0] = mac[0]&^1 | 2
	return mac
}

// link finds a device by name.
func link(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, fmt.Errorf("%s: %w", name, ErrNoDevice)
	}
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	return l, nil
}

// dumpTries is how often a list is asked for that changes while the kernel
// writes it.
const dumpTries = 20

// whole is what list returns, asked for again while the kernel says that it
// changed meanwhile and may lack something.
func whole[T any](list func() ([]T, error)) (out []T, err error) {
	for range dumpTries {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return out, err
}

// SetSysctl writes one setting below /proc/sys/net; a kernel that does not
// have it is no error.
func SetSysctl(setting, value string) error {
	err := os.WriteFile(sysctlPath(setting), []byte(value), 0o644)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("setting net/%s: %w", setting, err)
	}
	return nil
}

// Sysctl reads one setting below /proc/sys/net, without the line's end.
func Sysctl(setting string) (string, error) {
	b, err := os.ReadFile(sysctlPath(setting))
	if err != nil {
		return "", fmt.Errorf("setting net/%s: %w", setting, err)
	}
	return strings.TrimSpace(string(b)), nil
}

func sysctlPath(setting string) string { return filepath.Join("/proc/sys/net", setting) }

// QuickNeighbours makes the neighbour table of a device notice within seconds
// that an address has moved to another machine.
func QuickNeighbours(dev string) error {
	for _, s := range [][2]string{
		{"base_reachable_time", "5"},
		{"delay_first_probe_time", "2"},
		{"ucast_solicit", "1"},
	} {
		for _, family := range []string{"ipv4", "ipv6"} {
			if err := SetSysctl(filepath.Join(family, "neigh", dev, s[0]), s[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

// usable says whether a prefix read from the kernel is one of IPv4 or IPv6.
func usable(p netip.Prefix) bool { return p.IsValid() && !p.Addr().Is4In6() }
