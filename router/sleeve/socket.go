package sleeve

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"weave.local/router/turns"
)

const (
	// IP and UDP header, in bytes.
	ipv4Overhead = 20 + 8
	ipv6Overhead = 40 + 8

	// lanes is the number of queues in each direction, by the short id of the
	// neighbour or, at the TAP, of the peer that a frame goes to. They are served
	// in turn, and each has room of its own in the kernel.
	lanes = 8
	// socketBuffer is asked for in each direction and lane, in bytes: a burst of
	// 64 super-frames.
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
	fn   func(uintptr)
	lane int
	used int
	done int
	err  unix.Errno
}

// socket is the UDP port: a socket for each lane. send is for one goroutine,
// receive for another, sendOne for any.
type socket struct {
	fds   []int
	turns *turns.Set
	port  int
	ipv4  bool // the sockets are of family AF_INET
	out   batch
	in    batch
	bufs  [receiveLen][]byte
	from  [receiveLen]sockaddr
}

// openSocket binds the UDP port on bind, or on all addresses of both families
// if bind is the zero value.
func openSocket(bind netip.Addr, port int) (*socket, error) {
	bind = bind.Unmap()
	s := &socket{port: port, ipv4: bind.Is4()}
	err := s.bind(bind)
	if !s.ipv4 && !bind.IsValid() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		s.ipv4 = true
		err = s.bind(bind) // a host without IPv6
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
	s.out.fn = s.trySend
	for i := range s.bufs {
		s.bufs[i] = make([]byte, receiveBuf)
	}
	return s, nil
}

// bind makes the sockets. On an error there are none.
func (s *socket) bind(bind netip.Addr) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeAll())
		}
	}()
	family := unix.AF_INET6
	if s.ipv4 {
		family = unix.AF_INET
	}
	for len(s.fds) < lanes {
		fd, err := bindSocket(family, bind, s.port, len(s.fds) > 0)
		if err != nil {
			return err
		}
		if s.fds = append(s.fds, fd); len(s.fds) > 1 {
			continue
		}
		// The first is bound before it may share the port: not with another
		// program that has it, nor with another weave.
		if err := share(fd); err != nil {
			return err
		}
		if s.port == 0 {
			s.port = boundPort(fd)
		}
	}
	steer(s.fds[0])
	s.turns, err = turns.New(s.fds, s.tryReceive)
	return err
}

// steer makes the kernel choose the socket by the short id in the datagram,
// which both versions have in the same place. A kernel that refuses chooses by
// addresses and ports, which is nearly as good.
func steer(fd int) {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 2},
		{Code: unix.BPF_ALU | unix.BPF_MOD | unix.BPF_K, K: lanes},
		{Code: unix.BPF_RET | unix.BPF_A},
	}
	_ = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

// share lets a socket have its port beside others of ours.
func share(fd int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
}

// lane is the index of the socket for what goes to n.
func lane(n *neighbour) int { return int(n.id) % lanes }

func bindSocket(family int, bind netip.Addr, port int, shared bool) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	err = setUpSocket(fd, family, bind)
	if err == nil && shared {
		err = share(fd)
	}
	if err != nil {
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

func (s *socket) close() error {
	if err := s.turns.Close(); err != nil {
		return err
	}
	return s.closeAll()
}

func (s *socket) closeAll() error {
	var err error
	for _, fd := range s.fds {
		err = errors.Join(err, unix.Close(fd))
	}
	s.fds = nil
	return err
}

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

// send sends the first n messages of s.out by the socket of a lane and returns
// how many the kernel took before one failed. It waits for nothing: when there is
// no room (EAGAIN) another lane may have some.
func (s *socket) send(by, n int) (int, error) {
	s.out.lane, s.out.used, s.out.done = by, n, 0
	if err := s.turns.Hold(s.out.fn); err != nil {
		return s.out.done, err
	}
	if s.out.err != 0 {
		return s.out.done, s.out.err
	}
	return s.out.done, nil
}

func (s *socket) trySend(uintptr) {
	b := &s.out
	for b.done < b.used {
		brief := b.used == 1 && b.iov[0].Len <= turns.Small
		r, e := turns.Syscall(brief, unix.SYS_SENDMMSG, uintptr(s.fds[b.lane]), uintptr(unsafe.Pointer(&b.msgs[b.done])),
			uintptr(b.used-b.done), unix.MSG_DONTWAIT)
		if e == 0 {
			b.done += int(r)
		} else if e != unix.EINTR {
			b.err = e
			return
		}
	}
	b.err = 0
}

// sendOne sends one datagram without waiting.
func (s *socket) sendOne(to *neighbour, d []byte) error {
	var errno unix.Errno
	at := to.place.Load()
	err := s.turns.Hold(func(uintptr) {
		for {
			_, _, errno = unix.Syscall6(unix.SYS_SENDTO, uintptr(s.fds[lane(to)]), uintptr(unsafe.Pointer(&d[0])), uintptr(len(d)),
				unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(&at.sockaddr.raw[0])), uintptr(at.sockaddr.len))
			if errno != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	if errno != 0 {
		return os.NewSyscallError("sendto", errno)
	}
	return nil
}

// receive waits for messages and returns how many came; message says them.
func (s *socket) receive() (int, error) {
	if _, err := s.turns.Read(true); err != nil {
		return 0, err
	}
	if s.in.err != 0 {
		return 0, os.NewSyscallError("recvmmsg", s.in.err)
	}
	return s.in.done, nil
}

func (s *socket) tryReceive(fd int, brief bool) turns.Outcome {
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
		r, e := turns.Syscall(brief, unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])),
			uintptr(len(s.bufs)), unix.MSG_DONTWAIT)
		if e == unix.EINTR {
			continue
		}
		if e == unix.EAGAIN {
			return turns.Nothing
		}
		b.done, b.err = int(r), e
		return turns.Over
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
