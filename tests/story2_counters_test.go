package tests

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"weave.local/tests/lab"
)

// testCounted: a thousand pings and their answers are counted at the peers they
// went between, in metrics and status, at no other, and none of them is lost.
func testCounted(t *testing.T, cs []*container, names map[string]string) {
	const n, few = 1000, 100
	from, to, other := cs[0], cs[1], cs[2]
	read := func() map[string]float64 { return peerCounters(t, from.Host) }
	of := func(c *container, counter, more string) string {
		return fmt.Sprintf("%s nickname=%s path=fastdp peer=%s %s", counter, c.Name, names[c.Name], more)
	}
	before := read()
	if err := from.exec(t.Context(), "ping", "-q", "-A", "-c", fmt.Sprint(n), to.addr.Addr().String()).Err(); err != nil {
		t.Fatal(err)
	}
	after := read()
	for _, way := range []string{"direction=tx", "direction=rx"} {
		packets, volume := of(to, "weave_path_packets_total", way), of(to, "weave_path_bytes_total", way)
		if got := after[packets] - before[packets]; got < n || got > n+few {
			t.Errorf("%s: %v more, want %d", packets, got, n)
		}
		if got := after[volume] - before[volume]; got < n*98 || got > (n+few)*98 { // 56 bytes, ICMP, IPv4, Ethernet
			t.Errorf("%s: %v more, want %d", volume, got, n*98)
		}
		packets = of(other, "weave_path_packets_total", way)
		if got := after[packets] - before[packets]; got > few {
			t.Errorf("%s: %v more, nothing was sent there", packets, got)
		}
	}
	if line := weave(t, from.Host, "status", "traffic"); !strings.Contains(line, names[to.Name]+"("+to.Name+")") {
		t.Errorf("status traffic does not name %s:\n%s", to.Name, line)
	}
	got := weave(t, from.Host, "report", "-f", "{{range .Router.OverlayDiagnostics.Peers}}{{.NickName}}/{{.Path}} {{end}}")
	rows := slices.Sorted(slices.Values(strings.Fields(got))) // they are in the order of the peers' names
	if want := []string{"u2/fastdp", "u2/sleeve", "u3/fastdp", "u3/sleeve"}; !slices.Equal(rows, want) {
		t.Errorf("report has %q, want %q", rows, want)
	}
}

// peerCounters are the counters of a host by name and labels.
func peerCounters(t *testing.T, h *lab.Host) map[string]float64 {
	t.Helper()
	text := must(t, h, "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:6782/metrics")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text + "\n"))
	if err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	out := map[string]float64{}
	for name, f := range families {
		if !strings.HasPrefix(name, "weave_path_") {
			continue
		}
		for _, m := range f.GetMetric() {
			words, last := []string{name}, ""
			for _, l := range m.GetLabel() {
				if word := l.GetName() + "=" + l.GetValue(); l.GetName() == "direction" || l.GetName() == "reason" {
					last = word
				} else {
					words = append(words, word)
				}
			}
			out[strings.Join(append(words, last), " ")] = m.GetCounter().GetValue()
		}
	}
	return out
}
