package bpf

// Probes that are TCP segments, which show whether the devices on the way to a
// neighbour do what is left to them. The daemon sends them through the VXLAN
// device with the mark MarkProbe; what arrives right is reported as a Probe of
// size 0.
const (
	MarkProbe = 0x57560003
	Segment   = 256 // bytes of data in each segment
)

// SegmentToken is the token with which a frame arrives that holds the segments
// first to end-1 of a probe. The addresses in the segments are the upper 48 bits
// of its own token, and two bytes that do not matter.
func SegmentToken(token uint64, first, end int) uint64 {
	return token&^0xffff | uint64(first)<<8 | uint64(end)
}
