package cli

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"weave.local/cmd/internal/api"
	"weave.local/cmd/internal/daemon"
	"weave.local/plugin/standin"
)

func statusCommands(e *env) []*cobra.Command {
	return []*cobra.Command{statusCommand(e), reportCommand(e), psCommand(e), versionCommand(e)}
}

func statusCommand(e *env) *cobra.Command {
	parts := []string{"connections", "peers", "ipam", "targets", "traffic"}
	return &cobra.Command{
		Use:   "status [connections|peers|ipam|targets|traffic]",
		Short: "Show how the router is doing",
		Long: `Show how the router is doing.

  weave status              overview of all services
  weave status connections  a line for each connection: direction, address,
                            state, data path, peer, and attributes: mtu in
                            bytes, the reason when a slower path is used, and
                            the relay when no path works but through that peer
  weave status peers        all peers and the links they have
  weave status ipam         how much of the address range each peer holds
  weave status targets      the peers this one was told to connect to
  weave status traffic      a line for each peer and data path: packets and
                            bytes sent and received, how many of the packets
                            were flooded to all and how many were relayed (to
                            be passed on by whoever received them), and the
                            frames dropped, by reason`,
		ValidArgs: parts,
		Args:      quietArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := "/status"
			if len(args) == 1 {
				if !strings.Contains(" "+strings.Join(parts, " ")+" ", " "+args[0]+" ") {
					return fmt.Errorf("status has no part %q: want one of %s", args[0], strings.Join(parts, ", "))
				}
				path += "/" + args[0]
			}
			text, err := e.client().Get(cmd.Context(), path, nil)
			fmt.Fprint(e.out, text)
			if errors.Is(err, api.ErrNotRunning) {
				return inItsPlace(err)
			}
			return err
		},
	}
}

// inItsPlace adds to the error that no daemon runs what Docker meets instead.
func inItsPlace(err error) error {
	switch socket := daemon.DefaultPluginSocket; {
	case standin.Answers(socket):
		return fmt.Errorf("%w (until then a stand-in refuses what Docker asks of the network driver)", err)
	case standin.Abandoned(socket):
		return fmt.Errorf("%w (until then Docker waits 15 s with each call of the network driver: its socket %s is left over)", err, socket)
	}
	return err
}

func reportCommand(e *env) *cobra.Command {
	var format string
	c := &cobra.Command{
		Use:   "report [-f template]",
		Short: "Show all the router knows, as JSON or through a Go template",
		Long: `Show all the router knows as JSON, or what a Go text/template makes of it.

  weave report -f '{{.Router.Name}}'
  weave report -f '{{json .Router.Connections}}'`,
		Args: quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			q := url.Values{}
			if cmd.Flags().Changed("format") {
				q.Set("format", format)
			}
			text, err := e.client().Get(cmd.Context(), "/report", q)
			if text != "" {
				fmt.Fprintln(e.out, strings.TrimRight(text, "\n"))
			}
			return err
		},
	}
	c.Flags().StringVarP(&format, "format", "f", "", "Go text/template applied to the report; 'json' is a function in it")
	return c
}

func psCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "ps [container...]",
		Short: "List what is attached on this host",
		Long: `List what is attached on this host: identifier, Ethernet address and
addresses. The host itself, when exposed, is weave:expose.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			var as []api.Attachment
			if err := e.client().GetJSON(cmd.Context(), "/ps", url.Values{"id": args}, &as); err != nil {
				return err
			}
			api.WriteAttachments(e.out, as)
			return nil
		},
	}
}

func versionCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version of this command and of the running daemon",
		Args:  quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			fmt.Fprintln(e.out, "weave script", daemon.Version())
			running, err := e.client().Get(cmd.Context(), "/report", url.Values{"format": {"{{.Version}}"}})
			if err != nil {
				if !errors.Is(err, api.ErrNotRunning) {
					return err
				}
				running = daemon.Version()
			}
			fmt.Fprintln(e.out, "weave", strings.TrimSpace(running))
			return nil
		},
	}
}
