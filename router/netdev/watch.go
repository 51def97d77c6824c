package netdev

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// WatchRemovals calls removed with the index of each device that leaves the
// namespace, until ctx ends or the watch breaks. It first calls begun, from
// which moment on none is missed: what is gone before has to be looked up
// then. Neither may block for long.
func WatchRemovals(ctx context.Context, begun func(), removed func(index int)) error {
	const buffer = 1 << 20
	updates := make(chan netlink.LinkUpdate, 64)
	broken := make(chan error, 1)
	watchCtx, cancel := context.WithCancel(ctx)
	err := netlink.LinkSubscribeWithOptions(updates, watchCtx.Done(), netlink.LinkSubscribeOptions{
		ReceiveBufferSize: buffer,
		ErrorCallback: func(err error) {
			select {
			case broken <- err:
			default:
			}
		},
	})
	if err != nil {
		cancel()
		return fmt.Errorf("watch devices: %w", err)
	}
	// The reader closes updates when it ends; it may be in the middle of
	// handing one over.
	defer func() {
		cancel()
		for range updates {
		}
	}()
	begun()
	for {
		select {
		case <-ctx.Done():
			return nil
		case u, ok := <-updates:
			if !ok {
				return watchEnd(ctx, broken)
			}
			// A bridge tells of a port that leaves it in the same way,
			// under its own family.
			if u.Header.Type == unix.RTM_DELLINK && u.Family == unix.AF_UNSPEC {
				removed(int(u.Index))
			}
		}
	}
}

func watchEnd(ctx context.Context, broken <-chan error) error {
	if ctx.Err() != nil {
		return nil
	}
	select {
	case err := <-broken:
		return fmt.Errorf("watch devices: %w", err)
	default:
		return fmt.Errorf("watch devices: ended by the kernel")
	}
}

// WatchRoutes calls changed, which may not block, when the routes that IPv4
// packets take may have changed: with routes, rules, addresses or devices; and
// once in the beginning, from which moment on no change is missed. It goes on
// until ctx ends or the watch breaks.
func WatchRoutes(ctx context.Context, changed func()) error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE)
	if err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	stop := context.AfterFunc(ctx, s.Close) // wakes Receive
	defer func() {
		if stop() {
			s.Close()
		}
	}()
	changed()
	for {
		_, _, err := s.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !errors.Is(err, unix.ENOBUFS): // which says that some were lost
			return fmt.Errorf("watch routes: %w", err)
		}
		changed()
	}
}
