package netdev

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

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

// TxOffload says whether a device takes packets to send whose checksums are not
// complete, and super-frames.
func TxOffload(name string) (on bool, err error) {
	err = ethtool(name, unix.ETHTOOL_GTXCSUM, &on)
	return on, err
}

// SetTxOffload has a device take such packets, or not: then the kernel completes
// and cuts them before.
func SetTxOffload(name string, on bool) error { return setOffload(name, unix.ETHTOOL_STXCSUM, on) }

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
