package router

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"weave.local/peer"
	"weave.local/router/overlay"
)

// SetLease cuts the containers here off from other peers from until on; see
// overlay.Switch.
func (r *Router) SetLease(until time.Duration) error {
	if err := r.sw.SetLease(until); err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	return nil
}

// Recheck looks anew at which addresses other peers may have.
func (r *Router) Recheck() { r.nudge() }

func (r *Router) granted() func(peer.Name, netip.Addr) bool {
	if r.cfg.Granted == nil {
		return func(peer.Name, netip.Addr) bool { return true }
	}
	return r.cfg.Granted()
}

// allow takes the addresses off an endpoint that its peer may not have, and
// notes them. It is false when it had addresses and none is left.
func allow(ep *overlay.Endpoint, origin peer.Name, granted func(peer.Name, netip.Addr) bool, refused map[string]bool) bool {
	had := len(ep.Addrs)
	ep.Addrs = slices.DeleteFunc(ep.Addrs, func(a netip.Prefix) bool {
		if granted(origin, a.Addr()) {
			return false
		}
		refused[fmt.Sprintf("%s of peer %s", a.Addr(), origin)] = true
		return true
	})
	return had == 0 || len(ep.Addrs) > 0
}

// refuseLocked takes note of the announced addresses that are another peer's,
// and logs those that are new.
func (r *Router) refuseLocked(now map[string]bool) {
	for a := range now {
		if !r.refused[a] {
			r.cfg.Log.Warn("address announced that another peer has been granted; it is not used", "address", a)
		}
	}
	r.refused = now
}
