package tests

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// testLaunch: launch in any order, each naming the others.
func testLaunch(t *testing.T, l *lab.Lab) map[string]string {
	t.Helper()
	names := map[string]string{}
	var slowest time.Duration
	for _, h := range []*lab.Host{l.Host("u3"), l.Host("u1"), l.Host("u2")} { // the first ones name some that are not up
		name, took := launch(t, h, slices.Concat([]string{"--no-dns"}, others(l, h))...)
		for other, n := range names {
			if n == name {
				t.Errorf("%s and %s have the same name %s", h.Name, other, name)
			}
		}
		names[h.Name] = name
		slowest = max(slowest, took)
	}
	begin := time.Now()
	established(t, l, meshBar)
	t.Logf("ready in %s at most, mesh %s after the last launch", slowest.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	if slowest > readyBar {
		t.Errorf("launch took %s, want at most %s", slowest, readyBar)
	}
	refused(t, l.Host("u1"), 3, []string{"already running"}, "weave", "launch", "u2")
	refused(t, l.Host("u1"), 3, []string{"already running"}, "weave", "launch", "--foreground")
	return names
}

// testRefusedLaunches: what can't work is said in one line and leaves nothing.
func testRefusedLaunches(t *testing.T, h *lab.Host) {
	before := state(t, h)
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"--frobnicate"}, []string{"--frobnicate"}},
		{[]string{"--port", "seven"}, []string{"seven"}},
		{[]string{"--port", "65535"}, []string{"65535"}},
		{[]string{"--name", "u1"}, []string{"--name", "u1"}},
		{[]string{"--ipalloc-range", "10.32.0.0"}, []string{"--ipalloc-range", "10.32.0.0"}},
		{[]string{"--ipalloc-range", "10.32.0.1/16"}, []string{"10.32.0.0/16"}},
		{[]string{"--ipalloc-range", "10.32.0.0/16", "--ipalloc-default-subnet", "10.99.0.0/24"}, []string{"10.99.0.0/24"}},
		{[]string{"--ipalloc-init", "sometimes"}, []string{"sometimes", "consensus"}},
		{[]string{"--ipalloc-range", "192.0.2.0/24"}, []string{"192.0.2.0/24", "eth0", "--ipalloc-range"}},
		{[]string{"--ipalloc-range", "172.16.0.0/12"}, []string{"172.16.0.0/12", "docker0"}},
		{[]string{"no-such-host", "nor-this-one"}, []string{"no-such-host", "nor-this-one"}},
		{[]string{"u2:port"}, []string{"u2:port"}},
	} {
		refused(t, h, 1, c.words, slices.Concat([]string{"weave", "launch"}, c.args)...)
		asBefore(t, h, before)
	}
	refused(t, h, 1, []string{"root"}, "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "weave", "launch", "u2")
	refused(t, h, 1, []string{"nonsense"}, "weave", "nonsense")
	refused(t, h, 1, []string{"not running"}, "weave", "status")
	refused(t, h, 1, []string{"not running"}, "weave", "expose")
	asBefore(t, h, before)

	// A port that is taken.
	stop := must(t, h, "sh", "-c", "busybox nc -l -p 6783 >/dev/null 2>&1 </dev/null & echo $!")
	within(t, patience, "listener", func() error { return h.Run(t.Context(), "sh", "-c", "ss -Hlnt | grep -q :6783").Err() })
	refused(t, h, 1, []string{"6783"}, "weave", "launch", "u2")
	must(t, h, "kill", stop)
	asBefore(t, h, before)
}

// TestDiscovery: knowing one peer is enough to find all.
func TestDiscovery(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3", "u4"}})
	launch(t, l.Host("u1"), "--docker-api", "")
	launch(t, l.Host("u2"), "--docker-api", "", "u1")
	launch(t, l.Host("u4"), "--docker-api", "", "u3") // which is not up yet
	launch(t, l.Host("u3"), "--docker-api", "", "u2")
	established(t, l, patience)
	if got := weave(t, l.Host("u3"), "status", "targets"); got != "u2" {
		t.Errorf("targets of u3: %q, want what it was told: u2", got)
	}
	exposedReach(t, l)

	// Without discovery only those named are connected; the others are reached
	// through them.
	for _, h := range l.Hosts {
		weave(t, h, "reset")
	}
	for i, h := range l.Hosts {
		args := []string{"--docker-api", "", "--no-discovery", "--ipalloc-init", "consensus=4"}
		if i > 0 {
			args = append(args, l.Hosts[i-1].Name)
		}
		launch(t, h, args...)
	}
	for i, h := range l.Hosts {
		want := 2
		if i == 0 || i == len(l.Hosts)-1 {
			want = 1
		}
		within(t, patience, "line", func() error { return on(t.Context(), h, want, "fastdp") })
	}
	exposedReach(t, l)
}

