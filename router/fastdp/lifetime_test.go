package fastdp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// held is what a process of its own makes of a data path.
type held struct {
	Bridge, PinDir, TapName string
	Log                     string // file
	MAC                     overlay.MAC
	Port, MTU               int
	NoTCX                   bool
	Ports                   []overlay.Port
	Forwarding              overlay.Forwarding
}

// hold runs a data path until the process is killed.
func hold(s string) error {
	var h held
	if err := json.Unmarshal([]byte(s), &h); err != nil {
		return err
	}
	log, err := os.Create(h.Log)
	if err != nil {
		return err
	}
	d, err := New(Config{
		Bridge: h.Bridge, MAC: h.MAC, Port: h.Port, PinDir: h.PinDir, MTU: h.MTU, TapName: h.TapName,
		Log: slog.New(slog.NewTextHandler(log, nil)), noTCX: h.NoTCX, directRetry: shortRetry,
	})
	if err != nil {
		return err
	}
	for _, p := range h.Ports {
		if err := d.SetPort(p); err != nil {
			return err
		}
	}
	if err := d.Apply(h.Forwarding); err != nil {
		return err
	}
	fmt.Println("ready")
	return d.Run(context.Background())
}

// spawn starts a process that holds the data path of host i, and waits until
// it forwards.
func (l line) spawn(i int, ports []overlay.Port, f overlay.Forwarding) *exec.Cmd {
	h := l[i]
	h.t.Helper()
	s, err := json.Marshal(held{
		Bridge: h.cfg.Bridge, PinDir: h.cfg.PinDir, TapName: h.cfg.TapName, MAC: h.cfg.MAC, Port: h.cfg.Port, MTU: h.cfg.MTU,
		Log: h.logFile(), NoTCX: h.cfg.noTCX, Ports: ports, Forwarding: f,
	})
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdEnv+"="+string(s))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	h.must(cmd.Start)
	h.t.Cleanup(func() { kill(cmd) })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		h.t.Fatalf("process of host %d: %q, %v", h.id, line, err)
	}
	return cmd
}

// logFile is where the process says what it has to say.
func (h *host) logFile() string { return h.cfg.PinDir + ".log" }

// shortRetry is how soon the process tries the direct way again.
const shortRetry = 100 * time.Millisecond

// kill ends the process as kill -9 does; one that ended already is no error.
func kill(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Signal(unix.SIGKILL)
		_ = cmd.Wait()
	}
}

// The process that made everything dies and another takes over, twice; no
// frame is lost.
func TestKill(t *testing.T) {
	for name, noTCX := range map[string]bool{"tcx": false, "clsact": true} {
		t.Run(name, func(t *testing.T) {
			a, b := newHost(t, 1), newHost(t, 2)
			l := line{a, b}
			join(a, b, 1500)
			for _, h := range l {
				h.cfg.noTCX = noTCX
				t.Cleanup(h.remove)
			}
			b.start()
			b1 := b.container("10.32.0.2/24")
			b1.echo()
			first := l.spawn(0, nil, l.forwarding(0, nil))
			a1 := a.attach("10.32.0.1/24")
			kill(first)
			second := l.spawn(0, []overlay.Port{a1.port}, l.forwarding(0, nil))
			l[1].must(func() error { return b.dp.Apply(l.forwarding(1, nil)) })
			if !a1.reaches(b1.addr(), 100) {
				t.Fatal("no way between the hosts")
			}
			sent, back := a1.during(b1.addr(), func() {
				kill(second)
				third := l.spawn(0, []overlay.Port{a1.port}, l.forwarding(0, nil))
				kill(third)
				a.start() // adopts, and applies nothing
			})
			if sent != back || sent < 300 {
				t.Errorf("of %d datagrams %d came back", sent, back)
			}
			a.checkAttachments(a1.port.IfIndex, noTCX || a.dp.clsact)
			if a.dp.config.Self != uint16(a.id) {
				t.Errorf("adopted short id %d, want %d", a.dp.config.Self, a.id)
			}

			// A partial state takes nothing away, the next one does.
			a.must(func() error { return a.dp.Apply(overlay.Forwarding{Partial: true, Self: a.id}) })
			if !a1.reaches(b1.addr(), 100) {
				t.Error("a partial state took something away")
			}
			a.must(func() error { return a.dp.Apply(overlay.Forwarding{Self: a.id}) })
			if !a1.silent(b1.addr()) {
				t.Error("a complete state left something there")
			}
		})
	}
}

