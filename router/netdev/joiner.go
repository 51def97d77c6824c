package netdev

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// joinerMTU lets super-frames pass, whatever the MTU of those they come from.
const joinerMTU = 65535

// EnsureJoiner makes a pair of veth devices, or adopts it: what is sent by in
// comes out of out, packets of one TCP flow joined to super-frames by generic
// receive offload. Returns the indices of both. On error nothing of a new pair
// is left.
func EnsureJoiner(in, out string) (inIndex, outIndex int, err error) {
	_, err = link(in)
	created := errors.Is(err, ErrNoDevice)
	if created {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = in, joinerMTU
		err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: out, PeerMTU: joinerMTU})
	}
	if err != nil {
		return 0, 0, fmt.Errorf("create %s and %s: %w", in, out, err)
	}
	// Neither has business of its own on a network, and only what is sent
	// without segmentation offload is joined.
	err = errors.Join(
		SetSysctl("ipv6/conf/"+in+"/disable_ipv6", "1"),
		SetSysctl("ipv6/conf/"+out+"/disable_ipv6", "1"),
		setOffload(in, unix.ETHTOOL_STSO, false),
		setOffload(out, unix.ETHTOOL_SGRO, true),
		SetUp(out), SetUp(in))
	a, err1 := DeviceByName(in)
	b, err2 := DeviceByName(out)
	err = errors.Join(err, err1, err2)
	if err != nil && created {
		err = errors.Join(err, DeleteLink(in))
	}
	return a.Index, b.Index, err
}

// HandlesSuperFrames says whether a device joins received packets to
// super-frames or takes super-frames to send: whether what comes by it may be
// one.
func HandlesSuperFrames(index int) (bool, error) {
	dev, err := DeviceByIndex(index)
	if err != nil {
		return false, err
	}
	for _, offload := range []uint32{unix.ETHTOOL_GGRO, unix.ETHTOOL_GTSO} {
		on := false
		if err := ethtool(dev.Name, offload, &on); err != nil || on {
			return on, err
		}
	}
	return false, nil
}

func setOffload(name string, command uint32, on bool) error { return ethtool(name, command, &on) }

// ethtool gets or sets one offload of a device, by a command of
// linux/ethtool.h that has a number as its argument.
func ethtool(name string, command uint32, on *bool) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket for ethtool: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	arg := struct{ command, value uint32 }{command: command}
	if *on {
		arg.value = 1
	}
	request := struct { // struct ifreq
		name [unix.IFNAMSIZ]byte
		arg  unsafe.Pointer
		_    [16]byte
	}{arg: unsafe.Pointer(&arg)}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return fmt.Errorf("offload of %s: %w", name, errno)
	}
	*on = arg.value != 0
	return nil
}
