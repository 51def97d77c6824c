package fastdp

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/bpf"
	"weave.local/router/frame"
)

// segments are a probe in the manner of what containers send: TCP over IPv4
// between zero Ethernet addresses.
type segments struct {
	token uint64 // of which the last two bytes do not matter
	n     int    // how many; more than one are a super-frame
	left  bool   // the checksum is left to devices, as it is for a super-frame
}

// Places in such a frame, from its start.
const (
	segmentIP   = 14
	segmentTCP  = segmentIP + 20
	segmentSum  = segmentTCP + 16
	segmentData = segmentTCP + 20
)

// frame is what is sent to a neighbour.
func (s segments) frame(to peer.ShortID) []byte {
	const (
		versionIHL = 4<<4 | 5
		dataOffset = 5 << 4
		flagACK    = 0x10
		window     = 0xffff
		ttl        = 64
		flagDF     = 0x4000
	)
	f := make([]byte, segmentData+s.n*bpf.Segment)
	be := binary.BigEndian
	be.PutUint16(f[12:], frame.TypeIPv4)
	ip, tcp := f[segmentIP:], f[segmentTCP:]
	ip[0], ip[8], ip[9] = versionIHL, ttl, frame.ProtoTCP
	be.PutUint16(ip[2:], uint16(len(ip)))
	be.PutUint16(ip[6:], flagDF)
	be.PutUint64(ip[12:], s.token) // as both addresses
	frame.IPv4(ip).SetChecksum()
	be.PutUint16(tcp[2:], uint16(to))
	tcp[12], tcp[13] = dataOffset, flagACK
	be.PutUint16(tcp[14:], window)
	for i := range f[segmentData:] {
		f[segmentData+i] = byte(i) // so that no mistake cancels out
	}
	// What is left to a device begins with the sum of the pseudo header.
	sum := frame.Fold(frame.IPv4(ip).PseudoSum(frame.ProtoTCP, len(tcp)))
	if !s.left {
		sum = ^frame.Fold(frame.Sum(tcp, uint64(sum)))
	}
	be.PutUint16(f[segmentSum:], sum)
	return f
}

// vnetHeader tells the kernel what it is to leave to devices.
func (s segments) vnetHeader() []byte {
	h := make(frame.VirtioNet, frame.VirtioNetLen)
	if s.left {
		h.LeaveChecksum(segmentTCP, segmentSum-segmentTCP)
	}
	if s.n > 1 {
		h.SetHeaderLen(segmentData)
		h.SetGSO(frame.GSOTCP4, bpf.Segment)
	}
	return h
}

// sendSegments hands probes to a device as a container does its frames.
func sendSegments(device int, to peer.ShortID, probes ...segments) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // which receives nothing
	if err != nil {
		return fmt.Errorf("socket for segments: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, bpf.MarkProbe))
	if err != nil {
		return fmt.Errorf("socket for segments: %w", err)
	}
	at := &unix.SockaddrLinklayer{Ifindex: device}
	for _, s := range probes {
		if err := unix.Sendto(fd, append(s.vnetHeader(), s.frame(to)...), 0, at); err != nil {
			return fmt.Errorf("send segments: %w", err)
		}
	}
	return nil
}
