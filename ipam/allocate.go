package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"weave.local/ipam/space"
)

// waiter is a call that waits for addresses: for one of a subnet, or for one
// address (a prefix of full length).
type waiter struct {
	owner string
	want  netip.Prefix
	since time.Time
	shown netip.Prefix // with the length the caller gave
	err   error
}

// Allocate gives owner an address of subnet (zero: the default subnet), with
// the subnet's length. An owner that has one there already gets that one. The
// call waits for other peers when need be, until ctx ends; the error then says
// what it waited for. ErrExhausted is in the error when nobody has a free one.
func (a *Allocator) Allocate(ctx context.Context, owner string, subnet netip.Prefix) (netip.Prefix, error) {
	if !subnet.IsValid() {
		subnet = a.cfg.DefaultSubnet
	}
	if err := a.checkSubnet(subnet); err != nil {
		return netip.Prefix{}, err
	}
	if owner == "" {
		return netip.Prefix{}, fmt.Errorf("an address of %s needs an owner", subnet)
	}
	var got netip.Prefix
	err := a.serveCaller(ctx, &waiter{owner: owner, want: subnet, shown: subnet}, func() (netip.Prefix, bool, error) {
		if owner != Anonymous {
			for _, r := range a.heldLocked(owner, subnet) {
				return r.prefix, true, nil
			}
		}
		addr, ok := a.space.Lowest(subnet)
		return netip.PrefixFrom(addr, subnet.Bits()), ok && !a.overLocked(), nil
	}, &got)
	return got, err
}

func (a *Allocator) checkSubnet(subnet netip.Prefix) error {
	_, ok := space.Hosts(subnet)
	switch {
	case subnet != subnet.Masked():
		return fmt.Errorf("subnet %s has host bits; its network is %s", subnet, subnet.Masked())
	case !ok:
		return fmt.Errorf("subnet %s has fewer than four addresses; the smallest is a /%d", subnet, subnet.Addr().BitLen()-2)
	case !subnet.Overlaps(a.cfg.Range):
		return fmt.Errorf("subnet %s is outside the address range %s", subnet, a.cfg.Range)
	}
	return nil
}

// Claim gives owner the very address addr, with the length of its subnet. An
// address outside the range is recorded here alone. It waits as Allocate does;
// ErrHeld is in the error when somebody else has the address.
func (a *Allocator) Claim(ctx context.Context, owner string, addr netip.Prefix) error {
	ip := addr.Addr()
	if !addr.IsValid() || ip.BitLen() != a.cfg.Range.Addr().BitLen() || ip.Zone() != "" {
		return fmt.Errorf("address %v: want one like %s", addr, netip.PrefixFrom(a.cfg.Range.Addr().Next(), a.cfg.Range.Bits()))
	}
	if owner == "" {
		return fmt.Errorf("address %s needs an owner", ip)
	}
	if owner == Anonymous {
		owner += ip.String()
	}
	w := &waiter{owner: owner, want: netip.PrefixFrom(ip, ip.BitLen()), shown: addr}
	var got netip.Prefix
	holder := ""
	err := a.serveCaller(ctx, w, func() (netip.Prefix, bool, error) {
		if r := a.records[ip]; r != nil {
			if r.owner == Unknown && !r.busy {
				delete(a.records, ip) // its owner is back; serveCaller writes it anew
				return addr, true, nil
			}
			if r.owner == owner {
				return r.prefix, true, nil
			}
			holder = r.owner
			return netip.Prefix{}, false, ErrHeld
		}
		return addr, !a.cfg.Range.Contains(ip) || a.space.Owns(ip) && !a.overLocked(), nil
	}, &got)
	if holder == "" {
		return err
	}
	for {
		if who, known := a.who(holder, ip); known {
			return fmt.Errorf("%s is %w by %s on this host", ip, err, who)
		}
		select {
		case <-time.After(laterWait):
		case <-ctx.Done():
			return fmt.Errorf("%s is %w by %s on this host", ip, err, InWords(holder))
		}
	}
}

// who is the owner of an address in words; false: ask again soon.
func (a *Allocator) who(owner string, addr netip.Addr) (words string, known bool) {
	if a.cfg.Holder != nil && strings.HasPrefix(owner, Anonymous) {
		id, known := a.cfg.Holder(addr)
		if !known {
			return "", false
		}
		if id != "" {
			owner = id
		}
	}
	return InWords(owner), true
}

// serveCaller takes what pick finds, durable before it returns, and waits for
// as long as pick finds nothing.
func (a *Allocator) serveCaller(ctx context.Context, w *waiter, pick func() (netip.Prefix, bool, error), got *netip.Prefix) error {
	w.since = time.Now()
	defer a.forget(w)
	for {
		a.mu.Lock()
		prefix, ok, err := pick()
		if err == nil {
			err = w.err
		}
		if err == nil && a.leaving {
			err = fmt.Errorf("this peer has left the network: %w", ErrGone)
		}
		if err != nil {
			a.mu.Unlock()
			return err
		}
		if ok {
			r := a.records[prefix.Addr()]
			if r == nil {
				*got = prefix
				return a.takeAndUnlock(w.owner, prefix)
			}
			if !r.busy {
				a.mu.Unlock()
				*got = r.prefix
				return nil
			}
		}
		if !ok {
			a.waiters[w] = true
		}
		changed := a.changed
		a.mu.Unlock()
		if !ok {
			a.poke()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("no address for %s: %s: %w", w.shown, a.why(), ctx.Err())
		}
	}
}

