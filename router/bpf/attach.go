package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// ErrNoTCX says that the kernel (before 6.6) cannot attach a program to a
// device by a link; a clsact filter with the program's FD does the same.
var ErrNoTCX = errors.New("the kernel has no tcx links")

// Program names one of the programs.
type Program string

// The programs, by the place they are made for.
const (
	VXLANIn  Program = "vxlan_in"  // ingress of the VXLAN device
	VXLANOut Program = "vxlan_out" // egress of the VXLAN device
	TAPIn    Program = "tap_in"    // ingress of the user-space path's TAP
	PortIn   Program = "port_in"   // ingress of a container's host-side device
	PortOut  Program = "port_out"  // egress of a container's host-side device
	UplinkIn Program = "uplink_in" // ingress of a device of the underlay
	JoinIn   Program = "join_in"   // ingress of the device that joins packets
)

// Egress says on which of the two hooks of a device the program belongs.
func (p Program) Egress() bool { return p == VXLANOut || p == PortOut }

func (p Program) attachType() ebpf.AttachType {
	if p.Egress() {
		return ebpf.AttachTCXEgress
	}
	return ebpf.AttachTCXIngress
}

func (o *Objects) program(p Program) *ebpf.Program {
	switch p {
	case VXLANIn:
		return o.objs.VxlanIn
	case VXLANOut:
		return o.objs.VxlanOut
	case TAPIn:
		return o.objs.TapIn
	case PortIn:
		return o.objs.PortIn
	case PortOut:
		return o.objs.PortOut
	case UplinkIn:
		return o.objs.UplinkIn
	case JoinIn:
		return o.objs.JoinIn
	}
	return nil
}

// FD is the descriptor of the program, valid until Close.
func (o *Objects) FD(p Program) int { return o.program(p).FD() }

// linksDir is where attachments are pinned.
func linksDir(dir string) string { return filepath.Join(dir, "links") }

func linkPath(dir string, ifIndex int, p Program) string {
	return filepath.Join(linksDir(dir), strconv.Itoa(ifIndex)+"-"+string(p))
}

// Attached says whether a pinned attachment of the program, of whichever
// version, is in force on the device.
func (o *Objects) Attached(ifIndex int, p Program) bool {
	l, err := loadLink(linkPath(o.dir, ifIndex, p))
	if err != nil {
		return false
	}
	defer l.Close() //nolint:errcheck // only read from
	return linkDevice(l) == ifIndex
}

