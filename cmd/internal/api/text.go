package api

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// connectionStates in the order in which the summary counts them.
func connectionStates() []string {
	return []string{"established", "pending", "retrying", "failed", "connecting"}
}

// WriteStatus writes the overview: sections of label: value with the colon in
// column 16.
func WriteStatus(w io.Writer, r *Report) {
	line := func(label, format string, a ...any) { fmt.Fprintf(w, "%15s: %s\n", label, fmt.Sprintf(format, a...)) }
	fmt.Fprintln(w)
	line("Version", "%s (version check update disabled)", r.Version)
	if r.Router != nil {
		fmt.Fprintln(w)
		writeRouterStatus(line, r.Router)
	}
	if r.IPAM != nil {
		fmt.Fprintln(w)
		line("Service", "ipam")
		line("Status", "%s", r.IPAM.Status)
		line("Range", "%s", r.IPAM.Range)
		line("DefaultSubnet", "%s", r.IPAM.DefaultSubnet)
		if r.IPAM.Lease != "" {
			line("Lease", "%s", r.IPAM.Lease)
		}
		if r.IPAM.Conflict != "" {
			line("Conflict", "%s", r.IPAM.Conflict)
		}
	}
	if r.Proxy != nil {
		fmt.Fprintln(w)
		line("Service", "proxy")
		line("Address", "%s", strings.Join(r.Proxy.Addresses, ", "))
	}
	if r.Plugin != nil {
		fmt.Fprintln(w)
		line("Service", "plugin (legacy)")
		line("DriverName", "%s", r.Plugin.DriverName)
	}
	fmt.Fprintln(w)
}

func writeRouterStatus(line func(label, format string, a ...any), r *RouterReport) {
	line("Service", "router")
	protocol := fmt.Sprintf("weave %d..%d", r.ProtocolMinVersion, r.ProtocolMaxVersion)
	if r.ProtocolMinVersion == r.ProtocolMaxVersion {
		protocol = fmt.Sprintf("weave %d", r.ProtocolMaxVersion)
	}
	line("Protocol", "%s", protocol)
	line("Name", "%s(%s)", r.Name, r.NickName)
	encryption := enabled(r.Encryption)
	if r.PasswordChange {
		encryption += " (the password is being changed: the old one is still good)"
	}
	line("Encryption", "%s", encryption)
	line("PeerDiscovery", "%s", enabled(r.PeerDiscovery))
	line("Targets", "%d", len(r.Targets))
	line("Connections", "%s", connectionSummary(r.Connections))
	line("Peers", "%s", peerSummary(r.Peers))
	trusted := "none"
	if len(r.TrustedSubnets) > 0 {
		trusted = strings.Join(r.TrustedSubnets, ", ")
	}
	line("TrustedSubnets", "%s", trusted)
}

func enabled(b bool) string {
	if b {
		return "enabled"
	}
	return "disabled"
}

func connectionSummary(cs []Connection) string {
	n := make(map[string]int)
	for _, c := range cs {
		n[c.State]++
	}
	return summary(len(cs), n, connectionStates(), "")
}

func peerSummary(ps []PeerReport) string {
	n := make(map[string]int)
	for _, p := range ps {
		for _, c := range p.Connections {
			n[peerConnectionState(c)]++
		}
	}
	return summary(len(ps), n, connectionStates()[:2], "with ")
}

func summary(total int, n map[string]int, states []string, with string) string {
	var parts []string
	for _, s := range states {
		if n[s] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n[s], s))
		}
	}
	if len(parts) == 0 {
		return fmt.Sprint(total)
	}
	of := ""
	if with != "" {
		of = " connections"
	}
	return fmt.Sprintf("%d (%s%s%s)", total, with, strings.Join(parts, ", "), of)
}

func peerConnectionState(c PeerConnection) string {
	if c.Established {
		return "established"
	}
	return "pending"
}

func arrow(outbound bool) string {
	if outbound {
		return "->"
	}
	return "<-"
}

