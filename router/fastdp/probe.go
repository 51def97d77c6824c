package fastdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// Layout of a probe; see the package comment.
const (
	vxlanHeader    = 8
	etherHeader    = 14
	vxlanFlagVNI   = 0x08
	vniOffset      = 4
	vniShift       = 8  // a reserved byte follows the identifier
	shortIDBits    = 12 // of each of the two in an identifier
	etherTypeAt    = vxlanHeader + etherHeader - 2
	probeEtherType = 0x88b5
	tokenAt        = vxlanHeader + etherHeader
	sizeAt         = tokenAt + 8
	minProbeSize   = 46 // bytes after the Ethernet header: the least Ethernet has
	maxProbeSize   = 65535 - overhead4
)

// socket is where probes to one neighbour leave. It stays open so that the
// kernel can tell us of errors that come back.
type socket struct {
	conn          *net.UDPConn
	local, remote netip.Addr
}

// Probe sends one probe to a neighbour: a frame as large as one that carries
// an IP packet of size bytes. What the kernel knows to be larger than the
// path carries is refused with a *overlay.TooBigError.
func (d *DataPath) Probe(to peer.ShortID, token uint64, size int) error {
	n, self, ok := d.neighbour(to)
	switch {
	case !ok || !usable(n.Remote):
		return fmt.Errorf("peer %d is no neighbour that the fast path could reach", to)
	case self == 0:
		return errors.New("this peer has no short id yet")
	case size < 0:
		return fmt.Errorf("probe of %d bytes", size)
	}
	s, err := d.socketTo(n)
	if err != nil {
		return err
	}
	p := appendProbe(nil, self, to, token, min(size, maxProbeSize+1)) // which is too big
	_, err = s.conn.Write(p)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ECONNREFUSED): // the answer to the last one, which kept this one from leaving
		return fmt.Errorf("UDP port %d of %s is closed, or rejected by a firewall", d.cfg.Port, n.Remote)
	case errors.Is(err, unix.EMSGSIZE):
		return &overlay.TooBigError{MTU: max(0, s.pathMTU()-overhead(n.Remote))}
	}
	d.dropSocket(to, s) // our address may have changed: the next one is new
	return fmt.Errorf("probe %s: %w", n.Remote, err)
}

func appendProbe(b []byte, self, to peer.ShortID, token uint64, size int) []byte {
	p := make([]byte, vxlanHeader+etherHeader+max(size, minProbeSize))
	p[0] = vxlanFlagVNI
	vni := uint32(self) | uint32(to)<<shortIDBits
	binary.BigEndian.PutUint32(p[vniOffset:], vni<<vniShift)
	binary.BigEndian.PutUint16(p[etherTypeAt:], probeEtherType)
	binary.BigEndian.PutUint64(p[tokenAt:], token)
	binary.BigEndian.PutUint32(p[sizeAt:], uint32(size))
	return append(b, p...)
}

// socketTo is the open socket to a neighbour, or a new one.
func (d *DataPath) socketTo(n overlay.Neighbour) (*socket, error) {
	d.sendMu.Lock()
	defer d.sendMu.Unlock()
	if s, ok := d.sockets[n.ShortID]; ok {
		return s, nil
	}
	var local *net.UDPAddr
	if usable(n.Local) {
		local = net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.Local.Unmap(), 0))
	}
	remote := net.UDPAddrFromAddrPort(netip.AddrPortFrom(n.Remote.Unmap(), uint16(d.cfg.Port)))
	conn, err := net.DialUDP("udp", local, remote) // makes a socket, sends nothing
	if err != nil {
		return nil, fmt.Errorf("probe %s: %w", n.Remote, err)
	}
	s := &socket{conn: conn, local: n.Local, remote: n.Remote}
	if err := s.neverFragment(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	d.sockets[n.ShortID] = s
	return s, nil
}

func (d *DataPath) dropSocket(id peer.ShortID, s *socket) {
	d.sendMu.Lock()
	if d.sockets[id] == s {
		delete(d.sockets, id)
	}
	d.sendMu.Unlock()
	_ = s.conn.Close() // a UDP socket has nothing to lose
}

func (s *socket) neverFragment() error {
	level, option, value := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if !s.remote.Unmap().Is4() {
		level, option, value = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO
	}
	var set error
	err := s.control(func(fd int) { set = unix.SetsockoptInt(fd, level, option, value) })
	if err := errors.Join(err, set); err != nil {
		return fmt.Errorf("socket for probes: forbid fragments: %w", err)
	}
	return nil
}

// pathMTU is what the kernel believes of the path, 0 when it says nothing.
func (s *socket) pathMTU() int {
	level, option := unix.IPPROTO_IP, unix.IP_MTU
	if !s.remote.Unmap().Is4() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	mtu := 0
	if err := s.control(func(fd int) { mtu, _ = unix.GetsockoptInt(fd, level, option) }); err != nil {
		return 0
	}
	return mtu
}

func (s *socket) control(f func(fd int)) error {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("socket for probes: %w", err)
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}
