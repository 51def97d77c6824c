package sleeve

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"

	"weave.local/router/frame"
)

// Builders and checks of whole frames, written the plain way.

func testBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)}).Read(b)
	return b
}

// testPlain is a frame of n bytes of a type nobody knows.
func testPlain(n int) *packet {
	b := testBytes(n)
	b[0], b[6] = 2, 2
	binary.BigEndian.PutUint16(b[12:], 0x1234)
	return &packet{data: b}
}

// testIP is an Ethernet and IP header for payload bytes of proto.
func testIP(v6 bool, proto byte, payload int) []byte {
	b := []byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1}
	if v6 {
		b = binary.BigEndian.AppendUint16(b, frame.TypeIPv6)
		b = binary.BigEndian.AppendUint32(b, 6<<28)
		b = binary.BigEndian.AppendUint16(b, uint16(payload))
		b = append(b, proto, 64)
		b = append(b, netip.MustParseAddr("fd09::1").AsSlice()...)
		return append(b, netip.MustParseAddr("fd09::2").AsSlice()...)
	}
	b = binary.BigEndian.AppendUint16(b, frame.TypeIPv4)
	b = append(b, 0x45, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(20+payload))
	b = append(b, 0xff, 0xf0, 0x40, 0, 64, proto, 0, 0) // identification near its wrap
	b = append(b, 10, 9, 0, 1, 10, 9, 0, 2)
	binary.BigEndian.PutUint16(b[24:], ^slowSum(b[14:34]))
	return b
}

// slowSum is the checksum of RFC 1071 by the book.
func slowSum(parts ...[]byte) uint16 {
	var s uint32
	for _, b := range parts {
		for i := range b {
			if i%2 == 0 {
				s += uint32(b[i]) << 8
			} else {
				s += uint32(b[i])
			}
			s = s&0xffff + s>>16
		}
	}
	return uint16(s)
}

// pseudo is the pseudo header of the frame's transport.
func pseudo(b []byte, proto byte, length int) []byte {
	at, n := 14+12, 8
	if binary.BigEndian.Uint16(b[12:]) == frame.TypeIPv6 {
		at, n = 14+8, 32
	}
	p := append([]byte(nil), b[at:at+n]...)
	p = binary.BigEndian.AppendUint32(p, uint32(length))
	return append(p, 0, 0, 0, proto)
}

// testTCP is a TCP frame with payload bytes, a checksum to be completed and,
// unless it is 0, the given size of segments.
func testTCP(v6 bool, payload, size int) *packet {
	b := testIP(v6, frame.ProtoTCP, 32+payload)
	l4 := len(b)
	b = append(b, 0x30, 0x39, 0, 80, 0xff, 0xff, 0xf0, 0, 1, 2, 3, 4, 0x80, 0x99, 1, 0, 0, 0, 0, 0) // CWR ACK PSH FIN
	b = append(b, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8)
	p := testOffload(b, l4, frame.ProtoTCP, 32+payload, frame.TCPChecksum)
	p.data = append(b, testBytes(payload)...)
	if size > 0 {
		p.gsoType, p.gsoSize = gsoTCP4, uint16(size)
		if v6 {
			p.gsoType = gsoTCP6
		}
	}
	return p
}

// testUDP is the same for UDP.
func testUDP(v6 bool, payload, size int) *packet {
	b := testIP(v6, frame.ProtoUDP, 8+payload)
	l4 := len(b)
	b = append(b, 0x30, 0x39, 0, 53)
	b = binary.BigEndian.AppendUint16(b, uint16(8+payload))
	b = append(b, 0, 0)
	p := testOffload(b, l4, frame.ProtoUDP, 8+payload, frame.UDPChecksum)
	p.data = append(b, testBytes(payload)...)
	if size > 0 {
		p.gsoType, p.gsoSize = gsoUDP, uint16(size)
	}
	return p
}

func testOffload(b []byte, l4 int, proto byte, length int, at uint8) *packet {
	binary.BigEndian.PutUint16(b[l4+int(at):], slowSum(pseudo(b, proto, length)))
	return &packet{offload: offload{partial: true, csumStart: uint16(l4), csumAt: at}}
}

// checkSums says what is wrong with lengths and checksums of a frame: that of
// the transport must be the pseudo header's sum if it is still to be completed.
func checkSums(p *packet) error {
	b := p.data
	l, ok := frame.Parse(b)
	if !ok {
		return errors.New("headers do not fit the frame")
	}
	if l.L4 == 0 {
		return nil
	}
	length := len(b) - l.L4
	if l.Type == frame.TypeIPv4 {
		if slowSum(b[l.L3:l.L4]) != 0xffff {
			return errors.New("checksum of the IPv4 header")
		}
		if n := int(binary.BigEndian.Uint16(b[l.L3+2:])); n != len(b)-l.L3 {
			return fmt.Errorf("IPv4 length %d of %d", n, len(b)-l.L3)
		}
	} else if n := int(binary.BigEndian.Uint16(b[l.L3+4:])); n != length {
		return fmt.Errorf("IPv6 length %d of %d", n, length)
	}
	at := l.L4 + frame.TCPChecksum
	if l.Proto == frame.ProtoUDP {
		at = l.L4 + frame.UDPChecksum
		if n := int(binary.BigEndian.Uint16(b[l.L4+4:])); n != length {
			return fmt.Errorf("UDP length %d of %d", n, length)
		}
	}
	sum := slowSum(pseudo(b, l.Proto, length))
	if p.partial {
		if got := binary.BigEndian.Uint16(b[at:]); got%0xffff != sum%0xffff {
			return fmt.Errorf("pseudo header's sum %#x, not %#x", got, sum)
		}
		return nil
	}
	if slowSum(pseudo(b, l.Proto, length), b[l.L4:]) != 0xffff {
		return errors.New("checksum of the transport")
	}
	return nil
}
