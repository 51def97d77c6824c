package fastdp

import (
	"errors"

	"weave.local/router/bpf"
	"weave.local/router/netdev"
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
	return netdev.AttachFilter(index, p.Egress(), string(p), d.objs.FD(p))
}

// attached says whether any version of the program is on the device.
func (d *DataPath) attached(index int, p bpf.Program) bool {
	if d.objs.Attached(index, p) {
		return true
	}
	return netdev.HasFilter(index, p.Egress(), string(p))
}

func (d *DataPath) detach(index int, p bpf.Program) error {
	return errors.Join(d.objs.Detach(index, p), netdev.DetachFilter(index, p.Egress(), string(p)))
}

// detachAllFilters removes our programs from all devices on which they are
// filters. The VXLAN device takes its own with it.
func detachAllFilters() error {
	devices, err := netdev.Devices()
	if err != nil {
		return err
	}
	var errs []error
	for _, dev := range devices {
		for _, p := range []bpf.Program{bpf.PortIn, bpf.PortOut, bpf.TAPIn} {
			errs = append(errs, netdev.DetachFilter(dev.Index, p.Egress(), string(p)))
		}
	}
	return errors.Join(errs...)
}
