package netdev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxAlias is the longest alias a device may carry, in bytes.
const maxAlias = 255

// VethSpec describes a pair of veth devices.
type VethSpec struct {
	Host, Peer string  // names of the two ends
	PeerNS     string  // path of the namespace the peer end is made in; "": stays here
	PeerMAC    [6]byte // address of the peer end; zero: the kernel chooses
	MTU        int     // of both ends, in bytes
	Bridge     string  // the host end becomes a port of it
	Alias      string  // of the host end, to be recognised by; cut to 255 bytes
}

// CreateVeth makes a pair of devices, both down, and returns the index of the
// host end. On error nothing is left of it.
func CreateVeth(s VethSpec) (int, error) {
	bridge, err := link(s.Bridge)
	if err != nil {
		return 0, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = s.Host
	attrs.MTU = s.MTU
	attrs.MasterIndex = bridge.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: s.Peer}
	if s.PeerMAC != ([6]byte{}) {
		veth.PeerHardwareAddr = net.HardwareAddr(s.PeerMAC[:])
	}
	if s.PeerNS != "" {
		fd, err := openNamespace(s.PeerNS)
		if err != nil {
			return 0, err
		}
		defer func() { _ = unix.Close(fd) }()
		veth.PeerNamespace = netlink.NsFd(fd)
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return 0, fmt.Errorf("create %s and %s: %w", s.Host, s.Peer, err)
	}
	index, err := configureHostEnd(s)
	if err != nil {
		return 0, errors.Join(err, DeleteLink(s.Host))
	}
	return index, nil
}

func configureHostEnd(s VethSpec) (int, error) {
	l, err := link(s.Host)
	if err != nil {
		return 0, err
	}
	if err := netlink.LinkSetAlias(l, s.Alias[:min(len(s.Alias), maxAlias)]); err != nil {
		return 0, fmt.Errorf("alias of %s: %w", s.Host, err)
	}
	// A port of a bridge has no business of its own on the network.
	if err := SetSysctl(filepath.Join("ipv6/conf", s.Host, "disable_ipv6"), "1"); err != nil {
		return 0, err
	}
	return l.Attrs().Index, nil
}

// SetMaster makes a device a port of a bridge.
func SetMaster(name, bridge string) error {
	l, err := link(name)
	if err != nil {
		return err
	}
	b, err := link(bridge)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(l, b); err != nil {
		return fmt.Errorf("make %s a port of %s: %w", name, bridge, err)
	}
	return nil
}

// SetUp sets a device up.
func SetUp(name string) error {
	l, err := link(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// WaitCarrier waits until a device passes frames. The kernel sets a new port
// of a bridge forwarding shortly after both ends of its pair are up.
func WaitCarrier(ctx context.Context, name string) error {
	const every = 2 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		l, err := link(name)
		if err != nil {
			return err
		}
		if l.Attrs().OperState == netlink.OperUp {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not come up: %w", name, ctx.Err())
		case <-tick.C:
		}
	}
}
