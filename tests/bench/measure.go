package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"weave.local/tests/lab"
)

// What there is to choose from, in the order in which it is shown.
func allUnderlays() []string { return []string{"super", "wire"} }
func allPaths() []string {
	return []string{"raw", "vxlan", "fastdp", "relay", "sleeve", "sealed", "wireguard", "sleeve-relay", "sealed-relay", "wireguard-relay"}
}
func allMeasures() []string { return []string{"tcp1", "tcp4", "udp", "rtt"} }

const (
	// grace is what a measurement may take besides its own time.
	grace = 15 * time.Second
	// attempts at one measurement: a single lost connection or a server that
	// is still busy must not cost a long run.
	attempts = 3
)

// underlayResult holds all that was measured on an underlay.
type underlayResult struct {
	Name  string        `json:"name"`
	Mesh  *meshFigures  `json:"mesh,omitempty"` // with path fastdp
	Paths []*pathResult `json:"paths"`
}

// pathResult holds, for each quantity, a value for each round.
type pathResult struct {
	Name   string               `json:"name"`
	MTU    int                  `json:"mtu"`
	Rounds map[string][]float64 `json:"rounds"`
	Median map[string]float64   `json:"median"`
	Peak   int64                `json:"peak_bytes,omitempty"` // most memory that a daemon needed which carries packets itself
}

func (u *underlayResult) path(name string) *pathResult {
	for _, p := range u.Paths {
		if p.Name == name {
			return p
		}
	}
	return nil
}

