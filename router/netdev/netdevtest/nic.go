package netdevtest

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"weave.local/router/frame"
)

// NIC is a pair of network devices that ought to do what the kernel leaves to
// them with frames in VXLAN over IPv4: what comes by one, with what is left to do,
// goes out by the other through this code. It does both until told otherwise, but of
// super-frames it knows only TCP over IPv4.
type NIC struct {
	Port    uint16      // UDP port of VXLAN
	NoSums  atomic.Bool // leaves checksums inside tunnels as they are
	NoSuper atomic.Bool // loses super-frames in tunnels
}

// Carry begins to carry between two devices of the calling thread's network
// namespace. stop ends that.
func (n *NIC) Carry(a, b string) (stop func(), err error) {
	var fds [2]int
	for i, dev := range []string{a, b} {
		if fds[i], err = socketOn(dev); err != nil {
			if i > 0 {
				_ = unix.Close(fds[0])
			}
			return nil, err
		}
	}
	end := make(chan struct{})
	var wait sync.WaitGroup
	for i := range fds {
		wait.Go(func() { n.carry(fds[i], fds[1-i], end) })
	}
	return func() {
		close(end)
		wait.Wait()
		_, _ = unix.Close(fds[0]), unix.Close(fds[1])
	}, nil
}

// socketOn is one that sees frames as a device gets them, with what is left to
// it.
func socketOn(dev string) (int, error) {
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8 // in network order
	i, err := net.InterfaceByName(dev)
	if err != nil {
		return 0, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: i.Index}))
	if err != nil {
		_ = unix.Close(fd)
	}
	return fd, err
}

// Places in a frame in a tunnel.
const (
	vxlanLen = 8
	outerIP  = frame.EthernetLen
	outerUDP = outerIP + frame.IPv4Len
	innerIP  = outerUDP + frame.UDPLen + vxlanLen + frame.EthernetLen
)

func (n *NIC) isTunnel(f []byte) bool {
	return len(f) > innerIP+frame.IPv4Len && frame.Ethernet(f).Type() == frame.TypeIPv4 && frame.IPv4(f[outerIP:]).Proto() == frame.ProtoUDP &&
		binary.BigEndian.Uint16(f[outerUDP+2:]) == n.Port
}

// carry does what a device ought to do, or not, with what it reads, and sends it.
// What is in no tunnel goes on as it is.
func (n *NIC) carry(from, to int, end chan struct{}) {
	b := make([]byte, 1<<17)
	for {
		select {
		case <-end:
			return
		default:
		}
		size, at, err := unix.Recvfrom(from, b, 0)
		if l, ok := at.(*unix.SockaddrLinklayer); err != nil || !ok || l.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		v, f := frame.VirtioNet(b), b[frame.VirtioNetLen:size]
		if !n.isTunnel(f) {
			_, _ = unix.Write(to, b[:size])
			continue
		}
		start, field, left := v.ChecksumLeft()
		packets := [][]byte{f}
		if kind, size := v.GSO(); kind != frame.GSONone {
			packets = nil
			if kind&^frame.GSOECN == frame.GSOTCP4 && !n.NoSuper.Load() {
				packets = cut(f, int(start), int(size))
			}
		}
		for _, p := range packets {
			if left && (start == outerUDP || !n.NoSums.Load()) {
				binary.BigEndian.PutUint16(p[start+field:], ^frame.Fold(frame.Sum(p[start:], 0)))
			}
			_, _ = unix.Write(to, append(make([]byte, frame.VirtioNetLen), p...))
		}
	}
}

// cut makes packets of a super-frame of TCP over IPv4 in a tunnel. Their checksum
// is that of the pseudo header.
func cut(f []byte, tcp, size int) (packets [][]byte) {
	data := tcp + frame.TCP(f[tcp:]).HeaderLen()
	for at := data; at < len(f); at += size {
		p := append(append([]byte{}, f[:data]...), f[at:min(at+size, len(f))]...)
		for _, ip := range []int{outerIP, innerIP} {
			frame.IPv4(p[ip:]).SetTotalLen(len(p) - ip)
			frame.IPv4(p[ip:]).SetChecksum()
		}
		frame.UDP(p[outerUDP:]).SetLen(len(p) - outerUDP)
		t := frame.TCP(p[tcp:])
		t.SetSeq(t.Seq() + uint32(at-data))
		if at+size < len(f) {
			t.ClearFlags(frame.FlagFIN | frame.FlagPSH) // they are the last one's
		}
		sum := frame.Fold(frame.IPv4(p[innerIP:]).PseudoSum(frame.ProtoTCP, len(p)-tcp))
		binary.BigEndian.PutUint16(t[frame.TCPChecksum:], sum)
		packets = append(packets, p)
	}
	return packets
}
