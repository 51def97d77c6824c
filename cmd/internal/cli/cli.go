// Package cli is the command line: one file per group of commands, each a
// client of the daemon's control API.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"weave.local/cmd/internal/api"
	"weave.local/cmd/internal/daemon"
)

// Exit codes that scripts rely on.
const (
	exitFailure        = 1
	exitAlreadyRunning = 3
)

type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// env is what every command needs.
type env struct {
	runDir string
	out    io.Writer
	errOut io.Writer
}

func (e *env) client() *api.Client {
	return api.NewClient(filepath.Join(e.runDir, daemon.ControlSocket))
}

// Main runs the command that args name and returns the exit code.
func Main(args []string, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot(&env{out: out, errOut: errOut})
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if text := strings.TrimSpace(err.Error()); text != "" {
		fmt.Fprintln(errOut, "weave: "+text)
	}
	if exit := (*exitError)(nil); errors.As(err, &exit) {
		return exit.code
	}
	return exitFailure
}

func newRoot(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "weave",
		Short: "One network for containers on many hosts",
		Long: `weave joins containers on many hosts into one network.

  weave launch host2 host3             start the router here, peers there
  docker run --net=weave ...           a container with an address of its own
  docker $(weave config) run -e WEAVE_CIDR=net:10.32.1.0/24 ...
                                       the same, in a subnet apart
  weave expose                         join this host itself
  weave status                         see how it goes`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q: see 'weave help'", args[0])
			}
			return cmd.Help()
		},
	}
	runDir := os.Getenv("WEAVE_RUN_DIR")
	if runDir == "" {
		runDir = daemon.DefaultRunDir
	}
	root.PersistentFlags().StringVar(&e.runDir, "run-dir", runDir, "folder of the daemon's sockets")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w: see 'weave help %s'", err, cmd.Name())
	})
	for _, add := range []func(*env) []*cobra.Command{
		lifeCommands, statusCommands, peerCommands, attachCommands, dockerCommands,
	} {
		root.AddCommand(add(e)...)
	}
	return root
}

// needRoot refuses to go on without the rights that namespaces, links and
// sockets of the daemon need.
func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("this command must be run as root")
	}
	return nil
}

// quietArgs makes the errors of cobra's argument checks name the command.
func quietArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return fmt.Errorf("%s: %w; usage: %s", cmd.Name(), err, cmd.UseLine())
		}
		return nil
	}
}
