package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

func dockerCommands(e *env) []*cobra.Command {
	return []*cobra.Command{envCommand(e), configCommand(e)}
}

// proxyAddress is the first address the Docker API proxy listens on.
func (e *env) proxyAddress(ctx context.Context) (string, error) {
	text, err := e.client().Get(ctx, "/proxyaddrs", nil)
	if err != nil {
		return "", err
	}
	first, _, _ := strings.Cut(text, "\n")
	if first == "" {
		return "", errors.New("the Docker API proxy is switched off: launch without --proxy=false")
	}
	return first, nil
}

func envCommand(e *env) *cobra.Command {
	var restore bool
	c := &cobra.Command{
		Use:   "env [--restore]",
		Short: "Print shell commands that point docker at the proxy, or back",
		Long: `Print shell commands that point docker at the proxy:

  eval $(weave env)
  eval $(weave env --restore)`,
		Args: quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			old := os.Getenv("DOCKER_HOST")
			if restore {
				orig, ok := os.LookupEnv("ORIG_DOCKER_HOST")
				if !ok {
					return errors.New("nothing to restore: ORIG_DOCKER_HOST is not set")
				}
				fmt.Fprintf(e.out, "DOCKER_HOST=%s\n", orig)
				return nil
			}
			addr, err := e.proxyAddress(cmd.Context())
			if err != nil {
				// A shell that evaluates the output must go on as it was.
				fmt.Fprintln(e.errOut, "weave: "+err.Error())
				return nil
			}
			line := "export DOCKER_HOST=" + addr
			if old != addr {
				line += " ORIG_DOCKER_HOST=" + old
			}
			fmt.Fprintln(e.out, line)
			return nil
		},
	}
	c.Flags().BoolVar(&restore, "restore", false, "print what undoes it")
	return c
}

func configCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "config",
		Short: "Print the docker option that selects the proxy",
		Long: `Print the docker option that selects the proxy:

  docker $(weave config) run -ti busybox`,
		Args: quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			addr, err := e.proxyAddress(cmd.Context())
			if err != nil {
				return err
			}
			fmt.Fprintln(e.out, "-H="+addr)
			return nil
		},
	}
}
