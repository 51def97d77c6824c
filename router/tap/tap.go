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
	"weave.local/router/turns"
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
	clone = "/dev/net/tun" // what TAP devices are made with

	// tapMTU is the largest the kernel allows a TAP: 64 KiB less an Ethernet
	// header. Which packets are too large is decided before they get here.
	tapMTU = 65535 - 14
	// tapQueue is the number of frames that wait for us in the kernel in each
	// queue, each up to 64 KiB.
	tapQueue = 512
	// turnLen is how many bytes are read from a queue while others wait, a frame
	// counting frameCost more than it has: a super-frame, or 60 small ones.
	turnLen   = 64 << 10
	frameCost = 1 << 10
	// MaxParts bounds the pieces of one frame that WriteFrame takes; the kernel
	// takes 1024.
	MaxParts = 258
)

// Device is a TAP device, or what behaves like one: it keeps messages whole.
type Device struct {
	*os.File
	USO  bool  // frames written to it may be UDP super-frames; needs Linux 6.2
	more []int // descriptors of the queues besides the file's own
}

// Close gives the device back.
func (d *Device) Close() error {
	err := d.File.Close()
	if errors.Is(err, os.ErrClosed) {
		return err
	}
	for _, fd := range d.more {
		err = errors.Join(err, unix.Close(fd))
	}
	return err
}

// Conn is where frames are read and written. Reads are for one goroutine, writes
// for another.
type Conn struct {
	dev     *Device
	conn    syscall.RawConn
	queues  *turns.Set
	readBuf []byte
	readLen int
	readErr error
	left    int // of the turn, in bytes
	writeFn func(uintptr) bool
	iov     [MaxParts]unix.Iovec
	parts   int
	bytes   int // in parts
	writErr syscall.Errno
}

// Open makes a TAP device that carries frames with a virtio-net header of 10
// bytes, super-frames included, and brings it up, in the network namespace of
// the calling thread. The device vanishes with the file.
//
// With more queues than one, up to turns.Max, frames are put in them by the peer
// that the two VLAN tags name as their destination (see steering), each queue is as
// long as that of a device with one, and a Conn reads them in turn. A kernel that
// does not let us say which frame goes where makes one queue.
func Open(name string, queues int, log *slog.Logger) (*Device, error) {
	fd, err := unix.Open(clone, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s, which the TAP device %s needs: %w", clone, name, err)
	}
	var steering int
	if queues > 1 {
		if steering, err = loadSteering(); err != nil {
			log.Warn("all peers share one queue for what goes to them by sleeve", "device", name, "error", err)
			queues = 1
		} else {
			defer func() { _ = unix.Close(steering) }()
		}
	}
	d := &Device{}
	d.USO, err = setUpTap(fd, name, queues, log)
	for i := 1; err == nil && i < queues; i++ {
		err = d.addQueue(name)
	}
	if err == nil && queues > 1 {
		err = os.NewSyscallError("ioctl TUNSETSTEERINGEBPF", unix.IoctlSetPointerInt(fd, unix.TUNSETSTEERINGEBPF, steering))
	}
	if err == nil {
		err = raiseTap(name)
	}
	// The runtime may poll the descriptor, if it is the only one: Conn polls
	// several. Not before now: without a device it polls as an error.
	if queues == 1 {
		err = errors.Join(err, unix.SetNonblock(fd, true))
	}
	d.File = os.NewFile(uintptr(fd), clone)
	if queues > 1 {
		err = errors.Join(err, unix.SetNonblock(fd, true))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("TAP device %s: %w", name, err), d.Close())
	}
	return d, nil
}

// addQueue gives the device another queue.
func (d *Device) addQueue(name string) error {
	fd, err := unix.Open(clone, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("opening %s: %w", clone, err)
	}
	d.more = append(d.more, fd)
	return attach(fd, name, unix.IFF_MULTI_QUEUE)
}

// attach makes a descriptor a queue of the device.
func attach(fd int, name string, flags uint16) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("name: %w", err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("creating it: %w", err)
	}
	return nil
}

// NewConn serves frames from and to a device.
func NewConn(dev *Device) (*Conn, error) {
	t := &Conn{dev: dev}
	var err error
	if t.conn, err = dev.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("TAP device: %w", err), dev.Close())
	}
	var fds []int
	err = t.conn.Control(func(fd uintptr) { fds = append([]int{int(fd)}, dev.more...) })
	if err == nil {
		t.queues, err = turns.New(fds, t.tryRead)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("TAP device: %w", err), dev.Close())
	}
	t.left, t.writeFn = turnLen, t.tryWrite
	return t, nil
}

// setUpTap says whether frames may be UDP super-frames.
func setUpTap(fd int, name string, queues int, log *slog.Logger) (uso bool, err error) {
	// Nobody else's: a device with several queues would else take us for one more.
	flags := uint16(unix.IFF_TUN_EXCL)
	if queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	err = attach(fd, name, flags)
	if errors.Is(err, unix.EBUSY) {
		return false, errors.New("another process holds a device of that name; is another weave running here?")
	}
	if err != nil {
		return false, err
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
	return uso, nil
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
func (t *Conn) Close() error {
	if err := t.queues.Close(); err != nil {
		return err
	}
	return t.dev.Close()
}

// Read puts the next frame, behind its virtio-net header, into b. When none is
// there it waits or, without wait, returns 0.
func (t *Conn) Read(b []byte, wait bool) (int, error) {
	t.readBuf = b
	found, err := t.queues.Read(wait)
	if err != nil || !found {
		return 0, err
	}
	return t.readLen, t.readErr
}

func (t *Conn) tryRead(fd int, brief bool) turns.Outcome {
	for {
		r, errno := turns.Syscall(brief, unix.SYS_READ, uintptr(fd),
			uintptr(unsafe.Pointer(unsafe.SliceData(t.readBuf))), uintptr(len(t.readBuf)), 0)
		n := int(r)
		switch errno {
		case 0:
			t.readErr = nil
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			t.left = turnLen
			return turns.Nothing
		default:
			n, t.readErr = 0, os.NewSyscallError("read", errno)
		}
		t.readLen = n
		if t.left -= n + frameCost; t.left > 0 {
			return turns.More
		}
		t.left = turnLen
		return turns.Over
	}
}

// WriteFrame writes one frame, its virtio-net header first, that lies in parts.
func (t *Conn) WriteFrame(parts [][]byte) error {
	t.parts, t.bytes = len(parts), 0
	for i, p := range parts {
		t.bytes += len(p)
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
		_, t.writErr = turns.Syscall(t.bytes <= turns.Small, unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&t.iov[0])), uintptr(t.parts), 0)
		if t.writErr != unix.EINTR {
			return true
		}
	}
}
