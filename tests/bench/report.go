package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

// The bars.
const (
	barMemory = 30 << 20 // bytes, of an idle daemon among three
	barLaunch = 1.0      // seconds from `weave launch` to ready
	barMesh   = 3.0      // seconds until three are connected
	barCrowd  = 0.03     // share of fastdp's figures that full tables may cost
	barPeak   = 64 << 20 // bytes, of a daemon that carries packets itself
)

// wanted is what one path must be in terms of another.
type wanted struct {
	quantity, path, to string
	bar                float64 // at least or, of what is better when less, at most
	underlay           string  // empty: on each
}

func wantedRatios() []wanted {
	return []wanted{
		{"tcp1", "fastdp", "vxlan", 1.05, ""},
		{"tcp4", "fastdp", "vxlan", 1, ""},
		{"udp", "fastdp", "vxlan", 1.05, ""},
		{"rtt50", "fastdp", "vxlan", 0.95, ""},
		{"tcp1_cpu", "fastdp", "vxlan", 1, ""},
		{"tcp1", "relay", "fastdp", 0.7, ""},
		{"tcp1", "sealed", "wireguard", 2, ""},
		{"tcp4", "sealed", "wireguard", 2, ""},
		{"udp", "sealed", "wireguard", 2, ""},
		{"rtt50", "sealed", "wireguard", 0.8, ""},
		{"tcp1", "sealed", "raw", 0.65, "wire"},
		{"tcp4", "sealed", "raw", 0.65, "wire"},
		// Ten times what Weave Net's own sleeve did, encrypted, by the raw
		// figure of that run: 0.36 of 30.7 Gbit/s.
		{"tcp1", "sealed", "raw", 0.117, "super"},
		{"tcp1", "sealed-relay", "wireguard-relay", 2, ""},
		{"tcp4", "sealed-relay", "wireguard-relay", 2, ""},
	}
}

// report is what the bench prints.
type report struct {
	Machine   machine           `json:"machine"`
	Runs      int               `json:"runs"`
	Seconds   int               `json:"seconds"`             // of a TCP measure
	Crowd     *crowd            `json:"crowd,omitempty"`     // of fastdp-full
	WireGuard string            `json:"wireguard,omitempty"` // what wireguard is
	Underlays []*underlayResult `json:"underlays"`
	Ratios    []ratio           `json:"ratios"`
	Bars      []bar             `json:"bars"`
}

type machine struct {
	Kernel    string `json:"kernel"`
	Processor string `json:"processor"`
	CPUs      int    `json:"cpus"`
	// Load is the number of processes that wanted to run before the bench
	// began, over one minute.
	Load string `json:"load_before"`
}

// ratio compares a path of ours with another: the median over the rounds of
// value by value of the same round, and the range; and, as other work on the
// machine only ever takes away, the best round of one by the best of the other.
type ratio struct {
	Underlay string  `json:"underlay"`
	Quantity string  `json:"quantity"`
	Path     string  `json:"path"`
	To       string  `json:"to"`
	Median   float64 `json:"median"`
	Min      float64 `json:"min"`
	Max      float64 `json:"max"`
	Best     float64 `json:"best"`
}

type bar struct {
	Text  string  `json:"text"`
	Value float64 `json:"value"`
	Bar   float64 `json:"bar"`
	Met   bool    `json:"met"`
}

func newReport(o options) *report {
	r := &report{Runs: o.runs, Seconds: o.seconds, WireGuard: o.wgVersion, Machine: machine{CPUs: runtime.NumCPU()}}
	if o.crowd.Endpoints > 0 {
		r.Crowd = &o.crowd
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Machine.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		r.Machine.Load, _, _ = strings.Cut(string(b), " ")
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		_, after, _ := bytes.Cut(b, []byte("model name"))
		line, _, _ := bytes.Cut(after, []byte("\n"))
		r.Machine.Processor = strings.Trim(string(line), "\t :")
	}
	return r
}

