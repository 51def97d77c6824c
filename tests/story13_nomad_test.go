package tests

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"weave.local/tests/lab"
	"weave.local/tests/setup"
)

// nomadEnv names the nomad program where it is not in PATH. No release of Debian
// has it, so that the story of it is told where somebody has brought it.
const nomadEnv = "TEST_NOMAD"

// nomadCluster is Nomad and Consul on all hosts.
type nomadCluster struct {
	*lab.Lab
	nomad string // the program
}

// TestNomad runs jobs of Nomad, on u1 with Docker's own API and on u2 with
// Docker's API by way of weave. What Consul tells of them is compared with the
// addresses that their containers have.
func TestNomad(t *testing.T) {
	nomad := os.Getenv(nomadEnv)
	if nomad == "" {
		nomad, _ = exec.LookPath("nomad")
	}
	if nomad == "" {
		t.Logf("left out: there is no nomad in PATH, and %s names none", nomadEnv)
		return
	}
	consul, err := setup.Consul(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	removeGroups(t)
	l := build(t, lab.Config{Docker: true, Hosts: []string{"u1", "u2"}})
	flags := []string{"--ipalloc-range", "10.32.0.0/16", "--ipalloc-default-subnet", "10.32.0.0/24", "--rewrite-inspect"}
	launchAll(t, l, flags...)
	c := &nomadCluster{l, nomad}
	c.start(t, consul)
	var before []string
	for _, h := range l.Hosts {
		before = append(before, addressesOf(t, h))
	}
	var web, blue []*container
	step(t, "network", func(t *testing.T) { web = c.testNetwork(t) })
	step(t, "proxy", func(t *testing.T) { blue = c.testProxy(t) })
	step(t, "restarts", func(t *testing.T) { c.testRestarts(t, flags, web, blue) })
	step(t, "stop", func(t *testing.T) { c.testStop(t, before) })
}

// removeGroups removes, after the lab, the control groups that Nomad makes for the
// whole machine and leaves; not those of a machine that has a Nomad itself.
func removeGroups(t *testing.T) {
	const pattern = "/sys/fs/cgroup/*/nomad"
	if there, _ := filepath.Glob(pattern); len(there) > 0 {
		return
	}
	t.Cleanup(func() {
		left, _ := filepath.Glob(pattern)
		for _, dir := range left {
			if out, err := exec.Command("find", dir, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+").CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
	})
}

// start starts Consul and Nomad everywhere, and waits until Nomad can run
// containers everywhere.
func (c *nomadCluster) start(t *testing.T, consul string) {
	t.Helper()
	for i, h := range c.Hosts {
		must(t, h, "docker", "tag", "busybox", "busybox:1") // the latest is always pulled
		weave(t, h, "expose", "net:default", "net:10.32.9.0/24")
		mode, files, way := []string{"-dev"}, []string{"agent.hcl", "server.hcl", "docker.hcl"}, "docker"
		if i > 0 {
			mode, files, way = []string{"-data-dir", "/var/lib/consul", "-retry-join", "u1"}, []string{"agent.hcl", "proxy.hcl"}, "proxy"
		}
		c.daemon(t, h, consul, append(mode, "-bind", h.Addr.String(), "-node", h.Name)...)
		own := filepath.Join(c.Dir(), h.Name+".hcl")
		// Of use with control groups of version 2; see removeGroups.
		text := fmt.Sprintf("advertise {\n  http = %[1]q\n  rpc  = %[1]q\n  serf = %[1]q\n}\nclient {\n  cgroup_parent = \"/%[2]s-%[3]s-nomad\"\n  meta {\n    docker = %[4]q\n  }\n}\n",
			h.Addr, filepath.Base(c.Dir()), h.Name, way)
		if err := os.WriteFile(own, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args := []string{"-config", own}
		for _, f := range files {
			args = append(args, "-config", testdata(t, f))
		}
		c.daemon(t, h, c.nomad, args...)
	}
	within(t, time.Minute, "Nomad", func() error {
		said, err := c.Host("u1").Output(t.Context(), c.nomad, "operator", "api", "/v1/nodes")
		var nodes []struct {
			Status  string
			Drivers map[string]struct{ Healthy bool }
		}
		if err == nil {
			err = json.Unmarshal([]byte(said), &nodes)
		}
		ready := 0
		for _, n := range nodes {
			if n.Status == "ready" && n.Drivers["docker"].Healthy {
				ready++
			}
		}
		if err == nil && ready != len(c.Hosts) {
			err = fmt.Errorf("%d of %d nodes are ready: %s", ready, len(c.Hosts), said)
		}
		return err
	})
}

func testdata(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata/nomad", name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// daemon starts an agent; it ends with its host.
func (c *nomadCluster) daemon(t *testing.T, h *lab.Host, program string, args ...string) {
	t.Helper()
	path := filepath.Join(c.Dir(), h.Name+"-"+filepath.Base(program)+".log")
	log, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(program, append([]string{"agent"}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root"} // settings of clouds are none of its business
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	t.Cleanup(func() {
		if t.Failed() {
			said, _ := os.ReadFile(path)
			t.Logf("---- %s ----\n%s", filepath.Base(path), said[max(0, len(said)-8000):])
		}
	})
}

func (c *nomadCluster) run(t *testing.T, job string) {
	t.Helper()
	must(t, c.Host("u1"), c.nomad, "job", "run", "-detach", testdata(t, job+".nomad.hcl"))
}

// tasks are the containers of a job's tasks, which have its name.
func (c *nomadCluster) tasks(t *testing.T, job string) []*container {
	t.Helper()
	var out []*container
	for _, h := range c.Hosts {
		for id := range strings.FieldsSeq(must(t, h, "docker", "ps", "-q", "-f", "name=^"+job+"-")) {
			task := &container{Host: h, name: id, device: "ethwe"}
			// One that just ends has none.
			if r := task.exec(t.Context(), "true"); r.Code == 0 {
				if addrs := task.addresses(t, task.device); len(addrs) == 1 {
					task.addr = addrs[0]
				}
			}
			out = append(out, task)
		}
	}
	return out
}

// serve waits until a job has n tasks, and Consul those and no others: at the
// addresses that their containers have, where it has reached them.
func (c *nomadCluster) serve(t *testing.T, job string, n int) (tasks []*container) {
	t.Helper()
	within(t, time.Minute, job, func() error {
		tasks = c.tasks(t, job)
		var services []struct {
			Node    struct{ Node string }
			Service struct {
				Address string
				Port    int
			}
			Checks []struct{ Status string }
		}
		said := must(t, c.Host("u1"), "curl", "-s", "http://127.0.0.1:8500/v1/health/service/"+job)
		if err := json.Unmarshal([]byte(said), &services); err != nil {
			return err
		}
		var want, got []string
		for _, task := range tasks {
			want = append(want, fmt.Sprintf("%s %s:8080 all pass", task.Host.Name, task.addr.Addr()))
		}
		for _, s := range services {
			state := "all pass"
			for _, check := range s.Checks {
				if check.Status != "passing" {
					state = "not all pass"
				}
			}
			got = append(got, fmt.Sprintf("%s %s:%d %s", s.Node.Node, s.Service.Address, s.Service.Port, state))
		}
		if len(tasks) != n || !slices.Equal(sorted(got), sorted(want)) {
			return fmt.Errorf("containers: %q, Consul: %q; want %d", want, got, n)
		}
		return nil
	})
	return tasks
}

// fetch gets what the server at a task's address says.
func fetch(t *testing.T, from, to *container, want string) {
	t.Helper()
	within(t, patience, from.name+" from "+to.name, func() error {
		// Its wget does not run as a static program.
		r := from.exec(t.Context(), "sh", "-c", `printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 2 "$0" 8080`, to.addr.Addr().String())
		if err := r.Err(); err != nil || !strings.HasSuffix(r.Stdout, "\r\n\r\n"+want) {
			return fmt.Errorf("%q, want %q: %w", r.Stdout, want, err)
		}
		return nil
	})
}

// testNetwork: network_mode = "weave".
func (c *nomadCluster) testNetwork(t *testing.T) []*container {
	c.run(t, "web")
	web := c.serve(t, "web", 2)
	fetch(t, web[0], web[1], "web on u2")
	fetch(t, web[1], web[0], "web on u1")
	return web
}

// testProxy: the proxy as Docker's endpoint, and WEAVE_CIDR.
func (c *nomadCluster) testProxy(t *testing.T) []*container {
	c.run(t, "blue")
	blue := c.serve(t, "blue", 2)
	other := run(t, c.Host("u1"), proxySocket, "ethwe", "other", "-e", "WEAVE_CIDR=net:10.32.9.0/24")
	for _, task := range blue {
		if task.addr.Masked() != other.addr.Masked() || task.Host.Name != "u2" {
			t.Errorf("a task has %s on %s, want one of %s on u2", task.addr, task.Host.Name, other.addr.Masked())
		}
		fetch(t, other, task, "blue")
	}
	fetch(t, blue[0], blue[1], "blue")
	must(t, other.Host, "docker", "rm", "-f", other.name)
	return blue
}

// testRestarts: weave is stopped, killed and launched, of which Nomad takes no
// notice; then all tasks die.
func (c *nomadCluster) testRestarts(t *testing.T, flags []string, web, blue []*container) {
	for _, h := range c.Hosts {
		weave(t, h, "stop")
		launch(t, h, slices.Concat(flags, []string{"--no-dns"}, others(c.Lab, h))...)
		must(t, h, "sh", "-c", "kill -9 $0; while [ -d /proc/$0 ]; do sleep 0.05; done", daemonPID(t, h))
		launch(t, h, slices.Concat(flags, []string{"--no-dns"}, others(c.Lab, h))...)
	}
	established(t, c.Lab, patience)
	for job, tasks := range map[string][]*container{"web": web, "blue": blue} {
		var before, after []string
		for _, task := range tasks {
			before = append(before, task.name+" "+task.addr.String())
		}
		for _, task := range c.serve(t, job, 2) {
			after = append(after, task.name+" "+task.addr.String())
		}
		if !slices.Equal(before, after) {
			t.Errorf("%s before: %q, after: %q", job, before, after)
		}
	}
	fetch(t, web[1], web[0], "web on u1")
	for _, h := range c.Hosts {
		must(t, h, "sh", "-c", "docker kill $(docker ps -q)")
	}
	for job, tasks := range map[string][]*container{"web": web, "blue": blue} {
		fresh := c.serve(t, job, 2)
		for _, task := range fresh {
			if slices.ContainsFunc(tasks, func(old *container) bool { return old.name == task.name }) {
				t.Errorf("%s: container %s runs again, want a new one", job, task.name)
			}
		}
		if job == "web" {
			fetch(t, fresh[0], fresh[1], "web on u2")
		} else {
			fetch(t, fresh[0], fresh[1], "blue")
		}
	}
}

// addressesOf is what has addresses on a host.
func addressesOf(t *testing.T, h *lab.Host) string {
	t.Helper()
	return must(t, h, "sh", "-c", `weave ps; weave status ipam | grep -o '([0-9]* active)'`)
}

// testStop: of jobs that are stopped nothing stays.
func (c *nomadCluster) testStop(t *testing.T, before []string) {
	for _, job := range []string{"web", "blue"} {
		must(t, c.Host("u1"), c.nomad, "job", "stop", "-purge", "-detach", job)
	}
	within(t, patience, "leftovers", func() error {
		for i, h := range c.Hosts {
			containers := must(t, h, "docker", "ps", "-aq")
			if addrs := addressesOf(t, h); addrs != before[i] || containers != "" {
				return fmt.Errorf("%s: containers %q, addresses\n%s\nbefore:\n%s", h.Name, containers, addrs, before[i])
			}
		}
		for _, job := range []string{"web", "blue"} {
			if said := must(t, c.Host("u1"), "curl", "-s", "http://127.0.0.1:8500/v1/catalog/service/"+job); said != "[]" {
				return fmt.Errorf("Consul has %s", said)
			}
		}
		return nil
	})
}
