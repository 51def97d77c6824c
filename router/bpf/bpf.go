// Package bpf holds the kernel programs of the fast data path with their
// maps: the C source, the compiled objects and a typed view of both.
//
// The maps and the attachments (links) of the programs are pinned in a BPF
// file system, so frames flow on while no daemon runs and the next daemon
// adopts what it finds. Below the pin directory:
//
//	maps-<layout>/<map>          <layout> is a hash of all key and value types
//	links/<ifindex>-<program>    one per device and program (tcx only)
//
// The head of weave.bpf.c says what the programs do, tables.h what the fields of
// the maps mean.
package bpf

import (
	"errors"
	"fmt"
	"hash/fnv"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
)

// Features of the running kernel that the programs make use of; see Config.
const (
	FeatureLocalAddr   = 1 << iota // a tunnel key carries the source address
	FeatureTunnelFlags             // flags of a tunnel key can be read: own errors about oversize frames are recognised
	FeatureShortcut                // not of the kernel but wanted: unicast between announced endpoints goes past the bridge, neighbour solicitations are answered
	FeatureARP                     // wanted as well: ARP requests for announced addresses are answered
)

// dirMode keeps the pins to root.
const dirMode = 0o700

// Objects are the programs and maps, loaded into the kernel. Its methods may
// be called from several goroutines; it does not order writers.
type Objects struct {
	dir      string
	layout   string
	fresh    bool
	features uint32
	objs     weaveObjects

	Neighbours Table[Addr, Neighbour]
	Hops       Table[uint16, Hop]
	Trees      Table[uint16, Tree]
	Endpoints  Table[MAC, Endpoint]
	Ports      Table[uint32, Port]
	Addresses  Table[Addr, MAC]
	Foreign    Table[uint16, Subnets] // by peer: where MACs that nobody announced may be
}

// Open loads the programs with their maps pinned below dir, a BPF file
// system: maps of the same layout are adopted with their content, else made.
func Open(dir string) (*Objects, error) {
	limit := rlimit.RemoveMemlock() // needed before Linux 5.11
	if err := features.HaveProgramType(ebpf.SchedCLS); err != nil {
		return nil, fmt.Errorf("the kernel lets us have no BPF programs: %w", err)
	}
	if limit != nil {
		return nil, fmt.Errorf("memory limit for BPF maps: %w", limit)
	}
	spec, err := loadWeave()
	if err != nil {
		return nil, fmt.Errorf("BPF objects: %w", err)
	}
	o := &Objects{dir: dir, layout: "maps-" + layoutHash(spec)}
	pins := filepath.Join(dir, o.layout)
	switch err := os.Mkdir(pins, dirMode); {
	case err == nil:
		o.fresh = true
	case !errors.Is(err, os.ErrExist):
		return nil, fmt.Errorf("directory for pinned maps: %w", err)
	}
	for name, m := range spec.Maps {
		if isOurs(name) {
			m.Pinning = ebpf.PinByName
		}
	}
	if err := o.load(spec, pins); err != nil {
		return nil, err
	}
	return o, nil
}

func (o *Objects) load(spec *ebpf.CollectionSpec, pins string) error {
	opts := &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: pins}}
	err := spec.LoadAndAssign(&o.objs, opts)
	if err != nil {
		return fmt.Errorf("load BPF programs: %w", err)
	}
	if o.features, err = o.testFeatures(); err != nil {
		return errors.Join(err, o.Close())
	}
	o.bindTables()
	return nil
}

// isOurs tells the maps of the C source from the sections of global variables.
func isOurs(name string) bool { return name[0] != '.' }

