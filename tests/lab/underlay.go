package lab

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// startSwitch makes the namespace of the switch, with one bridge in it.
func (l *Lab) startSwitch(ctx context.Context) error {
	var err error
	if l.sw, err = l.start(exec.Command("sleep", "infinity"), unix.CLONE_NEWNET); err != nil {
		return err
	}
	if err := enter([]string{l.sw.ns("net")}, bareBridge); err != nil {
		return err
	}
	return batch(ctx, l.sw.ns("net"),
		"link set lo up",
		fmt.Sprintf("link add br0 mtu %d type bridge", l.cfg.MTU),
		fmt.Sprintf("addr add %s/24 dev br0", Outside()),
		"link set br0 up",
	)
}

// bareBridge keeps the frames of bridges in the network namespace of the
// calling thread out of the machine's packet filters, through which they go
// where br_netfilter is loaded: no real switch does that, and it costs as much
// as what is measured.
func bareBridge() error {
	files, err := filepath.Glob("/proc/sys/net/bridge/bridge-nf-call-*")
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := os.WriteFile(f, []byte("0"), 0); err != nil {
			return fmt.Errorf("setting of the switch: %w", err)
		}
	}
	return nil
}

// plug joins a host to the switch. The pair of devices is made inside the
// switch's namespace, so that nothing ever shows in that of the machine.
func (l *Lab) plug(ctx context.Context, h *Host) error {
	err := batch(ctx, l.sw.ns("net"),
		fmt.Sprintf("link add %s mtu %d type veth peer name eth0 mtu %d netns %d", h.port(), l.cfg.MTU, l.cfg.MTU, h.init.cmd.Process.Pid),
		fmt.Sprintf("link set %s master br0 up", h.port()),
	)
	if err != nil {
		return err
	}
	// Its own IPv6 address shall be there with the device, not a second later.
	if err := h.Do(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/eth0/accept_dad", []byte("0"), 0) }); err != nil {
		return fmt.Errorf("setting of eth0: %w", err)
	}
	err = batch(ctx, h.init.ns("net"),
		"link set lo up",
		fmt.Sprintf("addr add %s/24 dev eth0", h.Addr),
		"link set eth0 up",
		fmt.Sprintf("route add default via %s", Outside()),
	)
	if err != nil || !l.cfg.Wire {
		return err
	}
	for dev, netns := range map[string]string{"eth0": h.init.ns("net"), h.port(): l.sw.ns("net")} {
		if err := run(ctx, netns, nil, "ethtool", "-K", dev, "tso", "off", "gso", "off", "gro", "off", "tx", "off"); err != nil {
			return err
		}
	}
	return nil
}

// Interpose takes the host's cable apart: what comes by one of two devices of the
// switch, and is to go on by the other, is the business of carry, which runs once in
// the network namespace of the switch. Cut and the like do not work on that cable.
func (h *Host) Interpose(ctx context.Context, carry func(host, network string) error) error {
	network := h.port() + "n"
	err := batch(ctx, h.lab.sw.ns("net"),
		fmt.Sprintf("link set %s nomaster", h.port()),
		fmt.Sprintf("link add %s mtu %d type veth peer name %sp mtu %d", network, h.lab.cfg.MTU, network, h.lab.cfg.MTU),
		fmt.Sprintf("link set %s up", network),
		fmt.Sprintf("link set %sp master br0 up", network),
	)
	if err != nil {
		return err
	}
	return enter([]string{h.lab.sw.ns("net")}, func() error { return carry(h.port(), network) })
}

// port is the name of the host's device on the switch.
func (h *Host) port() string { return "v" + h.Name }

// Cut lets nothing pass on the underlay between two hosts, in either
// direction, while both still reach all others.
func (l *Lab) Cut(ctx context.Context, a, b *Host) error {
	l.cuts[[2]string{a.port(), b.port()}] = true
	return l.applyCuts(ctx)
}

// Heal undoes Cut.
func (l *Lab) Heal(ctx context.Context, a, b *Host) error {
	delete(l.cuts, [2]string{a.port(), b.port()})
	delete(l.cuts, [2]string{b.port(), a.port()})
	return l.applyCuts(ctx)
}

// Narrow lets no IP packet of more than mtu bytes pass between two hosts, and
// says nothing to their senders. It needs Config.Wire: super-frames are larger.
func (l *Lab) Narrow(ctx context.Context, a, b *Host, mtu int) error {
	l.narrow[[2]string{a.port(), b.port()}] = mtu
	return l.applyCuts(ctx)
}

