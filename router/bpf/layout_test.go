package bpf

import (
	"net/netip"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf/btf"
	"pgregory.net/rapid"
)

func spec(t *testing.T) *btf.Spec {
	t.Helper()
	s, err := loadWeave()
	if err != nil {
		t.Fatal(err)
	}
	return s.Types
}

// The order of the counters is agreed between C and Go by hand.
func TestCounterNames(t *testing.T) {
	var e *btf.Enum
	if err := spec(t).TypeByName("counter", &e); err != nil {
		t.Fatal(err)
	}
	if len(e.Values) != len(counterNames)+1 {
		t.Fatalf("%d counters in C, %d in Go", len(e.Values)-1, len(counterNames))
	}
	for i, name := range counterNames {
		if want := strings.ToLower(strings.TrimPrefix(e.Values[i].Name, "COUNT_")); name != want || e.Values[i].Value != uint64(i) {
			t.Errorf("counter %d is %q in Go, %q in C", i, name, want)
		}
	}
}

// What Go writes to a map must be what C reads from it, byte for byte.
func TestLayouts(t *testing.T) {
	types := spec(t)
	check := func(name string, size uintptr, offsets map[string]uintptr) {
		t.Helper()
		var s *btf.Struct
		if err := types.TypeByName(name, &s); err != nil {
			t.Error(err)
			return
		}
		if uintptr(s.Size) != size {
			t.Errorf("struct %s: %d bytes in C, %d in Go", name, s.Size, size)
		}
		for _, m := range s.Members {
			if off, ok := offsets[m.Name]; ok && off != uintptr(m.Offset.Bytes()) {
				t.Errorf("struct %s: field %s is at %d in C, at %d in Go", name, m.Name, m.Offset.Bytes(), off)
			}
			delete(offsets, m.Name)
		}
		for f := range offsets {
			t.Errorf("struct %s has no field %s in C", name, f)
		}
	}
	check("cfg", unsafe.Sizeof(weaveCfg{}), map[string]uintptr{
		"self": unsafe.Offsetof(weaveCfg{}.Self), "vxlan_if": unsafe.Offsetof(weaveCfg{}.VxlanIf),
		"tap_if": unsafe.Offsetof(weaveCfg{}.TapIf), "flags": unsafe.Offsetof(weaveCfg{}.Flags)})
	check("addr", unsafe.Sizeof(weaveAddr{}), nil)
	check("mac", unsafe.Sizeof(weaveMac{}), nil)
	check("neighbour", unsafe.Sizeof(weaveNeighbour{}), map[string]uintptr{
		"n": unsafe.Offsetof(weaveNeighbour{}.N), "id": unsafe.Offsetof(weaveNeighbour{}.Id)})
	check("hop", unsafe.Sizeof(weaveHop{}), map[string]uintptr{
		"kind": unsafe.Offsetof(weaveHop{}.Kind), "via": unsafe.Offsetof(weaveHop{}.Via), "mtu": unsafe.Offsetof(weaveHop{}.Mtu),
		"remote": unsafe.Offsetof(weaveHop{}.Remote), "local": unsafe.Offsetof(weaveHop{}.Local)})
	check("tree", unsafe.Sizeof(weaveTree{}), map[string]uintptr{
		"parent": unsafe.Offsetof(weaveTree{}.Parent), "n": unsafe.Offsetof(weaveTree{}.N), "child": unsafe.Offsetof(weaveTree{}.Child)})
	check("endpoint", unsafe.Sizeof(weaveEndpoint{}), map[string]uintptr{
		"peer": unsafe.Offsetof(weaveEndpoint{}.Peer), "subnets": unsafe.Offsetof(weaveEndpoint{}.Subnets)})
	check("port", unsafe.Sizeof(weavePort{}), map[string]uintptr{
		"mac": unsafe.Offsetof(weavePort{}.Mac), "n_addrs": unsafe.Offsetof(weavePort{}.N_addrs),
		"subnets": unsafe.Offsetof(weavePort{}.Subnets), "addrs": unsafe.Offsetof(weavePort{}.Addrs)})
	check("traffic", unsafe.Sizeof(weaveTraffic{}), map[string]uintptr{
		"tx": unsafe.Offsetof(weaveTraffic{}.Tx), "rx": unsafe.Offsetof(weaveTraffic{}.Rx)})
	check("flow", unsafe.Sizeof(weaveTraffic{}.Tx), map[string]uintptr{
		"packets": unsafe.Offsetof(weaveTraffic{}.Tx.Packets), "bytes": unsafe.Offsetof(weaveTraffic{}.Tx.Bytes),
		"flooded": unsafe.Offsetof(weaveTraffic{}.Tx.Flooded), "relayed": unsafe.Offsetof(weaveTraffic{}.Tx.Relayed)})
	check("loss", unsafe.Sizeof(weaveLoss{}), map[string]uintptr{
		"peer": unsafe.Offsetof(weaveLoss{}.Peer), "why": unsafe.Offsetof(weaveLoss{}.Why)})
	check("learnt", unsafe.Sizeof(weaveLearnt{}), map[string]uintptr{
		"peer": unsafe.Offsetof(weaveLearnt{}.Peer), "ifindex": unsafe.Offsetof(weaveLearnt{}.Ifindex), "seen": unsafe.Offsetof(weaveLearnt{}.Seen)})
	check("subnets", unsafe.Sizeof(weaveSubnets{}), nil)
	check("event", eventSize, map[string]uintptr{"token": eventToken, "size": eventIPSize, "from": eventFrom})
}

