package tests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// moveBar is how long it may take until everybody sends to where an Ethernet
// address is now.
const moveBar = time.Second

// TestEndpoints is about which Ethernet addresses may speak, and where they are.
func TestEndpoints(t *testing.T) {
	l := hosts(t)
	launchAll(t, l)
	step(t, "any source", func(t *testing.T) { testAnySource(t, l) })
	step(t, "moved", func(t *testing.T) { testMoved(t, l) })
}

// testAnySource: what is behind a container takes part where a user allows it, in
// each of the ways there are.
func testAnySource(t *testing.T, l *lab.Lab) {
	u1, u3 := l.Host("u1"), l.Host("u3")
	must(t, u1, "docker", "network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.40.1.0/24", "--opt", "weave.any-source=true", "routers")
	must(t, u3, "docker", "network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.40.1.0/24", "routers")
	to := map[string]*container{
		"weave":   run(t, u3, "", "ethwe0", "to-weave", "--net=weave"),
		"routers": run(t, u3, "", "ethwe0", "to-routers", "--net=routers"),
	}
	type sender struct {
		from, to *container
	}
	allowed := map[string]sender{
		"label":    {run(t, u1, "", "ethwe0", "by-label", "--net=weave", "--label", "weave.any-source=true"), to["weave"]},
		"endpoint": {run(t, u1, "", "ethwe0", "by-endpoint", "--network", "name=weave,driver-opt=weave.any-source=true"), to["weave"]},
		"network":  {run(t, u1, "", "ethwe0", "by-network", "--net=routers"), to["routers"]},
		"proxy":    {run(t, u1, proxySocket, "ethwe0", "by-proxy", "--label", "weave.any-source"), to["weave"]},
	}
	late := run(t, u1, "", "", "by-attach", "--net=none")
	late.addr = netip.MustParsePrefix(weave(t, u1, "attach", "--any-source", "by-attach") + "/12")
	allowed["attach"] = sender{late, to["weave"]}
	plain := run(t, u1, "", "ethwe0", "plain", "--net=weave")
	r := u1.Docker(t.Context(), "run", "--rm", "--network", "name=weave,driver-opt=weave.any-source=perhaps", "busybox", "true")
	if r.Code == 0 || !strings.Contains(r.Stderr, "option weave.any-source=perhaps: want true or false") {
		t.Errorf("an option that makes no sense: exit %d, %q", r.Code, r.Stderr)
	}

	n := byte(0)
	// heard says whether a frame that a container sends from an Ethernet and an IP
	// address of its own invention arrives.
	heard := func(t *testing.T, x sender, patience time.Duration) error {
		n++
		from, tap := x.from.tap(t), x.to.tap(t)
		text := fmt.Sprintf("from behind %s %d", x.from.name, n)
		frame := packet(tap.MAC(), net.HardwareAddr{2, 0xaa, 0, 0, 0, n}, lastHost(x.from.addr), x.to.addr.Addr(), text)
		return lab.Wait(t.Context(), patience, func() error {
			if err := from.Send(frame); err != nil {
				return err
			}
			_, err := tap.Receive(200*time.Millisecond, func(f []byte) bool { return len(f) >= len(frame) && string(f[42:len(frame)]) == text })
			return err
		})
	}
	for way, x := range allowed {
		t.Run(way, func(t *testing.T) {
			if err := heard(t, x, patience); err != nil {
				t.Errorf("%s: %v", x.from.name, err)
			}
		})
	}
	t.Run("child device", func(t *testing.T) { testChildDevice(t, allowed["label"].from, plain, to["weave"]) })
	t.Run("not allowed", func(t *testing.T) {
		if err := heard(t, sender{plain, to["weave"]}, time.Second); err == nil {
			t.Error("a container without permission is heard")
		}
	})
	t.Run("other subnet", func(t *testing.T) {
		if err := heard(t, sender{allowed["network"].from, to["weave"]}, time.Second); err == nil {
			t.Error("what is behind a container is heard in a subnet that is not the container's")
		}
	})
	t.Run("after a restart", func(t *testing.T) {
		weave(t, u1, "stop")
		launch(t, u1, append([]string{"--no-dns"}, others(l, u1)...)...)
		established(t, l, patience)
		for _, way := range []string{"label", "network", "attach"} {
			if err := heard(t, allowed[way], patience); err != nil {
				t.Errorf("%s: %v", way, err)
			}
		}
		if err := heard(t, sender{plain, to["weave"]}, time.Second); err == nil {
			t.Error("a container without permission is heard")
		}
	})
	for _, h := range l.Hosts {
		must(t, h, "sh", "-c", "docker ps -aq | xargs -r docker rm -f")
	}
}

