package fastdp

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/netdev"
)

const vxlanPrefix = "vxlan-"

func vxlanName(port int) string { return vxlanPrefix + strconv.Itoa(port) }

// ensureVXLAN makes our VXLAN device, or adopts it. A new one is down.
func ensureVXLAN(port, mtu int) (index int, created bool, err error) {
	name := vxlanName(port)
	created, err = netdev.EnsureVXLAN(name, port, mtu)
	if err != nil {
		return 0, false, err
	}
	// A port of a bridge has no business of its own on the network.
	err = netdev.SetSysctl("ipv6/conf/"+name+"/disable_ipv6", "1")
	dev, err2 := netdev.DeviceByName(name)
	err = errors.Join(err, err2)
	if err != nil && created {
		err = errors.Join(err, netdev.DeleteLink(name))
	}
	return dev.Index, created, err
}

// joinBridge sets the VXLAN device up and makes it a port of the bridge.
// Devices of ours for other UDP ports go.
func joinBridge(port int, bridge string) error {
	name := vxlanName(port)
	switch err := netdev.SetUp(name); {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("UDP port %d is taken: another program listens on it", port)
	case err != nil:
		return err
	}
	if err := netdev.SetMaster(name, bridge); err != nil {
		return err
	}
	return removeVXLANs(bridge, name)
}

// removeVXLANs removes our VXLAN devices from a bridge, except those named.
func removeVXLANs(bridge string, except ...string) error {
	ports, err := netdev.Ports(bridge)
	if errors.Is(err, netdev.ErrNoDevice) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range ports {
		if p.Kind == "vxlan" && strings.HasPrefix(p.Name, vxlanPrefix) && !slices.Contains(except, p.Name) {
			errs = append(errs, netdev.DeleteLink(p.Name))
		}
	}
	return errors.Join(errs...)
}

// What VXLAN adds to the IP packet inside, in bytes: the inner Ethernet
// header, VXLAN and UDP headers, and the outer IP header.
const (
	overhead4 = 14 + 8 + 8 + 20
	overhead6 = 14 + 8 + 8 + 40
)

func overhead(remote netip.Addr) int {
	if remote.Unmap().Is4() {
		return overhead4
	}
	return overhead6
}

// MTU is the largest IP packet, in bytes, that the route to a neighbour could
// carry in VXLAN; 0 when the neighbour or the route is unknown.
func (d *DataPath) MTU(to peer.ShortID) int {
	n, _, ok := d.neighbour(to)
	if !ok || !usable(n.Remote) {
		return 0
	}
	local := n.Local
	if !usable(local) {
		local = netip.Addr{}
	}
	hop, err := netdev.NextHopTo(n.Remote, local)
	if err != nil {
		d.log.Debug("no MTU", "neighbour", n.Name, "error", err)
		return 0
	}
	d.leaves(to, hop)
	return hop.MTU - overhead(n.Remote)
}

// pinDirMode keeps pins to root.
const pinDirMode = 0o700

// isBPF says whether a BPF file system is mounted on dir.
func isBPF(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC
}

// mountBPF mounts a BPF file system on dir, unless one is there.
func mountBPF(dir string) (mounted bool, err error) {
	if err := os.MkdirAll(dir, pinDirMode); err != nil {
		return false, fmt.Errorf("directory for BPF pins: %w", err)
	}
	if isBPF(dir) {
		return false, nil
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return false, fmt.Errorf("mount a BPF file system on %s: %w", dir, err)
	}
	return true, nil
}

// unmountBPF unmounts and removes dir; nothing there is no error.
func unmountBPF(dir string) error {
	for isBPF(dir) {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}
