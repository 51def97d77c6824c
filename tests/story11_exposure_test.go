package tests

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/router/frame"
	"weave.local/tests/lab"
)

// TestExposure: what of a host can be reached, and by whom. Hosts u1 and u2
// are members, u3 is any machine of the same network.
func TestExposure(t *testing.T) {
	l := hosts(t)
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	before := sockets(t, u1)
	launch(t, u1)
	launch(t, u2, "u1")
	within(t, patience, "mesh", func() error { return on(t.Context(), u1, 1, "fastdp") })
	inside := run(t, u1, "", "ethwe0", "c1", "--net=weave")
	far := run(t, u2, "", "ethwe0", "c2", "--net=weave")
	allReach(t, inside, far)
	plain := run(t, u1, "", "", "plain")
	bridge := netip.MustParseAddr(weave(t, u1, "expose"))

	step(t, "sockets", func(t *testing.T) { testSockets(t, u1, before) })
	step(t, "scan", func(t *testing.T) {
		for who, c := range map[string]struct {
			from *container
			to   netip.Addr
			want []int
		}{
			"the host itself":                      {&container{Host: u1}, netip.MustParseAddr("127.0.0.1"), []int{6782, 6783}},
			"another host":                         {&container{Host: u3}, u1.Addr, []int{6783}},
			"a container, to the underlay address": {inside, u1.Addr, []int{6783}},
			"a container, to the exposed address":  {inside, bridge, []int{6783}},
		} {
			if got := c.from.scan(t, c.to); !slices.Equal(got, c.want) {
				t.Errorf("%s: TCP ports %v of %s answer, want %v", who, got, c.to, c.want)
			}
		}
		for _, c := range []*container{{Host: u3}, inside, plain} {
			c.wantSilence(t, u1.Addr)
		}
	})
	step(t, "loopback", func(t *testing.T) { testLoopback(t, inside, bridge) })
	step(t, "forged frames", func(t *testing.T) { testForgedFrames(t, u3, plain, inside, far) })
}

// sockets are the ports and unix sockets of a host on which somebody listens;
// ports of UDP also those of the kernel.
func sockets(t *testing.T, h *lab.Host) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	for line := range strings.Lines(must(t, h, "ss", "-Hlntux")) {
		if f := strings.Fields(line); len(f) > 4 {
			addr, port := "", f[4]
			if f[0] == "tcp" || f[0] == "udp" {
				i := strings.LastIndex(port, ":")
				addr, port = port[:i], port[i+1:]
			}
			where := " all"
			if strings.HasPrefix(addr, "127.") {
				where = " local"
			} else if addr == "" {
				where = ""
			}
			if !strings.HasPrefix(port, "/run/containerd/") { // one for each container
				all[f[0]+" "+strings.TrimPrefix(port, "/var")+where] = true
			}
		}
	}
	return all
}

