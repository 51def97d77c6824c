package sleeve

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// IP and UDP header, in bytes.
	ipv4Overhead = 20 + 8
	ipv6Overhead = 40 + 8

	// socketBuffer is asked for in each direction, in bytes: a burst of 64
	// super-frames.
	socketBuffer = 4 << 20

	// batchLen is the number of messages in one system call, and of segments
	// in one message: older kernels cut no message in more.
	batchLen = 64
	// receiveLen is the number of messages received at once; each needs a
	// buffer of 64 KiB, since the kernel joins datagrams of a size.
	receiveLen = 16
	receiveBuf = 1 << 16
)

// sockaddr is an address as the kernel takes it.
type sockaddr struct {
	raw [unix.SizeofSockaddrInet6]byte
	len uint32
}

// newSockaddr is the address for a socket that speaks only IPv4, or both.
func newSockaddr(to netip.AddrPort, ipv4 bool) (sockaddr, error) {
	var s sockaddr
	addr := to.Addr()
	if ipv4 {
		if !addr.Is4() {
			return s, fmt.Errorf("address %s is IPv6, but the sleeve's socket is IPv4 only", addr)
		}
		binary.NativeEndian.PutUint16(s.raw[0:], unix.AF_INET)
		binary.BigEndian.PutUint16(s.raw[2:], to.Port())
		copy(s.raw[4:], addr.AsSlice())
		s.len = unix.SizeofSockaddrInet4
		return s, nil
	}
	binary.NativeEndian.PutUint16(s.raw[0:], unix.AF_INET6)
	binary.BigEndian.PutUint16(s.raw[2:], to.Port())
	ip := addr.As16()
	copy(s.raw[8:], ip[:])
	s.len = unix.SizeofSockaddrInet6
	if zone := addr.Zone(); zone != "" {
		ifi, err := net.InterfaceByName(zone)
		if err != nil {
			return s, fmt.Errorf("zone of address %s: %w", addr, err)
		}
		binary.NativeEndian.PutUint32(s.raw[24:], uint32(ifi.Index))
	}
	return s, nil
}

// zone is the index of the interface of a link-local IPv6 address.
func (s *sockaddr) zone() uint32 { return binary.NativeEndian.Uint32(s.raw[24:]) }

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// control is room for one control message with a number.
type control [4]uint64

// batch is the memory of one system call with several messages.
type batch struct {
	msgs [batchLen]mmsghdr
	iov  [batchLen]unix.Iovec
	ctl  [batchLen]control
	fn   func(uintptr) bool
	used int
	done int
	err  unix.Errno
}

// socket is the UDP socket. send is for one goroutine, receive for another,
// sendOne for any.
type socket struct {
	file *os.File
	conn syscall.RawConn
	port int
	ipv4 bool // the socket is of family AF_INET
	out  batch
	in   batch
	bufs [receiveLen][]byte
	from [receiveLen]sockaddr
}

// openSocket binds the UDP port on bind, or on all addresses of both families
// if bind is the zero value.
func openSocket(bind netip.Addr, port int) (*socket, error) {
	bind = bind.Unmap()
	family := unix.AF_INET6
	if bind.Is4() {
		family = unix.AF_INET
	}
	fd, err := bindSocket(family, bind, port)
	if family == unix.AF_INET6 && !bind.IsValid() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		family = unix.AF_INET
		fd, err = bindSocket(family, bind, port) // a host without IPv6
	}
	where := "on all addresses"
	if bind.IsValid() {
		where = "on " + bind.String()
	}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("UDP port %d %s, which the sleeve needs, is taken by another program: stop it or choose another port", port, where)
	case err != nil:
		return nil, fmt.Errorf("UDP port %d %s for the sleeve: %w", port, where, err)
	}
	s := &socket{ipv4: family == unix.AF_INET, port: port}
	if port == 0 {
		s.port = boundPort(fd)
	}
	s.file = os.NewFile(uintptr(fd), "udp")
	if s.conn, err = s.file.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("UDP socket of the sleeve: %w", err), s.file.Close())
	}
	s.out.fn, s.in.fn = s.trySend, s.tryReceive
	for i := range s.bufs {
		s.bufs[i] = make([]byte, receiveBuf)
	}
	return s, nil
}

func bindSocket(family int, bind netip.Addr, port int) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := setUpSocket(fd, family, bind); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	var sa unix.Sockaddr
	if family == unix.AF_INET {
		in := &unix.SockaddrInet4{Port: port}
		if bind.IsValid() {
			in.Addr = bind.As4()
		}
		sa = in
	} else {
		in := &unix.SockaddrInet6{Port: port}
		if bind.IsValid() {
			in.Addr = bind.As16()
		}
		sa = in
	}
	if err := unix.Bind(fd, sa); err != nil {
		return -1, errors.Join(os.NewSyscallError("bind", err), unix.Close(fd))
	}
	return fd, nil
}

