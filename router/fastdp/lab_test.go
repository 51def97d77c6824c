package fastdp

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
	"weave.local/router/overlay/overlaytest"
)

const (
	ownMounts = "FASTDP_TEST_OWN_MOUNTS" // set once the test has a mount namespace of its own
	holdEnv   = "FASTDP_TEST_HOLD"       // set for a process that holds a data path until it is killed
	testPort  = 6784
	testMTU   = 1450 // of the bridge; what VXLAN carries over an underlay of 1500
)

// TestMain moves the test into a mount namespace of its own, so that no mount
// of a BPF file system outlives it whatever happens.
func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv(ownMounts) == "" {
		if err := execInOwnMounts(); err != nil {
			panic(err)
		}
	}
	if held := os.Getenv(holdEnv); held != "" {
		if err := hold(held); err != nil {
			panic(err)
		}
		return
	}
	m.Run()
}

func execInOwnMounts() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return unix.Exec(self, os.Args, append(os.Environ(), ownMounts+"=1"))
}

// space is a network namespace that ends with the test: nothing names it but
// the thread of its worker.
type space struct {
	t    *testing.T
	path string // names it to ip(8)
}

func newSpace(t *testing.T) *space {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("TEST_STRICT") == "1" {
			t.Fatal("needs root for network namespaces")
		}
		t.Skip("needs root for network namespaces")
	}
	s := &space{t: t}
	ready := make(chan error)
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // for good: the thread dies with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		s.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		ready <- err
		<-end
	}()
	if err := <-ready; err != nil {
		t.Fatalf("network namespace: %v", err)
	}
	t.Cleanup(func() { close(end); <-ended })
	s.ip("link set lo up")
	return s
}

// do runs f in the namespace.
func (s *space) do(f func() error) error { return netdev.Do(s.path, f) }

func (s *space) must(f func() error) {
	s.t.Helper()
	if err := s.do(f); err != nil {
		s.t.Fatal(err)
	}
}

// output runs a command in the namespace.
func (s *space) output(command string) (string, error) {
	var out []byte
	err := s.do(func() error {
		args := strings.Fields(command)
		var err error
		out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return string(out), nil
}

func (s *space) ip(args string) {
	s.t.Helper()
	if _, err := s.output("ip " + args); err != nil {
		s.t.Fatal(err)
	}
}

// host is a data path in a namespace of its own.
type host struct {
	*space
	id         peer.ShortID
	cfg        Config
	dp         *DataPath
	probes     *overlaytest.Recorder
	containers []*container
	ipv6       bool                 // is the underlay
	proven     map[peer.ShortID]int // MTU by neighbour
	direct     bool                 // frames take the direct way
}

func (h *host) addr() netip.Addr {
	if h.ipv6 {
		return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: byte(h.id)})
	}
	return netip.AddrFrom4([4]byte{192, 0, 2, byte(h.id)})
}

func (h *host) mac() overlay.MAC { return overlay.MAC{0x02, 0xff, 0, 0, 0, byte(h.id)} }

// newHost makes a host with nothing on it.
func newHost(t *testing.T, id peer.ShortID) *host {
	t.Helper()
	h := &host{space: newSpace(t), id: id, probes: overlaytest.NewRecorder()}
	h.cfg = Config{
		Bridge: "weave", MAC: h.mac(), Port: testPort, MTU: testMTU, TapName: "weave-sleeve",
		PinDir: filepath.Join(t.TempDir(), "bpf"), OnProbe: h.probes.OnProbe, Log: slog.New(slog.DiscardHandler),
	}
	return h
}

// start makes the host's data path, or takes over what one left there.
func (h *host) start() {
	h.t.Helper()
	h.must(func() (err error) {
		h.dp, err = New(h.cfg)
		return err
	})
	dp := h.dp
	h.t.Cleanup(func() { _ = dp.Close() })
}

