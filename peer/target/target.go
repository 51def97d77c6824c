// Package target reads what a user names as a peer to dial, and resolves it.
package target

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const resolveWait = 5 * time.Second

// Resolve checks that all targets are well-formed and that one of them resolves,
// if there are any: the others may do so later and are not waited for. The
// error, of one line, names those that are wrong. Port is the default one.
func Resolve(ctx context.Context, targets []string, port uint16) error {
	malformed := slices.ContainsFunc(targets, func(t string) bool {
		_, _, err := Split(t, port)
		return err != nil
	})
	ctx, enough := context.WithCancel(ctx)
	defer enough()
	var asked sync.WaitGroup
	lost := make([]error, len(targets))
	for i, t := range targets {
		asked.Go(func() {
			if lost[i] = Check(ctx, t, port); lost[i] == nil && !malformed {
				enough()
			}
		})
	}
	asked.Wait()
	if !malformed && (len(targets) == 0 || slices.Contains(lost, nil)) {
		return nil
	}
	return OneLine(lost)
}

// OneLine joins errors into one whose text has no line breaks; nil for none.
func OneLine(errs []error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) < 2 {
		return errors.Join(errs...)
	}
	text := make([]string, len(errs))
	for i, err := range errs {
		text[i] = err.Error()
	}
	return errors.New(strings.Join(text, "; "))
}

// Check says what is wrong with a target, as Resolve does.
func Check(ctx context.Context, target string, defaultPort uint16) error {
	host, port, err := Split(target, defaultPort)
	if err == nil {
		_, err = Host(ctx, host, port)
	}
	return err
}

// Host returns the addresses of a host, given as Split returns it.
func Host(ctx context.Context, host string, port uint16) ([]netip.AddrPort, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(addr.Unmap(), port)}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, resolveWait)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		reason := err.Error()
		if dns := (*net.DNSError)(nil); errors.As(err, &dns) {
			reason = dns.Err
		}
		return nil, fmt.Errorf("peer %q does not resolve (%s): give a host name that does, or an IP address", host, reason)
	}
	out := make([]netip.AddrPort, 0, len(addrs))
	for _, a := range addrs {
		if ap := netip.AddrPortFrom(a.Unmap(), port); !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	return out, nil
}

// Split reads host, host:port, address, address:port or [address]:port.
func Split(s string, defaultPort uint16) (host string, port uint16, err error) {
	bad := fmt.Errorf("peer %q: want a host name or IP address, optionally with a port such as 192.0.2.1:6783", s)
	if addr, err := netip.ParseAddr(s); err == nil {
		return addr.String(), defaultPort, nil
	}
	if inner, ok := strings.CutPrefix(s, "["); ok && strings.HasSuffix(inner, "]") {
		addr, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		if err != nil {
			return "", 0, bad
		}
		return addr.String(), defaultPort, nil
	}
	host, port = s, defaultPort
	if strings.Contains(s, ":") {
		var text string
		if host, text, err = net.SplitHostPort(s); err != nil {
			return "", 0, bad
		}
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return "", 0, fmt.Errorf("peer %q: the port %q is no number from 1 to 65535", s, text)
		}
		port = uint16(n)
	}
	if host == "" || strings.ContainsAny(host, "/ \t\n,;@[]") {
		return "", 0, bad
	}
	return host, port, nil
}
