package firewall

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Names of our chains.
const (
	chainForward = "WEAVE-FORWARD" // filter: what may cross the bridge
	chainExpose  = "WEAVE-EXPOSE"  // filter: what may enter it from outside
	chainGuard   = "WEAVE-GUARD"   // filter: what containers may not send to other hosts
	chainNAT     = "WEAVE"         // nat: whose source address is replaced
)

// dockerUser is the chain that Docker keeps before all of its own, for rules
// like ours. It is there when Docker is.
const dockerUser = "DOCKER-USER"

// dockerBridges are the bridges of networks that users make: br- and twelve
// digits.
const dockerBridges = "br-+"

const (
	tableFilter = "filter"
	tableNAT    = "nat"
)

// Exposure is a subnet of the network that the host is part of.
type Exposure struct {
	Subnet netip.Prefix // masked
	// NoMasquerade keeps the source addresses of what is routed between
	// the subnet and the world outside.
	NoMasquerade bool
}

// chain is one of our chains as it should be. Rules are written as
// iptables-save prints them, so that the two can be compared.
type chain struct {
	table, name string
	base        string // chain that starts with a jump to it, "" for none
	rules       []string
}

// ours lists every chain that we may have made, callers before callees, so that
// they can be deleted in this order.
func ours() []chain {
	return []chain{
		{table: tableFilter, name: chainForward, base: "FORWARD"},
		{table: tableFilter, name: chainExpose},
		{table: tableFilter, name: chainGuard, base: dockerUser},
		{table: tableNAT, name: chainNAT, base: "POSTROUTING"},
	}
}

// desired says which chains there should be.
func desired(cfg Config, exposed []Exposure) []chain {
	bridge := cfg.Bridge
	exposed = slices.Clone(exposed)
	slices.SortFunc(exposed, func(a, b Exposure) int { return a.Subnet.Compare(b.Subnet) })
	forward := chain{table: tableFilter, name: chainForward, base: "FORWARD"}
	for _, dev := range cfg.Untrusted {
		if dev != bridge {
			forward.addf("-i %s -o %s -j DROP", dev, bridge)
		}
	}
	for _, e := range exposed {
		// The host is in several subnets but is no way between them.
		forward.addf("! -s %s -d %s -i %s -o %s -j DROP", e.Subnet, e.Subnet, bridge, bridge)
	}
	// Bridged frames come by here where the kernel hands them to iptables.
	forward.addf("-i %s -o %s -j ACCEPT", bridge, bridge)
	forward.addf("-o %s -j %s", bridge, chainExpose)
	for _, e := range exposed {
		forward.addf("-s %s -i %s ! -o %s -j ACCEPT", e.Subnet, bridge, bridge)
	}
	chains := []chain{forward}
	if cfg.VXLAN != 0 {
		// Docker would let it leave with this host's address, from which
		// the other hosts take frames, and accepts it before our chain of
		// FORWARD is asked.
		guard := chain{table: tableFilter, name: chainGuard, base: dockerUser}
		for _, dev := range append([]string{bridge, dockerBridges}, cfg.Untrusted...) {
			guard.addf("-i %s ! -o %s -p udp -m udp --dport %d -j DROP", dev, dev, cfg.VXLAN)
		}
		chains = append(chains, guard)
	}
	expose := chain{table: tableFilter, name: chainExpose}
	nat := chain{table: tableNAT, name: chainNAT, base: "POSTROUTING"}
	for _, e := range exposed {
		expose.addf("-d %s -j ACCEPT", e.Subnet)
		if e.NoMasquerade {
			continue
		}
		nat.addf("-s %s -d 224.0.0.0/4 -j RETURN", e.Subnet)
		nat.addf("! -s %s -d %s -o %s -j MASQUERADE", e.Subnet, e.Subnet, bridge)
		nat.addf("-s %s ! -d %s ! -o %s -j MASQUERADE", e.Subnet, e.Subnet, bridge)
	}
	chains = append(chains, expose)
	if len(nat.rules) > 0 {
		chains = append(chains, nat)
	}
	return chains
}

func (c *chain) addf(format string, args ...any) {
	c.rules = append(c.rules, fmt.Sprintf(format, args...))
}

// tableState is one table as it is: the rules of each chain.
type tableState map[string][]string

// parseTable reads what iptables-save printed of one table.
func parseTable(saved string) tableState {
	t := make(tableState)
	for line := range strings.Lines(saved) {
		line = strings.TrimRight(line, " \n")
		switch {
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			if _, seen := t[name]; !seen {
				t[name] = nil
			}
		case strings.HasPrefix(line, "-A "):
			name, rule, _ := strings.Cut(line[len("-A "):], " ")
			t[name] = append(t[name], rule)
		}
	}
	return t
}

// change is the input for iptables-restore that leads a table from what it is
// to what is wanted, "" when it is so already. All of it takes effect at once.
// Rules of others are not touched.
func change(table string, now tableState, want []chain) string {
	var b strings.Builder
	for _, c := range want {
		if c.table != table {
			continue
		}
		have, exists := now[c.name]
		if !exists || !slices.Equal(have, c.rules) {
			fmt.Fprintf(&b, ":%s - [0:0]\n", c.name) // made, or emptied
		}
	}
	// Rules follow when all chains exist that they may jump to.
	for _, c := range want {
		if c.table != table {
			continue
		}
		if have, exists := now[c.name]; !exists || !slices.Equal(have, c.rules) {
			for _, r := range c.rules {
				fmt.Fprintf(&b, "-A %s %s\n", c.name, r)
			}
		}
		if _, docker := now[dockerUser]; c.base == dockerUser && !docker {
			continue
		}
		// Whoever else puts a rule on top may stay there: moving ours
		// back each time would be a quarrel without end.
		if c.base != "" && !slices.Contains(now[c.base], jump(c)) {
			fmt.Fprintf(&b, "-I %s 1 %s\n", c.base, jump(c))
		}
	}
	for _, c := range ours() {
		wanted := slices.ContainsFunc(want, func(w chain) bool { return w.table == c.table && w.name == c.name })
		if c.table != table || wanted {
			continue
		}
		for _, r := range now[c.base] {
			if r == jump(c) {
				fmt.Fprintf(&b, "-D %s %s\n", c.base, r)
			}
		}
		if _, exists := now[c.name]; exists {
			fmt.Fprintf(&b, "-F %s\n-X %s\n", c.name, c.name)
		}
	}
	if b.Len() == 0 {
		return ""
	}
	return fmt.Sprintf("*%s\n%sCOMMIT\n", table, b.String())
}

func jump(c chain) string { return "-j " + c.name }
