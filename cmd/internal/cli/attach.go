package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"weave.local/cmd/internal/api"
)

const addressHelp = `
Addresses are written net:default, net:10.2.3.0/24 (any address of that subnet)
or ip:10.2.3.4/24 (just that one; "ip:" may be left out). Without any,
net:default is meant.`

func attachCommands(e *env) []*cobra.Command {
	return []*cobra.Command{attachCommand(e), detachCommand(e), exposeCommand(e), hideCommand(e)}
}

// isAddress says whether a word is an address argument: those come first, and
// the first word that is none ends them.
func isAddress(s string) bool {
	if strings.HasPrefix(s, "net:") || strings.HasPrefix(s, "ip:") {
		return true
	}
	_, err := netip.ParsePrefix(s)
	return err == nil
}

// target splits `[address...] [container]` or, with a namespace, only
// addresses.
func target(cmd *cobra.Command, args []string, netns string) (api.AttachRequest, error) {
	req := api.AttachRequest{NetNS: netns}
	for len(args) > 0 && isAddress(args[0]) {
		req.Addresses = append(req.Addresses, args[0])
		args = args[1:]
	}
	switch {
	case netns != "" && len(args) > 0:
		return req, fmt.Errorf("%s: %q is neither an address nor may it stand beside --netns", cmd.Name(), args[0])
	case netns != "":
		abs, err := filepath.Abs(netns)
		if err != nil {
			return req, fmt.Errorf("path %q: %w", netns, err)
		}
		req.NetNS = abs
		return req, nil
	case len(args) == 0:
		return req, fmt.Errorf("%s: no container named; usage: %s", cmd.Name(), cmd.UseLine())
	case len(args) > 1:
		return req, fmt.Errorf("%s: %q is not an address (net:default, net:10.2.3.0/24, ip:10.2.3.4/24), and just one container is wanted", cmd.Name(), args[0])
	}
	req.Container = args[0]
	return req, nil
}

func attachCommand(e *env) *cobra.Command {
	var netns string
	var noMulticast, anySource bool
	c := &cobra.Command{
		Use:   "attach [address...] {container | --netns path}",
		Short: "Join a running container or a network namespace to the network",
		Long: `Join a running container, or the network namespace whose file --netns names, to
the network, and print its addresses.

It may send from its own addresses only, unless --any-source is given: that lets
a router, virtual machines or the holder of a virtual address behind it take
part. The permission ends when it is detached.
` + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := target(cmd, args, netns)
			if err != nil {
				return err
			}
			req.NoMulticastRoute, req.AnySource = noMulticast, anySource
			return e.printAddresses(cmd.Context(), "/attach", req)
		},
	}
	c.Flags().StringVar(&netns, "netns", "", "file of a network namespace, in place of a container")
	c.Flags().BoolVar(&noMulticast, "no-multicast-route", false, "do not route multicast over the network")
	c.Flags().BoolVar(&anySource, "any-source", false, "let it send from any Ethernet and IP address")
	return c
}

func detachCommand(e *env) *cobra.Command {
	var netns string
	c := &cobra.Command{
		Use:   "detach [address...] {container | --netns path}",
		Short: "Take a container or a network namespace off the network",
		Long: `Take a container, or the network namespace whose file --netns names, off the
network, and print the addresses it had.
` + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := target(cmd, args, netns)
			if err != nil {
				return err
			}
			return e.printAddresses(cmd.Context(), "/detach", req)
		},
	}
	c.Flags().StringVar(&netns, "netns", "", "file of a network namespace, in place of a container")
	return c
}

func exposeCommand(e *env) *cobra.Command {
	var noMasquerade bool
	c := &cobra.Command{
		Use:   "expose [address...]",
		Short: "Give this host addresses on the network",
		Long: `Give this host addresses on the network, one for each subnet named, and print
them. The host and the containers of these subnets then reach each other, and so
do machines that route the subnet through this host: behind its address, or with
their own when --without-masquerade is given.
` + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := onlyAddresses(args); err != nil {
				return err
			}
			return e.printAddresses(cmd.Context(), "/expose", api.ExposeRequest{Addresses: args, NoMasquerade: noMasquerade})
		},
	}
	c.Flags().BoolVar(&noMasquerade, "without-masquerade", false, "leave source addresses from outside as they are")
	return c
}

func hideCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "hide [address...]",
		Short: "Undo expose",
		Long: `Take addresses off this host that expose gave it, and print them. Harmless when
there are none.
` + addressHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := onlyAddresses(args); err != nil {
				return err
			}
			return e.printAddresses(cmd.Context(), "/hide", api.ExposeRequest{Addresses: args})
		},
	}
}

func onlyAddresses(args []string) error {
	for _, a := range args {
		if !isAddress(a) {
			return fmt.Errorf("%q is not an address: want net:default, net:10.2.3.0/24 or ip:10.2.3.4/24", a)
		}
	}
	return nil
}

// printAddresses prints the addresses an operation gave or took, without
// their lengths, on one line.
func (e *env) printAddresses(ctx context.Context, path string, req any) error {
	var got api.Addresses
	if err := e.client().Call(ctx, path, req, &got); err != nil {
		return err
	}
	ips := make([]string, 0, len(got.CIDRs))
	for _, c := range got.CIDRs {
		p, err := netip.ParsePrefix(c)
		if err != nil {
			return errors.New("the daemon answered with " + c + ", which is no address")
		}
		ips = append(ips, p.Addr().String())
	}
	if len(ips) > 0 {
		fmt.Fprintln(e.out, strings.Join(ips, " "))
	}
	return nil
}