// setUpSocket sets what the path lives by: no fragmentation by the kernel, and
// room. That the kernel joins received datagrams (UDP_GRO) is a bonus.
func setUpSocket(fd, family int, bind netip.Addr) error {
	for _, opt := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
		force := unix.SO_RCVBUFFORCE
		if opt == unix.SO_SNDBUF {
			force = unix.SO_SNDBUFFORCE
		}
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) != nil {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, socketBuffer); err != nil {
				return os.NewSyscallError("setsockopt", err)
			}
		}
	}
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if family == unix.AF_INET {
		return nil
	}
	v6only := 0
	if bind.IsValid() {
		v6only = 1
	}
	return errors.Join(
		os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, v6only)),
		os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)),
	)
}

func boundPort(fd int) int {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sa.Port
	case *unix.SockaddrInet6:
		return sa.Port
	}
	return 0
}

func (s *socket) close() error { return s.file.Close() }

// load puts a message of n bytes for the neighbour to into place i of the
// batch; the kernel cuts it in datagrams of seg bytes when it is larger.
func (b *batch) load(i int, to *neighbour, data []byte, seg int) {
	b.iov[i].Base = unsafe.SliceData(data)
	b.iov[i].SetLen(len(data))
	h := &b.msgs[i].hdr
	at := to.place.Load()
	h.Name = &at.sockaddr.raw[0]
	h.Namelen = at.sockaddr.len
	h.Iov = &b.iov[i]
	h.SetIovlen(1)
	h.Control = nil
	h.SetControllen(0)
	if len(data) > seg {
		c := &b.ctl[i]
		cm := (*unix.Cmsghdr)(unsafe.Pointer(c))
		cm.Level, cm.Type = unix.IPPROTO_UDP, unix.UDP_SEGMENT
		cm.SetLen(unix.CmsgLen(2))
		*(*uint16)(unsafe.Add(unsafe.Pointer(c), unix.CmsgLen(0))) = uint16(seg)
		h.Control = (*byte)(unsafe.Pointer(c))
		h.SetControllen(unix.CmsgSpace(2))
	}
}

// send sends the first n messages of s.out and returns how many the kernel
// took before one failed. It waits for room.
func (s *socket) send(n int) (int, error) {
	s.out.used, s.out.done = n, 0
	if err := s.conn.Write(s.out.fn); err != nil {
		return s.out.done, closed(err)
	}
	if s.out.err != 0 {
		return s.out.done, s.out.err
	}
	return s.out.done, nil
}

func (s *socket) trySend(fd uintptr) bool {
	b := &s.out
	for b.done < b.used {
		r, _, e := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&b.msgs[b.done])),
			uintptr(b.used-b.done), unix.MSG_DONTWAIT, 0, 0)
		if e == unix.EAGAIN {
			return false
		}
		if e == 0 {
			b.done += int(r)
		} else if e != unix.EINTR {
			b.err = e
			return true
		}
	}
	b.err = 0
	return true
}

// sendOne sends one datagram without waiting.
func (s *socket) sendOne(to *neighbour, d []byte) error {
	var errno unix.Errno
	at := to.place.Load()
	err := s.conn.Control(func(fd uintptr) {
		for {
			_, _, errno = unix.Syscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&d[0])), uintptr(len(d)),
				unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(&at.sockaddr.raw[0])), uintptr(at.sockaddr.len))
			if errno != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return closed(err)
	}
	if errno != 0 {
		return os.NewSyscallError("sendto", errno)
	}
	return nil
}

// receive waits for messages and returns how many came; message says them.
func (s *socket) receive() (int, error) {
	if err := s.conn.Read(s.in.fn); err != nil {
		return 0, closed(err)
	}
	if s.in.err != 0 {
		return 0, os.NewSyscallError("recvmmsg", s.in.err)
	}
	return s.in.done, nil
}

func (s *socket) tryReceive(fd uintptr) bool {
	b := &s.in
	for i := range s.bufs {
		b.iov[i].Base = unsafe.SliceData(s.bufs[i])
		b.iov[i].SetLen(len(s.bufs[i]))
		h := &b.msgs[i].hdr
		h.Name, h.Namelen = &s.from[i].raw[0], unix.SizeofSockaddrInet6
		h.Iov = &b.iov[i]
		h.SetIovlen(1)
		h.Control = (*byte)(unsafe.Pointer(&b.ctl[i]))
		h.SetControllen(int(unsafe.Sizeof(b.ctl[i])))
	}
	for {
		r, _, e := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.msgs[0])),
			uintptr(len(s.bufs)), unix.MSG_DONTWAIT, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e == unix.EAGAIN {
			return false
		}
		b.done, b.err = int(r), e
		return true
	}
}

// message is the i-th message received: datagrams of seg bytes, the last one
// perhaps shorter, and where they came from.
func (s *socket) message(i int) (data []byte, seg int, from *sockaddr) {
	m := &s.in.msgs[i]
	s.from[i].len = m.hdr.Namelen
	data = s.bufs[i][:m.n]
	seg = len(data)
	if m.hdr.Controllen >= uint64(unix.CmsgLen(4)) {
		c := &s.in.ctl[i]
		cm := (*unix.Cmsghdr)(unsafe.Pointer(c))
		if cm.Level == unix.IPPROTO_UDP && cm.Type == unix.UDP_GRO {
			seg = int(*(*int32)(unsafe.Add(unsafe.Pointer(c), unix.CmsgLen(0))))
		}
	}
	return data, max(seg, 1), &s.from[i]
}
