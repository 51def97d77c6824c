// Package userdp is what stands in for the fast path on a host whose kernel
// cannot have it: a switch in user space between the bridge and the sleeve.
//
// A TAP device is a port of the bridge, where the fast path has its VXLAN
// device. What the bridge sends into it gets the two tags that say where it
// goes (see package sleeve) and is handed to the sleeve; what the sleeve
// receives is delivered to the bridge or goes on to other peers.
//
//	containers ── bridge ── TAP ── Switch ── socket pair ── sleeve
//
// To the sleeve the socket pair is its TAP: each message is a frame with its
// virtio-net header. So frames may be super-frames here as well.
//
// The rules are those of package bpf, with exceptions: frames between
// containers of one host do not come by, nor can a broadcast be kept from some
// of them. On one host, containers of different subnets are apart only as far
// as their addresses go. Nor is it known which container a frame is from, so
// foreign Ethernet addresses are nobody's. Forwarding ends with the daemon.
package userdp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"weave.local/ipam/uptime"
	"weave.local/peer"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
	"weave.local/router/tap"
)

// Config says how to build a Switch.
type Config struct {
	Bridge  string // name of the bridge, which is there
	TapName string // of the device to make
	Why     error  // what the fast path lacks
	Log     *slog.Logger
}

// Switch stands in for the fast path. It implements overlay.Switch, under the
// name of the fast path, which it says to be absent.
type Switch struct {
	cfg    Config
	bridge int         // index of the bridge
	tap    *tap.Device // frames from and to the bridge
	near   *os.File    // our end of the socket pair
	far    *os.File    // the sleeve's
	count  counters
	table  atomic.Pointer[table]
	limits limits       // for the goroutine that reads the TAP
	lease  atomic.Int64 // see SetLease

	mu        sync.Mutex // guards what follows, of which table is made
	self      peer.ShortID
	announced []overlay.Endpoint
	ports     map[int]overlay.Port
}

var _ overlay.Switch = (*Switch)(nil)

// New makes the TAP device and joins it to the bridge. Nothing is carried
// before Run. A Switch that shall not run must be closed.
func New(cfg Config) (*Switch, error) {
	bridge, err := netdev.DeviceByName(cfg.Bridge)
	if err != nil {
		return nil, err
	}
	near, far, err := socketPair()
	if err != nil {
		return nil, err
	}
	dev, err := tap.Open(cfg.TapName, 1, cfg.Log)
	if err != nil {
		return nil, errors.Join(err, near.Close(), far.Close())
	}
	s := &Switch{
		cfg: cfg, bridge: bridge.Index, tap: dev, near: near, far: far,
		limits: make(limits), ports: make(map[int]overlay.Port),
	}
	s.table.Store(newTable(0, s.bridge, nil, nil))
	if err := netdev.SetMaster(cfg.TapName, cfg.Bridge); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// pairBuffer is how many bytes may wait in each direction between Switch and
// sleeve.
const pairBuffer = 4 << 20

// socketPair makes two connected sockets that keep messages whole.
func socketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair for frames: %w", err)
	}
	a, b = os.NewFile(uintptr(fds[0]), "frames"), os.NewFile(uintptr(fds[1]), "frames")
	for _, fd := range fds {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, pairBuffer); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("socket pair for frames: %w", err), a.Close(), b.Close())
		}
	}
	return a, b, nil
}

// Device is what the sleeve takes for its TAP. It is the sleeve's to close.
func (s *Switch) Device() *tap.Device { return &tap.Device{File: s.far, USO: s.tap.USO} }

// Name is overlay.FastDP, for which it stands.
func (s *Switch) Name() string { return overlay.FastDP }

// MTU is the least that is something, so that the router asks for the path and
// hears why there is none.
func (s *Switch) MTU(peer.ShortID) int { return 1 }

// Probe fails with an *overlay.AbsentError.
func (s *Switch) Probe(peer.ShortID, uint64, int) error {
	return &overlay.AbsentError{Why: s.cfg.Why}
}

// Apply takes over what f says of endpoints; where frames go is the sleeve's.
func (s *Switch) Apply(f overlay.Forwarding) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.Self != 0 || !f.Partial {
		s.self = f.Self
	}
	s.announced = f.Endpoints
	s.rebuildLocked()
	return nil
}

// SetPort adds a local port or replaces what is known of it.
func (s *Switch) SetPort(p overlay.Port) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ports[p.IfIndex] = p
	s.rebuildLocked()
	return nil
}

// RemovePort forgets a port.
func (s *Switch) RemovePort(ifIndex int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ports, ifIndex)
	s.rebuildLocked()
	return nil
}

// SetLease cuts the bridge off from other peers from until on. When this program
// is dead, it is cut off anyway.
func (s *Switch) SetLease(until time.Duration) error {
	s.lease.Store(int64(until))
	return nil
}

func (s *Switch) cutOff() bool {
	until := s.lease.Load()
	if until == 0 {
		return false
	}
	return uptime.Now() >= time.Duration(until)
}

func (s *Switch) rebuildLocked() {
	s.table.Store(newTable(s.self, s.bridge, s.announced, maps.Clone(s.ports)))
}

// Counters returns frames counted by event since New, under the names that
// bpf.Objects.Counters explains.
func (s *Switch) Counters() (map[string]uint64, error) { return s.count.snapshot(), nil }

// Traffic is empty: what is exchanged with others the sleeve carries and counts.
func (s *Switch) Traffic() (map[peer.ShortID]overlay.Traffic, error) { return nil, nil }

// Run carries frames until ctx ends, then closes the TAP, which vanishes with
// it. It may be called once.
func (s *Switch) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-ctx.Done()
		return s.Close()
	})
	g.Go(func() error { return unlessClosed(s.serveBridge()) })
	g.Go(func() error { return unlessClosed(s.servePeers()) })
	return g.Wait()
}

// Close gives back what New made, the sleeve's end of the pair apart. A second
// Close does nothing.
func (s *Switch) Close() error {
	return errors.Join(unlessClosed(s.tap.Close()), unlessClosed(s.near.Close()))
}

func unlessClosed(err error) error {
	if errors.Is(err, os.ErrClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
