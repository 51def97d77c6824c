package fastdp

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"weave.local/router/bpf"
)

// Place of our clsact filters: Docker and others leave it free.
const (
	filterPriority = 1
	filterHandle   = 1
)

// attach makes a program run on a device: by a tcx link where the kernel has
// these, else as a clsact filter. Both replace an older version of the
// program without a gap, and both outlive the daemon. While the switch-over
// is deferred, what is attached is left alone.
func (d *DataPath) attach(index int, p bpf.Program) error {
	if d.deferred && d.attached(index, p) {
		return nil
	}
	if !d.clsact {
		err := d.objs.Attach(index, p)
		if !errors.Is(err, bpf.ErrNoTCX) {
			return err
		}
		d.clsact = true
	}
	return attachFilter(index, d.objs.FD(p), p)
}

// attached says whether any version of the program is on the device.
func (d *DataPath) attached(index int, p bpf.Program) bool {
	if d.objs.Attached(index, p) {
		return true
	}
	f, err := findFilter(index, p)
	return err == nil && f != nil
}

func (d *DataPath) detach(index int, p bpf.Program) error {
	return errors.Join(d.objs.Detach(index, p), detachFilter(index, p))
}

func filterParent(p bpf.Program) uint32 {
	if p.Egress() {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

func clsactOf(index int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

func attachFilter(index, fd int, p bpf.Program) error {
	if err := netlink.QdiscAdd(clsactOf(index)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact on device %d: %w", index, err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: index, Parent: filterParent(p), Handle: filterHandle,
			Protocol: unix.ETH_P_ALL, Priority: filterPriority,
		},
		Fd: fd, Name: string(p), DirectAction: true,
	}
	if err := netlink.FilterReplace(f); err != nil {
		return fmt.Errorf("filter %s on device %d: %w", p, index, err)
	}
	return nil
}

// findFilter is nil when the program is not on the device as a filter.
func findFilter(index int, p bpf.Program) (netlink.Filter, error) {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return nil, fmt.Errorf("device %d: %w", index, err)
	}
	filters, err := netlink.FilterList(l, filterParent(p))
	if err != nil {
		return nil, nil //nolint:nilerr // there is no clsact on the device
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == string(p) {
			return f, nil
		}
	}
	return nil, nil
}

// detachFilter removes the program from the device, and clsact with the last
// filter. A device that is gone is no error.
func detachFilter(index int, p bpf.Program) error {
	f, err := findFilter(index, p)
	if f == nil || err != nil {
		return nil //nolint:nilerr // the device is gone, and all with it
	}
	if err := netlink.FilterDel(f); err != nil {
		return fmt.Errorf("remove filter %s from device %d: %w", p, index, err)
	}
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return nil //nolint:nilerr // gone meanwhile
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		left, err := netlink.FilterList(l, parent)
		if err != nil || len(left) > 0 {
			return nil //nolint:nilerr // others use it
		}
	}
	if err := netlink.QdiscDel(clsactOf(index)); err != nil {
		return fmt.Errorf("remove clsact from device %d: %w", index, err)
	}
	return nil
}

// detachAllFilters removes our programs from all devices on which they are
// filters.
func detachAllFilters() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	var errs []error
	for _, l := range links {
		for _, p := range []bpf.Program{bpf.PortIn, bpf.PortOut, bpf.TAPIn} {
			errs = append(errs, detachFilter(l.Attrs().Index, p))
		}
	}
	return errors.Join(errs...)
}
