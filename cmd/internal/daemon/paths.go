package daemon

import (
	"errors"
	"fmt"

	"weave.local/router/fastdp"
	"weave.local/router/overlay"
	"weave.local/router/sleeve"
	"weave.local/router/userdp"
)

func (d *daemon) sleeveConfig() sleeve.Config {
	return sleeve.Config{
		Port: d.cfg.Port, Bind: d.cfg.Host, TapName: tapName, OnProbe: d.router.Probed, Log: d.log.With("part", "sleeve"),
	}
}

// openSwitch makes the fast path, which also owns the bridge's ports, or what
// stands in for it on a host that cannot have one.
func (d *daemon) openSwitch() (overlay.Switch, error) {
	fast, err := fastdp.New(d.fastdpConfig())
	if err != nil {
		return d.openUserSwitch(err)
	}
	d.undo.atEnd(func() { _ = fast.Close() })
	until, after := d.mayKeepClear()
	switch {
	case fast.Adopted() && until:
		d.router.Hold()
		if !after {
			d.router.DropInherited()
		}
	case fast.Adopted():
		// What the kernel forwards is in clear, and other settings allowed it:
		// it ends now, and goes on where links say that it may.
		if err := fast.Apply(overlay.Forwarding{Self: d.self.ShortID}); err != nil {
			return nil, fmt.Errorf("what an earlier run left forwarding in clear: %w", err)
		}
	default:
		d.undo.onFailure(func() { _ = fastdp.Remove(d.fastdpConfig()) })
	}
	return fast, d.saveClear(d.keys)
}

// openUserSwitch stands in for a fast path that is not to be had. Where an
// earlier run had one, it is at work: two ways into the overlay would be one
// too many.
func (d *daemon) openUserSwitch(why error) (overlay.Switch, error) {
	if fastdp.Present(d.fastdpConfig()) {
		return nil, fmt.Errorf("the fast path that an earlier run left (weave reset removes it): %w", why)
	}
	d.log.Warn("no fast path on this host: all frames travel in user space, by sleeve, and stop with the daemon", "reason", why)
	// The device is the way into the bridge now, not the sleeve's any more.
	if err := d.sleeve.Close(); err != nil {
		return nil, err
	}
	user, err := userdp.New(userdp.Config{Bridge: bridgeName, TapName: tapName, Why: why, Log: d.log.With("part", "userdp")})
	if err != nil {
		return nil, errors.Join(why, err)
	}
	d.undo.atEnd(func() { _ = user.Close() })
	cfg := d.sleeveConfig()
	cfg.Device = user.Device()
	d.sleeve, err = sleeve.New(cfg)
	return user, err
}
