// Package firewall keeps the packet filter of the host in step with the
// network: frames between containers pass, what is routed passes to and from
// the exposed subnets alone, and sources from outside are replaced by the
// host's address unless that is declined.
//
// All rules stand in chains of our own, entered by one jump each from FORWARD
// and POSTROUTING:
//
//	filter FORWARD     -> WEAVE-FORWARD -> WEAVE-EXPOSE
//	nat    POSTROUTING -> WEAVE
//
// What should be there is computed without side effects (desired, change) and
// applied through iptables-restore, a table at a time, so that no packet ever
// meets half of it.
package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
)

// ErrNoIPTables says that the host has no iptables programs.
var ErrNoIPTables = errors.New("iptables is not installed on this host (Debian and Ubuntu: apt install iptables)")

// checkEvery is how often Run looks whether the rules are still there.
const checkEvery = 5 * time.Second

// lockWait is how many seconds to wait for others who change rules.
const lockWait = "5"

// Config is what a Firewall is made of.
type Config struct {
	Bridge string
	// VXLAN is the UDP port of the network's frames, which no container may
	// send through the host; 0: there is none.
	VXLAN uint16
	// Untrusted names devices, such as Docker's bridges, that forward nothing
	// into the bridge, nor any frames of ours. They need not exist. Nil: docker0
	// and docker_gwbridge, through which any container, also one of another
	// subnet, would get in otherwise.
	Untrusted []string
	Log       *slog.Logger
}

// Firewall holds the rules of one bridge. Its methods may be called from
// several goroutines.
type Firewall struct {
	cfg   Config
	every time.Duration
	apply chan struct{} // capacity 1; whoever holds the token applies

	mu      sync.Mutex
	active  bool // rules are wanted at all
	exposed []Exposure
	printed map[string]spelling // by chain
}

// spelling is how iptables-save of this host writes a chain, where it differs
// from how we do.
type spelling struct{ ours, theirs []string }

// New makes a Firewall; no rule is touched before SetExposed or Remove. The
// name of the bridge must be that of a device.
func New(cfg Config) (*Firewall, error) {
	if cfg.Bridge == "" || strings.ContainsAny(cfg.Bridge, " \t\n/") {
		return nil, fmt.Errorf("%q is no name of a bridge", cfg.Bridge)
	}
	if cfg.Untrusted == nil {
		cfg.Untrusted = []string{"docker0", "docker_gwbridge"}
	}
	return &Firewall{cfg: cfg, every: checkEvery, apply: make(chan struct{}, 1), printed: make(map[string]spelling)}, nil
}

// SetExposed makes the rules fit the given exposures, of which there may be
// none; a subnet may be named once. The error is ErrNoIPTables when the host
// cannot have rules; they are then tried again by Run.
func (f *Firewall) SetExposed(ctx context.Context, exposed []Exposure) error {
	f.mu.Lock()
	f.active, f.exposed = true, slices.Clone(exposed)
	f.mu.Unlock()
	_, err := f.converge(ctx)
	return err
}

// Remove takes away all rules and chains that SetExposed made, also those of an
// earlier run.
func (f *Firewall) Remove(ctx context.Context) error {
	f.mu.Lock()
	f.active, f.exposed = false, nil
	f.mu.Unlock()
	_, err := f.converge(ctx)
	if errors.Is(err, ErrNoIPTables) {
		return nil // then there is nothing to remove
	}
	return err
}

// Run restores rules that somebody else has taken away, until ctx ends. It
// leaves them in place.
func (f *Firewall) Run(ctx context.Context) error {
	tick := time.NewTicker(f.every)
	defer tick.Stop()
	complained := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		f.mu.Lock()
		active := f.active
		f.mu.Unlock()
		if !active {
			continue
		}
		changed, err := f.converge(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && err.Error() != complained:
			complained = err.Error()
			f.cfg.Log.Warn("firewall rules cannot be restored, will be tried again", "err", err)
		case err == nil:
			complained = ""
			if changed {
				f.cfg.Log.Info("firewall rules had been removed by somebody else and were restored")
			}
		}
	}
}

// converge makes the rules what they should be and says whether they were not.
func (f *Firewall) converge(ctx context.Context) (changed bool, err error) {
	select {
	case f.apply <- struct{}{}:
		defer func() { <-f.apply }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	f.mu.Lock()
	active, exposed := f.active, f.exposed
	f.mu.Unlock()
	var want []chain
	if active {
		want = desired(f.cfg, exposed)
	}
	for _, table := range []string{tableFilter, tableNAT} {
		now, err := f.read(ctx, table, want)
		if err != nil {
			return changed, err
		}
		input := change(table, now, want)
		if input == "" {
			continue
		}
		if _, err := run(ctx, input, "iptables-restore", "--wait", lockWait, "--noflush"); err != nil {
			return changed, fmt.Errorf("table %s: %w", table, err)
		}
		changed = true
		if err := f.learnSpelling(ctx, table, want); err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// read returns a table as it is, our chains in our own spelling.
func (f *Firewall) read(ctx context.Context, table string, want []chain) (tableState, error) {
	saved, err := run(ctx, "", "iptables-save", "-t", table)
	if err != nil {
		return nil, err
	}
	now := parseTable(saved)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range want {
		p := f.printed[c.name]
		if c.table == table && len(p.theirs) > 0 && slices.Equal(p.theirs, now[c.name]) && slices.Equal(p.ours, c.rules) {
			now[c.name] = c.rules
		}
	}
	return now, nil
}

// learnSpelling notes how the host prints what was just written, so that a
// version of iptables that orders words otherwise is not taken for somebody
// who changes our rules.
func (f *Firewall) learnSpelling(ctx context.Context, table string, want []chain) error {
	saved, err := run(ctx, "", "iptables-save", "-t", table)
	if err != nil {
		return err
	}
	now := parseTable(saved)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range want {
		if c.table == table && !slices.Equal(now[c.name], c.rules) && len(now[c.name]) == len(c.rules) {
			f.printed[c.name] = spelling{ours: c.rules, theirs: now[c.name]}
		}
	}
	return nil
}

// run runs one of the iptables programs and returns what it printed.
func run(ctx context.Context, input, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = strings.NewReader(input)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return "", ErrNoIPTables
	case err != nil:
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}
