package netdev

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

const (
	forwardAll   = "ipv4/ip_forward"
	confDir      = "ipv4/conf"
	redirectsAll = "ipv4/conf/all/accept_redirects"
)

// Forwarding is how a host that did not route IPv4 packets was set up, so that
// it can be brought back to that: the kernel changes other settings along with
// net.ipv4.ip_forward.
type Forwarding struct {
	Redirects string            // net.ipv4.conf.all.accept_redirects
	Devices   map[string]string // net.ipv4.conf.*.forwarding where it was on
}

// ForwardingOff returns the settings of a host that does not route IPv4
// packets, and nil for one that does.
func ForwardingOff() (*Forwarding, error) {
	now, err := Sysctl(forwardAll)
	if err != nil || now != "0" {
		return nil, err
	}
	f := &Forwarding{Devices: make(map[string]string)}
	if f.Redirects, err = Sysctl(redirectsAll); err != nil {
		return nil, err
	}
	devs, err := os.ReadDir(sysctlPath(confDir))
	if err != nil {
		return nil, fmt.Errorf("settings of devices: %w", err)
	}
	for _, d := range devs {
		setting := filepath.Join(confDir, d.Name(), "forwarding")
		if v, err := Sysctl(setting); err == nil && v != "0" {
			f.Devices[d.Name()] = v
		}
	}
	return f, nil
}

// EnableForwarding lets the host route IPv4 packets.
func EnableForwarding() error { return SetSysctl(forwardAll, "1") }

// Restore undoes EnableForwarding.
func (f *Forwarding) Restore() error {
	errs := []error{SetSysctl(forwardAll, "0"), SetSysctl(redirectsAll, f.Redirects)}
	for _, dev := range slices.Sorted(maps.Keys(f.Devices)) {
		errs = append(errs, SetSysctl(filepath.Join(confDir, dev, "forwarding"), f.Devices[dev]))
	}
	return errors.Join(errs...)
}