func (a *Allocator) forget(w *waiter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.waiters, w)
}

// takeAndUnlock records prefix for owner; on return the record is durable or
// there is none. The lock is held on entry and not on return.
func (a *Allocator) takeAndUnlock(owner string, prefix netip.Prefix) error {
	addr := prefix.Addr()
	if owner == Anonymous {
		owner += addr.String()
	}
	r := &record{owner: owner, prefix: prefix, busy: true}
	a.records[addr] = r
	a.space.Use(addr)
	a.disputed = a.disputed || a.cfg.Range.Contains(addr) && !a.space.Owns(addr)
	value := r.encode()
	a.mu.Unlock()
	err := a.cfg.Store.Put(ownKey(addr), value)
	a.mu.Lock()
	defer a.mu.Unlock()
	r.busy = false
	if err != nil {
		delete(a.records, addr)
		a.space.Release(addr)
	}
	a.changedLocked()
	return err
}

// heldLocked are the records of owner within subnet, by address; zero subnet:
// all of them.
func (a *Allocator) heldLocked(owner string, subnet netip.Prefix) []*record {
	var out []*record
	for _, r := range a.records {
		if r.owner == owner && (!subnet.IsValid() || r.prefix.Masked() == subnet) {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *record) int { return a.prefix.Addr().Compare(b.prefix.Addr()) })
	return out
}

// Lookup is what owner holds within subnet, by address; zero subnet: all of
// it. It never waits.
func (a *Allocator) Lookup(owner string, subnet netip.Prefix) []netip.Prefix {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []netip.Prefix
	for _, r := range a.heldLocked(owner, subnet) {
		if !r.busy {
			out = append(out, r.prefix)
		}
	}
	return out
}

// Owned is all that is held here, by owner, in and outside the range.
func (a *Allocator) Owned() map[string][]netip.Prefix {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := map[string][]netip.Prefix{}
	for _, r := range a.records {
		out[r.owner] = append(out[r.owner], r.prefix)
	}
	for _, list := range out {
		slices.SortFunc(list, netip.Prefix.Compare)
	}
	return out
}

// Free ends owner's hold of addr at once. That nobody holds it is no error.
func (a *Allocator) Free(owner string, addr netip.Addr) error {
	if owner == Anonymous {
		owner += addr.String()
	}
	for {
		a.mu.Lock()
		r := a.records[addr]
		switch {
		case r == nil:
			a.mu.Unlock()
			return nil
		case r.owner != owner:
			a.mu.Unlock()
			return fmt.Errorf("%s is %w by %s, not by %s", addr, ErrHeld, InWords(r.owner), InWords(owner))
		case !r.busy:
			return a.dropAndUnlock(r)
		}
		changed := a.changed
		a.mu.Unlock()
		<-changed // a write under way ends soon
	}
}

// dropAndUnlock removes a record, durably before the address is free. The
// lock is held on entry and not on return.
func (a *Allocator) dropAndUnlock(r *record) error {
	r.busy = true
	addr := r.prefix.Addr()
	a.mu.Unlock()
	err := a.cfg.Store.Delete(ownKey(addr))
	a.mu.Lock()
	r.busy = false
	if err == nil {
		delete(a.records, addr)
		a.space.Release(addr)
		if a.disputed {
			a.disputeLocked()
		}
	}
	a.changedLocked()
	a.mu.Unlock()
	a.poke()
	return err
}

// FreeAll ends every hold of owner at once, and calls of it that wait.
func (a *Allocator) FreeAll(owner string) error {
	a.mu.Lock()
	held := a.heldLocked(owner, netip.Prefix{})
	for w := range a.waiters {
		if w.owner == owner {
			w.err = fmt.Errorf("%s is gone: %w", InWords(owner), ErrGone)
		}
	}
	a.changedLocked()
	a.mu.Unlock()
	for _, r := range held {
		if err := a.Free(owner, r.prefix.Addr()); err != nil {
			return err
		}
	}
	return nil
}

// InWords is an owner in words.
func InWords(owner string) string {
	switch {
	case owner == "weave:expose":
		return "the host itself (weave expose)"
	case owner == Unknown:
		return "an owner whose record is damaged"
	case strings.HasPrefix(owner, Anonymous):
		return "a container of the Docker network"
	case strings.Contains(owner, "/"): // the path of a network namespace
		return owner
	case len(owner) > 12:
		return "container " + owner[:12]
	}
	return "container " + owner
}
