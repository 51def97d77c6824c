package netdev

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// EnsureBridge makes a bridge with the given address and MTU, or adopts the
// one of that name, and sets it up: no spanning tree, no multicast snooping (all
// multicast is flooded), no router advertisements taken, and up. The MTU is
// the bridge's own from then on and does not follow its ports.
func EnsureBridge(name string, mac [6]byte, mtu int) error {
	l, err := link(name)
	created := errors.Is(err, ErrNoDevice)
	if created {
		l, err = createBridge(name)
	}
	if err != nil {
		return err
	}
	err = configureBridge(l, mac, mtu, created)
	if err != nil && created {
		err = errors.Join(err, DeleteLink(name))
	}
	return err
}

func createBridge(name string) (netlink.Link, error) {
	off := false
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}); err != nil {
		return nil, fmt.Errorf("create bridge %s: %w", name, err)
	}
	return link(name)
}

func configureBridge(l netlink.Link, mac [6]byte, mtu int, created bool) error {
	name := l.Attrs().Name
	b, ok := l.(*netlink.Bridge)
	if !ok {
		return fmt.Errorf("device %s is a %s, not a bridge: remove it and try again", name, l.Type())
	}
	if b.MulticastSnooping == nil || *b.MulticastSnooping {
		if err := netlink.BridgeSetMcastSnoop(l, false); err != nil {
			return fmt.Errorf("multicast snooping of %s: %w", name, err)
		}
	}
	// Set after creation, or older kernels lack its entry in the
	// forwarding table; set at all, or the bridge takes its ports'.
	if err := netlink.LinkSetHardwareAddr(l, net.HardwareAddr(mac[:])); err != nil {
		return fmt.Errorf("address of %s: %w", name, err)
	}
	if err := pinMTU(l, mtu, created); err != nil {
		return err
	}
	for _, s := range [][2]string{
		{"ipv6/conf/" + name + "/accept_ra", "0"},
		{"ipv6/conf/" + name + "/addr_gen_mode", "1"}, // no address of its own accord
		{"ipv4/conf/" + name + "/promote_secondaries", "1"},
	} {
		if err := SetSysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	if err := QuickNeighbours(name); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// pinMTU gives a bridge its MTU. Only a change makes the kernel regard it as
// the bridge's own, so a fresh one is changed in any case.
func pinMTU(l netlink.Link, mtu int, fresh bool) error {
	name := l.Attrs().Name
	if l.Attrs().MTU == mtu {
		if !fresh {
			return nil
		}
		if err := netlink.LinkSetMTU(l, mtu-1); err != nil {
			return fmt.Errorf("MTU of %s: %w", name, err)
		}
	}
	if err := netlink.LinkSetMTU(l, mtu); err != nil {
		return fmt.Errorf("MTU %d of %s: %w", mtu, name, err)
	}
	return nil
}

// Device is a device as the kernel describes it.
type Device struct {
	Index, Master int // Master is the bridge it is a port of, 0 for none
	Name, Kind    string
	Alias         string
	MAC           [6]byte
	MTU           int
	Up            bool
	// For one end of a veth pair, the other end: its index, and the
	// namespace as our namespace numbers others, -1 for our own.
	PeerIndex, PeerNSID int
}

func device(l netlink.Link) Device {
	a := l.Attrs()
	d := Device{
		Index: a.Index, Master: a.MasterIndex, Name: a.Name, Kind: l.Type(), Alias: a.Alias,
		MTU: a.MTU, Up: a.Flags&net.FlagUp != 0, PeerIndex: a.ParentIndex, PeerNSID: a.NetNsID,
	}
	copy(d.MAC[:], a.HardwareAddr)
	return d
}

// DeviceByName describes a device; the error is ErrNoDevice when there is none.
func DeviceByName(name string) (Device, error) {
	l, err := link(name)
	if err != nil {
		return Device{}, err
	}
	return device(l), nil
}

// Exists says whether there is a device of that name.
func Exists(name string) bool {
	_, err := link(name)
	return err == nil
}

// DeviceByIndex describes a device; the error is ErrNoDevice when there is none.
func DeviceByIndex(index int) (Device, error) {
	l, err := netlink.LinkByIndex(index)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return Device{}, fmt.Errorf("number %d: %w", index, ErrNoDevice)
	}
	if err != nil {
		return Device{}, fmt.Errorf("device number %d: %w", index, err)
	}
	return device(l), nil
}

// Devices lists all devices.
func Devices() ([]Device, error) {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	list := make([]Device, len(links))
	for i, l := range links {
		list[i] = device(l)
	}
	return list, nil
}

// Ports lists the ports of a bridge.
func Ports(bridge string) ([]Device, error) {
	b, err := link(bridge)
	if err != nil {
		return nil, err
	}
	all, err := Devices()
	if err != nil {
		return nil, err
	}
	var ports []Device
	for _, d := range all {
		if d.Master == b.Attrs().Index {
			ports = append(ports, d)
		}
	}
	return ports, nil
}

// DeleteLink removes a device; one that is not there is no error.
func DeleteLink(name string) error {
	l, err := link(name)
	if errors.Is(err, ErrNoDevice) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := netlink.LinkDel(l); err != nil {
		if _, gone := link(name); errors.Is(gone, ErrNoDevice) {
			return nil // it went by itself meanwhile
		}
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}
