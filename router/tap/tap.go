// Package tap makes TAP devices that carry super-frames, and reads and writes
// whole frames there without allocating. Each frame has a frame.VirtioNet header
// before it.
package tap

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"weave.local/router/frame"
)

// What the TAP may leave to us (TUN_F_*, linux/if_tun.h).
const (
	tunCsum   = 0x01
	tunTSO4   = 0x02
	tunTSO6   = 0x04
	tunTSOECN = 0x08
	tunUSO4   = 0x20
	tunUSO6   = 0x40

	tunTCP = tunCsum | tunTSO4 | tunTSO6 | tunTSOECN
	tunUDP = tunUSO4 | tunUSO6 // since Linux 6.2
)

const (
	// tapMTU is the largest the kernel allows a TAP: 64 KiB less an Ethernet
	// header. Which packets are too large is decided before they get here.
	tapMTU = 65535 - 14
	// tapQueue is the number of frames that wait for us in the kernel, each
	// up to 64 KiB.
	tapQueue = 512
	// MaxParts bounds the pieces of one frame that WriteFrame takes; the kernel
	// takes 1024.
	MaxParts = 258
)

// Device is a TAP device, or what behaves like one: it keeps messages whole.
type Device struct {
	*os.File
	USO bool // frames written to it may be UDP super-frames; needs Linux 6.2
}

// Conn is where frames are read and written. Reads are for one goroutine, writes
// for another.
type Conn struct {
	dev     *Device
	conn    syscall.RawConn
	readFn  func(uintptr) bool
	readBuf []byte
	wait    bool
	readLen int
	readErr error
	writeFn func(uintptr) bool
	iov     [MaxParts]unix.Iovec
	parts   int
	writErr syscall.Errno
}

// Open makes a TAP device that carries frames with a virtio-net header of 10
// bytes, super-frames included, and brings it up, in the network namespace of
// the calling thread. The device vanishes with the file.
func Open(name string, log *slog.Logger) (*Device, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening /dev/net/tun, which the TAP device %s needs: %w", name, err)
	}
	uso, err := setUpTap(fd, name, log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("TAP device %s: %w", name, err), unix.Close(fd))
	}
	// Only now may the runtime poll the descriptor: before it has a device
	// it polls as an error.
	return &Device{os.NewFile(uintptr(fd), "/dev/net/tun"), uso}, nil
}

// NewConn serves frames from and to a device.
func NewConn(dev *Device) (*Conn, error) {
	t := &Conn{dev: dev}
	var err error
	if t.conn, err = dev.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("TAP device: %w", err), dev.Close())
	}
	t.readFn, t.writeFn = t.tryRead, t.tryWrite
	return t, nil
}

// setUpTap says whether frames may be UDP super-frames.
func setUpTap(fd int, name string, log *slog.Logger) (uso bool, err error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return false, fmt.Errorf("name: %w", err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	switch err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); {
	case errors.Is(err, unix.EBUSY):
		return false, errors.New("another process holds a device of that name; is another weave running here?")
	case err != nil:
		return false, fmt.Errorf("creating it: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, frame.VirtioNetLen); err != nil {
		return false, fmt.Errorf("virtio-net header: %w", err)
	}
	uso = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tunTCP|tunUDP) == nil
	if !uso {
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tunTCP); err != nil {
			return false, fmt.Errorf("offloads: %w", err)
		}
	}
	// The device is no host's: no address of its own, and no frames about one.
	path := "/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6"
	if err := os.WriteFile(path, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("IPv6 stays on at the TAP device; what the kernel sends through it by itself is dropped", "device", name, "error", err)
	}
	return uso, raiseTap(name)
}

// raiseTap sets MTU and queue of the device and brings it up.
func raiseTap(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(s) }()
	set := func(request uint, what string, fill func(*unix.Ifreq)) error {
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return fmt.Errorf("name: %w", err)
		}
		fill(ifr)
		if err := unix.IoctlIfreq(s, request, ifr); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	}
	return errors.Join(
		set(unix.SIOCSIFMTU, "MTU", func(r *unix.Ifreq) { r.SetUint32(tapMTU) }),
		set(unix.SIOCSIFTXQLEN, "queue length", func(r *unix.Ifreq) { r.SetUint32(tapQueue) }),
		set(unix.SIOCSIFFLAGS, "bringing it up", func(r *unix.Ifreq) {
			r.SetUint16(unix.IFF_UP | unix.IFF_NOARP)
		}),
	)
}

// USO says whether frames written may be UDP super-frames.
func (t *Conn) USO() bool { return t.dev.USO }

// Close gives the device back; reads and writes end with os.ErrClosed.
func (t *Conn) Close() error { return t.dev.Close() }

// Read puts the next frame, behind its virtio-net header, into b. When none is
// there it waits or, without wait, returns 0.
func (t *Conn) Read(b []byte, wait bool) (int, error) {
	t.readBuf, t.wait = b, wait
	if err := t.conn.Read(t.readFn); err != nil {
		return 0, fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	return t.readLen, t.readErr
}

func (t *Conn) tryRead(fd uintptr) bool {
	for {
		n, err := unix.Read(int(fd), t.readBuf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			t.readLen, t.readErr = 0, nil
			return !t.wait
		}
		t.readLen, t.readErr = n, os.NewSyscallError("read", err)
		return true
	}
}

// WriteFrame writes one frame, its virtio-net header first, that lies in parts.
func (t *Conn) WriteFrame(parts [][]byte) error {
	t.parts = len(parts)
	for i, p := range parts {
		t.iov[i].Base = unsafe.SliceData(p)
		t.iov[i].SetLen(len(p))
	}
	if err := t.conn.Write(t.writeFn); err != nil {
		return fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	if t.writErr != 0 {
		return t.writErr
	}
	return nil
}

func (t *Conn) tryWrite(fd uintptr) bool {
	for {
		_, _, t.writErr = unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&t.iov[0])), uintptr(t.parts))
		if t.writErr != unix.EINTR {
			return true
		}
	}
}