// exposedReach exposes all hosts: the addresses differ, and all reach all.
func exposedReach(t *testing.T, l *lab.Lab) {
	t.Helper()
	seen := map[string]bool{}
	for _, h := range l.Hosts {
		addr := weave(t, h, "expose")
		if seen[addr] {
			t.Errorf("%s got %s, which another has", h.Name, addr)
		}
		seen[addr] = true
	}
	for _, h := range l.Hosts {
		for addr := range seen {
			within(t, patience, h.Name+" to "+addr, func() error {
				return h.Run(t.Context(), "busybox", "ping", "-c", "1", "-W", "1", addr).Err()
			})
		}
	}
}

// testStatus: what each host tells once the mesh stands.
func testStatus(t *testing.T, l *lab.Lab, names map[string]string) {
	ways := map[string]string{}
	for _, h := range l.Hosts {
		var cs []connection
		// A target that was not up when it was tried shows until the next try.
		within(t, patience, h.Name, func() error {
			var err error
			if cs, err = connections(t.Context(), h); err == nil && len(cs) != 2 {
				err = fmt.Errorf("%d lines of connections, want 2: %v", len(cs), cs)
			}
			return err
		})
		for _, c := range cs {
			ways[h.Name+" "+c.nick] = c.way
			if names[c.nick] != c.peer {
				t.Errorf("%s: %q: %s is %s", h.Name, c.line, c.nick, names[c.nick])
			}
			// Columns are those that scripts cut by.
			want := fmt.Sprintf(`%s %-21s established fastdp %s(%s) mtu=1450`, c.way, c.address, c.peer, c.nick)
			if c.line != want {
				t.Errorf("%s: %q, want %q", h.Name, c.line, want)
			}
			if !strings.HasPrefix(c.address, l.Host(c.nick).Addr.String()+":") {
				t.Errorf("%s: %q: %s is at %s", h.Name, c.line, c.nick, l.Host(c.nick).Addr)
			}
		}
	}
	for pair, way := range ways {
		a, b, _ := strings.Cut(pair, " ")
		if ways[b+" "+a] == way {
			t.Errorf("between %s and %s both say %q", a, b, way)
		}
	}
	for _, h := range l.Hosts {
		t.Run(h.Name, func(t *testing.T) { testStatusOf(t, l, h, names) })
	}
}

const statusText = `^
        Version: \S+ \(version check update disabled\)

        Service: router
       Protocol: weave \d+(\.\.\d+)?
           Name: %s\(%s\)
     Encryption: disabled
  PeerDiscovery: enabled
        Targets: 2
    Connections: 2 \(2 established\)
          Peers: 3 \(with 6 established connections\)
 TrustedSubnets: none

        Service: ipam
         Status: \S[^\n]*
          Range: 10\.32\.0\.0/12
  DefaultSubnet: 10\.32\.0\.0/12

        Service: proxy
        Address: unix:///var/run/weave/weave\.sock

        Service: plugin \(legacy\)
     DriverName: weave

$`

func testStatusOf(t *testing.T, l *lab.Lab, h *lab.Host, names map[string]string) {
	name := names[h.Name]
	r := h.Run(t.Context(), "weave", "status")
	if want := regexp.MustCompile(fmt.Sprintf(statusText, name, h.Name)); r.Err() != nil || !want.MatchString(r.Stdout) {
		t.Errorf("status is\n%s%v, want\n%s", r.Stdout, r.Err(), want)
	}
	if got := strings.Fields(weave(t, h, "status", "targets")); !slices.Equal(sorted(got), others(l, h)) {
		t.Errorf("targets %v, want %v", got, others(l, h))
	}
	testPeers(t, l, weave(t, h, "status", "peers"), names)
	refused(t, h, 1, []string{"weather"}, "weave", "status", "weather")

	if got := weave(t, h, "report", "-f", "{{.Router.Name}} {{.Router.NickName}}"); got != name+" "+h.Name {
		t.Errorf("report by template: %q", got)
	}
	if got := weave(t, h, "report", "-f", "{{json .Router.PeerDiscovery}}"); got != "true" {
		t.Errorf("report by template with json: %q", got)
	}
	refused(t, h, 1, []string{"template"}, "weave", "report", "-f", "{{.Router")
	var report struct {
		Ready   bool
		Version string
		Router  struct {
			Name        string
			Connections []struct{ State string }
			Peers       []struct{ Name string }
		}
		IPAM struct{ Range string }
	}
	if err := json.Unmarshal([]byte(weave(t, h, "report")), &report); err != nil {
		t.Errorf("report: %v", err)
	}
	if !report.Ready || report.Router.Name != name || len(report.Router.Peers) != 3 || len(report.Router.Connections) != 2 || report.IPAM.Range != "10.32.0.0/12" {
		t.Errorf("report: %+v", report)
	}
	if got := weave(t, h, "version"); !regexp.MustCompile(`^weave script ` + regexp.QuoteMeta(report.Version) + `\nweave ` + regexp.QuoteMeta(report.Version) + `$`).MatchString(got) {
		t.Errorf("version: %q, the report says %q", got, report.Version)
	}
	if got := weave(t, h, "config"); got != "-H=unix:///var/run/weave/weave.sock" {
		t.Errorf("config: %q", got)
	}
	if got := weave(t, h, "env"); !regexp.MustCompile(`^export DOCKER_HOST=unix:///var/run/weave/weave\.sock ORIG_DOCKER_HOST=$`).MatchString(got) {
		t.Errorf("env: %q", got)
	}
	both := must(t, h, "bash", "-c", `eval $(weave env); docker version -f '{{.Server.Os}}'; eval $(weave env --restore); echo "[$DOCKER_HOST]"`)
	if both != "linux\n[]" {
		t.Errorf("env and env --restore: %q", both)
	}
	testMemory(t, h)
}