// quantities that are shown, with their units.
func quantities() [][2]string {
	return [][2]string{
		{"tcp1", "TCP 1 stream, Gbit/s"},
		{"tcp4", "TCP 4 streams, Gbit/s"},
		{"udp", "UDP 64 bytes, 1000/s"},
		{"rtt50", "ping-pong p50, µs"},
		{"rtt99", "ping-pong p99, µs"},
		{"tcp1_cpu", "CPU TCP 1 stream, s/GB"},
		{"tcp4_cpu", "CPU TCP 4 streams, s/GB"},
	}
}

// comparisons are the pairs of paths that are compared.
func comparisons() [][2]string {
	return [][2]string{
		{"fastdp", "vxlan"},
		{"fastdp", "raw"},
		{"relay", "fastdp"},
		{fullPath, "fastdp"},
		{"sealed", "wireguard"},
		{"sealed", "raw"},
		{"sealed-relay", "wireguard-relay"},
	}
}

// judge computes the ratios and compares with the bars.
func (r *report) judge() {
	for _, u := range r.Underlays {
		for _, q := range quantities() {
			for _, pair := range comparisons() {
				if x, ok := compare(u, q[0], pair[0], pair[1]); ok {
					r.Ratios = append(r.Ratios, x)
				}
			}
		}
	}
	for _, x := range r.Ratios {
		for _, w := range wantedRatios() {
			if w.quantity == x.Quantity && w.path == x.Path && w.to == x.To && (w.underlay == "" || w.underlay == x.Underlay) {
				r.Bars = append(r.Bars, w.judge(x))
			}
		}
		if x.Path == fullPath && x.Quantity != "rtt99" {
			r.Bars = append(r.Bars, crowdBar(x))
		}
	}
	const mib = 1 << 20
	for _, u := range r.Underlays {
		for _, p := range u.Paths {
			if p.Peak > 0 && !strings.HasPrefix(p.Name, "wireguard") {
				text := fmt.Sprintf("underlay %s, %s, memory of a daemon under load, MiB, at most", u.Name, p.Name)
				r.Bars = append(r.Bars, bar{text, float64(p.Peak) / mib, barPeak / mib, p.Peak <= barPeak})
			}
		}
	}
	var worst meshFigures
	for _, u := range r.Underlays {
		if u.Mesh != nil {
			worst.RSSBytes = max(worst.RSSBytes, u.Mesh.RSSBytes)
			worst.LaunchSeconds = max(worst.LaunchSeconds, u.Mesh.LaunchSeconds)
			worst.MeshSeconds = max(worst.MeshSeconds, u.Mesh.MeshSeconds)
		}
	}
	if worst.RSSBytes == 0 {
		return
	}
	for _, b := range []bar{
		{Text: "memory of an idle daemon among three, MiB, at most", Value: float64(worst.RSSBytes) / mib, Bar: barMemory / mib},
		{Text: "weave launch until ready, s, at most", Value: worst.LaunchSeconds, Bar: barLaunch},
		{Text: "three daemons all connected, s from the first launch, at most", Value: worst.MeshSeconds, Bar: barMesh},
	} {
		b.Met = b.Value <= b.Bar
		r.Bars = append(r.Bars, b)
	}
}

func (w wanted) judge(x ratio) bar {
	text := fmt.Sprintf("underlay %s, %s, %s / %s ", x.Underlay, x.Quantity, x.Path, x.To)
	if isMoreBetter(x.Quantity) {
		return bar{text + "at least", x.Median, w.bar, x.Median >= w.bar}
	}
	return bar{text + "at most", x.Median, w.bar, x.Median <= w.bar}
}

// crowdBar judges what full tables cost.
func crowdBar(x ratio) bar {
	text := fmt.Sprintf("full tables, underlay %s, %s, fastdp-full / fastdp ", x.Underlay, x.Quantity)
	if isMoreBetter(x.Quantity) {
		return bar{text + "at least", x.Median, 1 - barCrowd, x.Median >= 1-barCrowd}
	}
	return bar{text + "at most", x.Median, 1 + barCrowd, x.Median <= 1+barCrowd}
}

func (r *report) missed() bool {
	return slices.ContainsFunc(r.Bars, func(b bar) bool { return !b.Met })
}

