package frame

import "encoding/binary"

// VirtioNetLen is the length of a VirtioNet header, in bytes.
const VirtioNetLen = 10

// Kinds of super-frames in a VirtioNet header; GSOECN may be added to TCP's.
const (
	GSONone = 0
	GSOTCP4 = 1
	GSOTCP6 = 4
	GSOUDP  = 5 // VIRTIO_NET_HDR_GSO_UDP_L4
	GSOECN  = 0x80
)

const needsCsum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM

// VirtioNet is a view of the legacy virtio-net header (struct virtio_net_hdr of
// linux/virtio_net.h), in host byte order: flags u8, GSO type u8, header length
// u16, GSO size u16, checksum start u16, checksum offset u16. It stands before a
// frame and says what is left to whoever takes that; places count from the start
// of the frame. A header of zeros says that nothing is.
type VirtioNet []byte

// HeaderLen is how many bytes of the frame are headers; 0: not known.
func (v VirtioNet) HeaderLen() uint16 { return binary.NativeEndian.Uint16(v[2:]) }

// SetHeaderLen says how many bytes of the frame are headers.
func (v VirtioNet) SetHeaderLen(n uint16) { binary.NativeEndian.PutUint16(v[2:], n) }

// GSO is the kind of super-frame, GSONone if it is none, and how many bytes of
// payload each of its segments has.
func (v VirtioNet) GSO() (kind uint8, size uint16) { return v[1], binary.NativeEndian.Uint16(v[4:]) }

// SetGSO makes the frame a super-frame.
func (v VirtioNet) SetGSO(kind uint8, size uint16) {
	v[1] = kind
	binary.NativeEndian.PutUint16(v[4:], size)
}

// ChecksumLeft says whether the checksum is to be completed: from start on, and
// put at that many bytes after start.
func (v VirtioNet) ChecksumLeft() (start, at uint16, left bool) {
	return binary.NativeEndian.Uint16(v[6:]), binary.NativeEndian.Uint16(v[8:]), v[0]&needsCsum != 0
}

// LeaveChecksum says that it is.
func (v VirtioNet) LeaveChecksum(start, at uint16) {
	v[0] |= needsCsum
	binary.NativeEndian.PutUint16(v[6:], start)
	binary.NativeEndian.PutUint16(v[8:], at)
}
