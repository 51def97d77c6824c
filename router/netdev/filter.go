package netdev

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Place of our clsact filters: Docker and others leave it free.
const (
	filterPriority = 1
	filterHandle   = 1
)

func filterParent(egress bool) uint32 {
	if egress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

func clsactOf(index int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// AttachFilter makes a BPF program run on a device as a clsact filter, instead
// of the one of that name if there is one.
func AttachFilter(index int, egress bool, name string, fd int) error {
	if err := netlink.QdiscAdd(clsactOf(index)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("clsact on device %d: %w", index, err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: index, Parent: filterParent(egress), Handle: filterHandle,
			Protocol: unix.ETH_P_ALL, Priority: filterPriority,
		},
		Fd: fd, Name: name, DirectAction: true,
	}
	if err := netlink.FilterReplace(f); err != nil {
		return fmt.Errorf("filter %s on device %d: %w", name, index, err)
	}
	return nil
}

// HasFilter says whether the program is on the device as a filter.
func HasFilter(index int, egress bool, name string) bool {
	f, err := findFilter(index, egress, name)
	return err == nil && f != nil
}

// findFilter is nil when the program is not on the device as a filter.
func findFilter(index int, egress bool, name string) (netlink.Filter, error) {
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return nil, fmt.Errorf("device %d: %w", index, err)
	}
	filters, err := whole(func() ([]netlink.Filter, error) { return netlink.FilterList(l, filterParent(egress)) })
	if err != nil {
		return nil, nil //nolint:nilerr // there is no clsact on the device
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == name {
			return f, nil
		}
	}
	return nil, nil
}

// DetachFilter removes the program from the device, and clsact with the last
// filter. A device that is gone is no error.
func DetachFilter(index int, egress bool, name string) error {
	f, err := findFilter(index, egress, name)
	if f == nil || err != nil {
		return nil //nolint:nilerr // the device is gone, and all with it
	}
	if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove filter %s from device %d: %w", name, index, err)
	}
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return nil //nolint:nilerr // gone meanwhile
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		left, err := whole(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent) })
		if err != nil || len(left) > 0 {
			return nil //nolint:nilerr // others use it
		}
	}
	if err := netlink.QdiscDel(clsactOf(index)); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove clsact from device %d: %w", index, err)
	}
	return nil
}
