// Command demo builds weave and shows it at work: three hosts on this machine,
// real daemons, and where a Docker engine is there, real containers. It prints
// each step as the command a user would type, and what comes of it, checks
// that it came as it should, and cleans up.
//
//	go run ./tests/demo          the whole story, from launch to reset
//	go run ./tests/demo --keep   stops before the reset and leaves the hosts standing
//	go run ./tests/demo --down   removes hosts that were kept
//
// Hosts are namespaces of a lab; nothing shows outside of them. Packages that
// are missing are installed with apt-get.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"weave.local/tests/lab"
	"weave.local/tests/setup"
)

type options struct {
	keep, down, plain bool
	weave             string
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == keeperWord {
		// A terminal's signals are for the program that started this one.
		signal.Ignore(os.Interrupt)
		os.Args = os.Args[1:]
		finish(withSignals(keeper))
	}
	o, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	case o.down:
		finish(withSignals(down))
	case o.keep:
		finish(startKeeper(os.Args[1:]))
	}
	finish(withSignals(func(ctx context.Context) error {
		return show(ctx, o, func(*demo) error { return nil })
	}))
}

func finish(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func withSignals(f func(ctx context.Context) error) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := f(ctx)
	if err != nil && ctx.Err() != nil && !errors.Is(err, errLeft) {
		return errors.New("interrupted; nothing is left behind")
	}
	return err
}

// errLeft is that hosts could not be removed without trace.
var errLeft = errors.New("not all was removed")

func parse(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.BoolVar(&o.keep, "keep", false, "leave the hosts standing")
	fs.BoolVar(&o.down, "down", false, "remove the hosts that --keep left")
	fs.BoolVar(&o.plain, "no-docker", false, "do without Docker: network namespaces take the place of containers")
	fs.StringVar(&o.weave, "weave", "", "show this binary instead of building ./cmd/weave")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("%q: there are only flags, see -h", fs.Arg(0))
	}
	return o, nil
}

// show tells the story. With o.keep it ends with kept, in place of the reset.
func show(ctx context.Context, o options, kept func(*demo) error) (err error) {
	start := time.Now()
	d := &demo{out: os.Stdout}
	if os.Geteuid() != 0 {
		return errors.New("needs root, to make namespaces")
	}
	notInstalled := setup.Install(ctx, "demo", os.Stdout)
	if why := lab.Missing(false); why != "" {
		return errors.Join(errors.New(why), notInstalled)
	}
	why := lab.Missing(true)
	if o.plain {
		why = "is not wanted"
	}
	d.docker = why == ""
	if !d.docker {
		d.say("Docker: %s; network namespaces take the place of containers.", why)
	}
	d.say("Three hosts on this machine, each with its own network, processes and files%s.", map[bool]string{true: ", and a Docker engine"}[d.docker])
	d.lab, err = lab.New(ctx, lab.Config{Docker: d.docker})
	if err != nil {
		return err
	}
	defer func() {
		if left := d.lab.Close(); left != nil {
			err = errors.Join(err, fmt.Errorf("%w: %w", errLeft, left))
		}
	}()
	if err := d.install(ctx, o.weave); err != nil {
		return err
	}
	if err := d.story(ctx); err != nil {
		return err
	}
	if o.keep {
		return kept(d)
	}
	if err := d.reset(ctx); err != nil {
		return err
	}
	d.say("All as it should be, in %.0f s.", time.Since(start).Seconds())
	return nil
}

// install puts the binary where the hosts find it.
func (d *demo) install(ctx context.Context, weave string) error {
	d.bin = filepath.Join(d.lab.Dir(), "bin")
	if err := os.Mkdir(d.bin, 0o755); err != nil {
		return fmt.Errorf("folder: %w", err)
	}
	if weave == "" {
		fmt.Fprintln(d.out, "# CGO_ENABLED=0 go build -o "+d.bin+"/weave ./cmd/weave")
		_, err := setup.Build(ctx, d.bin)
		return err
	}
	path, err := filepath.Abs(weave)
	if err != nil {
		return fmt.Errorf("path %q: %w", weave, err)
	}
	return os.Symlink(path, filepath.Join(d.bin, "weave"))
}