func TestSubnetOf(t *testing.T) {
	p := netip.MustParsePrefix
	same := [][2]string{
		{"10.32.1.7/24", "10.32.1.0/24"}, {"::ffff:10.32.1.7/24", "10.32.1.9/24"}, {"fd00::1/64", "fd00::2/64"},
	}
	for _, s := range same {
		if SubnetOf(p(s[0])) != SubnetOf(p(s[1])) {
			t.Errorf("%s and %s differ", s[0], s[1])
		}
	}
	different := [][2]string{
		{"10.32.1.7/24", "10.32.2.7/24"}, {"10.32.1.0/24", "10.32.1.0/25"}, {"0.0.0.0/0", "0.0.0.0/1"},
		{"fd00::1/64", "fd00:0:0:1::1/64"}, {"fd00::/64", "fd00::/65"}, {"::/0", "0.0.0.0/0"},
	}
	for _, s := range different {
		if SubnetOf(p(s[0])) == SubnetOf(p(s[1])) {
			t.Errorf("%s and %s are the same", s[0], s[1])
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a := netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "a")))
		b := netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "b")))
		x, y := netip.PrefixFrom(a, rapid.IntRange(0, 32).Draw(t, "x")), netip.PrefixFrom(b, rapid.IntRange(0, 32).Draw(t, "y"))
		if SubnetOf(x) == 0 {
			t.Fatalf("%s is 0, the end of a list", x)
		}
		if got, want := SubnetOf(x) == SubnetOf(y), x.Masked() == y.Masked(); got != want {
			t.Fatalf("%s and %s: same is %v", x, y, got)
		}
	})
}

func TestPortOfLimits(t *testing.T) {
	var addrs []netip.Prefix
	for i := range MaxAddrs + 1 {
		addrs = append(addrs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 32, byte(i), 1}), 24))
	}
	if _, err := PortOf(MAC{}, addrs[:MaxAddrs]); err != nil {
		t.Error(err)
	}
	if _, err := PortOf(MAC{}, addrs); err == nil {
		t.Error("one address too many was taken")
	}
	if s, ok := SubnetsOf(addrs); ok || s[MaxSubnets-1] != SubnetOf(addrs[MaxSubnets-1]) {
		t.Errorf("subnets %v, %v", s, ok)
	}
	if s, ok := SubnetsOf(append(addrs[:MaxSubnets:MaxSubnets], addrs[0])); !ok || s[MaxSubnets-1] == 0 {
		t.Errorf("a subnet twice counts twice: %v", s)
	}
}
