package main

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"weave.local/tests/lab"
)

const connections = "weave status connections"

// touch makes what ip and iptables make on a host when they are first used and
// leave there: weave's own trace is looked for, not theirs.
const touch = `
ip netns add touched && ip netns del touched
for chain in filter/INPUT filter/FORWARD nat/POSTROUTING; do
	iptables -w -t ${chain%/*} -I ${chain#*/} -j RETURN && iptables -w -t ${chain%/*} -D ${chain#*/} -j RETURN
done
`

// story is all but the end.
func (d *demo) story(ctx context.Context) error {
	d.before = map[string]lab.State{}
	for _, h := range d.lab.Hosts {
		if _, err := d.quiet(ctx, h.Name, touch); err != nil {
			return err
		}
		s, err := h.State(ctx)
		if err != nil {
			return err
		}
		d.before[h.Name] = s
	}
	if err := d.launch(ctx); err != nil {
		return err
	}
	addrs, err := d.containers(ctx)
	if err != nil {
		return err
	}
	if err := d.isolation(ctx, addrs); err != nil {
		return err
	}
	if err := d.expose(ctx, addrs); err != nil {
		return err
	}
	if err := d.throughput(ctx, addrs); err != nil {
		return err
	}
	return d.blocked(ctx, addrs)
}

func (d *demo) launch(ctx context.Context) error {
	d.say("One network. A single peer that is up is enough to find all others.")
	const launch = "weave launch --ipalloc-range 10.32.0.0/16 --ipalloc-default-subnet 10.32.0.0/24 "
	err := d.all(ctx, step{"u1", launch + "u2 u3"}, step{"u2", launch + "u1 u3"}, step{"u3", launch + "u1"})
	if err != nil {
		return err
	}
	for _, h := range d.lab.Hosts {
		if err := d.await(ctx, h.Name, connections, "established fastdp", 2); err != nil {
			return err
		}
	}
	return d.all(ctx, step{"u1", connections}, step{"u3", connections}, step{"u1", "weave status"})
}

// containers starts one on each host and returns their addresses by name.
func (d *demo) containers(ctx context.Context) (map[string]string, error) {
	d.say("A container on each host, each with an address of its own; they reach each other.")
	addrs := map[string]string{}
	for i, h := range d.lab.Hosts {
		name := fmt.Sprintf("c%d", i+1)
		addr, err := d.start(ctx, h.Name, name, "")
		if err != nil {
			return nil, err
		}
		addrs[name] = addr
	}
	return addrs, d.all(ctx,
		step{"u1", d.within("c1", "ping -c 2 "+addrs["c2"])},
		step{"u2", d.within("c2", "ping -c 2 "+addrs["c3"])},
		step{"u3", d.within("c3", "ping -c 2 -s 9000 "+addrs["c1"])},
		step{"u1", "weave ps"},
	)
}

func (d *demo) isolation(ctx context.Context, addrs map[string]string) error {
	through := ""
	if d.docker {
		through = ", through the Docker API proxy"
	}
	d.say("Containers in another subnet%s: they reach each other and nobody else,\n== not even with a route made by hand.", through)
	for i, host := range []string{"u1", "u2"} {
		name := fmt.Sprintf("b%d", i+1)
		addr, err := d.start(ctx, host, name, "10.32.1.0/24")
		if err != nil {
			return err
		}
		addrs[name] = addr
	}
	device := "ethwe"
	if d.docker {
		device = "ethwe0"
	}
	err := d.all(ctx,
		step{"u1", d.within("b1", "ping -c 2 "+addrs["b2"])},
		step{"u1", d.tool("b1", "ip route add 10.32.0.0/24 dev "+device)},
		step{"u2", d.tool("b2", "ip route add 10.32.0.0/24 dev "+device)},
	)
	if err != nil {
		return err
	}
	return d.fails(ctx, "u1", d.within("b1", "ping -c 1 -W 1 "+addrs["c2"]))
}

