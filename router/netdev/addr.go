package netdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// AddAddr gives a device an address; one it has already is no error.
func AddAddr(dev string, addr netip.Prefix) error {
	l, err := link(dev)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ipNet(addr)}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("address %s on %s: %w", addr, dev, err)
	}
	return nil
}

// DelAddr takes an address away; one that is not there is no error.
func DelAddr(dev string, addr netip.Prefix) error {
	l, err := link(dev)
	if errors.Is(err, ErrNoDevice) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := netlink.AddrDel(l, &netlink.Addr{IPNet: ipNet(addr)}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("remove address %s from %s: %w", addr, dev, err)
	}
	return nil
}

// Addrs lists the addresses of a device that are not link-local.
func Addrs(dev string) ([]netip.Prefix, error) {
	l, err := link(dev)
	if err != nil {
		return nil, err
	}
	list, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("addresses of %s: %w", dev, err)
	}
	var out []netip.Prefix
	for _, a := range list {
		if p := prefix(a.IPNet); usable(p) && !p.Addr().IsLinkLocalUnicast() {
			out = append(out, p)
		}
	}
	return out, nil
}

// AddMulticastRoute sends all IPv4 multicast of the namespace out of a device
// unless there is such a route already.
func AddMulticastRoute(dev string) error {
	l, err := link(dev)
	if err != nil {
		return err
	}
	route := &netlink.Route{
		LinkIndex: l.Attrs().Index,
		Dst:       ipNet(netip.PrefixFrom(netip.AddrFrom4([4]byte{224}), 4)),
		Scope:     netlink.SCOPE_LINK,
	}
	if err := netlink.RouteAdd(route); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("multicast route through %s: %w", dev, err)
	}
	return nil
}

// AnnounceAddrs tells the neighbours where IPv4 addresses live now, by one
// gratuitous ARP request for each (RFC 5227, section 3). The device must be up.
func AnnounceAddrs(dev string, addrs []netip.Prefix) error {
	l, err := link(dev)
	if err != nil {
		return err
	}
	// No protocol: the socket sends only.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("announce addresses of %s: %w", dev, err)
	}
	defer func() { _ = unix.Close(fd) }()
	var mac [6]byte
	copy(mac[:], l.Attrs().HardwareAddr)
	to := &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index, Halen: 6, Addr: [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	for _, p := range addrs {
		if !p.Addr().Is4() {
			continue
		}
		if err := unix.Sendto(fd, gratuitousARP(mac, p.Addr()), 0, to); err != nil {
			return fmt.Errorf("announce %s on %s: %w", p.Addr(), dev, err)
		}
	}
	return nil
}

// gratuitousARP is the Ethernet frame of an ARP request (RFC 826) for the
// sender's own address.
func gratuitousARP(mac [6]byte, addr netip.Addr) []byte {
	const ethernet, request = 1, 1
	ip := addr.As4()
	f := make([]byte, 0, 42)
	f = append(f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	f = append(f, mac[:]...)
	f = binary.BigEndian.AppendUint16(f, unix.ETH_P_ARP)
	f = binary.BigEndian.AppendUint16(f, ethernet)
	f = binary.BigEndian.AppendUint16(f, unix.ETH_P_IP)
	f = append(f, byte(len(mac)), byte(len(ip)))
	f = binary.BigEndian.AppendUint16(f, request)
	f = append(f, mac[:]...)
	f = append(f, ip[:]...)
	f = append(f, 0, 0, 0, 0, 0, 0)
	return append(f, ip[:]...)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefix is the inverse of ipNet; nil gives the zero Prefix.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits)
}