func measureUnderlay(ctx context.Context, o options, name string) (u *underlayResult, err error) {
	progress("underlay %s: hosts, daemons, paths %s", name, strings.Join(o.only.paths, " "))
	s, err := buildScene(ctx, name, o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if left := s.lab.Close(); left != nil {
			err = errors.Join(err, fmt.Errorf("%w: %w", errLeft, left))
		}
	}()
	u = &underlayResult{Name: name}
	for _, p := range s.paths {
		u.Paths = append(u.Paths, &pathResult{Name: p.name, MTU: p.mtu, Rounds: map[string][]float64{}, Median: map[string]float64{}})
	}
	if s.mesh.RSSBytes > 0 {
		u.Mesh = &s.mesh
	}
	for _, p := range s.paths {
		if p.name == fullPath { // fastdp's servers are its own
			if s.full, err = startCrowds(ctx, o.crowd, p.from.host, p.to.host); err != nil {
				return nil, fmt.Errorf("path %s: %w", p.name, err)
			}
			defer func() { err = errors.Join(err, s.full.stop()) }()
			continue
		}
		stop, err := s.serve(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("path %s: %w", p.name, err)
		}
		defer stop()
	}
	for _, p := range s.paths {
		if err := s.daemons(p.name, forgetPeak); err != nil {
			return nil, err
		}
	}
	for round := range o.runs {
		progress("underlay %s: round %d of %d", name, round+1, o.runs)
		for _, m := range o.only.measures {
			for i := range s.paths {
				// Each round begins with another path: none is always first.
				i = (i + round) % len(s.paths)
				if err := s.measureFilled(ctx, s.paths[i], m, o.seconds, u.Paths[i].Rounds); err != nil {
					return nil, fmt.Errorf("%s over %s: %w", m, s.paths[i].name, err)
				}
			}
		}
	}
	for _, p := range u.Paths {
		for q, values := range p.Rounds {
			p.Median[q] = median(values)
		}
		err := s.daemons(p.Name, func(h *lab.Host, daemon string) error {
			most, err := memory(h, daemon, "VmHWM:")
			p.Peak = max(p.Peak, most)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return u, s.stillThere(ctx)
}

// stillThere fails when a connection is no longer by the path it was measured
// for.
func (s *scene) stillThere(ctx context.Context) error {
	for _, p := range s.paths {
		var err error
		switch hosts := s.hosts(p.name); p.name {
		case "fastdp", "sleeve", "sealed":
			err = s.connected(ctx, carrier(p.name), hosts)
		case "relay", "sleeve-relay", "sealed-relay":
			err = s.relayed(ctx, carrier(p.name), hosts[0], hosts[1], hosts[2])
		}
		if err != nil {
			return fmt.Errorf("after the measurement: %w", err)
		}
	}
	return nil
}

// daemons calls do for each daemon that carries the packets of a path itself.
func (s *scene) daemons(path string, do func(h *lab.Host, daemon string) error) error {
	var daemon string
	switch path {
	case "sleeve", "sealed", "sleeve-relay", "sealed-relay":
		daemon = filepath.Base(s.weave)
	case "wireguard", "wireguard-relay":
		daemon = filepath.Base(s.wireguard)
	default:
		return nil
	}
	for _, h := range s.hosts(path) {
		if err := do(h, daemon); err != nil {
			return fmt.Errorf("memory of %s on %s: %w", daemon, h.Name, err)
		}
	}
	return nil
}

// serve starts what answers at the far end of a path and makes sure that the
// path carries packets.
func (s *scene) serve(ctx context.Context, p path) (stop func(), err error) {
	args := p.to.commandOn(receiverCPU(), "iperf3", "-s")
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if err := p.to.host.Start(cmd); err != nil {
		return nil, fmt.Errorf("iperf3: %w", err)
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	err = lab.Wait(ctx, grace, func() error {
		t, err := s.pair(ctx, p, "echo", "ping", 0.1)
		if err == nil && t.Packets == 0 {
			err = errors.New("no answer from the far end")
		}
		return err
	})
	if err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

// measureFilled is measure with the tables filled where that is what the path
// is about.
func (s *scene) measureFilled(ctx context.Context, p path, what string, seconds int, rounds map[string][]float64) error {
	if p.name != fullPath {
		return s.measure(ctx, p, what, seconds, rounds)
	}
	if err := s.full.do("fill"); err != nil {
		return err
	}
	return errors.Join(s.measure(ctx, p, what, seconds, rounds), s.full.do("empty"))
}

// measure does one measurement and adds what comes out to rounds.
func (s *scene) measure(ctx context.Context, p path, what string, seconds int, rounds map[string][]float64) error {
	var got map[string]float64
	var err error
	for range attempts {
		switch what {
		case "tcp1":
			got, err = s.tcp(ctx, p, 1, seconds)
		case "tcp4":
			got, err = s.tcp(ctx, p, 4, seconds)
		case "udp":
			got, err = s.udp(ctx, p, float64(seconds)/2)
		case "rtt":
			got, err = s.rtt(ctx, p, float64(seconds)/2)
		}
		if err == nil || ctx.Err() != nil {
			break
		}
		progress("%s over %s, again: %v", what, p.name, err)
	}
	for q, v := range got {
		rounds[q] = append(rounds[q], v)
	}
	return err
}

func (s *scene) tcp(ctx context.Context, p path, streams, seconds int) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+grace)
	defer cancel()
	before, err := busyTime()
	if err != nil {
		return nil, err
	}
	// The kernel's default congestion control, whatever this machine's is: BBR
	// paces by latency, and the rounds then scatter by more than paths differ.
	r := p.from.host.Run(ctx, p.from.commandOn(senderCPU, "iperf3", "-J", "-C", "cubic", "-c", p.to.addr.String(),
		"-t", strconv.Itoa(seconds), "-P", strconv.Itoa(streams))...)
	after, errAfter := busyTime()
	if errAfter != nil {
		return nil, errAfter
	}
	bytes, rate, err := parseIperf([]byte(r.Stdout))
	if err != nil {
		return nil, errors.Join(err, r.Err())
	}
	name := "tcp" + strconv.Itoa(streams)
	return map[string]float64{name: rate / 1e9, name + "_cpu": (after - before).Seconds() / (bytes / 1e9)}, nil
}

// parseIperf reads what arrived, in bytes and bits per second, from the JSON
// that iperf3 prints.
func parseIperf(text []byte) (received, rate float64, err error) {
	var out struct {
		Error string
		End   struct {
			SumReceived struct {
				Bytes         float64
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal(text, &out); err != nil {
		return 0, 0, fmt.Errorf("iperf3 printed no result: %w", err)
	}
	if out.Error != "" {
		return 0, 0, fmt.Errorf("iperf3: %s", out.Error)
	}
	if out.End.SumReceived.Bytes <= 0 || out.End.SumReceived.BitsPerSecond <= 0 {
		return 0, 0, errors.New("iperf3: nothing arrived")
	}
	return out.End.SumReceived.Bytes, out.End.SumReceived.BitsPerSecond, nil
}

// ticksPerSecond is the unit of /proc/stat, USER_HZ, the same on all systems.
const ticksPerSecond = 100

// busyTime is how long all processors of the machine together have worked.
func busyTime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return parseBusy(b)
}

// parseBusy reads the first line of /proc/stat (proc_stat(5)): user, nice,
// system, idle, iowait, irq, softirq and others.
func parseBusy(text []byte) (time.Duration, error) {
	line, _, _ := bytes.Cut(text, []byte("\n"))
	f := strings.Fields(string(line))
	if len(f) < 8 || f[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var ticks int64
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond, nil
}

func (s *scene) udp(ctx context.Context, p path, seconds float64) (map[string]float64, error) {
	t, err := s.pair(ctx, p, "sink", "blast", seconds)
	if err != nil {
		return nil, err
	}
	if t.Packets == 0 {
		return nil, errors.New("no datagram arrived")
	}
	return map[string]float64{"udp": float64(t.Packets) / t.Seconds / 1e3}, nil
}

func (s *scene) rtt(ctx context.Context, p path, seconds float64) (map[string]float64, error) {
	t, err := s.pair(ctx, p, "echo", "ping", seconds)
	if err != nil {
		return nil, err
	}
	if t.Packets < 100 {
		return nil, fmt.Errorf("%d answers, %d lost: too few to measure by", t.Packets, t.Lost)
	}
	return map[string]float64{"rtt50": t.P50, "rtt99": t.P99}, nil
}

// pair runs an agent that receives at the far end of a path and one that sends
// at the near end. It returns the tally of the sender, for a sink with the
// number of packets that arrived.
func (s *scene) pair(ctx context.Context, p path, receiver, sender string, seconds float64) (t tally, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds*float64(time.Second))+grace)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		return t, err
	}
	cpu := senderCPU
	if receiver == "sink" {
		cpu = receiverCPU()
	}
	args := p.to.commandOn(cpu, self, agentWord, receiver)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var said bytes.Buffer
	cmd.Stderr = &said
	in, err := cmd.StdinPipe()
	if err != nil {
		return t, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return t, err
	}
	if err := p.to.host.Start(cmd); err != nil {
		return t, fmt.Errorf("%s: %w", receiver, err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		_ = in.Close()
		return t, fmt.Errorf("%s: %w: %s", receiver, cmd.Wait(), said.String())
	}
	r := p.from.host.Run(ctx, p.from.commandOn(senderCPU, self, agentWord, sender, p.to.addr.String(), strconv.FormatFloat(seconds, 'f', -1, 64))...)
	_ = in.Close()
	lines.Scan()
	last := slices.Clone(lines.Bytes())
	if err := errors.Join(r.Err(), cmd.Wait()); err != nil {
		return t, fmt.Errorf("%w %s", err, said.String())
	}
	if err := json.Unmarshal([]byte(r.Stdout), &t); err != nil {
		return t, fmt.Errorf("%s: %w", sender, err)
	}
	if receiver == "sink" {
		var arrived tally
		if err := json.Unmarshal(last, &arrived); err != nil {
			return t, fmt.Errorf("%s: %w", receiver, err)
		}
		t.Packets = arrived.Packets
	}
	return t, nil
}