// checkAttachments sees that each program is there once.
func (h *host) checkAttachments(port int, noTCX bool) {
	h.t.Helper()
	pins, err := os.ReadDir(filepath.Join(h.cfg.PinDir, "links"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Fatal(err)
	}
	var got []string
	for _, p := range pins {
		// A process that was killed may have come to looking at routes, or not.
		if !strings.HasSuffix(p.Name(), "-uplink_in") {
			got = append(got, p.Name())
		}
	}
	want := []string{
		fmt.Sprintf("%d-port_in", port), fmt.Sprintf("%d-port_out", port),
		fmt.Sprintf("%d-vxlan_in", h.dp.vxlan), fmt.Sprintf("%d-vxlan_out", h.dp.vxlan),
	}
	if noTCX {
		want = nil
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		h.t.Errorf("pinned links %v, want %v", got, want)
	}
	for _, dev := range []string{"vxlan-6784", "c1"} {
		for _, side := range []string{"ingress", "egress"} {
			out, err := h.output("tc filter show dev " + dev + " " + side)
			if err != nil {
				h.t.Fatal(err)
			}
			if n := strings.Count(out, "direct-action"); (n == 1) != noTCX || n > 1 {
				h.t.Errorf("%d filters at %s of %s:\n%s", n, side, dev, out)
			}
		}
	}
}

// What the kernel does for a peer that the next daemon has not met stays,
// until the peer is met or a state no longer leaves it.
func TestInherited(t *testing.T) {
	l, a1, b1 := newPair(t)
	a := l[0]
	heard, shouts := b1.watch(number), uint64(0)
	restart := func() {
		t.Helper()
		a.must(a.dp.Close)
		a.start()
		a.must(func() error { return a.dp.SetPort(a1.port) })
	}
	nobody := overlay.Forwarding{Self: a.id, Inherit: true, Trees: map[peer.ShortID]overlay.Tree{a.id: {}}}
	met := l.forwarding(0, nil)
	met.Inherit, met.Endpoints = true, nil
	gone := nobody
	gone.Inherit = false
	for name, end := range map[string]overlay.Forwarding{"met without endpoints": met, "not to be left": gone} {
		t.Run(name, func(t *testing.T) {
			l.apply(nil)
			restart()
			a.must(func() error { return a.dp.Apply(nobody) })
			if !a1.reaches(b1.addr(), 100) {
				t.Error("a peer that nobody has met was given up")
			}
			shouts++
			a1.raw(a1.shout(shouts))
			for tries := 0; heard.count(number(a1.shout(shouts))) == 0 && tries < 100; tries++ {
				a1.reaches(b1.addr(), 100)
			}
			if n := heard.count(number(a1.shout(shouts))); n != 1 {
				t.Errorf("it hears a broadcast %d times", n)
			}
			a.must(func() error { return a.dp.Apply(end) })
			if !a1.silent(b1.addr()) {
				t.Error("something is left")
			}
			a.must(func() error { return a.dp.Apply(nobody) })
			if !a1.silent(b1.addr()) {
				t.Error("it came back")
			}
		})
	}
}

// A daemon with other map layouts takes over: the old programs run on until
// the new tables are complete.
func TestOtherLayout(t *testing.T) {
	l, a1, b1 := newPair(t)
	a := l[0]
	maps, err := filepath.Glob(filepath.Join(a.cfg.PinDir, "maps-*"))
	if err != nil || len(maps) != 1 {
		t.Fatalf("pinned maps %v, %v", maps, err)
	}
	if err := a.dp.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(maps[0], filepath.Join(a.cfg.PinDir, "maps-of-old")); err != nil {
		t.Fatal(err)
	}
	sent, back := a1.during(b1.addr(), func() {
		a.start()
		if !a.dp.deferred || !a.dp.Adopted() {
			t.Error("programs with empty tables took over")
		}
		a.must(func() error { return a.dp.SetPort(a1.port) })
		partial := l.forwarding(0, nil)
		partial.Partial = true
		a.must(func() error { return a.dp.Apply(partial) })
		a.must(func() error { return a.dp.Apply(l.forwarding(0, nil)) })
	})
	if sent != back {
		t.Errorf("of %d datagrams %d came back", sent, back)
	}
	if maps, err = filepath.Glob(filepath.Join(a.cfg.PinDir, "maps-*")); err != nil || len(maps) != 1 {
		t.Errorf("pinned maps %v, %v", maps, err)
	}
	if a.dp.deferred || a.counter("tx") == 0 {
		t.Error("the new programs do not forward")
	}
}

// A container's device goes while no daemon runs.
func TestStalePorts(t *testing.T) {
	a := started(t, 1)
	a1, a2 := a.container("10.32.0.1/24"), a.container("10.32.0.2/24")
	a2.echo()
	if err := a.dp.Close(); err != nil {
		t.Fatal(err)
	}
	a.ip("link del c1")
	a.start()
	if _, ok := a.dp.ports[a1.port.IfIndex]; ok {
		t.Error("a port without device is kept")
	}
	if _, ok := a.dp.ports[a2.port.IfIndex]; !ok {
		t.Error("a port with device is forgotten")
	}
	a.checkPins(a1.port.IfIndex, 0)
	if !a.dp.clsact { // filters of clsact need no pins
		a.checkPins(a2.port.IfIndex, 2)
	}
	// And while one runs.
	a.ip("link del c2")
	a.must(func() error { return a.dp.RemovePort(a2.port.IfIndex) })
	a.must(func() error { return a.dp.RemovePort(a2.port.IfIndex) })
	a.checkPins(a2.port.IfIndex, 0)
	ports, err1 := a.dp.objs.Ports.All()
	endpoints, err2 := a.dp.objs.Endpoints.All()
	if err := errors.Join(err1, err2); err != nil || len(ports)+len(endpoints) != 0 {
		t.Errorf("left: ports %v, endpoints %v, %v", ports, endpoints, err)
	}
}

func (h *host) checkPins(index, want int) {
	h.t.Helper()
	pins, err := filepath.Glob(filepath.Join(h.cfg.PinDir, "links", fmt.Sprintf("%d-*", index)))
	if err != nil || len(pins) != want {
		h.t.Errorf("device %d: pins %v, want %d", index, pins, want)
	}
}

// A local port has its address until that is announced to have moved on, and
// again when that is taken back.
func TestMovedOn(t *testing.T) {
	a := started(t, 1)
	a1 := a.container("10.32.0.1/24")
	announced := a1.port.Endpoint
	announced.Peer = 2
	apply := func(list ...overlay.Endpoint) {
		t.Helper()
		a.must(func() error { return a.dp.Apply(overlay.Forwarding{Self: 1, Endpoints: list}) })
	}
	endpoint := func() peer.ShortID {
		all, err := a.dp.objs.Endpoints.All()
		if err != nil {
			t.Fatal(err)
		}
		return peer.ShortID(all[[6]byte(a1.port.MAC)].Peer)
	}
	for _, c := range []struct {
		list []overlay.Endpoint
		want peer.ShortID
	}{{nil, 0}, {[]overlay.Endpoint{announced}, 2}, {nil, 0}, {[]overlay.Endpoint{announced}, 2}} {
		apply(c.list...)
		if p := endpoint(); p != c.want {
			t.Errorf("with %v announced the address is at peer %d, want %d", c.list, p, c.want)
		}
	}
	a.must(func() error { return a.dp.RemovePort(a1.port.IfIndex) })
	if p := endpoint(); p != 2 {
		t.Errorf("released address is at peer %d, want 2", p)
	}
}

// Remove leaves nothing, and neither does New that cannot work.
func TestRemove(t *testing.T) {
	for name, noTCX := range map[string]bool{"tcx": false, "clsact": true} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, 1)
			h.cfg.noTCX = noTCX
			before := h.state()
			h.remove() // nothing there
			h.start()
			c := h.container("10.32.0.1/24")
			h.must(func() error { return h.dp.Apply(overlay.Forwarding{Self: 1}) })
			if err := h.dp.Close(); err != nil {
				t.Fatal(err)
			}
			h.remove()
			out, err := h.output("tc qdisc show dev c1")
			if err != nil || strings.Contains(out, "clsact") {
				t.Errorf("left on the container's device: %s %v", out, err)
			}
			h.ip("link del " + c.port.IfName)
			if after := h.state(); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			h.remove()
		})
	}
}