// remove takes everything off the host.
func (h *host) remove() {
	h.t.Helper()
	if err := h.do(func() error { return Remove(h.cfg) }); err != nil {
		h.t.Error(err)
	}
}

func started(t *testing.T, id peer.ShortID) *host {
	t.Helper()
	return startedWith(t, id, kind{})
}

func startedWith(t *testing.T, id peer.ShortID, k kind) *host {
	t.Helper()
	h := newHost(t, id)
	h.ipv6, h.direct, h.cfg.NoShortcut, h.cfg.directFor = k.ipv6, k.direct, k.bridged, time.Hour
	t.Cleanup(h.remove)
	h.start()
	return h
}

// join lays a cable between two hosts.
func join(a, b *host, mtu int) {
	a.t.Helper()
	name := func(h *host) string { return fmt.Sprintf("to%d", h.id) }
	a.ip(fmt.Sprintf("link add %s mtu %d type veth peer name %s mtu %d netns %s", name(b), mtu, name(a), mtu, b.path))
	for _, end := range [][2]*host{{a, b}, {b, a}} {
		own, other := end[0], end[1]
		own.ip(fmt.Sprintf("link set %s up", name(other)))
		if a.ipv6 {
			own.ip(fmt.Sprintf("addr add %s/128 dev %s nodad", own.addr(), name(other)))
			own.ip(fmt.Sprintf("route add %s/128 dev %s", other.addr(), name(other)))
			continue
		}
		own.ip(fmt.Sprintf("addr add %s/32 peer %s dev %s", own.addr(), other.addr(), name(other)))
	}
}

// container is a namespace attached to a host's bridge.
type container struct {
	*space
	host *host
	port overlay.Port
}

func (c *container) addr() netip.Addr { return c.port.Addrs[0].Addr() }

// attach makes a container on the host, without telling the data path.
func (h *host) attach(cidr string) *container {
	h.t.Helper()
	n := len(h.containers) + 1
	c := &container{space: newSpace(h.t), host: h}
	c.port = overlay.Port{IfName: fmt.Sprintf("c%d", n), Endpoint: overlay.Endpoint{
		MAC: overlay.MAC{2, 0, 0, 0, byte(h.id), byte(n)}, Addrs: []netip.Prefix{netip.MustParsePrefix(cidr)}, Peer: h.id,
	}}
	h.ip(fmt.Sprintf("link add %s mtu %d type veth peer name eth0 mtu %d address %s netns %s",
		c.port.IfName, testMTU, testMTU, c.port.MAC, c.path))
	h.ip(fmt.Sprintf("link set %s master weave up", c.port.IfName))
	c.ip("link set eth0 up")
	c.ip("addr add " + cidr + " dev eth0")
	c.ip("route add default dev eth0") // so that only the data path keeps subnets apart
	h.must(func() error {
		i, err := net.InterfaceByName(c.port.IfName)
		c.port.IfIndex = i.Index
		return err
	})
	h.containers = append(h.containers, c)
	return c
}

// container attaches one and tells the data path.
func (h *host) container(cidr string) *container {
	h.t.Helper()
	c := h.attach(cidr)
	h.must(func() error { return h.dp.SetPort(c.port) })
	return c
}

// prove has a host know what a cable carries to its neighbour.
func (h *host) prove(to *host, mtu int) {
	if h.proven == nil {
		h.proven = make(map[peer.ShortID]int)
	}
	h.proven[to.id] = mtu - overhead(to.addr())
}

// line is hosts of which each has a cable to the next.
type line []*host

func newLine(t *testing.T, mtus ...int) line {
	t.Helper()
	return newLineOf(t, kind{}, mtus...)
}

// kind is what hosts may differ in.
type kind struct {
	ipv6    bool // is the underlay
	bridged bool // no frame goes past the bridge
	direct  bool // frames go past the VXLAN device, too
}

