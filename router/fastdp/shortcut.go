package fastdp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"weave.local/router/bpf"
	"weave.local/router/netdev"
)

const (
	rulesFresh = 3 * time.Second  // what was found out about rules is good for so long
	rulesEvery = 15 * time.Second // and is found out again so often
	rulesWait  = 2 * time.Second  // for a program that lists rules
)

// Who lists the rules for packets. What is not installed has none.
func listers() [][]string {
	return [][]string{{"iptables-save"}, {"ip6tables-save"}, {"nft", "list", "ruleset"}}
}

// ownChains is how the names of our own chains begin. They accept what stays
// on the bridge, so passing them by changes nothing.
const ownChains = "WEAVE"

// featuresLocked is what the programs are told to make use of.
func (d *DataPath) featuresLocked() uint32 {
	f := d.objs.Features()
	if d.barred == "" {
		f |= bpf.FeatureShortcut
	}
	if d.barred == "" || d.arp {
		f |= bpf.FeatureARP
	}
	return f
}

// notLooked is why frames do not go past the bridge at first.
const notLooked = "rules not looked at yet"

// watchRules follows rules that come and go, until ctx ends. Apply wakes it.
func (d *DataPath) watchRules(ctx context.Context) error {
	tick := time.NewTicker(rulesEvery)
	defer tick.Stop()
	for {
		if err := d.refreshRules(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-d.applied:
		}
	}
}

// refreshRules lets frames go past the bridge or not, by the rules as they are
// now.
func (d *DataPath) refreshRules() error {
	d.checkRules()
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.setConfigLocked(d.config)
}

// checkRules finds out whether frames may go past the bridge. It waits for
// other programs, so mu must not be held.
func (d *DataPath) checkRules() {
	d.mu.Lock()
	fresh := !d.checked.IsZero() && time.Since(d.checked) < rulesFresh
	devices := []int{d.vxlan}
	var subnets []netip.Prefix
	for index, p := range d.ports {
		if index != d.bridge {
			devices = append(devices, index)
		}
		subnets = append(subnets, p.Prefixes()...)
	}
	clsact := d.clsact
	d.mu.Unlock()
	if fresh {
		return
	}
	why := d.bars(devices, subnets, clsact)
	arp := why != "" && d.mayAnswerARP()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.checked = time.Now()
	d.arp = arp
	before := d.barred
	d.barred = why // rules may be listed with counters, so this one may differ each time
	if before != notLooked && (why == "") == (before == "") {
		return
	}
	if why == "" {
		d.log.Info("frames between containers go past the bridge")
		return
	}
	d.log.Info("frames between containers go through the bridge, which is slower", "reason", why)
}

// bars says what keeps frames from going past the bridge, "" when nothing does.
// When in doubt they do not: a rule must not be passed by.
func (d *DataPath) bars(devices []int, subnets []netip.Prefix, clsact bool) string {
	if d.cfg.NoShortcut {
		return "so configured"
	}
	why, err := netdev.FrameRules()
	if err != nil || why != "" {
		return orError(why, err)
	}
	disciplines, err := netdev.TrafficControl()
	if err != nil {
		return err.Error()
	}
	for _, index := range devices {
		for _, kind := range disciplines[index] {
			if kind != "clsact" || !clsact { // which then holds our own programs
				return fmt.Sprintf("device %d has traffic control (%s)", index, kind)
			}
		}
	}
	if !netdev.PacketRulesSeeFrames(d.cfg.Bridge) {
		return ""
	}
	for _, l := range listers() {
		text, err := list(l)
		if err != nil {
			return err.Error()
		}
		if rule := ruleAbout(text, d.cfg.Bridge, subnets); rule != "" {
			return "a rule may be about bridged packets: " + rule
		}
	}
	return ""
}

// mayAnswerARP says whether ARP requests may be answered though other frames
// must take the bridge: rules for IP packets are not about them.
func (d *DataPath) mayAnswerARP() bool {
	if d.cfg.NoShortcut {
		return false
	}
	why, err := netdev.ARPRules()
	return why == "" && err == nil
}

func orError(why string, err error) string {
	if err != nil {
		return err.Error()
	}
	return why
}

func list(command []string) (string, error) {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.WaitDelay = rulesWait
	var out strings.Builder
	cmd.Stdout = &out
	err := cmd.Start()
	if err == nil {
		late := time.AfterFunc(rulesWait, func() { _ = cmd.Process.Kill() })
		err = cmd.Wait()
		late.Stop()
	}
	if errors.Is(err, exec.ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("list rules by %s: %w", command[0], err)
	}
	return out.String(), nil
}

// ruleAbout returns the first rule, as iptables-save or nft write them, that
// may be about what passes the bridge: it names ports of bridges, the bridge,
// addresses of one of the subnets, or a set, which may hold any of these.
func ruleAbout(text, bridge string, subnets []netip.Prefix) string {
	own := false // in a chain of ours
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "chain": // nft
			own = strings.HasPrefix(fields[1], ownChains)
			continue
		case "table":
			own = false
			continue
		case "-A": // iptables
			own = strings.HasPrefix(fields[1], ownChains)
		}
		if !own && isAbout(fields, bridge, subnets) {
			return line
		}
	}
	return ""
}

func isAbout(fields []string, bridge string, subnets []netip.Prefix) bool {
	for _, f := range fields {
		f = strings.Trim(f, `",{};`)
		switch f {
		case "physdev", "ibrname", "obrname", "ibridge", "obridge", "match-set", "--match-set", bridge:
			return true
		}
		if strings.HasPrefix(f, "@") || strings.HasSuffix(f, "+") && strings.HasPrefix(bridge, strings.TrimSuffix(f, "+")) ||
			strings.HasSuffix(f, "*") && strings.HasPrefix(bridge, strings.TrimSuffix(f, "*")) {
			return true
		}
		for part := range strings.SplitSeq(f, "-") { // a range is two addresses
			if p, ok := addrIn(part); ok && overlapsAny(p, subnets) {
				return true
			}
		}
	}
	return false
}

// addrIn reads an address, with prefix length or port or without.
func addrIn(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p, true
	}
	if a, err := netip.ParseAddrPort(s); err == nil {
		return netip.PrefixFrom(a.Addr(), a.Addr().BitLen()), true
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, a.BitLen()), true
}

func overlapsAny(p netip.Prefix, subnets []netip.Prefix) bool {
	for _, s := range subnets {
		if s.Overlaps(p) {
			return true
		}
	}
	return false
}
