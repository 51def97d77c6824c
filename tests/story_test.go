package tests

import (
	"testing"

	"weave.local/tests/lab"
)

// TestFromLaunchToReset is the life of a network on three hosts with Docker.
func TestFromLaunchToReset(t *testing.T) {
	l := hosts(t)
	before := map[string]lab.State{}
	for _, h := range l.Hosts {
		must(t, h, "docker", "run", "--rm", "--net=none", "busybox", "true") // leaves what Docker leaves anyway
		before[h.Name] = state(t, h)
	}
	step(t, "help", func(t *testing.T) { testHelp(t, l.Host("u1")) })
	step(t, "refused launches", func(t *testing.T) { testRefusedLaunches(t, l.Host("u1")) })
	var names map[string]string
	step(t, "launch", func(t *testing.T) { names = testLaunch(t, l) })
	step(t, "status", func(t *testing.T) { testStatus(t, l, names) })
	var cs []*container
	step(t, "plugin", func(t *testing.T) { cs = testPlugin(t, l, names) })
	step(t, "counted", func(t *testing.T) { testCounted(t, cs, names) })
	step(t, "expose", func(t *testing.T) { testExpose(t, l, cs) })
	step(t, "reset", func(t *testing.T) { testReset(t, l, before) })
	step(t, "relaunch", func(t *testing.T) { testRelaunch(t, l) })
}

// TestThroughTheProxy is about subnets apart from each other, and about all
// ways in besides Docker's network `weave`.
func TestThroughTheProxy(t *testing.T) {
	l := hosts(t)
	launchAll(t, l, "--ipalloc-range", "10.32.0.0/16", "--ipalloc-default-subnet", "10.32.0.0/24")
	var cs map[string]*container
	step(t, "subnets", func(t *testing.T) { cs = testSubnets(t, l) })
	step(t, "isolation", func(t *testing.T) { testIsolation(t, cs) })
	step(t, "addresses", func(t *testing.T) { testAddressRules(t, l) })
	step(t, "networks", func(t *testing.T) { testNetworkRules(t, l.Host("u1")) })
	step(t, "holders", func(t *testing.T) { testHolders(t, l, cs["b1"]) })
	step(t, "restart", func(t *testing.T) { testRestart(t, cs) })
	step(t, "docker", func(t *testing.T) { testDockerAsWithout(t, l.Host("u1")) })
	step(t, "attach", func(t *testing.T) { testAttach(t, l, cs) })
	step(t, "attach netns", func(t *testing.T) { testAttachNetNS(t, l, cs) })
}

// TestTroubles is what the network lives through.
func TestTroubles(t *testing.T) {
	l := hosts(t)
	launchAll(t, l)
	var cs []*container
	for i, h := range l.Hosts {
		cs = append(cs, run(t, h, "", "ethwe0", []string{"c1", "c2", "c3"}[i], "--net=weave"))
	}
	allReach(t, cs...)
	step(t, "blocked port", func(t *testing.T) { testBlockedPort(t, l, cs) })
	step(t, "cut underlay", func(t *testing.T) { testCut(t, l, cs) })
	step(t, "killed daemon", func(t *testing.T) { testKilled(t, l, cs) })
	step(t, "stopped daemon", func(t *testing.T) { testStopped(t, l, cs) })
	step(t, "restarts", func(t *testing.T) { testRestarts(t, l, cs) })
	step(t, "targets", func(t *testing.T) { testTargets(t, l) })
}