// WriteConnections writes a line for each connection: direction, address,
// state, what is known of it, and its attributes as key=value.
func WriteConnections(w io.Writer, cs []Connection) {
	for _, c := range cs {
		fields := fmt.Sprintf("%s %-21s %-11s %s", arrow(c.Outbound), c.Address, c.State, c.Info)
		keys := make([]string, 0, len(c.Attrs))
		for k := range c.Attrs {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			fields += " " + k + "=" + attrValue(c.Attrs[k])
		}
		fmt.Fprintln(w, strings.TrimRight(fields, " "))
	}
}

// attrValue quotes what a reader that splits at spaces would take apart.
func attrValue(v string) string {
	if strings.ContainsAny(v, " \"") {
		return fmt.Sprintf("%q", v)
	}
	return v
}

// WritePeers writes each peer and below it its connections.
func WritePeers(w io.Writer, ps []PeerReport) {
	for _, p := range ps {
		fmt.Fprintf(w, "%s(%s)\n", p.Name, p.NickName)
		for _, c := range p.Connections {
			fmt.Fprintf(w, "   %s %-21s %-37s %s\n", arrow(c.Outbound), c.Address,
				fmt.Sprintf("%s(%s)", c.Name, c.NickName), peerConnectionState(c))
		}
	}
}

// WriteTraffic writes a line for each peer and data path with what was
// exchanged, then what was dropped on the way from or to it as reason=frames.
func WriteTraffic(w io.Writer, ts []PeerTraffic) {
	for _, t := range ts {
		line := fmt.Sprintf("%-37s %-6s", fmt.Sprintf("%s(%s)", t.Peer, t.NickName), t.Path)
		for _, way := range []struct {
			name string
			f    Flow
		}{{"tx", t.Tx}, {"rx", t.Rx}} {
			line += fmt.Sprintf(" %[1]s=%[2]d %[1]s_bytes=%[3]d %[1]s_flooded=%[4]d %[1]s_relayed=%[5]d",
				way.name, way.f.Packets, way.f.Bytes, way.f.Flooded, way.f.Relayed)
		}
		for _, reason := range slices.Sorted(maps.Keys(t.Dropped)) {
			line += fmt.Sprintf(" dropped_%s=%d", reason, t.Dropped[reason])
		}
		fmt.Fprintln(w, line)
	}
}

// WriteTargets writes the targets as they were typed, a line each.
func WriteTargets(w io.Writer, targets []string) {
	for _, t := range targets {
		fmt.Fprintln(w, t)
	}
}

// WriteIPAM writes how much of the range each peer holds, this peer first.
// Nothing is written before the range is shared out.
func WriteIPAM(w io.Writer, r *IPAMReport) {
	if r == nil || r.Cluster == "" {
		return
	}
	row := func(who string, size uint64, note string) {
		percent := 100 * float64(size) / float64(max(r.RangeNumIPs, 1))
		fmt.Fprintf(w, "%-37s %8d IPs (%04.1f%% of total) %s\n", who, size, percent, note)
	}
	for _, e := range r.Entries {
		note := ""
		switch {
		case e.Self:
			note = fmt.Sprintf("(%d active)", r.ActiveIPs)
		case !e.IsKnownPeer:
			note = "- unreachable!"
		}
		row(fmt.Sprintf("%s(%s)", e.Peer, e.Nickname), e.Size, note)
	}
	row("unclaimed", r.Unowned, "")
}

// WriteAttachments writes `weave ps`: an identifier, that of a container cut to
// 12 characters, the Ethernet address and the addresses.
func WriteAttachments(w io.Writer, as []Attachment) {
	for _, a := range as {
		id := a.ID
		if len(id) > 12 && !strings.HasPrefix(id, "weave:") && !strings.HasPrefix(id, "/") {
			id = id[:12]
		}
		fmt.Fprintln(w, strings.TrimRight(strings.Join(append([]string{id, a.MAC}, a.CIDRs...), " "), " "))
	}
}
