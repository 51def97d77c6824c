package fastdp

import (
	"errors"
	"fmt"
	"slices"

	"weave.local/router/bpf"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// The programs have room for all addresses that a port may have.
const _ = uint(bpf.MaxAddrs - overlay.MaxAddrs)

// SetPort adds a local port or replaces what is known of it. The bridge
// itself is the exposed host: its frames are not checked, since it may route
// for others.
func (d *DataPath) SetPort(p overlay.Port) error {
	port, err := bpf.PortOf(bpf.MAC(p.MAC), p.Addrs)
	if err != nil {
		return fmt.Errorf("port %s: %w", p.IfName, err)
	}
	dev, err := netdev.DeviceByIndex(p.IfIndex)
	if err != nil {
		return fmt.Errorf("port %s: %w", p.IfName, err)
	}
	port.Veth, port.AnySource = dev.Kind == "veth", p.AnySource
	d.mu.Lock()
	defer d.mu.Unlock()
	old, replaced := d.ports[p.IfIndex]
	// The tables first: no program may meet a port that it does not know.
	err = errors.Join(
		d.objs.Ports.Put(uint32(p.IfIndex), port),
		d.objs.Endpoints.Put(port.MAC, localEndpoint(p.IfIndex, port)))
	if err != nil {
		return err
	}
	d.ports[p.IfIndex] = port
	if err := d.moveAddrsLocked(old, port); err != nil {
		return err
	}
	// Where the bridge saw it before it was here is wrong now.
	if err := netdev.ForgetMAC(d.vxlan, port.MAC); err != nil {
		return err
	}
	if replaced && old.MAC != port.MAC {
		if err := d.releaseMACLocked(old.MAC); err != nil {
			return err
		}
	}
	if p.IfIndex == d.bridge {
		return nil
	}
	if err := d.attachPort(p.IfIndex); err != nil {
		if !replaced {
			err = errors.Join(err, d.removePortLocked(p.IfIndex))
		}
		return fmt.Errorf("port %s: %w", p.IfName, err)
	}
	return nil
}

// localEndpoint is the holder of a port's address.
func localEndpoint(index int, p bpf.Port) bpf.Endpoint {
	e := bpf.Endpoint{Subnets: p.Subnets}
	if p.Veth {
		e.IfIndex = uint32(index)
	}
	return e
}

func (d *DataPath) attachPort(index int) error {
	if err := d.attach(index, bpf.PortIn); err != nil {
		return err
	}
	return d.attach(index, bpf.PortOut)
}

// RemovePort forgets a port. A device that is gone already is no error.
func (d *DataPath) RemovePort(ifIndex int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.removePortLocked(ifIndex)
}

func (d *DataPath) removePortLocked(index int) error {
	p, known := d.ports[index]
	delete(d.ports, index)
	// Programs drop the frames of a port they do not know, so nothing
	// passes unchecked between these steps.
	errs := []error{d.objs.Ports.Delete(uint32(index))}
	if known {
		errs = append(errs, d.moveAddrsLocked(p, bpf.Port{}), d.releaseMACLocked(p.MAC))
	}
	if index != d.bridge {
		errs = append(errs, d.detach(index, bpf.PortIn), d.detach(index, bpf.PortOut))
	}
	return errors.Join(errs...)
}

// releaseMACLocked gives an address back that a port held: to another port
// with the same one, else to the peer that announces it, else to nobody.
func (d *DataPath) releaseMACLocked(mac bpf.MAC) error {
	for index, p := range d.ports {
		if p.MAC == mac {
			return d.objs.Endpoints.Put(mac, localEndpoint(index, p))
		}
	}
	if e, ok := d.remote[mac]; ok {
		return d.objs.Endpoints.Put(mac, e)
	}
	return d.objs.Endpoints.Delete(mac)
}

// moveAddrsLocked follows a port's change of addresses. Those that it no
// longer has go back as releaseMACLocked says.
func (d *DataPath) moveAddrsLocked(old, now bpf.Port) error {
	var errs []error
	for _, a := range old.Addrs[:old.N] {
		if !slices.Contains(now.Addrs[:now.N], a) {
			errs = append(errs, d.releaseAddrLocked(a))
		}
	}
	for _, a := range now.Addrs[:now.N] {
		errs = append(errs, d.objs.Addresses.Put(a, now.MAC))
	}
	return errors.Join(errs...)
}

func (d *DataPath) releaseAddrLocked(a bpf.Addr) error {
	for _, p := range d.ports {
		if slices.Contains(p.Addrs[:p.N], a) {
			return d.objs.Addresses.Put(a, p.MAC)
		}
	}
	if mac, ok := d.holders[a]; ok {
		return d.objs.Addresses.Put(a, mac)
	}
	return d.objs.Addresses.Delete(a)
}
