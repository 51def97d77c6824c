package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"weave.local/cmd/internal/api"
	"weave.local/cmd/internal/daemon"
	"weave.local/plugin/standin"
	"weave.local/proxy"
)

func lifeCommands(e *env) []*cobra.Command {
	return []*cobra.Command{launchCommand(e), stopCommand(e), resetCommand(e), standInCommand()}
}

// standInCommand is what the daemon runs to answer Docker when it is gone.
func standInCommand() *cobra.Command {
	return &cobra.Command{
		Use:    daemon.StandInCommand,
		Short:  "Answer Docker while no daemon does; the daemon starts it",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(cmd *cobra.Command, _ []string) error { return standin.Serve(cmd.Context(), proxy.Carry) },
	}
}

func stopCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "Stop the router; what it set up goes on forwarding",
		Long: `Stop the router. Attached containers keep their addresses, and what the kernel
forwards goes on; nothing new is attached and no change of the network is
followed until the next launch. Where there is Docker a small process stays, the
stand-in: it tells Docker at once that weave is not running, for which Docker
would otherwise wait 15 s with each container that starts or stops. 'weave launch'
and 'weave reset' end it, once nobody waits by the proxy for a container to end.`,
		Args: quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := e.client().Stop(cmd.Context(), "/stop", func(warning string) { fmt.Fprintln(e.errOut, "weave: "+warning) })
			if errors.Is(err, api.ErrNotRunning) {
				fmt.Fprintln(e.errOut, "weave: not running")
				return nil
			}
			return err
		},
	}
}

func resetCommand(e *env) *cobra.Command {
	var force bool
	var dataDir string
	c := &cobra.Command{
		Use:   "reset [--force]",
		Short: "Leave the network and put this host back as it was",
		Long: `Leave the network: hand the address space of this peer to the others, take all
containers off the network, stop, and remove every link, rule, route, socket and
file of weave from this host.

With the router stopped there is nobody to hand the space over; --force then
only cleans up, and 'weave rmpeer' on another host takes the space back.`,
		Args: quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(); err != nil {
				return err
			}
			err := e.client().Stop(cmd.Context(), "/reset", func(warning string) { fmt.Fprintln(e.errOut, "weave: "+warning) })
			if err != nil && !errors.Is(err, api.ErrNotRunning) {
				return err
			}
			notRunning := err != nil
			if notRunning && !force && daemon.HasState(dataDir) {
				return errors.New("weave is not running, so its address space can't be handed to other peers: launch it first, or use --force")
			}
			return daemon.Clean(cmd.Context(), e.runDir, dataDir)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "clean up even when the router is not running")
	c.Flags().StringVar(&dataDir, "data-dir", daemon.DefaultDataDir, "folder of what survives a restart")
	return c
}