// Drop makes the switch drop what matches, as nft(8) writes it, on its way from
// one host to another.
func (l *Lab) Drop(ctx context.Context, from, to *Host, match string) error {
	l.drops = append(l.drops, dropRule(from, to, match))
	return l.applyCuts(ctx)
}

// Undrop undoes Drop.
func (l *Lab) Undrop(ctx context.Context, from, to *Host, match string) error {
	l.drops = slices.DeleteFunc(l.drops, func(r string) bool { return r == dropRule(from, to, match) })
	return l.applyCuts(ctx)
}

func dropRule(from, to *Host, match string) string {
	return fmt.Sprintf("iifname %q oifname %q %s drop\n", from.port(), to.port(), match)
}

func (l *Lab) applyCuts(ctx context.Context) error {
	rules := &strings.Builder{}
	rules.WriteString("table bridge lab {}\ndelete table bridge lab\ntable bridge lab { chain cut { type filter hook forward priority 0;\n")
	for c := range l.cuts {
		fmt.Fprintf(rules, "iifname %q oifname %q drop\niifname %q oifname %q drop\n", c[0], c[1], c[1], c[0])
	}
	for c, mtu := range l.narrow {
		fmt.Fprintf(rules, "iifname %q oifname %q ip length > %d drop\niifname %q oifname %q ip length > %d drop\n", c[0], c[1], mtu, c[1], c[0], mtu)
	}
	for _, r := range l.drops {
		rules.WriteString(r)
	}
	rules.WriteString("}\n}\n")
	return run(ctx, l.sw.ns("net"), strings.NewReader(rules.String()), "nft", "-f", "-")
}

// Unplug takes the host's cable out of the switch.
func (h *Host) Unplug(ctx context.Context) error {
	return batch(ctx, h.lab.sw.ns("net"), fmt.Sprintf("link set %s down", h.port()))
}

// Plug undoes Unplug.
func (h *Host) Plug(ctx context.Context) error {
	return batch(ctx, h.lab.sw.ns("net"), fmt.Sprintf("link set %s up", h.port()))
}

// BlockUDP makes a firewall rule on the host that drops what comes for a UDP
// port.
func (h *Host) BlockUDP(ctx context.Context, port int) error { return h.Block(ctx, blockRule(port)) }

// UnblockUDP undoes BlockUDP.
func (h *Host) UnblockUDP(ctx context.Context, port int) error {
	return h.Unblock(ctx, blockRule(port))
}

// Block adds a firewall rule, as nft(8) writes it, for what comes to the host.
func (h *Host) Block(ctx context.Context, rule string) error {
	h.blocks = append(h.blocks, rule)
	return h.applyBlocks(ctx)
}

// Unblock takes the rule away again.
func (h *Host) Unblock(ctx context.Context, rule string) error {
	h.blocks = slices.DeleteFunc(h.blocks, func(r string) bool { return r == rule })
	return h.applyBlocks(ctx)
}

func blockRule(port int) string { return fmt.Sprintf("udp dport %d drop", port) }

func (h *Host) applyBlocks(ctx context.Context) error {
	rules := "table inet lab {}\ndelete table inet lab\n"
	if len(h.blocks) > 0 {
		rules += "table inet lab { chain block { type filter hook input priority -300;\n" + strings.Join(h.blocks, "\n") + "\n}\n}\n"
	}
	return run(ctx, h.init.ns("net"), strings.NewReader(rules), "nft", "-f", "-")
}

// Behind makes a machine that reaches the rest of the world only through the
// host. It has the address 198.51.100.2, the host 198.51.100.1 on device lan0.
func (l *Lab) Behind(ctx context.Context, h *Host, name string) (*Host, error) {
	m, err := l.newHost(ctx, name, netip.AddrFrom4([4]byte{198, 51, 100, 2}))
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", name, err)
	}
	l.extra = append(l.extra, m)
	err = batch(ctx, h.init.ns("net"),
		fmt.Sprintf("link add lan0 type veth peer name eth0 netns %d", m.init.cmd.Process.Pid),
		"addr add 198.51.100.1/24 dev lan0",
		"link set lan0 up",
	)
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", name, err)
	}
	return m, batch(ctx, m.init.ns("net"),
		"link set lo up",
		fmt.Sprintf("addr add %s/24 dev eth0", m.Addr),
		"link set eth0 up",
		"route add default via 198.51.100.1",
	)
}

// Unbehind takes the machine and its link away again.
func (l *Lab) Unbehind(ctx context.Context, h, m *Host) error {
	err := batch(ctx, h.init.ns("net"), "link del lan0")
	m.Crash()
	l.extra = slices.DeleteFunc(l.extra, func(x *Host) bool { return x == m })
	return err
}