// testChildDevice: a macvlan device on that of a container, with Ethernet and IP
// addresses that nobody announced, talks both ways where that is allowed.
func testChildDevice(t *testing.T, allowed, plain, to *container) {
	addr := lastHost(to.addr)
	child := func(c *container) func(to netip.Addr) error {
		must(t, c.Host, "ip", "netns", "add", c.name)
		t.Cleanup(func() {
			if err := c.Run(context.WithoutCancel(t.Context()), "ip", "netns", "del", c.name).Err(); err != nil {
				t.Error(err)
			}
		})
		must(t, c.Host, "nsenter", "--net="+c.netns, "ip", "link", "add", "child", "link", "ethwe0", "netns", c.name, "type", "macvlan", "mode", "bridge")
		must(t, c.Host, "ip", "-n", c.name, "addr", "add", netip.PrefixFrom(addr, to.addr.Bits()).String(), "dev", "child")
		must(t, c.Host, "ip", "-n", c.name, "link", "set", "child", "up")
		return func(to netip.Addr) error {
			return c.Run(t.Context(), "ip", "netns", "exec", c.name, "ping", "-c", "1", "-W", "1", to.String()).Err()
		}
	}
	ping := child(plain)
	if lab.Wait(t.Context(), time.Second, func() error { return ping(to.addr.Addr()) }) == nil {
		t.Error("a child device in a container without permission is heard")
	}
	must(t, plain.Host, "ip", "-n", plain.name, "link", "del", "child")
	ping = child(allowed)
	for _, c := range []*container{to, plain} { // on another host, and on this one
		within(t, patience, "child device", func() error { return ping(c.addr.Addr()) })
		if err := c.reaches(t.Context(), addr, 1400); err != nil {
			t.Errorf("to the child device: %v", err)
		}
	}
}

// testMoved: an Ethernet address that is attached on u1 and then on u2, while the
// old container is still there, is on u2 for all hosts within a second.
func testMoved(t *testing.T, l *lab.Lab) {
	u1, u2 := l.Host("u1"), l.Host("u2")
	const mac = "02:77:00:00:00:01"
	// The docker command of one engine does not tell another's which address.
	create := func(h *lab.Host, name string) *container {
		body := fmt.Sprintf(`{"Image":"busybox","Cmd":["sleep","3600"],"MacAddress":%q,"HostConfig":{"NetworkMode":"weave"}}`, mac)
		must(t, h, "curl", "-sSf", "--unix-socket", "/var/run/docker.sock", "-H", "Content-Type: application/json", "-d", body, "http://docker/v1.41/containers/create?name="+name)
		must(t, h, "docker", "start", name)
		c := &container{Host: h, name: name}
		var err error
		if c.netns, err = h.ContainerNetNS(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		c.addr = c.addresses(t, "ethwe0")[0]
		return c
	}
	old := create(u1, "old")
	var senders []*container
	for _, h := range l.Hosts {
		senders = append(senders, run(t, h, "", "ethwe0", "sender", "--net=weave"))
	}
	for _, s := range senders {
		within(t, patience, "ping", func() error { return s.reaches(t.Context(), old.addr.Addr(), 56) })
	}
	taps := map[*container]*lab.Tap{}
	for _, s := range senders {
		taps[s] = s.tap(t)
	}
	there := old.tap(t)
	moved := create(u2, "moved")
	begin := time.Now()
	here := moved.tap(t)
	n := 0
	// arrives sends until a frame of a container comes to the new place.
	arrives := func(s *container, limit time.Duration) error {
		n++
		text := fmt.Sprintf("to the new place %d", n)
		return lab.Wait(t.Context(), limit, func() error {
			if err := taps[s].Send(packet(here.MAC(), taps[s].MAC(), s.addr.Addr(), moved.addr.Addr(), text)); err != nil {
				return err
			}
			_, err := here.Receive(20*time.Millisecond, func(f []byte) bool { return len(f) >= 42+len(text) && string(f[42:42+len(text)]) == text })
			return err
		})
	}
	for _, s := range senders {
		if err := arrives(s, moveBar); err != nil {
			t.Errorf("%s: not at the new place: %v", s.Name, err)
		}
	}
	t.Logf("all hosts send to the new place %s after it was attached", time.Since(begin).Round(time.Millisecond))
	_, err := there.Receive(time.Millisecond, func([]byte) bool { return false }) // what came before is not looked at
	if !errors.Is(err, lab.ErrNoFrame) {
		t.Fatal(err)
	}
	for _, s := range senders {
		if err := arrives(s, moveBar); err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
	}
	f, err := there.Receive(300*time.Millisecond, func(f []byte) bool {
		return len(f) > 42 && net.HardwareAddr(f[:6]).String() == mac && string(f[42:]) == fmt.Sprintf("to the new place %d", n)
	})
	if err == nil {
		t.Errorf("the old place still gets frames: %q", f[42:])
	}
	// The end at the old place comes late, and changes nothing.
	steady := startFlow(t, senders[2], moved)
	must(t, u1, "docker", "rm", "-f", "old")
	end := time.Now()
	holds(t, []*flow{steady}, end, time.Second, smooth)
	for _, s := range senders {
		if err := arrives(s, moveBar); err != nil {
			t.Errorf("%s, after the end at the old place: %v", s.Name, err)
		}
		if err := s.reaches(t.Context(), moved.addr.Addr(), 56); err != nil {
			t.Errorf("after the end at the old place: %v", err)
		}
	}
}