// compare pairs values of the same round: what else the machine did then
// weighs on both.
func compare(u *underlayResult, quantity, name, to string) (ratio, bool) {
	a, b := u.path(name), u.path(to)
	if a == nil || b == nil {
		return ratio{}, false
	}
	var all []float64
	for i, v := range a.Rounds[quantity] {
		if i < len(b.Rounds[quantity]) && b.Rounds[quantity][i] > 0 {
			all = append(all, v/b.Rounds[quantity][i])
		}
	}
	if len(all) == 0 {
		return ratio{}, false
	}
	return ratio{u.Name, quantity, name, to, median(all), slices.Min(all), slices.Max(all),
		best(quantity, a.Rounds[quantity]) / best(quantity, b.Rounds[quantity])}, true
}

// best is the most of what flows and the least of what it costs.
func best(quantity string, values []float64) float64 {
	if isMoreBetter(quantity) {
		return slices.Max(values)
	}
	return slices.Min(values)
}

func isMoreBetter(quantity string) bool {
	return quantity == "tcp1" || quantity == "tcp4" || quantity == "udp"
}

// median of at least one value.
func median(values []float64) float64 {
	s := slices.Clone(values)
	slices.Sort(s)
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

func (r *report) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

func (r *report) writeText(out io.Writer) error {
	w := &bytes.Buffer{}
	fmt.Fprintf(w, "%s, %d CPUs, Linux %s; load before: %s\n", r.Machine.Processor, r.Machine.CPUs, r.Machine.Kernel, r.Machine.Load)
	fmt.Fprintf(w, "medians of %d rounds, TCP %d s, others %g s; ratios: median of the rounds (range; best by best)\n", r.Runs, r.Seconds, float64(r.Seconds)/2)
	fmt.Fprintln(w, "CPU: all that the machine worked meanwhile (/proc/stat), sender and receiver, per 10^9 bytes received")
	if r.Crowd != nil {
		fmt.Fprintf(w, "%s: fastdp while both hosts' tables hold besides its own %s\n", fullPath, r.Crowd)
	}
	if r.WireGuard != "" {
		fmt.Fprintf(w, "wireguard: %s\n", r.WireGuard)
	}
	for _, u := range r.Underlays {
		fmt.Fprintln(w)
		if err := r.writeTable(w, u); err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	for _, b := range r.Bars {
		word := "met   "
		if !b.Met {
			word = "MISSED"
		}
		fmt.Fprintf(w, "bar %s  %s %g: %.2f\n", word, b.Text, b.Bar, b.Value)
	}
	_, err := w.WriteTo(out)
	return err
}

func (r *report) writeTable(out io.Writer, u *underlayResult) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintf(w, "underlay %s", u.Name)
	for _, p := range u.Paths {
		fmt.Fprintf(w, "\t%s", p.Name)
	}
	var columns [][2]string
	for _, c := range comparisons() {
		if u.path(c[0]) != nil && u.path(c[1]) != nil {
			columns = append(columns, c)
		}
	}
	for _, c := range columns {
		fmt.Fprintf(w, "\t%s / %s", c[0], c[1])
	}
	fmt.Fprint(w, "\nMTU")
	for _, p := range u.Paths {
		fmt.Fprintf(w, "\t%d", p.MTU)
	}
	fmt.Fprintln(w)
	for _, q := range quantities() {
		line, measured := q[1], false
		for _, p := range u.Paths {
			v, ok := p.Median[q[0]]
			measured = measured || ok
			line += "\t" + figure(v)
		}
		if !measured {
			continue
		}
		for _, c := range columns {
			line += "\t" + r.ratioText(u.Name, q[0], c[0], c[1])
		}
		fmt.Fprintln(w, line)
	}
	line, measured := "peak memory, MiB", false
	for _, p := range u.Paths {
		measured = measured || p.Peak > 0
		line += "\t" + figure(float64(p.Peak)/(1<<20))
	}
	if measured {
		fmt.Fprintln(w, line)
	}
	return w.Flush()
}

func (r *report) ratioText(underlay, quantity, path, to string) string {
	for _, x := range r.Ratios {
		if x.Underlay == underlay && x.Quantity == quantity && x.Path == path && x.To == to {
			return fmt.Sprintf("%.2f (%.2f-%.2f; %.2f)", x.Median, x.Min, x.Max, x.Best)
		}
	}
	return "-"
}

// figure shows three significant digits or all before the point.
func figure(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}