// eachWay tests all ways that frames take: through the bridge, past it, and
// past the IP stack of their host as well.
func eachWay(t *testing.T, f func(t *testing.T, k kind)) {
	t.Helper()
	for name, k := range map[string]kind{"shortcut": {}, "bridged": {bridged: true}, "direct": {direct: true}} {
		t.Run(name, func(t *testing.T) { f(t, k) })
	}
}

// checkWay sees that frames took the way they ought to.
func (l line) checkWay(k kind) {
	l[0].t.Helper()
	for _, h := range l {
		if n := h.counter("shortcut"); (n == 0) != k.bridged && len(h.containers) > 0 {
			h.t.Errorf("host %d: %d frames went past the bridge", h.id, n)
		}
		for _, name := range []string{"direct_tx", "direct_rx"} {
			if n := h.counter(name); (n == 0) == k.direct && len(h.containers) > 0 {
				h.t.Errorf("host %d: %s is %d", h.id, name, n)
			}
		}
	}
}

func newLineOf(t *testing.T, k kind, mtus ...int) line {
	t.Helper()
	l := line{startedWith(t, 1, k)}
	for i, mtu := range mtus {
		l = append(l, startedWith(t, peer.ShortID(i+2), k))
		join(l[i], l[i+1], mtu)
		if k.direct { // only what is proven to arrive whole takes that way
			l[i].prove(l[i+1], mtu)
			l[i+1].prove(l[i], mtu)
		}
	}
	return l
}

// newPair is two hosts with a container each, the second of which answers.
func newPair(t *testing.T) (l line, near, far *container) {
	t.Helper()
	l = newLine(t, 1500)
	near, far = l[0].container("10.32.0.1/24"), l[1].container("10.32.0.2/24")
	far.echo()
	l.apply(nil)
	if !near.reaches(far.addr(), 100) {
		t.Fatal("no way between the hosts")
	}
	return l, near, far
}

// forwarding is what the router would want of host i. path names the data
// path between two neighbours; nil stands for the fast one.
func (l line) forwarding(i int, path func(a, b int) string) overlay.Forwarding {
	if path == nil {
		path = func(int, int) string { return overlay.FastDP }
	}
	f := overlay.Forwarding{
		Self: l[i].id, Hops: map[peer.ShortID]overlay.Hop{}, Trees: map[peer.ShortID]overlay.Tree{},
	}
	var next []int
	for _, j := range []int{i - 1, i + 1} {
		if j >= 0 && j < len(l) {
			next = append(next, j)
			f.Neighbours = append(f.Neighbours, overlay.Neighbour{
				Info: peer.Info{Name: peer.Name(l[j].id), ShortID: l[j].id}, Local: l[i].addr(), Remote: l[j].addr(),
			})
		}
	}
	for j, other := range l {
		tree := overlay.Tree{}
		for _, n := range next {
			if towards := (n > i) == (j > i); j != i && towards {
				f.Hops[other.id] = overlay.Hop{Via: l[n].id, Path: path(i, n), MTU: l[i].proven[l[n].id]}
				tree.Parent = l[n].id
			} else {
				tree.Children = append(tree.Children, l[n].id)
			}
		}
		f.Trees[other.id] = tree
		for _, c := range other.containers {
			if j != i {
				f.Endpoints = append(f.Endpoints, c.port.Endpoint)
			}
		}
	}
	return f
}

func (l line) apply(path func(a, b int) string) {
	l[0].t.Helper()
	for i, h := range l {
		h.must(func() error { return errors.Join(h.dp.Apply(l.forwarding(i, path)), h.dp.refreshRules()) })
		if h.direct {
			h.must(func() error { return errors.Join(h.dp.refreshDirect(), h.dp.extendDirect()) })
		}
	}
}

func (h *host) counter(name string) uint64 {
	h.t.Helper()
	all, err := h.dp.Counters()
	if err != nil {
		h.t.Fatal(err)
	}
	n, ok := all[name]
	if !ok {
		h.t.Fatalf("no counter %s", name)
	}
	return n
}
