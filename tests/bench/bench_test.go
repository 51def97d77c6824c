package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

func TestFlags(t *testing.T) {
	o, err := parse([]string{"--only", "wire,tcp1,udp", "--runs", "5"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(o.only.underlays, []string{"wire"}) || !slices.Equal(o.only.paths, allPaths()) || !slices.Equal(o.only.measures, []string{"tcp1", "udp"}) {
		t.Errorf("%+v", o.only)
	}
	o, err = parse([]string{"--only", "fastdp,raw", "--endpoints", "100"}, io.Discard)
	if err != nil || !slices.Equal(o.only.paths, []string{"fastdp", fullPath, "raw"}) {
		t.Errorf("%+v, %v", o.only, err)
	}
	for _, bad := range [][]string{{"--endpoints", "100000"}, {"--endpoints", "1", "--peers", "0"}, {"--only", "wine"}, {"--runs", "0"}, {"--seconds", "0"}, {"json"}} {
		if _, err := parse(bad, io.Discard); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestParseIperf(t *testing.T) {
	received, rate, err := parseIperf([]byte(`{"end":{"sum_sent":{"bytes":9},"sum_received":{"bytes":4e9,"bits_per_second":1.6e10}}}`))
	if err != nil || received != 4e9 || rate != 1.6e10 {
		t.Errorf("%g bytes, %g bit/s, %v", received, rate, err)
	}
	for _, bad := range []string{``, `{"error":"the server is busy"}`, `{"end":{}}`, `{"end":{"sum_received":{"bytes":0,"bits_per_second":0}}}`} {
		if _, _, err := parseIperf([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a result", bad)
		}
	}
}

func TestParseBusy(t *testing.T) {
	// user nice system idle iowait irq softirq steal: all but idle, iowait and steal.
	got, err := parseBusy([]byte("cpu  100 10 200 5000 70 3 40 9 0 0\ncpu0 1 1 1 1 1 1 1 1\n"))
	if want := 3530 * time.Millisecond; err != nil || got != want {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if _, err := parseBusy([]byte("intr 5\n")); err == nil {
		t.Error("another file is taken")
	}
	a, err := busyTime()
	if err != nil || a <= 0 {
		t.Errorf("this machine has worked for %v, %v", a, err)
	}
}

func TestCountEstablished(t *testing.T) {
	const status = `-> 192.0.2.2:6783        established fastdp 7a:00:00:00:00:02(f2) mtu=1450
<- 192.0.2.3:33110       established sleeve 7a:00:00:00:00:03(f3) mtu=1450 reason="none"
-> 192.0.2.4:6783        retrying    dial: refused fastdp
`
	if f, s := countEstablished(status, "fastdp"), countEstablished(status, "sleeve"); f != 1 || s != 1 {
		t.Errorf("%d fastdp, %d sleeve; want one each", f, s)
	}
}

// TestAgents sends over loopback.
func TestAgents(t *testing.T) {
	for _, answer := range []bool{false, true} {
		at := freePort(t)
		stop, end := io.Pipe()
		out, in := io.Pipe()
		done := make(chan error, 1)
		go func() { done <- receive(at, answer, stop, in) }()
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "ready" {
			t.Fatalf("%q, %v", lines.Text(), <-done)
		}
		send := blast
		if answer {
			send = pingPong
		}
		sent, err := send(at, 50*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		_ = end.Close()
		var got tally
		if !lines.Scan() {
			t.Fatal("no tally")
		}
		if err := json.Unmarshal(lines.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got.Packets == 0 || got.Packets > sent.Packets+sent.Lost || sent.Seconds < 0.05 {
			t.Errorf("sent %+v, received %+v", sent, got)
		}
		if answer && (sent.P50 <= 0 || sent.P99 < sent.P50 || sent.P99 > 1e6) {
			t.Errorf("round trips %+v", sent)
		}
	}
}

// freePort finds a port by taking it: other tests may run at the same time.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	at, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func sample() *report {
	path := func(name string, tcp, rtt float64) *pathResult {
		return &pathResult{Name: name, MTU: 1450, Rounds: map[string][]float64{
			"tcp1": {tcp, tcp * 2, tcp * 3}, "rtt50": {rtt, rtt, rtt},
		}, Median: map[string]float64{"tcp1": tcp * 2, "rtt50": rtt}}
	}
	return &report{Runs: 3, Seconds: 2, Underlays: []*underlayResult{{
		Name: "wire", Mesh: &meshFigures{LaunchSeconds: 0.5, MeshSeconds: 4, RSSBytes: 20 << 20},
		Paths: []*pathResult{path("raw", 20, 10), path("vxlan", 10, 20), path("fastdp", 9, 24)},
	}}}
}

func TestJudge(t *testing.T) {
	r := sample()
	r.judge()
	x, ok := compare(r.Underlays[0], "tcp1", "fastdp", "vxlan")
	if !ok || math.Abs(x.Median-0.9) > 1e-9 || math.Abs(x.Max-0.9) > 1e-9 {
		t.Errorf("%+v: rounds are compared with other rounds", x)
	}
	u := &underlayResult{Paths: []*pathResult{
		{Name: "vxlan", Rounds: map[string][]float64{"tcp1": {4, 10}, "rtt50": {20, 11}}},
		{Name: "fastdp", Rounds: map[string][]float64{"tcp1": {9, 5}, "rtt50": {22, 40}}},
	}}
	for q, want := range map[string]float64{"tcp1": 0.9, "rtt50": 2} {
		if x, _ := compare(u, q, "fastdp", "vxlan"); math.Abs(x.Best-want) > 1e-9 {
			t.Errorf("%s: best by best %g, want %g", q, x.Best, want)
		}
	}
	var missed []string
	for _, b := range r.Bars {
		if !b.Met {
			missed = append(missed, b.Text)
		}
	}
	if len(r.Bars) != 5 || len(missed) != 3 || !r.missed() {
		t.Errorf("bars %+v; throughput, ping-pong and mesh miss theirs", r.Bars)
	}
	r = sample()
	r.Underlays[0].Mesh.MeshSeconds = 1
	r.Underlays[0].path("fastdp").Rounds["tcp1"] = []float64{10.6, 21, 32}
	r.Underlays[0].path("fastdp").Rounds["rtt50"] = []float64{18, 19, 20}
	if r.judge(); r.missed() {
		t.Errorf("bars %+v; all are met", r.Bars)
	}
}

func TestReport(t *testing.T) {
	r := sample()
	r.judge()
	var text bytes.Buffer
	if err := r.writeText(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"TCP 1 stream, Gbit/s   40.0", "0.90 (0.90-0.90; 0.90)   0.45 (0.45-0.45; 0.45)", "1.20 (1.20-1.20; 1.20)", "bar MISSED", "bar met"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%q is not in\n%s", want, text.String())
		}
	}
	text.Reset()
	if err := r.writeJSON(&text); err != nil {
		t.Fatal(err)
	}
	var back report
	if err := json.Unmarshal(text.Bytes(), &back); err != nil || len(back.Ratios) != len(r.Ratios) || back.Underlays[0].path("fastdp").Median["tcp1"] != 18 {
		t.Errorf("%v: %s", err, text.String())
	}
}

func TestQuantile(t *testing.T) {
	var trips []time.Duration
	for i := range 100 {
		trips = append(trips, time.Duration(i+1)*time.Microsecond)
	}
	if p50, p99 := quantile(trips, 0.5), quantile(trips, 0.99); p50 != 51 || p99 != 100 {
		t.Errorf("p50 %g, p99 %g", p50, p99)
	}
	if quantile(nil, 0.5) != 0 {
		t.Error("a quantile of nothing")
	}
}

// TestMeasures runs the program itself, shortly.
func TestMeasures(t *testing.T) {
	if why := lab.Missing(false); why != "" {
		if os.Getenv("TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	bin := filepath.Join(t.TempDir(), "bench")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), bin, "--json", "--runs", "1", "--seconds", "1", "--only", "wire,vxlan,fastdp,relay,sealed,wireguard,tcp1,udp,rtt",
		"--endpoints", "1000", "--peers", "50")
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(r.Underlays) != 1 || len(r.Underlays[0].Paths) != 6 || r.Crowd == nil || r.Crowd.Endpoints != 1000 {
		t.Fatalf("%s", out)
	}
	for _, p := range r.Underlays[0].Paths {
		for _, q := range []string{"tcp1", "tcp1_cpu", "udp", "rtt50", "rtt99"} {
			if len(p.Rounds[q]) != 1 || p.Median[q] <= 0 {
				t.Errorf("%s %s: %v, median %g", p.Name, q, p.Rounds[q], p.Median[q])
			}
		}
	}
	if m := r.Underlays[0].Mesh; m == nil || m.RSSBytes < 1<<20 || m.LaunchSeconds <= 0 || m.MeshSeconds < m.LaunchSeconds {
		t.Errorf("daemons: %+v", m)
	}
	if len(r.Bars) != 16 {
		t.Errorf("bars: %+v", r.Bars)
	}
}
