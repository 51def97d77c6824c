package api

import (
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// Prometheus reads the counters with their labels.
func TestMetrics(t *testing.T) {
	r := sample()
	r.Router.OverlayDiagnostics = OverlayDiagnostics{
		FastDP: map[string]uint64{"tx": 7, "dropped_isolated": 2}, Sleeve: map[string]uint64{"dropped_too_big": 3},
		Peers: []PeerTraffic{
			{Peer: "7a:00:00:00:00:02", NickName: `u"2`, Path: "fastdp", Tx: Flow{Packets: 1000, Bytes: 98000, Flooded: 3, Relayed: 4}, Rx: Flow{Packets: 900}},
			{Peer: "7a:00:00:00:00:02", NickName: `u"2`, Path: "sleeve", Rx: Flow{Packets: 5}, Dropped: map[string]uint64{"malformed": 6}},
		},
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(&reportCollector{report: func() *Report { return r }})
	w := httptest.NewRecorder()
	promhttp.HandlerFor(reg, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for name, f := range families {
		counts := f.GetType().String() == "COUNTER"
		if counts != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %s", name, f.GetType())
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			slices.Sort(labels)
			if counts {
				got[name+" "+strings.Join(labels, " ")] = m.GetCounter().GetValue()
			}
		}
	}
	const u2 = `nickname=u"2 path=`
	want := map[string]float64{
		"weave_frames_total event=tx path=fastdp":                                                  7,
		"weave_dropped_frames_total path=fastdp reason=isolated":                                   2,
		"weave_dropped_frames_total path=sleeve reason=too_big":                                    3,
		"weave_path_dropped_frames_total " + u2 + "sleeve peer=7a:00:00:00:00:02 reason=malformed": 6,
		"weave_path_packets_total direction=tx " + u2 + "fastdp peer=7a:00:00:00:00:02":            1000,
		"weave_path_bytes_total direction=tx " + u2 + "fastdp peer=7a:00:00:00:00:02":              98000,
		"weave_path_flooded_packets_total direction=tx " + u2 + "fastdp peer=7a:00:00:00:00:02":    3,
		"weave_path_relayed_packets_total direction=tx " + u2 + "fastdp peer=7a:00:00:00:00:02":    4,
		"weave_path_packets_total direction=rx " + u2 + "fastdp peer=7a:00:00:00:00:02":            900,
		"weave_path_packets_total direction=rx " + u2 + "sleeve peer=7a:00:00:00:00:02":            5,
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if v, ok := got[k]; !ok || v != want[k] {
			t.Errorf("%s is %v (%v), want %v", k, v, ok, want[k])
		}
	}
	if n := len(want) + 10; len(got) != n { // those that are zero
		t.Errorf("%d counters, want %d: %v", len(got), n, slices.Sorted(maps.Keys(got)))
	}
}