// testPeers checks the format of `weave status peers`: every peer, and its
// links below it.
func testPeers(t *testing.T, l *lab.Lab, text string, names map[string]string) {
	t.Helper()
	head := regexp.MustCompile(`^(` + peerName + `)\((\S+)\)$`)
	link := regexp.MustCompile(`^   (->|<-) \S+:\d+ +(` + peerName + `)\((\S+)\) +established$`)
	links := map[string][]string{}
	at := ""
	for line := range strings.Lines(text + "\n") {
		line = strings.TrimRight(line, "\n")
		if m := head.FindStringSubmatch(line); m != nil && names[m[2]] == m[1] {
			at = m[2]
			continue
		}
		m := link.FindStringSubmatch(line)
		if m == nil || names[m[3]] != m[2] {
			t.Fatalf("status peers: what is %q in\n%s", line, text)
		}
		if want := fmt.Sprintf("   %s %-21s %-37s established", m[1], strings.Fields(line)[1], m[2]+"("+m[3]+")"); line != want {
			t.Errorf("status peers: %q, want %q", line, want)
		}
		links[at] = append(links[at], m[3])
	}
	for _, h := range l.Hosts {
		if got := sorted(links[h.Name]); !slices.Equal(got, others(l, h)) {
			t.Errorf("status peers: %s has links to %v, want %v:\n%s", h.Name, got, others(l, h), text)
		}
	}
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

// testMemory: a daemon that has nothing to do is small.
func testMemory(t *testing.T, h *lab.Host) {
	t.Helper()
	pid := daemonPID(t, h)
	text := must(t, h, "grep", "VmRSS", "/proc/"+pid+"/status")
	kb, err := strconv.Atoi(strings.Fields(text)[1])
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("memory of the daemon: %.1f MB", float64(kb)/1024)
	if kb<<10 > rssBar {
		t.Errorf("the daemon has %d kB, want at most %d", kb, rssBar>>10)
	}
}

// testIPAMStatus checks `weave status ipam` once addresses are in use.
func testIPAMStatus(t *testing.T, h *lab.Host, names map[string]string) {
	t.Helper()
	row := regexp.MustCompile(`^(\S+) +(\d+) IPs \((\d\d\.\d|100\.0)% of total\)(.*)$`)
	total := 0
	for i, line := range strings.Split(weave(t, h, "status", "ipam"), "\n") {
		m := row.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("%s: status ipam: what is %q?", h.Name, line)
		}
		if self := names[h.Name] + "(" + h.Name + ")"; i == 0 && (m[1] != self || !regexp.MustCompile(`\(\d+ active\)`).MatchString(m[4])) {
			t.Errorf("%s: status ipam begins with %q, want itself with what is active", h.Name, line)
		}
		n, err := strconv.Atoi(m[2])
		if err != nil {
			t.Fatal(err)
		}
		total += n
	}
	if total != 1<<20 {
		t.Errorf("%s: status ipam accounts for %d addresses of %d", h.Name, total, 1<<20)
	}
}

// testHelp: every command explains itself, and shells can complete them.
func testHelp(t *testing.T, h *lab.Host) {
	help := weave(t, h, "help")
	for _, c := range strings.Fields(`launch stop reset status report ps version connect forget rmpeer prime
		attach detach expose hide env config completion`) {
		if !regexp.MustCompile(`(?m)^ +` + c + ` `).MatchString(help) {
			t.Errorf("help does not list %s", c)
		}
		if text := weave(t, h, "help", c); len(text) < 100 || !strings.Contains(text, "Usage:") {
			t.Errorf("help %s: %q", c, text)
		}
	}
	must(t, h, "bash", "-c", "weave completion bash | bash -n")
	if got := weave(t, h, "__complete", "sta"); !strings.HasPrefix(got, "status") {
		t.Errorf("completion of \"sta\": %q", got)
	}
}
