package netdev_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/router/netdev"
	"weave.local/router/netdev/netdevtest"
)

func TestMain(m *testing.M) { netdevtest.Main(m) }

const bridge = "weave"

func withBridge(t *testing.T, mtu int) {
	t.Helper()
	netdevtest.Need(t)
	t.Cleanup(func() {
		if err := netdev.DeleteLink(bridge); err != nil {
			t.Error(err)
		}
	})
	if err := netdev.EnsureBridge(bridge, [6]byte{2, 0, 0, 0, 0, 1}, mtu); err != nil {
		t.Fatal(err)
	}
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func device(t *testing.T, name string) netdev.Device {
	t.Helper()
	d, err := netdev.DeviceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestBridgeKeepsItsMTUAndAddress(t *testing.T) {
	// 1500 is what a bridge has without being told, so it is the hard case.
	for _, mtu := range []int{1500, 1450, 9000} {
		withBridge(t, mtu)
		if _, err := netdev.CreateVeth(netdev.VethSpec{Host: "vethwltest", Peer: "vethwgtest", PeerMAC: [6]byte{2, 9, 9, 9, 9, 9}, MTU: 1300, Bridge: bridge, Alias: "weave x"}); err != nil {
			t.Fatal(err)
		}
		d := device(t, bridge)
		if d.MTU != mtu || d.MAC != [6]byte{2, 0, 0, 0, 0, 1} || !d.Up {
			t.Errorf("bridge with a port of MTU 1300: %+v, want MTU %d and its own address", d, mtu)
		}
		if p := device(t, "vethwgtest"); p.MTU != 1300 || p.MAC != [6]byte{2, 9, 9, 9, 9, 9} {
			t.Errorf("peer end %+v", p)
		}
		if p := device(t, "vethwltest"); p.Alias != "weave x" || p.Master != d.Index || p.PeerNSID != -1 {
			t.Errorf("host end %+v", p)
		}
		for _, name := range []string{"vethwltest", "vethwltest", bridge} { // a second time is no error
			if err := netdev.DeleteLink(name); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestBridgeIsAdopted(t *testing.T) {
	withBridge(t, 1400)
	index := device(t, bridge).Index
	if err := netdev.EnsureBridge(bridge, [6]byte{2, 0, 0, 0, 0, 2}, 1500); err != nil {
		t.Fatal(err)
	}
	d := device(t, bridge)
	if d.Index != index || d.MTU != 1500 || d.MAC != [6]byte{2, 0, 0, 0, 0, 2} {
		t.Errorf("adopted bridge %+v", d)
	}
	out := netdevtest.In(t, "", "ip", "-d", "link", "show", bridge)
	for _, want := range []string{"stp_state 0", "mcast_snooping 0"} {
		if !strings.Contains(out, want) {
			t.Errorf("bridge lacks %s: %s", want, out)
		}
	}
	if out := netdevtest.In(t, "", "ip", "-6", "addr", "show", bridge); out != "" {
		t.Errorf("bridge gave itself an address: %s", out)
	}
	if v, err := netdev.Sysctl("ipv4/neigh/weave/base_reachable_time"); err != nil || v != "5" {
		t.Errorf("base_reachable_time = %q, %v", v, err)
	}
}

func TestBridgeOfAnotherKind(t *testing.T) {
	netdevtest.Need(t)
	netdevtest.In(t, "", "ip", "link", "add", "other", "type", "veth", "peer", "name", "other2")
	defer netdevtest.In(t, "", "ip", "link", "del", "other")
	err := netdev.EnsureBridge("other", [6]byte{2}, 1500)
	if err == nil || !strings.Contains(err.Error(), "is a veth, not a bridge") {
		t.Errorf("error = %v", err)
	}
	if !netdev.Exists("other") {
		t.Error("the device of somebody else was removed")
	}
}

func TestVethIntoNamespace(t *testing.T) {
	withBridge(t, 1400)
	path := netdevtest.Namespace(t)
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	index, err := netdev.CreateVeth(netdev.VethSpec{Host: "vethwepltest", Peer: "ethwe", PeerNS: path, PeerMAC: [6]byte{2, 1, 2, 3, 4, 5}, MTU: 1400, Bridge: bridge})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = netdev.DeleteLink("vethwepltest") }()
	host := device(t, "vethwepltest")
	if host.Index != index || host.PeerNSID < 0 {
		t.Fatalf("host end %+v, want index %d and a peer elsewhere", host, index)
	}
	found, err := netdev.FindNamespace(host.PeerNSID)
	if err == nil {
		t.Errorf("namespace found at %s, but no process or name shows it", found)
	}
	if _, err := netdev.CreateVeth(netdev.VethSpec{Host: "vethwepltes2", Peer: "ethwe", PeerNS: path, MTU: 1400, Bridge: bridge}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("second ethwe: %v", err)
	}
	if netdev.Exists("vethwepltes2") {
		t.Error("the failed pair left its host end")
	}
	addrs := []netip.Prefix{prefix("10.2.1.5/24"), prefix("10.2.1.6/24"), prefix("10.3.0.1/16")}
	err = netdev.Do(path, func() error {
		for _, a := range append(addrs, addrs...) {
			if err := netdev.AddAddr("ethwe", a); err != nil {
				return err
			}
		}
		if err := errors.Join(netdev.QuickNeighbours("ethwe"), netdev.SetUp("ethwe"),
			netdev.AddMulticastRoute("ethwe"), netdev.AddMulticastRoute("ethwe"),
			netdev.SetSysctl("ipv4/conf/ethwe/promote_secondaries", "1"),
			netdev.DelAddr("ethwe", addrs[0]), netdev.DelAddr("ethwe", addrs[0])); err != nil {
			return err
		}
		got, err := netdev.Addrs("ethwe")
		if err == nil && (len(got) != 2 || got[0] == addrs[0] || got[1] == addrs[0]) {
			t.Errorf("addresses %v after removing %v", got, addrs[0])
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if out := netdevtest.In(t, path, "ip", "route"); !strings.Contains(out, "224.0.0.0/4 dev ethwe scope link") {
		t.Errorf("no multicast route: %s", out)
	}
	if after, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || after != before {
		t.Errorf("Do left this thread in %s, was in %s (%v)", after, before, err)
	}
}

func TestNamespaceErrors(t *testing.T) {
	netdevtest.Need(t)
	if _, err := netdev.NamespaceAt("/proc/self/ns/net"); !errors.Is(err, netdev.ErrOwnNamespace) {
		t.Errorf("own: %v", err)
	}
	for _, path := range []string{"/proc/4194305/ns/net", "/run/netns/none"} {
		if _, err := netdev.NamespaceAt(path); !errors.Is(err, netdev.ErrNoNamespace) {
			t.Errorf("%s: %v", path, err)
		}
		if err := netdev.Do(path, func() error { return nil }); !errors.Is(err, netdev.ErrNoNamespace) {
			t.Errorf("Do %s: %v", path, err)
		}
	}
	if _, err := netdev.NamespaceAt("/etc/passwd"); err == nil || !strings.Contains(err.Error(), "no network namespace") {
		t.Errorf("ordinary file: %v", err)
	}
	boom := errors.New("boom")
	if err := netdev.Do(netdevtest.Namespace(t), func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("Do returns %v", err)
	}
}

func TestAnnounceAddrs(t *testing.T) {
	withBridge(t, 1400)
	if _, err := netdev.CreateVeth(netdev.VethSpec{Host: "vethwltest", Peer: "vethwgtest", PeerMAC: [6]byte{2, 1, 2, 3, 4, 5}, MTU: 1400, Bridge: bridge}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = netdev.DeleteLink("vethwltest") }()
	if err := errors.Join(netdev.SetUp("vethwltest"), netdev.SetUp("vethwgtest"), netdev.WaitCarrier(t.Context(), "vethwltest")); err != nil {
		t.Fatal(err)
	}
	// The bridge shows what really crossed a port.
	const arp = 0x0608 // ETH_P_ARP in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, arp)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: arp, Ifindex: device(t, bridge).Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	if err := netdev.AnnounceAddrs("vethwgtest", []netip.Prefix{prefix("10.2.1.5/24")}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		t.Fatalf("no announcement on the bridge: %v", err)
	}
	want, err := hex.DecodeString("ffffffffffff" + "020102030405" + "0806" + "0001080006040001" +
		"020102030405" + "0a020105" + "000000000000" + "0a020105")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(buf[:n], want) {
		t.Errorf("announcement\n%x, want\n%x", buf[:n], want)
	}
}

func TestRoutes(t *testing.T) {
	netdevtest.Need(t)
	for _, cmd := range []string{
		"ip link add up0 type veth peer name up1", "ip link set up0 mtu 1300 up", "ip link set up1 up",
		"ip addr add 10.40.1.2/16 dev up0",
	} {
		netdevtest.In(t, "", strings.Fields(cmd)...)
	}
	defer netdevtest.In(t, "", "ip", "link", "del", "up0")
	if mtu, err := netdev.DefaultUnderlayMTU(); err != nil || mtu != 1300 {
		t.Errorf("MTU by address = %d, %v", mtu, err)
	}
	netdevtest.In(t, "", "ip", "route", "add", "default", "via", "10.40.0.1")
	if mtu, err := netdev.DefaultUnderlayMTU(); err != nil || mtu != 1300 {
		t.Errorf("MTU by default route = %d, %v", mtu, err)
	}
	if mtu, err := netdev.DefaultUnderlayMTU("up0"); err != nil || mtu != 1500 {
		t.Errorf("MTU of no device = %d, %v", mtu, err)
	}
	for _, c := range []struct {
		r, ignore, want string
	}{
		{"10.32.0.0/12", "", "10.40.0.0/16 dev up0"},
		{"10.40.3.0/24", "", "10.40.0.0/16 dev up0"},
		{"10.32.0.0/12", "up0", ""},
		{"10.48.0.0/12", "", ""},
	} {
		route, overlaps, err := netdev.OverlappingRoute(prefix(c.r), c.ignore)
		if err != nil || overlaps != (c.want != "") || (overlaps && route.String() != c.want) {
			t.Errorf("OverlappingRoute(%s) = %s %v %v, want %q", c.r, route, overlaps, err, c.want)
		}
	}
	if p := netdev.FreeRange(prefix("10.32.0.0/12")); p != prefix("10.0.0.0/12") {
		t.Errorf("FreeRange = %s", p)
	}
	netdevtest.In(t, "", "ip", "route", "add", "10.0.0.0/8", "via", "10.40.0.1")
	if p := netdev.FreeRange(prefix("10.32.0.0/12")); p != prefix("172.16.0.0/12") {
		t.Errorf("FreeRange without 10/8 = %s", p)
	}
	netdevtest.In(t, "", "ip", "route", "add", "172.16.0.0/12", "via", "10.40.0.1")
	if p := netdev.FreeRange(prefix("10.32.0.0/12")); p != prefix("192.168.0.0/16") {
		t.Errorf("FreeRange without 172.16/12 = %s", p)
	}
	netdevtest.In(t, "", "ip", "route", "add", "192.168.0.0/16", "via", "10.40.0.1")
	if p := netdev.FreeRange(prefix("10.32.0.0/12")); p.IsValid() {
		t.Errorf("FreeRange without any = %s", p)
	}
}

func TestWatchRemovals(t *testing.T) {
	withBridge(t, 1400)
	ctx, cancel := context.WithCancel(t.Context())
	begun, removed, ended := make(chan struct{}), make(chan int, 16), make(chan error)
	go func() {
		ended <- netdev.WatchRemovals(ctx, func() { close(begun) }, func(i int) { removed <- i })
	}()
	<-begun
	path := netdevtest.Namespace(t)
	index, err := netdev.CreateVeth(netdev.VethSpec{Host: "vethwepltest", Peer: "ethwe", PeerNS: path, MTU: 1400, Bridge: bridge})
	if err != nil {
		t.Fatal(err)
	}
	netdevtest.In(t, "", "ip", "link", "set", "vethwepltest", "nomaster") // leaves the bridge, not the host
	netdevtest.End(t, path)
	select {
	case got := <-removed:
		if got != index {
			t.Errorf("removed %d, want %d", got, index)
		}
	case <-time.After(10 * time.Second):
		t.Error("the end of the namespace was not noticed")
	}
	if netdev.Exists("vethwepltest") {
		t.Error("told of the removal too early")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestForwardingIsRestored(t *testing.T) {
	netdevtest.Need(t)
	for _, s := range [][2]string{{"ipv4/ip_forward", "0"}, {"ipv4/conf/all/accept_redirects", "0"}, {"ipv4/conf/lo/forwarding", "1"}} {
		if err := netdev.SetSysctl(s[0], s[1]); err != nil {
			t.Fatal(err)
		}
	}
	before := netdevtest.Host(t)
	f, err := netdev.ForwardingOff()
	if err != nil || f == nil {
		t.Fatalf("ForwardingOff = %v, %v", f, err)
	}
	if err := netdev.EnableForwarding(); err != nil {
		t.Fatal(err)
	}
	if again, err := netdev.ForwardingOff(); err != nil || again != nil {
		t.Errorf("ForwardingOff of a router = %v, %v", again, err)
	}
	if netdevtest.Host(t) == before {
		t.Error("nothing has changed")
	}
	if err := f.Restore(); err != nil {
		t.Fatal(err)
	}
	if d := netdevtest.Changes(before, netdevtest.Host(t)); d != "" {
		t.Errorf("the host has changed:\n%s", d)
	}
}

func TestRandomMAC(t *testing.T) {
	a, b := netdev.RandomMAC(), netdev.RandomMAC()
	if a == b || a[0]&3 != 2 || b[0]&3 != 2 {
		t.Errorf("%x, %x: want two locally administered unicast addresses", a, b)
	}
}
