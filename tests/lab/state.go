package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// State is what a program may change on a host, as sorted lines: devices,
// addresses, routes, rules of the firewall, kernel settings, files, mounts,
// eBPF programs, listening sockets, processes, and what Docker knows.
type State []string

// Diff lists what b lacks of a, with "-" before, and what it has besides,
// with "+".
func (a State) Diff(b State) []string {
	count := map[string]int{}
	for _, line := range b {
		count[line]++
	}
	var out []string
	for _, line := range a {
		if count[line]--; count[line] < 0 {
			out = append(out, "-"+line)
		}
	}
	for _, line := range b {
		if count[line] > 0 {
			count[line]--
			out = append(out, "+"+line)
		}
	}
	return out
}

// State takes the state of the host.
func (h *Host) State(ctx context.Context) (State, error) {
	var s State
	add := func(section string, lines []string) {
		for _, l := range lines {
			if l = strings.TrimSpace(l); l != "" {
				s = append(s, section+": "+l)
			}
		}
	}
	for _, q := range stateCommands(h.engine != nil) {
		text, err := h.Output(ctx, q.args...)
		if err != nil {
			return nil, fmt.Errorf("state: %w", err)
		}
		for _, re := range q.drop {
			text = re.ReplaceAllString(text, "")
		}
		add(q.section, strings.Split(text, "\n"))
	}
	for _, part := range []struct {
		section string
		read    func() ([]string, error)
	}{
		{"sysctl", h.sysctls}, {"file", h.files}, {"mount", h.mounts}, {"bpf", h.programs}, {"process", h.processes},
	} {
		lines, err := part.read()
		if err != nil {
			return nil, fmt.Errorf("state: %s: %w", part.section, err)
		}
		add(part.section, lines)
	}
	slices.Sort(s)
	return s, nil
}

type stateCommand struct {
	section string
	args    []string
	drop    []*regexp.Regexp // what changes by itself
}

func stateCommands(docker bool) []stateCommand {
	index := regexp.MustCompile(`(?m)^\d+: `)
	peer := regexp.MustCompile(`@if\d+`)
	dad := regexp.MustCompile(` tentative| expires \d+sec`)
	counters := regexp.MustCompile(`(?m)^#.*$| ?\[\d+:\d+\]$`)
	noise := []*regexp.Regexp{index, peer, dad}
	cs := []stateCommand{
		{"link", []string{"ip", "-o", "link"}, noise},
		{"address", []string{"ip", "-o", "addr"}, noise},
		{"route4", []string{"ip", "-4", "route", "show", "table", "all"}, noise},
		{"route6", []string{"ip", "-6", "route", "show", "table", "all"}, noise},
		{"rule4", []string{"ip", "-4", "rule"}, nil},
		{"rule6", []string{"ip", "-6", "rule"}, nil},
		{"iptables", []string{"iptables-save"}, []*regexp.Regexp{counters}},
		{"ip6tables", []string{"ip6tables-save"}, []*regexp.Regexp{counters}},
		{"nft", []string{"nft", "-s", "list", "ruleset"}, nil},
		{"qdisc", []string{"tc", "qdisc", "show"}, nil},
		{"listening", []string{"ss", "-Hlntu"}, nil},
	}
	if docker {
		cs = append(cs,
			stateCommand{"docker network", []string{"docker", "network", "ls", "--format", "{{.Name}} {{.Driver}}"}, nil},
			stateCommand{"docker container", []string{"docker", "ps", "-a", "--format", "{{.Names}}"}, nil},
			stateCommand{"docker volume", []string{"docker", "volume", "ls", "-q"}, nil},
		)
	}
	return cs
}

// sysctls reads the settings of the network namespace.
func (h *Host) sysctls() ([]string, error) {
	var out []string
	err := h.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || d.Name() == "nf_conntrack_count" {
				return err
			}
			// Some can only be written and others have no value yet.
			if b, err := os.ReadFile(path); err == nil {
				out = append(out, strings.TrimPrefix(path, "/proc/sys/")+" = "+strings.TrimSpace(string(b)))
			}
			return nil
		})
	})
	return out, err
}

// files lists the top of /run and /var/lib, all that was changed in /etc, and
// the folders where weave and Docker's drivers keep files.
func (h *Host) files() ([]string, error) {
	var out []string
	etc := filepath.Join(h.dir, "etc/upper")
	folders := map[string]bool{}
	err := h.Do(func() error {
		for _, dir := range []string{"/run", "/var/lib"} {
			entries, err := os.ReadDir(dir)
			if err != nil {
				return err
			}
			for _, e := range entries {
				out = append(out, filepath.Join(dir, e.Name()))
			}
		}
		for _, dir := range []string{"/run/weave", "/run/docker/plugins", "/run/netns", "/var/lib/weave", etc} {
			err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
				if err == nil {
					out = append(out, path)
					folders[path] = d.IsDir()
				}
				return err
			})
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return nil
	})
	// A folder of the machine's is there as soon as something was in it.
	out = slices.DeleteFunc(out, func(path string) bool {
		name, ok := strings.CutPrefix(path, etc+"/")
		fi, err := os.Stat(filepath.Join("/etc", name))
		return ok && folders[path] && err == nil && fi.IsDir()
	})
	slices.Sort(out)
	return slices.Compact(out), err
}

func (h *Host) mounts() ([]string, error) {
	b, err := os.ReadFile(h.Path("/proc/1/mountinfo"))
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		if fields := strings.Fields(before); ok && len(fields) > 4 {
			kind, _, _ := strings.Cut(after, " ")
			out = append(out, fields[4]+" "+kind)
		}
	}
	return out, nil
}

// progQuery is union bpf_attr of BPF_PROG_QUERY (linux/bpf.h), as far as it is
// needed.
type progQuery struct {
	ifIndex     uint32
	attachType  uint32
	queryFlags  uint32
	attachFlags uint32
	progIDs     uint64
	count       uint32
	_           uint32
	_           [4]uint64
	_           uint64
}

// Numbers of linux/bpf.h.
const (
	cmdProgQuery = 16
	tcxIngress   = 46
	tcxEgress    = 47
)

// programs lists the eBPF programs that run on the host's devices.
func (h *Host) programs() ([]string, error) {
	var out []string
	err := h.Do(func() error {
		devs, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, d := range devs {
			for way, attach := range map[string]uint32{"in": tcxIngress, "out": tcxEgress} {
				q := progQuery{ifIndex: uint32(d.Index), attachType: attach}
				_, _, errno := unix.Syscall(unix.SYS_BPF, cmdProgQuery, uintptr(unsafe.Pointer(&q)), unsafe.Sizeof(q))
				if errno != 0 && errno != unix.EINVAL { // EINVAL: a kernel without tcx
					return fmt.Errorf("programs of %s: %w", d.Name, errno)
				}
				if q.count > 0 {
					out = append(out, fmt.Sprintf("%s %s: %d programs", d.Name, way, q.count))
				}
			}
		}
		return nil
	})
	return out, err
}

// processes lists the names of what runs on the host, without containers.
func (h *Host) processes() ([]string, error) {
	entries, err := os.ReadDir(h.Path("/proc"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		comm, err := os.ReadFile(h.Path("/proc/" + e.Name() + "/comm"))
		if err != nil {
			continue // no process, or gone by now
		}
		name := strings.TrimSpace(string(comm))
		if !strings.HasPrefix(name, "containerd-shim") && name != "runc" {
			out = append(out, name)
		}
	}
	return out, nil
}