// layoutHash names what a pinned map must look like to be of use to these
// programs: kind and size of all maps, names and places of all fields.
func layoutHash(spec *ebpf.CollectionSpec) string {
	h := fnv.New64a()
	names := make([]string, 0, len(spec.Maps))
	for name := range spec.Maps {
		if isOurs(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		m := spec.Maps[name]
		fmt.Fprintf(h, "%s %v %d %d %d %d\n", name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
		writeType(h, m.Key)
		writeType(h, m.Value)
	}
	return fmt.Sprintf("%016x", h.Sum64())
}

func writeType(h interface{ Write([]byte) (int, error) }, t btf.Type) {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		for _, m := range t.Members {
			fmt.Fprintf(h, "%s@%d\n", m.Name, m.Offset)
			writeType(h, m.Type)
		}
	case *btf.Array:
		fmt.Fprintf(h, "[%d]", t.Nelems)
		writeType(h, t.Type)
	case *btf.Int:
		fmt.Fprintf(h, "%d\n", t.Size)
	}
}

// minFrame is the shortest frame that a test run of a program takes, in bytes.
const minFrame = 64

func (o *Objects) testFeatures() (uint32, error) {
	have, _, err := o.objs.TestFeatures.Test(make([]byte, minFrame))
	if err != nil {
		return 0, fmt.Errorf("find out features of the kernel: %w", err)
	}
	return have, nil
}

// Fresh says that the maps were made by Open and are empty.
func (o *Objects) Fresh() bool { return o.fresh }

// Features are those Feature bits that this kernel has.
func (o *Objects) Features() uint32 { return o.features }

// Supersedes says that maps of programs with another layout are pinned beside
// ours: a daemon of another version was here before, and DropOtherLayouts has
// not been called since.
func (o *Objects) Supersedes() (bool, error) {
	dirs, err := filepath.Glob(filepath.Join(o.dir, "maps-*"))
	if err != nil {
		return false, fmt.Errorf("list pinned maps: %w", err)
	}
	return len(dirs) > 1, nil
}

// DropOtherLayouts removes the pinned maps of programs with other layouts. To
// be called when no such program is attached any more.
func (o *Objects) DropOtherLayouts() error {
	dirs, err := filepath.Glob(filepath.Join(o.dir, "maps-*"))
	if err != nil {
		return fmt.Errorf("list pinned maps: %w", err)
	}
	var errs []error
	for _, dir := range dirs {
		if filepath.Base(dir) != o.layout {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// Close lets go of the programs and maps; what is pinned works on.
func (o *Objects) Close() error {
	if err := o.objs.Close(); err != nil {
		return fmt.Errorf("close BPF objects: %w", err)
	}
	return nil
}

// Config is what the programs know of this host.
type Config struct {
	Self     uint16 // short id of this peer; 0 while it has none: nothing is sent
	VXLAN    uint32 // interface index of the VXLAN device
	TAP      uint32 // interface index of the user-space path's TAP, 0 without
	Features uint32

	Port        uint16        // UDP port of VXLAN
	Join        uint32        // interface index of the device that joins packets, 0 without
	DirectUntil time.Duration // on the monotonic clock of the kernel: the direct way is not used after
	// LeaseUntil is when the ports here are cut off from other peers, on the
	// clock of the kernel that counts sleep; 0: never.
	LeaseUntil time.Duration
}

// SetConfig replaces the configuration.
func (o *Objects) SetConfig(c Config) error {
	v := weaveCfg{
		Self: uint32(c.Self), VxlanIf: c.VXLAN, TapIf: c.TAP, Flags: c.Features,
		JoinIf: c.Join, Port: uint32(bits.ReverseBytes16(c.Port)), DirectUntil: uint64(c.DirectUntil),
		LeaseUntil: uint64(c.LeaseUntil),
	}
	if err := o.objs.Config.Put(uint32(0), v); err != nil {
		return fmt.Errorf("BPF configuration: %w", err)
	}
	return nil
}

// Config reads the configuration back; zero before the first SetConfig.
func (o *Objects) Config() (Config, error) {
	var v weaveCfg
	if err := o.objs.Config.Lookup(uint32(0), &v); err != nil {
		return Config{}, fmt.Errorf("BPF configuration: %w", err)
	}
	return Config{
		Self: uint16(v.Self), VXLAN: v.VxlanIf, TAP: v.TapIf, Features: v.Flags,
		Join: v.JoinIf, Port: bits.ReverseBytes16(uint16(v.Port)), DirectUntil: time.Duration(v.DirectUntil),
		LeaseUntil: time.Duration(v.LeaseUntil),
	}, nil
}
