package attach

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"weave.local/router/netdev"
	"weave.local/router/netdev/netdevtest"
)

func TestRestartAdoptsWhatIsThere(t *testing.T) {
	h := newHost(t)
	red, blue, dead := netdevtest.Namespace(t), netdevtest.Namespace(t), netdevtest.Namespace(t)
	a := h.attach("red", red, ip("10.2.1.5/24"))
	h.attach("red", red, ip("10.3.1.5/24"))
	h.attach("blue", blue, ip("10.2.1.6/24"))
	gone := h.attach("dead", dead, ip("10.2.1.7/24"))
	netdevtest.End(t, dead)
	eventually(t, "the interface of the dead is gone", func() bool { return !netdev.Exists(gone.HostIf) })
	// A crash in the middle of things, and somebody who tidies up too much.
	if _, err := netdev.CreateVeth(netdev.VethSpec{Host: "vethwl0fedcba98", Peer: "vethwg0fedcba98", MTU: testMTU, Bridge: testBridge, Alias: "weave endpoint 0fedcba98765"}); err != nil {
		t.Fatal(err)
	}
	if _, err := netdev.CreateVeth(netdev.VethSpec{Host: "vethwlforeign", Peer: "vethwgforeign", MTU: testMTU, Bridge: testBridge}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = netdev.DeleteLink("vethwlforeign") }()
	netdevtest.In(t, "", "ip", "link", "set", a.HostIf, "down", "nomaster")
	netdevtest.In(t, red, "ip", "addr", "del", "10.3.1.5/24", "dev", "ethwe")

	h.restart()
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24", "10.3.1.5/24")
	h.wantAddrs("blue", blue, "ethwe", "10.2.1.6/24")
	mustReach(t, red, blue, "10.2.1.6", "10.2.1.5")
	if b, _ := h.find("red"); b.MAC != a.MAC || b.IfIndex != a.IfIndex {
		t.Errorf("adopted as %+v, was %+v", b, a)
	}
	if _, listed := h.find("dead"); listed || h.ports.len() != 2 || len(h.store.All()) != 2 {
		t.Errorf("the dead is still known: %v, journal %v", h.List(), h.store.All())
	}
	if netdev.Exists("vethwl0fedcba98") || !netdev.Exists("vethwlforeign") {
		t.Error("of two unknown devices the one that is ours must go and the other stay")
	}
	if _, err := h.Detach(t.Context(), Target{ID: "red"}, []Request{{Net: p("10.3.1.0/24")}, {IP: p("10.2.1.5/24")}}); err != nil {
		t.Error(err)
	}
}

// TestLostJournal needs a process in the namespace, since only /proc tells of it.
func TestLostJournal(t *testing.T) {
	h := newHost(t)
	red := netdevtest.Namespace(t)
	sleeper := exec.CommandContext(t.Context(), "nsenter", "--net="+red, "sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sleeper.Process.Kill(); _ = sleeper.Wait() }()
	eventually(t, "a process lives in the namespace", func() bool {
		want, err := netdev.NamespaceAt(red)
		got, err2 := netdev.NamespaceAt(procNS(sleeper.Process))
		return err == nil && err2 == nil && got == want
	})
	a := h.attach("red", red, ip("10.2.1.5/24"))
	for key := range h.store.All() {
		if err := h.store.Put(key, []byte("{}")); err != nil { // of an unknown layout
			t.Fatal(err)
		}
	}
	h.restart()
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24")
	if b, _ := h.find("red"); b.MAC != a.MAC || b.IfIndex != a.IfIndex || b.Kind != KindContainer || !strings.HasPrefix(b.NetNS, "/proc/") {
		t.Errorf("found as %+v, was %+v", b, a)
	}
	h.attach("red", red, ip("10.2.1.6/24"))
	h.wantAddrs("red", red, "ethwe", "10.2.1.5/24", "10.2.1.6/24")
}

func procNS(p *os.Process) string {
	return "/proc/" + strconv.Itoa(p.Pid) + "/ns/net"
}

func TestDeathIsNoticed(t *testing.T) {
	h := newHost(t)
	h.grace = 100 * time.Millisecond
	h.restart()
	stop := h.run()
	defer stop()
	red, blue := netdevtest.Namespace(t), netdevtest.Namespace(t)
	h.attach("red", red, ip("10.2.1.5/24"))
	h.attach("blue", blue, ip("10.2.1.6/24"))
	h.ContainerStarted("blue")
	netdevtest.End(t, red)
	netdevtest.End(t, blue)
	eventually(t, "ports of the dead are removed", func() bool { return h.ports.len() == 0 })
	eventually(t, "red is forgotten", func() bool { return h.get("red") == nil })
	if r := h.get("blue"); r == nil {
		t.Error("blue was forgotten although its container runs")
	}
	if list := h.List(); len(list) != 1 {
		t.Errorf("listed: %v", list)
	}
	h.ContainerDied("blue")
	eventually(t, "blue is forgotten", func() bool { return h.get("blue") == nil })

	// Destroyed is destroyed, whatever it looks like.
	pink := netdevtest.Namespace(t)
	a := h.attach("pink", pink, ip("10.2.1.5/24"))
	h.ContainerDestroyed("pink")
	eventually(t, "pink is gone", func() bool { return h.get("pink") == nil && !netdev.Exists(a.HostIf) && h.ports.len() == 0 })
	h.ContainerDestroyed("never heard of")
}

func TestReturnWithinGrace(t *testing.T) {
	h := newHost(t)
	h.grace = 300 * time.Millisecond
	h.restart()
	stop := h.run()
	defer stop()
	red := netdevtest.Namespace(t)
	h.attach("red", red, ip("10.2.1.5/24"))
	h.ContainerDied("red")
	netdevtest.End(t, red)
	eventually(t, "the port is removed", func() bool { return h.ports.len() == 0 })
	again := netdevtest.Namespace(t)
	h.attach("red", again, ip("10.2.1.5/24"))
	h.mu.Lock()
	pending := len(h.releases)
	h.mu.Unlock()
	if pending != 0 {
		t.Error("red is to be released although it is back")
	}
	h.wantAddrs("red", again, "ethwe", "10.2.1.5/24")
}

func TestRemoveAllWithoutReconcile(t *testing.T) {
	netdevtest.Need(t)
	before := netdevtest.Host(t)
	h := newHost(t)
	red := netdevtest.Namespace(t)
	h.attach("red", red, ip("10.2.1.5/24"))
	h.expose(ExposeOptions{}, ip("10.2.1.1/24"))
	if _, err := h.CreateEndpoint(t.Context(), EndpointSpec{ID: "0123456789ab", Addrs: ip2("10.2.1.7/24")}); err != nil {
		t.Fatal(err)
	}
	m, err := New(h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.RemoveAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := netdevtest.Changes(before, netdevtest.Host(t)); d != "" || len(h.store.All()) != 0 {
			t.Errorf("the host has changed (journal %v):\n%s", h.store.All(), d)
		}
	}
}
