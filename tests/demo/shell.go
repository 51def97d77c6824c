package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"weave.local/tests/lab"
)

const (
	// stepTimeout bounds a command; the slowest takes a few seconds.
	stepTimeout = 60 * time.Second
	// awaitTimeout bounds the making of links and the choice of another path.
	awaitTimeout = 20 * time.Second
)

// demo is the state of the story.
type demo struct {
	out    io.Writer
	lab    *lab.Lab
	bin    string // folder of the weave binary
	docker bool
	before map[string]lab.State
}

// say prints a heading.
func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "\n== "+format+"\n", args...)
}

// quiet runs a shell command on a host and returns what it prints.
func (d *demo) quiet(ctx context.Context, host, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", "PATH="+d.bin+":$PATH\n"+command)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	r := d.lab.Host(host).RunCmd(cmd)
	err := r.Err()
	if err != nil {
		err = fmt.Errorf("on %s: %s: exit code %d: %s", host, command, r.Code, strings.TrimSpace(out.String()))
	}
	return strings.TrimSpace(out.String()), err
}

// sh shows a command and what it prints. It must succeed.
func (d *demo) sh(ctx context.Context, host, command string) (string, error) {
	fmt.Fprintf(d.out, "%s# %s\n", host, command)
	out, err := d.quiet(ctx, host, command)
	if out != "" {
		fmt.Fprintln(d.out, "    "+strings.ReplaceAll(out, "\n", "\n    "))
	}
	return out, err
}

// fails shows a command that must fail.
func (d *demo) fails(ctx context.Context, host, command string) error {
	_, err := d.sh(ctx, host, command)
	if err == nil {
		return fmt.Errorf("on %s: %s: succeeded, and must not", host, command)
	}
	return ctx.Err()
}

// step is a command to be shown on a host.
type step struct{ host, command string }

func (d *demo) all(ctx context.Context, steps ...step) error {
	for _, s := range steps {
		if _, err := d.sh(ctx, s.host, s.command); err != nil {
			return err
		}
	}
	return nil
}

// await repeats a command, without showing it, until enough lines of what it
// prints contain the text.
func (d *demo) await(ctx context.Context, host, command, text string, lines int) error {
	return lab.Wait(ctx, awaitTimeout, func() error {
		out, err := d.quiet(ctx, host, command)
		if err != nil {
			return err
		}
		n := 0
		for line := range strings.Lines(out) {
			if strings.Contains(line, text) {
				n++
			}
		}
		if n < lines {
			return fmt.Errorf("on %s: %s: %d lines with %q, want %d:\n%s", host, command, n, text, lines, out)
		}
		return nil
	})
}

// within is the command run inside of a container.
func (d *demo) within(container, command string) string {
	if d.docker {
		return "docker exec " + container + " " + command
	}
	return "ip netns exec " + container + " busybox " + command
}

// tool is a command of the host run in the network of a container, whose image
// does not have it.
func (d *demo) tool(container, command string) string {
	if d.docker {
		return "nsenter -t $(docker inspect -f '{{.State.Pid}}' " + container + ") -n " + command
	}
	return "ip netns exec " + container + " " + command
}

// start starts a container in the default subnet, or in another one through
// the proxy, and returns its address.
func (d *demo) start(ctx context.Context, host, name, subnet string) (string, error) {
	if !d.docker {
		at := " "
		if subnet != "" {
			at = " net:" + subnet + " "
		}
		return d.sh(ctx, host, "ip netns add "+name+" && weave attach"+at+"--netns /run/netns/"+name)
	}
	command := "docker run -d --net=weave --name " + name + " busybox sleep 1h"
	if subnet != "" {
		command = "eval $(weave env) && docker run -d --name " + name + " -e WEAVE_CIDR=net:" + subnet + " busybox sleep 1h"
	}
	if _, err := d.sh(ctx, host, command); err != nil {
		return "", err
	}
	out, err := d.sh(ctx, host, "docker exec "+name+" ip -4 -o addr show ethwe0")
	if err != nil {
		return "", err
	}
	_, after, _ := strings.Cut(out, "inet ")
	addr, _, ok := strings.Cut(after, "/")
	if !ok {
		return "", errors.New("no address in " + out)
	}
	return addr, nil
}
