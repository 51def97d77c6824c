package netdev

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// EnsureVXLAN makes a VXLAN device for a UDP port in collect-metadata mode, or
// adopts the one of that name, and sets its MTU. A new one is down.
func EnsureVXLAN(name string, port, mtu int) (created bool, err error) {
	l, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	switch {
	case err == nil && isExternalVXLAN(l, port):
	case err == nil:
		return false, fmt.Errorf("device %s is not a VXLAN device of ours: remove it and try again", name)
	case errors.As(err, &missing):
		if l, err = createVXLAN(name, port); err != nil {
			return false, err
		}
		created = true
	default:
		return false, fmt.Errorf("device %s: %w", name, err)
	}
	if l.Attrs().MTU == mtu {
		return created, nil
	}
	if err := netlink.LinkSetMTU(l, mtu); err != nil {
		err = fmt.Errorf("MTU %d of %s: %w", mtu, name, err)
		if created {
			err = errors.Join(err, DeleteLink(name))
		}
		return false, err
	}
	return created, nil
}

func isExternalVXLAN(l netlink.Link, port int) bool {
	v, ok := l.(*netlink.Vxlan)
	return ok && v.FlowBased && v.Port == port
}

func createVXLAN(name string, port int) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := netlink.LinkAdd(&netlink.Vxlan{
		LinkAttrs: attrs,
		FlowBased: true, // the programs give each frame its tunnel key
		Port:      port,
		// We send without UDP checksum, so that the kernel need not
		// touch the payload; over IPv6 the receiver must agree (RFC 6935).
		UDP6ZeroCSumRx: true,
	})
	if errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("UDP port %d: another VXLAN device uses it already", port)
	}
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", name, err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	return l, nil
}
