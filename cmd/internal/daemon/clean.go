package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"weave.local/peer/state"
	"weave.local/plugin"
	"weave.local/plugin/standin"
	"weave.local/router/attach"
	"weave.local/router/fastdp"
	"weave.local/router/firewall"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// HasState says whether a run left anything in the data folder.
func HasState(dataDir string) bool {
	_, err := os.Stat(filepath.Join(dataDir, stateFile))
	return err == nil
}

func (d *daemon) fastdpConfig() fastdp.Config {
	cfg := fastdp.Config{
		Bridge: bridgeName, MAC: d.self.Name.MAC(), Port: d.cfg.Port + 1, PinDir: d.cfg.run(pinDir),
		MTU: d.mtu, TapName: tapName, NoShortcut: d.cfg.NoShortcut, Log: d.log.With("part", "fastdp"),
	}
	if d.router != nil {
		cfg.OnProbe = d.router.Probed
	}
	return cfg
}

// Clean removes every trace of a daemon that does not run: attachments, rules,
// devices, eBPF programs and files. What is gone already is no error.
func Clean(ctx context.Context, runDir, dataDir string) error {
	d := &daemon{cfg: Config{RunDir: runDir, DataDir: dataDir, Port: DefaultPort}, log: slog.New(slog.DiscardHandler)}
	var errs []error
	made := []string{d.cfg.RunDir, d.cfg.DataDir}
	if HasState(dataDir) {
		db, err := state.Open(d.cfg.data(stateFile), d.log)
		if err != nil {
			return err
		}
		made = folders(db)
		errs = append(errs, d.cleanAttachments(ctx, db), db.Close())
	}
	errs = append(errs, fastdp.Remove(d.fastdpConfig()))
	if netdev.Exists(bridgeName) {
		errs = append(errs, netdev.DeleteLink(bridgeName))
	}
	errs = append(errs, d.cleanFiles(made))
	return errors.Join(errs...)
}

func (d *daemon) cleanAttachments(ctx context.Context, db *state.DB) error {
	fw, err := firewall.New(firewall.Config{Bridge: bridgeName, Log: d.log})
	if err != nil {
		return err
	}
	m, err := attach.New(attach.Config{
		Bridge: bridgeName, Store: db.Bucket("attachments"), Firewall: fw, Log: d.log,
		SetPort:    func(overlay.Port) error { return nil },
		RemovePort: func(int) error { return nil },
	})
	if err != nil {
		return err
	}
	return m.RemoveAll(ctx)
}

// cleanFiles removes the files that are ours, and the folders that were made
// for them if nothing else is in them.
func (d *daemon) cleanFiles(made []string) error {
	errs := []error{plugin.RemoveAbsence(pluginSpec), standin.Clear(DefaultPluginSocket)}
	ours := []string{
		d.cfg.run(ControlSocket), d.cfg.run(proxySocket), d.cfg.run(lockFile),
		d.cfg.data(logFile), d.cfg.data(logFile + ".old"),
	}
	db, err := filepath.Glob(d.cfg.data(stateFile + "*"))
	if err != nil {
		return fmt.Errorf("state files: %w", err)
	}
	for _, p := range append(ours, db...) {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, dir := range append([]string{d.cfg.run(pinDir)}, made...) {
		if dir != "" {
			_ = os.Remove(dir) // fails when something else is in it, which stays
		}
	}
	return errors.Join(errs...)
}
