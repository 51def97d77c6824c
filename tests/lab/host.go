package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// outputDelay is how long after the end of a command its output may stay open.
const outputDelay = 5 * time.Second

// readyTimeout bounds the start of a host.
const readyTimeout = 10 * time.Second

// Host is one machine of the lab.
type Host struct {
	Name string
	Addr netip.Addr // on the underlay

	lab    *Lab
	dir    string
	init   *process
	docker Engine
	engine *engine
	blocks []string // nft rules that drop traffic to this host
}

// keptEtc is, in a host's folder, what was changed in /etc before a reboot.
const keptEtc = "etc.kept"

// initScript makes the private parts of a host's file system and then becomes
// its process 1, an init that buries what daemons leave.
const initScript = `
set -eu
dir=$1 name=$2
mount --make-rprivate /
mount -t proc proc /proc
echo "$name" >/proc/sys/kernel/hostname
mkdir -p "$dir/cgroup" "$dir/security" "$dir/lib" "$dir/etc"
# What is mounted below /sys would be hidden by the new one. Docker needs the
# control groups and, where there is AppArmor, the way to load its profile.
mount --rbind /sys/fs/cgroup "$dir/cgroup"
[ ! -d /sys/kernel/security ] || mount --rbind /sys/kernel/security "$dir/security"
mount -t sysfs sysfs /sys
mount --rbind "$dir/cgroup" /sys/fs/cgroup
[ ! -d /sys/kernel/security ] || mount --rbind "$dir/security" /sys/kernel/security
umount -l "$dir/cgroup"
[ ! -d /sys/kernel/security ] || umount -l "$dir/security"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/lock
mount --bind "$dir/lib" /var/lib
mount -t tmpfs -o mode=755 tmpfs "$dir/etc"
mkdir "$dir/etc/upper" "$dir/etc/work"
cp -a "$dir/etc.kept/." "$dir/etc/upper"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$dir/etc/upper,workdir=$dir/etc/work" /etc
rm -f /etc/hosts /etc/resolv.conf /etc/hostname
cp "$dir/hosts" /etc/hosts
cp "$dir/resolv.conf" /etc/resolv.conf
echo "$name" >/etc/hostname
echo ready >&3
exec 3>&-
exec tini-static -g -- sleep infinity
`

// newHost starts a host that has no link yet.
func (l *Lab) newHost(ctx context.Context, name string, addr netip.Addr) (*Host, error) {
	h := &Host{Name: name, Addr: addr, lab: l, dir: filepath.Join(l.dir, name)}
	if i, all := slices.Index(l.cfg.Hosts, name), l.cfg.Engines; i >= 0 && len(all) > 0 {
		h.docker = all[i%len(all)]
	}
	if err := h.writeFiles(); err != nil {
		return nil, err
	}
	return h, h.boot(ctx)
}

// boot starts the host's process 1.
func (h *Host) boot(ctx context.Context) error {
	log, err := os.Create(filepath.Join(h.dir, "init.log"))
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	defer func() { _ = log.Close() }()
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer func() { _ = r.Close() }()
	cmd := exec.Command("/bin/sh", "-c", initScript, "init", h.dir, h.Name)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles, cmd.Env = log, log, []*os.File{w}, environment()
	init, err := h.lab.start(cmd, unix.CLONE_NEWNET|unix.CLONE_NEWNS|unix.CLONE_NEWPID|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC)
	_ = w.Close()
	if err != nil {
		return err
	}
	h.init = init
	stop := context.AfterFunc(ctx, h.init.kill)
	defer stop()
	if err := r.SetReadDeadline(time.Now().Add(readyTimeout)); err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	if n, err := r.Read(make([]byte, 8)); n == 0 {
		h.init.kill()
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("not ready: %w: %s", err, said)
	}
	return Wait(ctx, readyTimeout, func() error {
		ps, err := h.processes()
		if err == nil && !slices.Equal(ps, []string{"tini-static", "sleep"}) {
			err = fmt.Errorf("processes %v", ps)
		}
		return err
	})
}

