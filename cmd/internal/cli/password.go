package cli

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"weave.local/cmd/internal/api"
)

// nextFlag gives the password that a change leads to.
const nextFlag = "password-next"

func rotatePasswordCommand(e *env) *cobra.Command {
	var req api.PasswordRequest
	c := &cobra.Command{
		Use:   "rotate-password [--password-next NEW | --finish]",
		Short: "Change the password of running routers, without a break",
		Long: `Change the password of the network while it runs. Two rounds over all hosts, and
no connection is lost:

  1. on each host  weave rotate-password --password-next NEW
     From now on this host takes both passwords, and prefers the new one.
  2. on each host  weave rotate-password --finish
     It takes the new one alone, and makes connections anew that were made with
     the old one. Who has only that stays outside.

Begin the second round when the first is through; 'weave status' shows which
hosts take both. A router that is started again must be given the passwords
that are good by then, so change what starts it along with each round:
WEAVE_PASSWORD=OLD WEAVE_PASSWORD_NEXT=NEW in the first, WEAVE_PASSWORD=NEW in
the second. Stopping and launching the routers with these, one after the other,
does the same as this command. WEAVE_PASSWORD_NEXT, where it is set, is taken
for --password-next.`,
		Args: quietArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.Finish && cmd.Flags().Changed(nextFlag) {
				return errors.New("rotate-password: give --password-next to begin or --finish to end, not both")
			}
			if req.Finish {
				req.Next = ""
			} else if req.Next == "" {
				return errors.New("rotate-password: give the new password as WEAVE_PASSWORD_NEXT or --password-next, or --finish when all hosts have it")
			}
			return e.client().Call(cmd.Context(), "/password", req, nil)
		},
	}
	c.Flags().StringVar(&req.Next, nextFlag, os.Getenv(nextEnv), "the new password (better given as "+nextEnv+": others on this host can read command lines)")
	c.Flags().Lookup(nextFlag).DefValue = ""
	c.Flags().BoolVar(&req.Finish, "finish", false, "the new password is the only one from now on")
	return c
}
