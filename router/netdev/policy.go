package netdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Families of netfilter that see frames apart from those of IP.
const (
	nfFamilyARP    = 3
	nfFamilyNetdev = 5
	nfFamilyBridge = 7
)

// nfDrop is the policy of a chain that drops what no rule is about.
const nfDrop = 0

// FrameRules says what in this network namespace filters frames by rules of
// their own, as opposed to the packets inside: nftables of the families bridge
// and netdev, or ebtables. It is "" when nothing does.
func FrameRules() (string, error) {
	for _, family := range []struct {
		number uint8
		name   string
	}{{nfFamilyBridge, "bridge"}, {nfFamilyNetdev, "netdev"}} {
		active, err := hasRules(family.number)
		if err != nil {
			return "", err
		}
		if active {
			return "nftables has rules of the family " + family.name, nil
		}
	}
	// The old ebtables does not tell without loading its own modules.
	if hasModule("ebtable_filter", "ebtable_nat", "ebtable_broute") {
		return "ebtables is in use", nil
	}
	return "", nil
}

// ARPRules says what in this network namespace may have rules about ARP: all that
// FrameRules names, nftables of the family arp, or arptables. It is "" when
// nothing does.
func ARPRules() (string, error) {
	why, err := FrameRules()
	if why != "" || err != nil {
		return why, err
	}
	active, err := hasRules(nfFamilyARP)
	switch {
	case err != nil:
		return "", err
	case active:
		return "nftables has rules of the family arp", nil
	case hasModule("arptable_filter"):
		return "arptables is in use", nil
	}
	return "", nil
}

// hasModule says whether the kernel has loaded one of the modules.
func hasModule(names ...string) bool {
	for _, name := range names {
		if _, err := os.Stat(filepath.Join("/sys/module", name)); err == nil {
			return true
		}
	}
	return false
}

// hasRules says whether nftables of a family has a rule, or a chain that drops.
func hasRules(family uint8) (bool, error) {
	rules, err := dumpNFTables(unix.NFT_MSG_GETRULE, family)
	if err != nil || len(rules) > 0 {
		return len(rules) > 0, err
	}
	chains, err := dumpNFTables(unix.NFT_MSG_GETCHAIN, family)
	if err != nil {
		return false, err
	}
	for _, c := range chains {
		attrs, err := nl.ParseRouteAttr(c[nl.SizeofNfgenmsg:])
		if err != nil {
			return false, fmt.Errorf("nftables: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.NFTA_CHAIN_POLICY && len(a.Value) >= 4 && binary.BigEndian.Uint32(a.Value) == nfDrop {
				return true, nil
			}
		}
	}
	return false, nil
}

// dumpNFTables is empty where the kernel has no nftables.
func dumpNFTables(message int, family uint8) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|message, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	out, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOENT):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("nftables: %w", err)
	}
	return slices.DeleteFunc(out, func(m []byte) bool { return len(m) < nl.SizeofNfgenmsg }), nil
}

// PacketRulesSeeFrames says whether the rules for IP packets (iptables and its
// like) are also asked about what a bridge merely passes on.
func PacketRulesSeeFrames(bridge string) bool {
	for _, what := range []string{"iptables", "ip6tables", "arptables"} {
		if v, err := Sysctl("bridge/bridge-nf-call-" + what); err == nil && v != "0" {
			return true
		}
		v, err := os.ReadFile(filepath.Join("/sys/class/net", bridge, "bridge", "nf_call_"+what))
		if err == nil && len(v) > 0 && v[0] != '0' {
			return true
		}
	}
	return false
}

// TrafficControl lists the kinds of queueing disciplines that the devices of this
// network namespace have, by interface index. Those that do nothing (noqueue) are
// left out; clsact and ingress hold filters only.
func TrafficControl() (map[int][]string, error) {
	list, err := whole(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	kinds := make(map[int][]string)
	for _, q := range list {
		if index := q.Attrs().LinkIndex; q.Type() != "noqueue" {
			kinds[index] = append(kinds[index], q.Type())
		}
	}
	return kinds, nil
}

// HasIPsecPolicies says whether packets of this network namespace may have to
// be encrypted by IPsec (RFC 4301), which is decided for each by its addresses.
func HasIPsecPolicies() (bool, error) {
	list, err := whole(func() ([]netlink.XfrmPolicy, error) { return netlink.XfrmPolicyList(netlink.FAMILY_ALL) })
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
		return false, nil // the kernel has none
	case err != nil:
		return false, fmt.Errorf("list IPsec policies: %w", err)
	}
	return len(list) > 0, nil
}
