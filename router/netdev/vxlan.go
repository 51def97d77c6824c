package netdev

import (
	"errors"
	"fmt"
	"net/netip"

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

// RouteMTU is the MTU in bytes of the route to remote, where it has one of
// its own, or of the device it leaves by. local may be the zero Addr.
func RouteMTU(remote, local netip.Addr) (int, error) {
	opts := &netlink.RouteGetOptions{}
	if local.IsValid() {
		opts.SrcAddr = local.Unmap().AsSlice()
	}
	routes, err := netlink.RouteGetWithOptions(remote.Unmap().AsSlice(), opts)
	if err != nil {
		return 0, fmt.Errorf("route to %s: %w", remote, err)
	}
	if len(routes) == 0 {
		return 0, fmt.Errorf("route to %s: none", remote)
	}
	if routes[0].MTU > 0 {
		return routes[0].MTU, nil
	}
	l, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return 0, fmt.Errorf("device of the route to %s: %w", remote, err)
	}
	return l.Attrs().MTU, nil
}