// testSockets: nothing listens but what the README lists, and the sockets are
// root's.
func testSockets(t *testing.T, h *lab.Host, before map[string]bool) {
	want := map[string]bool{
		"tcp 6782 local": true, "tcp 6783 all": true, "udp 6783 all": true, "udp 6784 all": true,
		"u_str /run/weave/control.sock": true, "u_str /run/weave/weave.sock": true, "u_str /run/docker/plugins/weave.sock": true,
	}
	for s := range sockets(t, h) {
		if !before[s] && !want[s] {
			t.Errorf("somebody listens on %s", s)
		}
		delete(want, s)
	}
	for s := range want {
		t.Errorf("nobody listens on %s", s)
	}
	engine := must(t, h, "stat", "-c", "%a %u %g", "/var/run/docker.sock")
	for path, mode := range map[string]string{
		"/run/weave/control.sock": "600 0 0", "/run/docker/plugins/weave.sock": "600 0 0", "/run/weave/weave.sock": engine,
	} {
		if got := must(t, h, "stat", "-c", "%a %u %g", path); got != mode {
			t.Errorf("%s: mode and owner %q, want %q", path, got, mode)
		}
		r := h.Run(t.Context(), "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "curl", "-sS", "--unix-socket", path, "http://x/status")
		if r.Err() == nil || !strings.Contains(r.Stderr, "ermission denied") && !strings.Contains(r.Stderr, "connect to") {
			t.Errorf("%s for a user: %v, %s", path, r.Err(), r.Stdout)
		}
	}
	if mode := must(t, h, "stat", "-c", "%a %u", "/var/lib/weave"); mode != "700 0" {
		t.Errorf("/var/lib/weave: mode and owner %q: others than root may look into it", mode)
	}
	if r := h.Run(t.Context(), "curl", "-sS", "http://127.0.0.1:6782/report?format=x"); !strings.Contains(r.Stdout, "root") {
		t.Errorf("whoever likes has templates executed: %s", r.Stdout)
	}
}

// do runs f in the network namespace of the container, or on the host itself.
func (c *container) do(f func() error) error {
	if c.netns == "" {
		return c.Do(f)
	}
	return c.DoIn(c.netns, f)
}

// scan connects to all TCP ports and returns those that accept.
func (c *container) scan(t *testing.T, to netip.Addr) (open []int) {
	t.Helper()
	silent := 0
	one := func(port int) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 1}),
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
		if err != nil {
			return err
		}
		switch err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: to.As4()}); {
		case err == nil:
			// On loopback the kernel may give the socket that very port,
			// which so answers itself.
			if self, err := unix.Getsockname(fd); err != nil || self.(*unix.SockaddrInet4).Port != port {
				open = append(open, port)
			}
		case !errors.Is(err, unix.ECONNREFUSED):
			if silent++; silent > 10 {
				return fmt.Errorf("port %d: %w", port, err)
			}
		}
		return nil
	}
	err := c.do(func() error {
		for port := 1; port < 1<<16; port++ {
			if err := one(port); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return open
}

// wantSilence sends to the UDP ports what nobody who belongs to the network
// would.
func (c *container) wantSilence(t *testing.T, to netip.Addr) {
	t.Helper()
	var conns []net.Conn
	err := c.do(func() error {
		for _, port := range []uint16{6783, vxlanPort} {
			conn, err := net.Dial("udp", netip.AddrPortFrom(to, port).String())
			if err != nil {
				return err
			}
			conns = append(conns, conn)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, conn := range conns {
		for size := range 64 {
			_, err := conn.Write(make([]byte, 16*size))
			if err != nil {
				t.Errorf("%s is closed: %v", conn.RemoteAddr(), err)
			}
		}
	}
	for _, conn := range conns {
		_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := conn.Read(make([]byte, 2048)); err == nil || errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s answers a stranger: %d bytes, %v", conn.RemoteAddr(), n, err)
		}
		_ = conn.Close()
	}
}

// testLoopback: frames to the host's loopback address get no answer.
func testLoopback(t *testing.T, c *container, bridge netip.Addr) {
	tap, err := c.Tap(c.netns, c.device)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Close() }()
	host, err := net.ParseMAC(must(t, c.Host, "cat", "/sys/class/net/weave/address"))
	if err != nil {
		t.Fatal(err)
	}
	syn := func(to netip.Addr, port uint16) func() bool {
		ip := ipHeader(c.addr.Addr(), to, unix.IPPROTO_TCP, 20)
		b := slices.Concat(host, tap.MAC(), []byte{8, 0}, ip)
		tcp := make([]byte, 20)
		binary.BigEndian.PutUint16(tcp, 40000+port)
		binary.BigEndian.PutUint16(tcp[2:], port)
		tcp[12], tcp[13], tcp[15] = 5<<4, 2, 100
		binary.BigEndian.PutUint16(tcp[16:], ^frame.Fold(frame.Sum(tcp, frame.IPv4(ip).PseudoSum(unix.IPPROTO_TCP, len(tcp)))))
		return func() bool {
			if err := tap.Send(append(b, tcp...)); err != nil {
				t.Fatal(err)
			}
			_, err := tap.Receive(300*time.Millisecond, func(f []byte) bool {
				return len(f) >= 54 && f[12] == 8 && f[13] == 0 && f[23] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(f[36:]) == 40000+port && f[47]&0x12 == 0x12
			})
			return err == nil
		}
	}
	within(t, patience, "the control port", func() error {
		if !syn(bridge, 6783)() {
			return errors.New("a port that is open does not answer: this test would see nothing")
		}
		return nil
	})
	if syn(netip.MustParseAddr("127.0.0.1"), 6782)() {
		t.Error("a container reaches 127.0.0.1:6782 of its host")
	}
}

// ipHeader is the header of an IPv4 packet with n bytes behind it.
func ipHeader(from, to netip.Addr, proto byte, n int) []byte {
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+n))
	copy(h[12:], from.AsSlice())
	copy(h[16:], to.AsSlice())
	frame.IPv4(h).SetChecksum()
	return h
}

// testForgedFrames: VXLAN datagrams as a member would send them, from who is
// none. inside and plain are containers on a member, plain one of Docker's own
// network.
func testForgedFrames(t *testing.T, outsider *lab.Host, plain, inside, far *container) {
	ids := map[string]uint32{}
	for line := range strings.Lines(weave(t, far.Host, "report", "-f", "{{range .Router.Peers}}{{.NickName}} {{.ShortID}}\n{{end}}")) {
		name, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.ParseUint(id, 10, 12)
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = uint32(n)
	}
	tap, err := far.Tap(far.netns, far.device)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Close() }()
	mac, err := net.ParseMAC(strings.Fields(inside.exec(t.Context(), "cat", "/sys/class/net/"+inside.device+"/address").Stdout)[0])
	if err != nil {
		t.Fatal(err)
	}
	arrives := func(from *container, to *lab.Host, src string, marker byte) bool {
		t.Helper()
		payload := slices.Repeat([]byte{marker}, 32)
		b := []byte{8, 0, 0, 0}
		b = binary.BigEndian.AppendUint32(b, (ids[src]|ids[far.Host.Name]<<12)<<8)
		b = slices.Concat(b, tap.MAC(), mac, []byte{8, 0}, ipHeader(inside.addr.Addr(), far.addr.Addr(), 253, len(payload)), payload)
		err := from.do(func() error {
			conn, err := net.Dial("udp", netip.AddrPortFrom(to.Addr, vxlanPort).String())
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close() }()
			_, err = conn.Write(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = tap.Receive(300*time.Millisecond, func(f []byte) bool { return strings.Contains(string(f), string(payload)) })
		return err == nil
	}
	member := &container{Host: inside.Host}
	within(t, patience, "a frame from a member", func() error {
		if !arrives(member, far.Host, inside.Host.Name, 1) {
			return errors.New("is not delivered: this test would see nothing")
		}
		return nil
	})
	for who, c := range map[string]struct {
		from *container
		to   *lab.Host
	}{
		"another host":                               {&container{Host: outsider}, far.Host},
		"a container of its own host":                {far, far.Host},
		"a container of Docker's own":                {plain, plain.Host},
		"a container of another member":              {inside, far.Host},
		"a container of a network of Docker's there": {plain, far.Host},
	} {
		for i, src := range []string{inside.Host.Name, far.Host.Name} {
			if arrives(c.from, c.to, src, byte(2+i)) {
				t.Errorf("%s sends frames as %s", who, src)
			}
		}
	}
}
