package plugin

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"weave.local/proxy/docker"
	"weave.local/tests/lab"
)

// choices has containers name their addresses without the proxy.
func choices(t *testing.T, h *lab.Host, p *helper, run func(...string) string) {
	r := h.Docker(t.Context(), "network", "create", "-d", "weave", "--subnet", "10.43.0.0/24", "doubled")
	if r.Code == 0 || !strings.Contains(r.Stderr, "--ipam-driver weave") {
		t.Errorf("a network with addresses by the engine: exit %d, %s", r.Code, r.Stderr)
	}
	const show = "ip -4 -o addr; sleep 600"
	option := func(network, value string) string {
		return "name=" + network + ",driver-opt=" + docker.Choice + "=" + value
	}
	sees := func(name, want string, not ...string) {
		t.Helper()
		if err := logs(t, h, name, want, not...); err != nil {
			t.Error(err)
		}
	}
	run("network", "create", "-d", "weave", "--ipam-driver", "null", "any")
	run("run", "-d", "--name", "n1", "--network", option("any", "ip:10.41.1.5/24"), "busybox", "sh", "-c", show)
	run("run", "-d", "--name", "n2", "--network", option("any", "net:10.32.0.128/25"), "busybox", "sh", "-c", show)
	run("run", "-d", "--name", "n3", "--network", "any", "busybox", "sh", "-c", show)
	sees("n1", " 10.41.1.5/24")
	sees("n2", "/25 ")
	sees("n3", " 10.32.0.")
	if got := run("inspect", "-f", "{{.NetworkSettings.Networks.any.IPAddress}}", "n1"); got != "10.41.1.5" {
		t.Errorf("inspect shows %s", got)
	}
	run("restart", "-t", "0", "n1")
	if out := run("exec", "n1", "ip", "-4", "-o", "addr"); !strings.Contains(out, "10.41.1.5/24") {
		t.Errorf("after a restart:\n%s", out)
	}
	r = h.Docker(t.Context(), "run", "--rm", "--network", option("any", "ip:10.41.1.5/24"), "busybox", "true")
	if r.Code == 0 || !strings.Contains(r.Stderr, "10.41.1.5 is held by container") {
		t.Errorf("the same address again: exit %d, %s", r.Code, r.Stderr)
	}
	r = h.Docker(t.Context(), "run", "--rm", "--network", option("any", "net:nowhere"), "busybox", "true")
	if r.Code == 0 || !strings.Contains(r.Stderr, "net:nowhere") {
		t.Errorf("a bad option: exit %d, %s", r.Code, r.Stderr)
	}
	run("rm", "-f", "n1", "n2", "n3")
	run("network", "rm", "any")

	label := "--label=" + docker.Choice + "="
	settled := func(name, want string) {
		t.Helper()
		err := lab.Wait(t.Context(), 20*time.Second, func() error {
			if got := run("inspect", "-f", "{{range $n, $e := .NetworkSettings.Networks}}{{$n}} {{end}}", name); got != want {
				return fmt.Errorf("%s is on %s, want %s", name, got, want)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	run("create", "--name", "l1", "--net=weave", label+"ip:10.42.1.7/24", "busybox", "sh", "-c", show)
	settled("l1", "weave-10.42.1.0-24")
	run("start", "l1")
	sees("l1", " 10.42.1.7/24", "10.32.0.")
	run("run", "-d", "--name", "l2", "--net=weave", label+"10.42.1.8/24", "busybox", "sleep", "600")
	run("run", "-d", "--name", "l3", "--network", option("weave", "10.42.1.9/24"), "busybox", "sh", "-c", show)
	for name, want := range map[string]string{"l2": "10.42.1.8/24", "l3": "10.42.1.9/24"} {
		settled(name, "weave-10.42.1.0-24")
		out := run("exec", name, "ip", "-4", "-o", "addr")
		if !strings.Contains(out, want) || strings.Contains(out, "10.32.0.") {
			t.Errorf("%s has, want %s:\n%s", name, want, out)
		}
		run("exec", name, "ping", "-c", "1", "-W", "2", "10.42.1.7")
	}
	run("restart", "-t", "0", "l3")
	settled("l3", "weave-10.42.1.0-24")
	run("create", "--name", "l4", "--net=weave", label+"net:nowhere", "busybox", "true")
	if r := h.Docker(t.Context(), "start", "l4"); r.Code == 0 || !strings.Contains(r.Stderr, "net:nowhere") {
		t.Errorf("a bad label: exit %d, %s", r.Code, r.Stderr)
	}
	run("rm", "-f", "l1", "l2", "l3", "l4")
	run("network", "rm", "weave-10.42.1.0-24")
	if owned := p.ask(t, "owned"); owned != "map[]" {
		t.Errorf("addresses that are still owned: %s", owned)
	}
}

// logs waits for what a container says first.
func logs(t *testing.T, h *lab.Host, name, want string, not ...string) error {
	return lab.Wait(t.Context(), 20*time.Second, func() error {
		out := h.Docker(t.Context(), "logs", name).Stdout
		if !strings.Contains(out, want) {
			return fmt.Errorf("%s does not say %s:\n%s", name, want, out)
		}
		for _, s := range not {
			if strings.Contains(out, s) {
				return fmt.Errorf("%s says %s:\n%s", name, s, out)
			}
		}
		return nil
	})
}

// networks are made and used by hand.
func networks(t *testing.T, h *lab.Host, run func(...string) string) {
	run("network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.44.0.0/24",
		"--opt", docker.OptionMulticast, "mine")
	// The command would not send a MAC address to an old engine.
	create(t, h, "m1", `{"Image":"busybox","Cmd":["sleep","600"],"MacAddress":"7a:00:00:00:00:09","HostConfig":{"NetworkMode":"mine"},
		"NetworkingConfig":{"EndpointsConfig":{"mine":{"IPAMConfig":{"IPv4Address":"10.44.0.9"},"Aliases":["nine"],"MacAddress":"7a:00:00:00:00:09"}}}}`)
	run("start", "m1")
	out := run("exec", "m1", "sh", "-c", "ip addr show ethwe0; ip route")
	for _, want := range []string{"10.44.0.9/24", "7a:00:00:00:00:09", "224.0.0.0/4 dev ethwe0"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %s in\n%s", want, out)
		}
	}
	run("run", "-d", "--name", "m2", "--network", "mine", "--ip", "10.44.0.10", "busybox", "sleep", "600")
	run("exec", "m2", "ping", "-c", "1", "-W", "2", "nine") // by Docker's own name service
	run("network", "connect", "--ip", "10.32.0.90", "weave", "m1")
	if out := run("exec", "m1", "ip", "-4", "-o", "addr"); !strings.Contains(out, "10.32.0.90/24") || !strings.Contains(out, "10.44.0.9/24") {
		t.Errorf("on two networks:\n%s", out)
	}
	run("network", "disconnect", "mine", "m1")
	if out := run("exec", "m1", "ip", "-4", "-o", "addr"); !strings.Contains(out, "10.32.0.90/24") || strings.Contains(out, "10.44.0.9/24") {
		t.Errorf("off one of two networks:\n%s", out)
	}
	run("restart", "-t", "0", "m1")
	if out := run("exec", "m1", "ip", "-4", "-o", "addr"); !strings.Contains(out, "10.32.0.90/24") {
		t.Errorf("after a restart:\n%s", out)
	}
	for bad, why := range map[string]string{"works.weave.multicast=maybe": "want true or false"} {
		r := h.Docker(t.Context(), "network", "create", "-d", "weave", "--ipam-driver", "weave", "--subnet", "10.45.0.0/24", "--opt", bad, "bad")
		if r.Code == 0 || !strings.Contains(r.Stderr, why) {
			t.Errorf("--opt %s: exit %d, %s", bad, r.Code, r.Stderr)
		}
	}
	run("rm", "-f", "m1", "m2")
	run("network", "rm", "mine")
	run("network", "create", "-d", "bridge", "--ipam-driver", "weave", "--subnet", "10.46.0.0/24", "half")
	r := h.Docker(t.Context(), "run", "--rm", "--net=half", "busybox", "true")
	if r.Code == 0 || !strings.Contains(r.Stderr, "network half has driver bridge") {
		t.Errorf("a network of another driver with our addresses: exit %d, %s", r.Code, r.Stderr)
	}
	run("network", "rm", "half")
}

// create makes a container by the API itself.
func create(t *testing.T, h *lab.Host, name, body string) {
	t.Helper()
	if err := call(t.Context(), h, http.MethodPost, "/containers/create?name="+name, body); err != nil {
		t.Fatal(err)
	}
}

// call speaks to the engine itself.
func call(ctx context.Context, h *lab.Host, method, path, body string) error {
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", h.Path("/run/docker.sock"))
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text)
	}
	return err
}

func TestGivenUp(t *testing.T) {
	dead := `legacy plugin: Post "http://%2Frun%2Fdocker%2Fplugins%2Fweave.sock/Plugin.Activate": dial unix /run/docker/plugins/weave.sock: connect: connection refused`
	for _, c := range []struct {
		policy, failure string
		want            bool
	}{
		{"always", dead, true},
		{"unless-stopped", `plugin "weave" not found`, true},
		{"on-failure", "NetworkDriver.Join: endpoint 0123 is not known", true},
		{"no", dead, false},
		{"", dead, false},
		{"always", "", false},
		{"always", `plugin "other" not found`, false},
		{"always", `exec: "nosuch": executable file not found in $PATH`, false},
	} {
		if got := givenUp(c.policy, c.failure); got != c.want {
			t.Errorf("policy %q, %q: got %v", c.policy, c.failure, got)
		}
	}
}
