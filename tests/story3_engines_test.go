package tests

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"weave.local/tests/lab"
	"weave.local/tests/setup"
)

// unpacked is the Docker of a release of Debian.
func unpacked(t *testing.T, suite string) string {
	t.Helper()
	dir, err := setup.Engine(t.Context(), suite)
	if err != nil && os.Getenv("TEST_STRICT") != "1" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestEngines is one network of hosts with Docker old and new: the machine's own
// on u1, 26.1 on u2, 28.5 on u3, which refuses clients of versions of the API
// before 1.44.
func TestEngines(t *testing.T) {
	l := build(t, lab.Config{Docker: true, Engines: []lab.Engine{
		{}, {Dir: unpacked(t, "trixie")}, {Dir: unpacked(t, "forky"), MinAPI: "1.44"},
	}})
	var versions []string
	for _, h := range l.Hosts {
		v := must(t, h, "curl", "-s", "--unix-socket", "/run/docker.sock", "http://docker/version")
		_, v, _ = strings.Cut(v, `"Version":"`)
		v, _, _ = strings.Cut(v, `"`)
		versions = append(versions, v)
	}
	t.Logf("Docker %s", versions)
	if slices.Sort(versions); len(slices.Compact(versions)) != 3 {
		t.Errorf("want engines of three versions")
	}
	u3 := l.Host("u3")
	if said := must(t, u3, "curl", "-s", "--unix-socket", "/run/docker.sock", "http://docker/v1.43/info"); !strings.Contains(said, "too old") {
		t.Errorf("u3 answers version 1.43 with %.200s", said)
	}
	subnets := []string{"--ipalloc-range", "10.32.0.0/16", "--ipalloc-default-subnet", "10.32.0.0/24"}
	launchAll(t, l, append(subnets, "--rewrite-inspect", "--hostname-from-label", "host", "--hostname-match", "^front-", "--hostname-replacement", "web-",
		"-H", "unix:///run/second.sock", "-H", "tcp://127.0.0.1:2375")...)
	step(t, "flags", func(t *testing.T) { testFlags(t, l, subnets) })
	step(t, "both ways", func(t *testing.T) { testBothWays(t, l) })
	step(t, "compose", func(t *testing.T) { testCompose(t, u3) })
	step(t, "docker", func(t *testing.T) { testDockerAsWithout(t, u3) })
	step(t, "restart", func(t *testing.T) { testEngineRestart(t, u3) })
}

// testFlags: the address that a container and clients of the engine take for its
// own, and its name.
func testFlags(t *testing.T, l *lab.Lab, subnets []string) {
	for i, socket := range []string{proxySocket, "unix:///run/second.sock", "tcp://127.0.0.1:2375"} {
		h := l.Hosts[i]
		for _, flags := range []string{"--net=weave", "--net=bridge", "--net=none -e WEAVE_CIDR=net:default"} {
			c := run(t, h, socket, "ethwe", "front-x", append(strings.Fields(flags), "--label", "host=front-7")...)
			want := c.addr.Addr().String()
			if flags != "--net=bridge" { // there the file of names has Docker's own first
				if said := must(t, h, "docker", "exec", "front-x", "hostname", "-i"); said != want {
					t.Errorf("%s: %s: hostname -i: %s, want %s", h.Name, flags, said, want)
				}
			}
			if said := must(t, h, "docker", "exec", "front-x", "hostname"); flags != "--net=weave" && said != "web-7" {
				t.Errorf("%s: %s: host name %s", h.Name, flags, said)
			}
			// In the field of old, and in every network, as Nomad picks one.
			said := must(t, h, "docker", "-H", socket, "inspect", "-f", "{{.NetworkSettings.IPAddress}}{{range .NetworkSettings.Networks}} {{.IPAddress}}{{end}}", "front-x")
			if strings.Trim(strings.ReplaceAll(said, want, ""), " ") != "" {
				t.Errorf("%s: %s: inspect shows %s, want %s", h.Name, flags, said, want)
			}
			must(t, h, "docker", "rm", "-f", "front-x")
		}
	}
	u1 := l.Host("u1")
	weave(t, u1, "stop")
	launch(t, u1, append(subnets, "--no-dns", "--no-default-ipalloc", "--no-multicast-route", "u2")...)
	if got := run(t, u1, proxySocket, "", "without").addresses(t, "ethwe"); len(got) > 0 {
		t.Errorf("--no-default-ipalloc: %s", got)
	}
	with := run(t, u1, proxySocket, "ethwe", "with", "-e", "WEAVE_CIDR=net:default")
	if said := with.exec(t.Context(), "ip", "route").Stdout; strings.Contains(said, "224.0.0.0") || !strings.Contains(said, "ethwe") {
		t.Errorf("--no-multicast-route: %s", said)
	}
	must(t, u1, "docker", "rm", "-f", "with", "without")
	weave(t, u1, "stop")
	launch(t, u1, append(subnets, "--no-dns", "u2")...)
	established(t, l, patience)
}

// testBothWays: containers of all engines, by the plugin and by the proxy.
func testBothWays(t *testing.T, l *lab.Lab) {
	var plain, subnet, own []*container
	for i, h := range l.Hosts {
		must(t, h, "docker", "network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.32.2.0/24", "own")
		plain = append(plain, run(t, h, "", "ethwe", "p"+h.Name, "--net=weave"), run(t, h, proxySocket, "ethwe", "d"+h.Name))
		subnet = append(subnet, run(t, h, proxySocket, "ethwe", "s"+h.Name, "-e", "WEAVE_CIDR=net:10.32.1.0/24"))
		ip := fmt.Sprintf("10.32.2.%d", i+7)
		own = append(own, run(t, h, "", "ethwe", "o"+h.Name, "--net=own", "--ip", ip))
		if got := own[i].addr; got != netip.MustParsePrefix(ip+"/24") {
			t.Errorf("%s: %s with --ip %s", h.Name, got, ip)
		}
	}
	for _, cs := range [][]*container{plain, subnet, own} {
		for _, c := range cs {
			if c.addr.Masked() != cs[0].addr.Masked() {
				t.Errorf("%s has %s, %s %s", c.name, c.addr, cs[0].name, cs[0].addr)
			}
		}
		allReach(t, cs[len(cs)-1], cs[0], cs[len(cs)/2])
	}
	if subnet[0].reaches(t.Context(), plain[0].addr.Addr(), 56) == nil {
		t.Error("a container reaches one of another subnet")
	}
	for _, h := range l.Hosts {
		r := h.Docker(t.Context(), "-H", proxySocket, "run", "--name", "bad", "-e", "WEAVE_CIDR=ip:10.32.2.7/24", "busybox", "true")
		if r.Code == 0 || !strings.Contains(r.Stderr, "10.32.2.7") {
			t.Errorf("%s: an address of another's: exit %d, %s", h.Name, r.Code, r.Stderr)
		}
	}
	for _, h := range l.Hosts {
		must(t, h, "sh", "-c", "docker rm -f $(docker ps -aq) && docker network rm own")
	}
}

// testCompose: a project that is on the network by the plugin and by the proxy.
func testCompose(t *testing.T, h *lab.Host) {
	must(t, h, "sh", "-c", `mkdir -p /run/docker-config /run/project && ln -s "$1" /run/docker-config/cli-plugins && printf 'FROM busybox\nRUN echo built >/built\n' >/run/project/Dockerfile`,
		"sh", h.CLIPlugins())
	project := `
name: trial
services:
  plugin: {build: ., command: sleep 600, networks: [weave]}
  proxy: {image: busybox, command: sleep 600, network_mode: bridge, environment: {WEAVE_CIDR: "net:default"}}
networks:
  weave: {external: true}
`
	if err := os.WriteFile(h.Path("/run/project/compose.yaml"), []byte(project), 0o600); err != nil {
		t.Fatal(err)
	}
	compose := func(args ...string) string {
		t.Helper()
		return must(t, h, append(strings.Fields("docker -H "+proxySocket+" compose --project-directory /run/project"), args...)...)
	}
	compose("up", "-d", "--quiet-pull", "--build")
	for _, service := range []string{"plugin", "proxy"} {
		if said := compose("exec", "-T", service, "ip", "-4", "-o", "addr"); !strings.Contains(said, "10.32.0.") {
			t.Errorf("%s has\n%s", service, said)
		}
	}
	if said := compose("exec", "-T", "plugin", "cat", "/built"); said != "built" {
		t.Errorf("what BuildKit built says %q", said)
	}
	compose("down", "-t", "0")
	if left := must(t, h, "docker", "ps", "-aq"); left != "" {
		t.Errorf("left: %s", left)
	}
}

// testEngineRestart: containers that come back with the engine have their
// address when their first instruction runs.
func testEngineRestart(t *testing.T, h *lab.Host) {
	starts := map[string]string{"plugin": "--net=weave", "proxy": "--net=bridge"}
	for name, net := range starts {
		must(t, h, "docker", "-H", proxySocket, "run", "-d", "--restart=always", "--name", name, net, "busybox", "sh", "-c", "ip -4 -o addr; exec sleep 600")
	}
	if err := h.StopDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name := range starts {
		within(t, patience, name, func() error {
			said := must(t, h, "docker", "logs", name)
			if n := strings.Count(said, "inet 10.32.0."); n != 2 {
				return fmt.Errorf("the address is seen at %d of 2 starts:\n%s", n, said)
			}
			return nil
		})
	}
}
