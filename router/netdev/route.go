package netdev

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ethernetMTU is taken when there is no device to go by.
const ethernetMTU = 1500

// Route is a route of the main table.
type Route struct {
	Dst netip.Prefix
	Dev string
}

// String writes the route as 10.0.0.0/8 dev eth0.
func (r Route) String() string { return fmt.Sprintf("%s dev %s", r.Dst, r.Dev) }

// OverlappingRoute returns a route of the host that has addresses in common
// with a range, leaving out default routes and those through the named
// devices.
func OverlappingRoute(r netip.Prefix, ignore ...string) (Route, bool, error) {
	list, err := routes(family(r))
	if err != nil {
		return Route{}, false, err
	}
	for _, route := range list {
		if route.Dst.Overlaps(r) && !slices.Contains(ignore, route.Dev) {
			return route, true, nil
		}
	}
	return Route{}, false, nil
}

// FreeRange returns a private IPv4 range that overlaps no route of the host: as
// large as r if there is one, else the largest. It is the zero Prefix when all
// private addresses are taken.
func FreeRange(r netip.Prefix, ignore ...string) netip.Prefix {
	const smallest = 24
	list, err := routes(netlink.FAMILY_V4)
	if err != nil {
		return netip.Prefix{}
	}
	list = slices.DeleteFunc(list, func(x Route) bool { return slices.Contains(ignore, x.Dev) })
	for bits := r.Bits(); bits <= smallest; bits++ {
		for _, private := range []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10}), 8),
			netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16}), 12),
			netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168}), 16),
		} {
			if p, ok := freeWithin(private, bits, list); ok {
				return p
			}
		}
	}
	return netip.Prefix{}
}

func freeWithin(private netip.Prefix, bits int, taken []Route) (netip.Prefix, bool) {
	step := uint32(1) << (32 - bits)
	first := private.Addr().As4()
	at := binary.BigEndian.Uint32(first[:])
	for {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], at)
		p := netip.PrefixFrom(netip.AddrFrom4(b), bits)
		if p.Bits() < private.Bits() || !private.Contains(p.Addr()) {
			return netip.Prefix{}, false
		}
		if !slices.ContainsFunc(taken, func(r Route) bool { return r.Dst.Overlaps(p) }) {
			return p, true
		}
		at += step
	}
}

// routes lists the main table without default routes.
func routes(family int) ([]Route, error) {
	list, err := mainRoutes(family)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	names, err := deviceNames()
	if err != nil {
		return nil, err
	}
	var out []Route
	for _, route := range list {
		if dst := prefix(route.Dst); usable(dst) && dst.Bits() != 0 {
			out = append(out, Route{Dst: dst, Dev: names[route.LinkIndex]})
		}
	}
	return out, nil
}

func family(p netip.Prefix) int {
	if p.Addr().Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func deviceNames() (map[int]string, error) {
	all, err := Devices()
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(all))
	for _, d := range all {
		names[d.Index] = d.Name
	}
	return names, nil
}

// DefaultUnderlayMTU is the smallest MTU of the devices that traffic to other
// hosts may leave through: those of the default routes or, when there are
// none, those with global addresses other than bridges and their ports. It is
// 1500 when there is no such device. Devices named in ignore are left out.
func DefaultUnderlayMTU(ignore ...string) (int, error) {
	routes, err := mainRoutes(netlink.FAMILY_ALL)
	if err != nil {
		return 0, fmt.Errorf("list routes: %w", err)
	}
	links, err := whole(netlink.LinkList)
	if err != nil {
		return 0, fmt.Errorf("list devices: %w", err)
	}
	leads := make(map[int]bool)
	for _, r := range routes {
		if r.Dst != nil && prefix(r.Dst).Bits() != 0 {
			continue
		}
		leads[r.LinkIndex] = true
		for _, hop := range r.MultiPath {
			leads[hop.LinkIndex] = true
		}
	}
	usable := func(l netlink.Link) bool {
		a := l.Attrs()
		return a.Flags&net.FlagUp != 0 && a.Flags&net.FlagLoopback == 0 && !slices.Contains(ignore, a.Name)
	}
	if mtu := smallestMTU(links, func(l netlink.Link) bool { return usable(l) && leads[l.Attrs().Index] }); mtu != 0 {
		return mtu, nil
	}
	mtu := smallestMTU(links, func(l netlink.Link) bool {
		local := l.Type() == "bridge" || l.Attrs().MasterIndex != 0 || strings.HasPrefix(l.Attrs().Name, "docker")
		return usable(l) && !local && hasGlobalAddr(l)
	})
	if mtu == 0 {
		mtu = ethernetMTU
	}
	return mtu, nil
}

func smallestMTU(links []netlink.Link, want func(netlink.Link) bool) int {
	smallest := 0
	for _, l := range links {
		if mtu := l.Attrs().MTU; want(l) && (smallest == 0 || mtu < smallest) {
			smallest = mtu
		}
	}
	return smallest
}

func hasGlobalAddr(l netlink.Link) bool {
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	return err == nil && slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		return prefix(a.IPNet).Addr().IsGlobalUnicast()
	})
}

// NextHop is the way out of this host to an address of the underlay.
type NextHop struct {
	Dev     int        // index of the device
	Name    string     // of the device
	Gateway netip.Addr // on the device's link; the address itself when that is on it
	Source  netip.Addr // that packets are sent from
	MTU     int        // bytes: of the route where it has one of its own, else of the device
	Ether   bool       // the device is an Ethernet one, and none that leads back into this host
}

// NextHopTo finds the way that packets from local, which may be the zero Addr,
// take to remote.
func NextHopTo(remote, local netip.Addr) (NextHop, error) {
	opts := &netlink.RouteGetOptions{}
	if local.IsValid() {
		opts.SrcAddr = local.Unmap().AsSlice()
	}
	found, err := netlink.RouteGetWithOptions(remote.Unmap().AsSlice(), opts)
	if err != nil {
		return NextHop{}, fmt.Errorf("route to %s: %w", remote, err)
	}
	if len(found) == 0 {
		return NextHop{}, fmt.Errorf("route to %s: none", remote)
	}
	l, err := netlink.LinkByIndex(found[0].LinkIndex)
	if err != nil {
		return NextHop{}, fmt.Errorf("device of the route to %s: %w", remote, err)
	}
	a := l.Attrs()
	hop := NextHop{Dev: a.Index, Name: a.Name, Gateway: remote.Unmap(), MTU: found[0].MTU}
	if hop.MTU == 0 {
		hop.MTU = a.MTU
	}
	if gateway, ok := netip.AddrFromSlice(found[0].Gw); ok {
		hop.Gateway = gateway.Unmap()
	}
	if source, ok := netip.AddrFromSlice(found[0].Src); ok {
		hop.Source = source.Unmap()
	}
	hop.Ether = a.EncapType == "ether" && a.Flags&net.FlagLoopback == 0
	return hop, nil
}

// mainRoutes lists the main routing table of a family.
func mainRoutes(family int) ([]netlink.Route, error) {
	return whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
}