// Attach makes the program run on the device: an attachment that is pinned
// from before is switched over to it without a gap, else one is made and
// pinned. Returns ErrNoTCX where the kernel has no such attachments.
func (o *Objects) Attach(ifIndex int, p Program) error {
	prog := o.program(p)
	path := linkPath(o.dir, ifIndex, p)
	if err := os.MkdirAll(linksDir(o.dir), dirMode); err != nil {
		return fmt.Errorf("directory for pinned links: %w", err)
	}
	l, err := loadLink(path)
	if err == nil && linkDevice(l) == ifIndex {
		defer l.Close() //nolint:errcheck // pinned; only the descriptor goes
		if err := l.Update(prog); err != nil {
			return fmt.Errorf("renew %s on device %d: %w", p, ifIndex, err)
		}
		return o.detachStrays(ifIndex, p, l)
	}
	if err == nil { // of a device that is gone and whose index was given anew
		if err := errors.Join(l.Unpin(), l.Close()); err != nil {
			return fmt.Errorf("stale pin of %s: %w", p, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("pinned link of %s: %w", p, err)
	}
	l, err = link.AttachTCX(link.TCXOptions{Interface: ifIndex, Program: prog, Attach: p.attachType()})
	switch {
	case errors.Is(err, ebpf.ErrNotSupported):
		return ErrNoTCX
	case err != nil:
		return fmt.Errorf("attach %s to device %d: %w", p, ifIndex, err)
	}
	defer l.Close() //nolint:errcheck // pinned; only the descriptor goes
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin %s on device %d: %w", p, ifIndex, err)
	}
	return o.detachStrays(ifIndex, p, l)
}

// detachStrays removes copies of the program that hang on pins we cannot see
// (another BPF file system over ours, say): two copies would both handle
// every frame.
func (o *Objects) detachStrays(ifIndex int, p Program, mine link.Link) error {
	info, err := mine.Info()
	if err != nil {
		return fmt.Errorf("link of %s: %w", p, err)
	}
	attached, err := link.QueryPrograms(link.QueryOptions{Target: ifIndex, Attach: p.attachType()})
	if err != nil {
		return fmt.Errorf("programs on device %d: %w", ifIndex, err)
	}
	var errs []error
	for _, a := range attached.Programs {
		id, ok := a.LinkID()
		if !ok || id == info.ID || programName(a.ID) != string(p) {
			continue
		}
		stray, err := link.NewFromID(id)
		if err != nil {
			continue // gone meanwhile
		}
		errs = append(errs, stray.Detach(), stray.Close())
	}
	return errors.Join(errs...)
}

// programName is "" when the program is gone or cannot be read.
func programName(id ebpf.ProgramID) string {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer prog.Close() //nolint:errcheck // only read from
	info, err := prog.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// Detach takes the program off the device and removes the pin; nothing there
// is no error.
func (o *Objects) Detach(ifIndex int, p Program) error {
	return detach(linkPath(o.dir, ifIndex, p))
}

func detach(path string) error {
	l, err := loadLink(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pinned link %s: %w", filepath.Base(path), err)
	}
	// Detaching, not only unpinning: others may hold the link, too.
	err = l.Detach()
	if errors.Is(err, ebpf.ErrNotSupported) || linkDevice(l) == 0 {
		err = nil // the device is gone, and the attachment with it
	}
	if err := errors.Join(err, l.Unpin(), l.Close()); err != nil {
		return fmt.Errorf("detach %s: %w", filepath.Base(path), err)
	}
	return nil
}

// AttachedTo lists the devices that have a pinned attachment of the program, of
// whichever version, by interface index.
func (o *Objects) AttachedTo(p Program) ([]int, error) {
	var devices []int
	err := eachLink(o.dir, func(path string, ifIndex int) error {
		if path == linkPath(o.dir, ifIndex, p) {
			devices = append(devices, ifIndex)
		}
		return nil
	})
	return devices, err
}

// Shares says whether a device has programs of others, attached by links, on
// the hook that the program belongs on.
func (o *Objects) Shares(ifIndex int, p Program) (bool, error) {
	attached, err := link.QueryPrograms(link.QueryOptions{Target: ifIndex, Attach: p.attachType()})
	if err != nil {
		return false, fmt.Errorf("programs on device %d: %w", ifIndex, err)
	}
	for _, a := range attached.Programs {
		if programName(a.ID) != string(p) {
			return true, nil
		}
	}
	return false, nil
}

// SweepLinks removes the pins of devices that are gone.
func (o *Objects) SweepLinks() error {
	return eachLink(o.dir, func(path string, ifIndex int) error {
		l, err := loadLink(path)
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", filepath.Base(path), err)
		}
		defer l.Close() //nolint:errcheck // only the descriptor goes
		if linkDevice(l) == ifIndex {
			return nil
		}
		return l.Unpin()
	})
}

// DetachAll takes all pinned programs below dir off their devices and removes
// all pins, without need for Open. A directory that is not there is no error.
func DetachAll(dir string) error {
	err := eachLink(dir, func(path string, _ int) error { return detach(path) })
	errs := []error{err, os.RemoveAll(linksDir(dir))}
	maps, err := filepath.Glob(filepath.Join(dir, "maps-*"))
	errs = append(errs, err)
	for _, m := range maps {
		errs = append(errs, os.RemoveAll(m))
	}
	return errors.Join(errs...)
}

func eachLink(dir string, do func(path string, ifIndex int) error) error {
	entries, err := os.ReadDir(linksDir(dir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list pinned links: %w", err)
	}
	var errs []error
	for _, e := range entries {
		index, _, _ := strings.Cut(e.Name(), "-")
		ifIndex, err := strconv.Atoi(index)
		if err != nil {
			continue // not ours
		}
		errs = append(errs, do(filepath.Join(linksDir(dir), e.Name()), ifIndex))
	}
	return errors.Join(errs...)
}

func loadLink(path string) (link.Link, error) { return link.LoadPinnedLink(path, nil) }

// linkDevice is the interface index that the link is on, 0 when the device is
// gone.
func linkDevice(l link.Link) int {
	info, err := l.Info()
	if err != nil || info.TCX() == nil {
		return 0
	}
	return int(info.TCX().Ifindex)
}
