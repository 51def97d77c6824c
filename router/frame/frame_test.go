package frame

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// slowSum is the sum of RFC 1071 by the book.
func slowSum(b []byte, s uint16) uint16 {
	n := uint32(s)
	for i := range b {
		if i%2 == 0 {
			n += uint32(b[i]) << 8
		} else {
			n += uint32(b[i])
		}
		n = n&0xffff + n>>16
	}
	return uint16(n)
}

func TestSum(t *testing.T) {
	rnd := rand.NewChaCha8([32]byte{1})
	b := make([]byte, 300)
	for n := range len(b) {
		_, _ = rnd.Read(b)
		start := uint16(rnd.Uint64())
		if got, want := Fold(Sum(b[:n], uint64(start))), slowSum(b[:n], start); got != want {
			t.Fatalf("%d bytes: %#x, want %#x", n, got, want)
		}
	}
	ones := make([]byte, 1<<16)
	for i := range ones {
		ones[i] = 0xff
	}
	if got := Fold(Sum(ones, ^uint64(0))); got != 0xffff {
		t.Errorf("all ones: %#x", got)
	}
}

func TestReplace(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 1000 {
		b := binary.BigEndian.AppendUint64(nil, rnd.Uint64())
		sum := slowSum(b, 0)
		before, after := binary.BigEndian.Uint16(b[2:]), uint16(rnd.Uint32())
		binary.BigEndian.PutUint16(b[2:], after)
		if got, want := Replace(sum, before, after), slowSum(b, 0); got%0xffff != want%0xffff {
			t.Fatalf("%#x, want %#x", got, want)
		}
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff"), uint16(0xffff))
	f.Fuzz(func(t *testing.T, b []byte, s uint16) {
		if got, want := Fold(Sum(b, uint64(s))), slowSum(b, s); got != want {
			t.Errorf("%#x, want %#x", got, want)
		}
	})
}

func ethernet(types ...uint16) []byte {
	b := make([]byte, AddrsLen)
	for i, typ := range types {
		b = binary.BigEndian.AppendUint16(b, typ)
		if i < len(types)-1 {
			b = append(b, 0, 1)
		}
	}
	return b
}

func ipv4(options int, proto byte, offset uint16, payload ...byte) []byte {
	b := make([]byte, IPv4Len+options)
	b[0] = 0x40 | byte(len(b)/4)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)+len(payload)))
	binary.BigEndian.PutUint16(b[6:], offset)
	b[9] = proto
	return append(b, payload...)
}

func ipv6(proto byte, payload ...byte) []byte {
	b := make([]byte, IPv6Len)
	b[0], b[6] = 0x60, proto
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	return append(b, payload...)
}

func tcp(words byte, n int) []byte {
	b := make([]byte, n)
	b[12] = words << 4
	return b
}

func TestParse(t *testing.T) {
	join := func(parts ...[]byte) (b []byte) {
		for _, p := range parts {
			b = append(b, p...)
		}
		return b
	}
	for _, c := range []struct {
		name string
		b    []byte
		want Layers
		ok   bool
	}{
		{"empty", nil, Layers{}, false},
		{"short", make([]byte, 13), Layers{}, false},
		{"unknown type", ethernet(0x1234), Layers{Type: 0x1234, L3: 14}, true},
		{"TCP", join(ethernet(TypeIPv4), ipv4(0, ProtoTCP, 0x4000, tcp(5, 20)...)), Layers{TypeIPv4, 14, 34, ProtoTCP}, true},
		{"options", join(ethernet(TypeIPv4), ipv4(8, ProtoTCP, 0, tcp(8, 32)...)), Layers{TypeIPv4, 14, 42, ProtoTCP}, true},
		{"TCP cut", join(ethernet(TypeIPv4), ipv4(0, ProtoTCP, 0, tcp(8, 31)...)), Layers{TypeIPv4, 14, 0, 0}, false},
		{"fragment", join(ethernet(TypeIPv4), ipv4(0, ProtoTCP, 0x2000)), Layers{TypeIPv4, 14, 0, 0}, true},
		{"later fragment", join(ethernet(TypeIPv4), ipv4(0, ProtoUDP, 3)), Layers{TypeIPv4, 14, 0, 0}, true},
		{"ICMP", join(ethernet(TypeIPv4), ipv4(0, 1, 0)), Layers{TypeIPv4, 14, 0, 0}, true},
		{"one tag", join(ethernet(TypeVLAN, TypeIPv6), ipv6(ProtoUDP, make([]byte, 8)...)), Layers{TypeIPv6, 18, 58, ProtoUDP}, true},
		{"two tags", join(ethernet(TypeSVLAN, TypeVLAN, TypeIPv6), ipv6(ProtoUDP, make([]byte, 8)...)), Layers{TypeIPv6, 22, 62, ProtoUDP}, true},
		{"tag cut", ethernet(TypeVLAN), Layers{}, false},
		{"five tags", ethernet(TypeVLAN, TypeVLAN, TypeVLAN, TypeVLAN, TypeVLAN, TypeIPv4), Layers{}, false},
		{"extension header", join(ethernet(TypeIPv6), ipv6(0, make([]byte, 8)...)), Layers{TypeIPv6, 14, 0, 0}, true},
		{"version", join(ethernet(TypeIPv6), ipv4(20, ProtoTCP, 0)), Layers{TypeIPv6, 14, 0, 0}, false},
	} {
		got, ok := Parse(c.b)
		if ok != c.ok || ok && got != c.want {
			t.Errorf("%s: %+v %v, want %+v %v", c.name, got, ok, c.want, c.ok)
		}
	}
}

func TestIPv4Checksum(t *testing.T) {
	p := IPv4(ipv4(4, ProtoUDP, 0, 1, 2, 3))
	p.SetID(0x1234)
	p.SetTotalLen(27)
	p.SetChecksum()
	if slowSum(p[:p.HeaderLen()], 0) != 0xffff {
		t.Errorf("header % x", p[:p.HeaderLen()])
	}
	if p.ID() != 0x1234 || p.TotalLen() != 27 {
		t.Errorf("read back id %#x, length %d", p.ID(), p.TotalLen())
	}
}

func FuzzParse(f *testing.F) {
	f.Add(append(ethernet(TypeVLAN, TypeIPv4), ipv4(0, ProtoTCP, 0, tcp(5, 20)...)...))
	f.Add(append(ethernet(TypeIPv6), ipv6(ProtoUDP, make([]byte, 8)...)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, ok := Parse(b)
		if !ok {
			return
		}
		if l.L3 > len(b) {
			t.Fatalf("%+v in %d bytes", l, len(b))
		}
		if l.L4 == 0 {
			return
		}
		switch l.Proto {
		case ProtoTCP:
			_ = b[l.L4+TCP(b[l.L4:]).HeaderLen()-1]
		case ProtoUDP:
			_ = b[l.L4+UDPLen-1]
		default:
			t.Errorf("%+v", l)
		}
	})
}