func (d *demo) expose(ctx context.Context, addrs map[string]string) error {
	d.say("A host joins.")
	out, err := d.sh(ctx, "u1", "weave expose")
	if err != nil {
		return err
	}
	return d.all(ctx,
		step{"u1", "busybox ping -c 2 " + addrs["c3"]},
		step{"u3", d.within("c3", "ping -c 2 "+out)},
	)
}

func (d *demo) throughput(ctx context.Context, addrs map[string]string) error {
	if _, err := exec.LookPath("iperf3"); err != nil {
		d.say("Throughput: skipped, there is no iperf3 on this machine.")
		return nil
	}
	d.say("Throughput, one TCP stream: containers over the network, then host to host without it.")
	serve := d.tool("c2", "iperf3 -s -D")
	if err := d.all(ctx, step{"u2", serve}, step{"u2", "iperf3 -s -D"}); err != nil {
		return err
	}
	for _, listening := range []string{d.tool("c2", "ss -Hltn"), "ss -Hltn"} {
		if err := d.await(ctx, "u2", listening, ":5201", 1); err != nil {
			return err
		}
	}
	return d.all(ctx,
		step{"u1", d.tool("c1", "iperf3 -t 2 -c "+addrs["c2"]) + " | grep receiver"},
		step{"u1", "iperf3 -t 2 -c u2 | grep receiver"},
	)
}

func (d *demo) blocked(ctx context.Context, addrs map[string]string) error {
	d.say("A firewall on u3 drops VXLAN: its connections move to the userspace path, and say why.")
	rule := func(what string) string { return "iptables " + what + " INPUT -p udp --dport 6784 -j DROP" }
	if _, err := d.sh(ctx, "u3", rule("-I")); err != nil {
		return err
	}
	start := time.Now()
	if err := d.await(ctx, "u3", connections, "established sleeve", 2); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "(after %.1f s)\n", time.Since(start).Seconds())
	out, err := d.sh(ctx, "u3", connections)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "reason=") {
		return fmt.Errorf("on u3: %s: tells no reason", connections)
	}
	err = d.all(ctx, step{"u3", d.within("c3", "ping -c 2 "+addrs["c1"])}, step{"u3", rule("-D")})
	if err != nil {
		return err
	}
	start = time.Now()
	for _, h := range d.lab.Hosts {
		if err := d.await(ctx, h.Name, connections, "established fastdp", 2); err != nil {
			return err
		}
	}
	fmt.Fprintf(d.out, "(after %.1f s)\n", time.Since(start).Seconds())
	return d.all(ctx, step{"u3", connections}, step{"u3", d.within("c3", "ping -c 2 "+addrs["c1"])})
}

// reset ends the story: nothing stays of it on the hosts.
func (d *demo) reset(ctx context.Context) error {
	d.say("The end: hosts as they were.")
	for i, h := range d.lab.Hosts {
		remove := fmt.Sprintf("ip netns del c%d", i+1)
		if h.Name != "u3" {
			remove += fmt.Sprintf(" && ip netns del b%d", i+1)
		}
		if d.docker {
			remove = "docker rm -f $(docker ps -aq)"
		}
		// What was measured with is no business of weave's.
		if _, err := d.quiet(ctx, h.Name, "for p in $(busybox pidof iperf3); do kill $p; done"); err != nil {
			return err
		}
		if err := d.all(ctx, step{h.Name, remove}, step{h.Name, "weave reset"}); err != nil {
			return err
		}
	}
	for _, h := range d.lab.Hosts {
		after, err := h.State(ctx)
		if err != nil {
			return err
		}
		left := slices.DeleteFunc(d.before[h.Name].Diff(after), dockers)
		if len(left) > 0 {
			return fmt.Errorf("%s is not as it was before launch:\n%s", h.Name, strings.Join(left, "\n"))
		}
		fmt.Fprintf(d.out, "(%s: links, addresses, routes, firewall, settings, files and processes are those of before)\n", h.Name)
	}
	return nil
}

// dockers says whether a line of a host's state is of Docker's own making: it
// makes the bridge docker_gwbridge for the first container on a network of any
// driver but its own, and keeps it.
func dockers(line string) bool {
	return strings.Contains(line, "docker0") || strings.Contains(line, "docker_gwbridge") || line == "+file: /run/containerd"
}
