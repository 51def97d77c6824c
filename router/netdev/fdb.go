package netdev

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ForgetMAC makes the bridge that a device is a port of forget that it has seen
// an Ethernet address there. One that it has not seen there is no error.
func ForgetMAC(index int, mac [6]byte) error {
	err := netlink.NeighDel(&netlink.Neigh{
		LinkIndex: index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: net.HardwareAddr(mac[:]),
	})
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return nil // unknown there, or the device is gone or of no bridge
	}
	return fmt.Errorf("let the bridge forget %s at device %d: %w", net.HardwareAddr(mac[:]), index, err)
}
