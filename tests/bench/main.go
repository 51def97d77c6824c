// Command bench measures the data path against what it stands on and what it
// replaces, in one run on one machine, the paths taking turns:
//
//	raw     host to host on the underlay
//	vxlan   kernel bridge + VXLAN with a static forwarding table, MTU 1450
//	fastdp  ours, with real daemons
//	relay   the same through a third host, the ends knowing only that one
//	sleeve  ours, daemons launched with --no-fastdp
//	sealed  the same with --password
//	wireguard  wireguard-go on each host, containers' subnets routed into it
//	sleeve-relay, sealed-relay, wireguard-relay  the same through a third host
//
// With --endpoints there is one more, fastdp-full: fastdp itself, while the
// tables of both hosts hold that many endpoints on --peers peers besides its own.
// They are put into the pinned tables before each of its measures and taken out
// after it, without the daemon's knowledge.
//
// on two underlays: "super", virtual Ethernet that passes super-frames of up
// to 64 KiB whole, and "wire", the same without segmentation, receive and
// checksum offload, where every packet crosses as on a plain network card.
// Hosts are network namespaces of a lab; nothing shows outside of them.
//
// Its exit code is 0 when everything was measured, 1 when something could not
// be or, with --check, when a bar was missed, and 2 for bad usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"weave.local/tests/setup"
)

var (
	errBar  = errors.New("a bar was missed")
	errLeft = errors.New("not all was removed")
)

type options struct {
	json, check bool
	runs        int
	seconds     int
	weave       string
	wireguard   string // the program; empty when no path needs it
	wgVersion   string
	crowd       crowd // of fastdp-full, if it has endpoints
	only        filter
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == agentWord {
		exit(agent(os.Args[2:]))
	}
	o, err := parse(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	exit(run(ctx, o))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func parse(args []string, usage io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(usage)
	fs.BoolVar(&o.json, "json", false, "print the results as JSON")
	fs.BoolVar(&o.check, "check", false, "exit with 1 when a bar is missed")
	fs.IntVar(&o.runs, "runs", 3, "rounds; figures are the medians over them")
	fs.IntVar(&o.seconds, "seconds", 2, "length of a TCP measure in seconds; the others take half of it")
	fs.StringVar(&o.weave, "weave", "", "measure this binary instead of building ./cmd/weave")
	fs.IntVar(&o.crowd.Endpoints, "endpoints", 0, "measure fastdp with so many more endpoints in its tables, too")
	fs.IntVar(&o.crowd.Peers, "peers", 500, "on so many more peers")
	only := fs.String("only", "", "restrict to these, separated by commas: underlays ("+strings.Join(allUnderlays(), " ")+
		"), paths ("+strings.Join(allPaths(), " ")+"), measures ("+strings.Join(allMeasures(), " ")+")")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("%q: there are only flags, see -h", fs.Arg(0))
	}
	if o.runs < 1 || o.runs > 1000 {
		return o, fmt.Errorf("--runs %d: want 1 to 1000", o.runs)
	}
	if o.seconds < 1 || o.seconds > 3600 {
		return o, fmt.Errorf("--seconds %d: want 1 to 3600", o.seconds)
	}
	if o.crowd.Endpoints < 0 || o.crowd.Endpoints > 60000 || o.crowd.Peers < 1 || o.crowd.Peers > maxPeers {
		return o, fmt.Errorf("--endpoints %d --peers %d: want at most 60000, and 1 to %d", o.crowd.Endpoints, o.crowd.Peers, maxPeers)
	}
	var err error
	o.only, err = parseFilter(*only)
	if i := slices.Index(o.only.paths, "fastdp"); i >= 0 && o.crowd.Endpoints > 0 {
		o.only.paths = slices.Insert(slices.Clone(o.only.paths), i+1, fullPath)
	}
	return o, err
}

// filter holds what is to be done of each kind.
type filter struct{ underlays, paths, measures []string }

func parseFilter(s string) (filter, error) {
	var f filter
	for word := range strings.FieldsFuncSeq(s, func(r rune) bool { return r == ',' || r == ' ' }) {
		switch {
		case slices.Contains(allUnderlays(), word):
			f.underlays = append(f.underlays, word)
		case slices.Contains(allPaths(), word):
			f.paths = append(f.paths, word)
		case slices.Contains(allMeasures(), word):
			f.measures = append(f.measures, word)
		default:
			return f, fmt.Errorf("--only %q: neither an underlay (%s), nor a path (%s), nor a measure (%s)", word,
				strings.Join(allUnderlays(), " "), strings.Join(allPaths(), " "), strings.Join(allMeasures(), " "))
		}
	}
	for _, kind := range []struct {
		chosen *[]string
		all    []string
	}{{&f.underlays, allUnderlays()}, {&f.paths, allPaths()}, {&f.measures, allMeasures()}} {
		if len(*kind.chosen) == 0 {
			*kind.chosen = kind.all
		}
	}
	return f, nil
}

func run(ctx context.Context, o options) (err error) {
	if err := setup.Install(ctx, "bench", os.Stderr); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "weave-bench-")
	if err != nil {
		return fmt.Errorf("folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if o.weave == "" {
		progress("building ./cmd/weave")
		o.weave, err = setup.Build(ctx, dir)
	} else {
		o.weave, err = filepath.Abs(o.weave)
	}
	if err != nil {
		return err
	}
	if slices.ContainsFunc(o.only.paths, func(p string) bool { return strings.HasPrefix(p, "wireguard") }) {
		progress("wireguard-go, to measure against")
		if o.wireguard, o.wgVersion, err = setup.WireGuard(ctx); err != nil {
			return err
		}
	}
	// The program that measures must not collect garbage meanwhile.
	debug.SetGCPercent(1000)
	r := newReport(o)
	for _, name := range o.only.underlays {
		u, err := measureUnderlay(ctx, o, name)
		if err != nil && ctx.Err() != nil && !errors.Is(err, errLeft) {
			return errors.New("interrupted; nothing is left behind")
		}
		if err != nil {
			return fmt.Errorf("underlay %s: %w", name, err)
		}
		r.Underlays = append(r.Underlays, u)
	}
	r.judge()
	if o.json {
		err = r.writeJSON(os.Stdout)
	} else {
		err = r.writeText(os.Stdout)
	}
	if err == nil && o.check && r.missed() {
		err = errBar
	}
	return err
}

// progress tells what goes on; results alone go to the standard output.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}
