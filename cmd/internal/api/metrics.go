package api

import (
	"cmp"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics serves the state of the router in Prometheus' text format, gathered
// anew at each request.
func (s *Server) metrics() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		&reportCollector{report: s.Report},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}

type reportCollector struct{ report func() *Report }

// Describe sends nothing: which labels there are depends on the state.
func (c *reportCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *reportCollector) Collect(ch chan<- prometheus.Metric) {
	r := c.report()
	gauge := func(name, help string, v float64, labels map[string]string) {
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, nil, labels), prometheus.GaugeValue, v)
	}
	type kind struct{ state, path, encryption string }
	count := make(map[kind]int)
	for _, s := range connectionStates() {
		count[kind{s, "unknown", ""}] = 0
	}
	for _, conn := range r.Router.Connections {
		k := kind{conn.State, cmp.Or(conn.path, "unknown"), ""}
		if conn.encrypted {
			k.encryption = "yes"
		}
		count[k]++
	}
	for k, n := range count {
		gauge("weave_connections", "Connections to other peers by state and data path.", float64(n),
			map[string]string{"state": k.state, "type": k.path, "encryption": k.encryption})
	}
	gauge("weave_peers", "Peers in the link state, this one included.", float64(len(r.Router.Peers)), nil)
	if i := r.IPAM; i != nil {
		gauge("weave_ips", "Addresses of the range in use here.", float64(i.ActiveIPs), map[string]string{"state": "local-used"})
		gauge("weave_max_ips", "Addresses in the range.", float64(i.RangeNumIPs), nil)
		unreachable := 0
		for _, e := range i.Entries {
			if !e.IsKnownPeer {
				unreachable++
			}
		}
		gauge("weave_ipam_unreachable_count", "Peers that hold addresses and can't be reached.", float64(unreachable), nil)
		gauge("weave_ipam_pending_allocates", "Allocations that wait.", float64(len(i.PendingAllocates)), nil)
		gauge("weave_ipam_pending_claims", "Claims that wait.", float64(len(i.PendingClaims)), nil)
	}
	for path, counters := range map[string]map[string]uint64{
		"fastdp": r.Router.OverlayDiagnostics.FastDP, "sleeve": r.Router.OverlayDiagnostics.Sleeve,
	} {
		for event, n := range counters {
			if reason, ok := strings.CutPrefix(event, "dropped_"); ok {
				counter(ch, "weave_dropped_frames_total", "Frames dropped by data path and reason.", n,
					map[string]string{"path": path, "reason": reason})
				continue
			}
			counter(ch, "weave_frames_total", "Frames by data path and what became of them.", n,
				map[string]string{"path": path, "event": event})
		}
	}
	for _, t := range r.Router.OverlayDiagnostics.Peers {
		t.collect(ch)
	}
}

func counter(ch chan<- prometheus.Metric, name, help string, n uint64, labels map[string]string) {
	ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, nil, labels), prometheus.CounterValue, float64(n))
}

func (t *PeerTraffic) collect(ch chan<- prometheus.Metric) {
	labels := func(more, value string) map[string]string {
		return map[string]string{"peer": t.Peer, "nickname": t.NickName, "path": t.Path, more: value}
	}
	for direction, f := range map[string]Flow{"tx": t.Tx, "rx": t.Rx} {
		l := labels("direction", direction)
		counter(ch, "weave_path_packets_total", "Packets exchanged with a peer by a data path.", f.Packets, l)
		counter(ch, "weave_path_bytes_total", "Bytes of the frames of these packets.", f.Bytes, l)
		counter(ch, "weave_path_flooded_packets_total", "Packets of these that went to all peers.", f.Flooded, l)
		counter(ch, "weave_path_relayed_packets_total", "Packets of these that the receiver was to pass on.", f.Relayed, l)
	}
	for reason, n := range t.Dropped {
		counter(ch, "weave_path_dropped_frames_total", "Frames dropped on the way from or to a peer by reason.", n,
			labels("reason", reason))
	}
}
