// Command weave joins containers on many hosts into one network: it is the
// router daemon and the command line that steers it.
package main

import (
	"os"

	"weave.local/cmd/internal/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:], os.Stdout, os.Stderr)) }