// state is devices and mounts.
func (h *host) state() string {
	h.t.Helper()
	out, err := h.output("ip -o link")
	if err != nil {
		h.t.Fatal(err)
	}
	names := []string{}
	for line := range strings.Lines(out) {
		names = append(names, strings.Fields(line)[1])
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, h.cfg.PinDir) {
			names = append(names, line)
		}
	}
	if _, err := os.Stat(h.cfg.PinDir); err == nil {
		names = append(names, h.cfg.PinDir)
	}
	return strings.Join(names, " ")
}

func TestPortTaken(t *testing.T) {
	h := newHost(t, 1)
	before := h.state()
	c := &container{space: h.space}
	for _, take := range []func() (release func()){
		func() func() {
			conn := c.listen(testPort)
			return func() { _ = conn.Close() }
		},
		func() func() {
			h.ip("link add other type vxlan external dstport 6784")
			h.ip("link set other up")
			return func() { h.ip("link del other") }
		},
	} {
		release := take()
		err := h.do(func() error {
			d, err := New(h.cfg)
			if err == nil {
				err = errors.Join(d.Close(), Remove(h.cfg))
			}
			return err
		})
		if err == nil || !strings.Contains(err.Error(), "UDP port 6784") {
			t.Errorf("port taken: %v", err)
		}
		release()
		if after := h.state(); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	}
}

func TestNeighbourWithoutAddress(t *testing.T) {
	f := overlay.Forwarding{
		Self:       1,
		Neighbours: []overlay.Neighbour{{Info: peer.Info{ShortID: 2}, Remote: netip.MustParseAddr("fe80::2%eth0")}},
		Hops:       map[peer.ShortID]overlay.Hop{2: {Via: 2, Path: overlay.FastDP}, 3: {Via: 2, Path: overlay.Sleeve}},
	}
	want := desired(f, nil)
	if len(want.hops) != 1 || len(want.neighbours) != 0 || len(want.warnings) != 1 {
		t.Errorf("%+v", want)
	}
}