// settle waits until the host's cable works: the kernel takes note of that
// only once a second.
func (h *Host) settle(ctx context.Context) error {
	return Wait(ctx, readyTimeout, func() error {
		state, err := os.ReadFile(h.Path("/sys/class/net/eth0/operstate"))
		if err == nil && strings.TrimSpace(string(state)) != "up" {
			err = fmt.Errorf("eth0 is %s", state)
		}
		return err
	})
}

func (h *Host) writeFiles() error {
	for _, dir := range []string{h.dir, filepath.Join(h.dir, keptEtc)} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("folder: %w", err)
		}
	}
	hosts := &strings.Builder{}
	fmt.Fprintln(hosts, "127.0.0.1 localhost")
	for i, name := range h.lab.cfg.Hosts {
		fmt.Fprintf(hosts, "192.0.2.%d %s\n", i+1, name)
	}
	// A name server that refuses at once: a look-up of what is not in the
	// hosts file must not cost its time-out. Not on loopback, for which Docker
	// would put public servers.
	resolv := fmt.Sprintf("nameserver %s\n", h.Addr)
	return errors.Join(
		os.WriteFile(filepath.Join(h.dir, "hosts"), []byte(hosts.String()), 0o600),
		os.WriteFile(filepath.Join(h.dir, "resolv.conf"), []byte(resolv), 0o600),
	)
}

// Crash ends the host at once, as a power cut does.
func (h *Host) Crash() { h.init.kill() }

// Reboot crashes the host and starts it again, as a power cut of a moment does:
// what is in /etc and /var/lib is there, and nothing runs.
func (h *Host) Reboot(ctx context.Context) error {
	if err := h.Run(ctx, "cp", "-a", "--remove-destination", filepath.Join(h.dir, "etc/upper")+"/.", filepath.Join(h.dir, keptEtc)).Err(); err != nil {
		return fmt.Errorf("keep /etc: %w", err)
	}
	h.Crash()
	// Its cable goes with its namespace, but when is up to the kernel; an error
	// says that it has gone.
	_ = batch(ctx, h.lab.sw.ns("net"), "link del "+h.port())
	if err := h.boot(ctx); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if err := h.lab.plug(ctx, h); err != nil {
		return err
	}
	return h.settle(ctx)
}

// Do runs f on a thread that is in all namespaces of the host. What f opens
// stays usable elsewhere; processes that it starts run on the host.
func (h *Host) Do(f func() error) error { return enter(h.namespaces(), f) }

// DoIn is Do in the network namespace whose file, on the host, is netns.
func (h *Host) DoIn(netns string, f func() error) error {
	return h.Do(func() error {
		if err := setns([]string{netns}); err != nil {
			return err
		}
		return f()
	})
}

func (h *Host) namespaces() []string {
	return []string{h.init.ns("ipc"), h.init.ns("uts"), h.init.ns("net"), h.init.ns("pid"), h.init.ns("mnt")}
}

// Path is where a file of the host is found from outside of its namespaces.
func (h *Host) Path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", h.init.cmd.Process.Pid), name)
}

// Start starts cmd on the host. It ends with the host, if not before.
func (h *Host) Start(cmd *exec.Cmd) error {
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	if cmd.Env == nil {
		cmd.Env = environment()
	}
	h.docker.prepare(cmd)
	return h.Do(cmd.Start)
}

// Run runs a command on the host to its end.
func (h *Host) Run(ctx context.Context, args ...string) Result {
	return collect(exec.CommandContext(ctx, args[0], args[1:]...), h.Start)
}

// RunCmd is Run for a prepared command. Its standard output and error are
// gathered unless they are set.
func (h *Host) RunCmd(cmd *exec.Cmd) Result { return collect(cmd, h.Start) }

// Output runs a command that is expected to succeed and returns what it
// prints, without white space around it.
func (h *Host) Output(ctx context.Context, args ...string) (string, error) {
	r := h.Run(ctx, args...)
	return strings.TrimSpace(r.Stdout), r.Err()
}
