package sleeve

import (
	"errors"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// routes asks the kernel for path MTUs: that of a connected socket is the
// smallest of the device's, the route's and what ICMP has told. Connecting a
// UDP socket sends nothing.
type routes struct {
	mu     sync.Mutex
	v4, v6 int // sockets; -1 when there is none
}

// openRoutes makes the sockets in the namespace of the calling thread.
func openRoutes() (*routes, error) {
	r := &routes{v4: -1, v6: -1}
	var err error
	if r.v4, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	r.v6, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		r.v6 = -1
		if !errors.Is(err, unix.EAFNOSUPPORT) {
			r.close()
			return nil, os.NewSyscallError("socket", err)
		}
	}
	return r, nil
}

// mtu is the path MTU to an address in bytes, as far as the kernel knows.
func (r *routes) mtu(to netip.AddrPort) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fd, level, option := r.v4, unix.IPPROTO_IP, unix.IP_MTU
	var sa unix.Sockaddr
	if to.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	} else {
		full, err := newSockaddr(to, false)
		if err != nil {
			return 0, err
		}
		fd, level, option = r.v6, unix.IPPROTO_IPV6, unix.IPV6_MTU
		sa = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16(), ZoneId: full.zone()}
	}
	if fd < 0 {
		return 0, os.ErrClosed
	}
	if err := unix.Connect(fd, sa); err != nil {
		return 0, os.NewSyscallError("connect", err)
	}
	mtu, err := unix.GetsockoptInt(fd, level, option)
	if err != nil {
		return 0, os.NewSyscallError("getsockopt", err)
	}
	return mtu, nil
}

func (r *routes) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, fd := range []*int{&r.v4, &r.v6} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
			*fd = -1
		}
	}
}
