package cli

import (
	"fmt"
	"net/url"

	"github.com/spf13/cobra"

	"weave.local/cmd/internal/api"
)

func peerCommands(e *env) []*cobra.Command {
	return []*cobra.Command{connectCommand(e), forgetCommand(e), rmpeerCommand(e), primeCommand(e), rotatePasswordCommand(e)}
}

func connectCommand(e *env) *cobra.Command {
	var replace bool
	c := &cobra.Command{
		Use:   "connect [--replace] peer...",
		Short: "Add peers to connect to",
		Long: `Add peers to connect to: names or addresses, with :port where it is not the
usual one. They are remembered over restarts. With --replace they take the
place of all earlier ones. What can't be resolved is named and the others are
added all the same.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 && !replace {
				return fmt.Errorf("connect: no peer named; usage: %s", cmd.UseLine())
			}
			q := url.Values{"peer": args}
			if replace {
				q.Set("replace", "true")
			}
			_, err := e.client().Post(cmd.Context(), "/connect", q)
			return err
		},
	}
	c.Flags().BoolVar(&replace, "replace", false, "forget all earlier targets first")
	return c
}

func forgetCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "forget peer...",
		Short: "Stop connecting to peers",
		Long: `Stop connecting to peers, named just as they were given to launch or connect.
A connection that stands is left alone.`,
		Args: quietArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := e.client().Post(cmd.Context(), "/forget", url.Values{"peer": args})
			return err
		},
	}
}

func rmpeerCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "rmpeer peer...",
		Short: "Take over the address space of peers that are gone for good",
		Long: `Take over the address space of peers that are gone for good, given by peer
name or nickname. The peer must be off: what it still hands out would be handed
out twice.`,
		Args: quietArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var first error
			for _, p := range args {
				var r api.Removed
				if err := e.client().Delete(cmd.Context(), "/peer/"+p, &r); err != nil {
					if first == nil {
						first = err
					}
					continue
				}
				fmt.Fprintf(e.out, "%d IPs taken over from %s\n", r.Count, p)
			}
			return first
		},
	}
}

func primeCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "prime",
		Short: "Wait until addresses can be allocated",
		Args:  quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := e.client().Get(cmd.Context(), "/ring", nil)
			return err
		},
	}
}
