package tests

import (
	"fmt"
	"strings"
	"testing"

	"weave.local/tests/lab"
)

// testHolders: whoever asks for an address that is taken, in whatever way and on
// whatever host, is told which container has it and where; and of a subnet that
// is used up, how many addresses each host has in use.
func testHolders(t *testing.T, l *lab.Lab, held *container) {
	must(t, held.Host, "docker", "network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.32.1.0/24", "held")
	other := l.Host("u2")
	must(t, other, "docker", "network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.32.1.0/24", "held")
	addr, id := held.addr.Addr(), must(t, held.Host, "docker", "inspect", "-f", "{{.Id}}", held.name)[:12]
	small := "net:10.32.9.0/30" // two addresses
	full := "range exhausted in 10.32.9.0/30: 2 of 2 in use ("
	run(t, held.Host, proxySocket, "ethwe", "small1", "-e", "WEAVE_CIDR="+small)
	run(t, other, proxySocket, "ethwe", "small2", "-e", "WEAVE_CIDR="+small)
	for _, h := range []*lab.Host{held.Host, other} {
		where := held.Host.Name
		if h == held.Host {
			where = "this host"
		}
		must(t, h, "docker", "run", "-d", "--name", "asker", "--net=none", "busybox", "sleep", "3600")
		taken := fmt.Sprintf("%s is held by container %s on %s", addr, id, where)
		for _, c := range []struct {
			want string
			args []string
		}{
			{taken, []string{"docker", "-H", proxySocket, "run", "--rm", "-e", "WEAVE_CIDR=ip:" + held.addr.String(), "busybox", "true"}},
			{taken, []string{"docker", "run", "--rm", "--net=held", "--ip", addr.String(), "busybox", "true"}},
			{taken, []string{"weave", "attach", held.addr.String(), "asker"}},
			{full, []string{"docker", "-H", proxySocket, "run", "--rm", "-e", "WEAVE_CIDR=" + small, "busybox", "true"}},
			{full, []string{"weave", "attach", small, "asker"}},
		} {
			r := h.Run(t.Context(), c.args...)
			t.Logf("%s: %s: %s", h.Name, strings.Join(c.args, " "), r.Stderr)
			if r.Code == 0 || !strings.Contains(r.Stderr, c.want) {
				t.Errorf("%s: %s: exit %d, said %q, want %q", h.Name, strings.Join(c.args, " "), r.Code, r.Stderr, c.want)
			}
			if both := strings.Contains(r.Stderr, "u1 1") && strings.Contains(r.Stderr, "u2 1"); c.want == full && !both {
				t.Errorf("%s: %q does not say who has them", h.Name, r.Stderr)
			}
		}
		must(t, h, "docker", "rm", "-f", "asker")
		must(t, h, "docker", "network", "rm", "held")
	}
	must(t, held.Host, "docker", "rm", "-f", "small1")
	must(t, other, "docker", "rm", "-f", "small2")
}
