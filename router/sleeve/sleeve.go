// Package sleeve is the data path through user space, for peers that the
// kernel's own tunnels do not reach: frames come out of a TAP device, travel
// in UDP datagrams to the neighbour's sleeve and go into the TAP there.
//
// # Frames on the TAP
//
// Every frame carries a virtio-net header of 10 bytes and two VLAN tags that
// say where it comes from and where it goes:
//
//	802.1ad (88a8)  bits 15-12 hop limit bits 5-2   bits 11-0 source's short id
//	802.1Q  (8100)  bit 15 flood  bit 14 zero
//	                bits 13-12 hop limit bits 1-0   bits 11-0 destination's short id
//
// The hop limit is 1 to 63; whoever decides that a frame is relayed lowers it,
// the sleeve carries it as it is. A flooded frame that leaves the kernel has
// destination 0 and goes to each child of this peer in the source's tree that
// is reached by sleeve; one that enters the kernel has this peer as its
// destination and came from this peer's parent in that tree. Frames may be
// super-frames, far larger than any MTU: see virtio's VIRTIO_NET_HDR_GSO_*.
//
// # Datagrams, version 1
//
// All numbers are big-endian. The frame travels without the two tags.
//
//	 0  u8   version, 1
//	 1  u8   kind: 1 frame, 2 segment, 3 fragment, 4 probe
//	 2  u16  sender's short id
//	 4  u64  session: a secret of the two ends' control link, so that nobody off
//	         the path can put frames in
//	12  u32  source's short id : 12 | destination's : 12 | hop limit : 6 |
//	         flood : 1 | checksum to be completed : 1
//	16  u16  group: number of the frame that the pieces belong to; 0 in others
//	18  u16  offset of the piece in the frame (fragment) or in its payload (segment)
//	20  u16  payload of each segment of the super-frame; 0 when it is none
//	22  u16  where the checksum's coverage starts, from the frame's first byte
//	24  u8   where the checksum lies from there
//	25  u8   length of the headers in a segment, Ethernet to TCP or UDP
//	26  u8   virtio GSO type of the frame; 0 none
//	27  u8   bit 0: last piece; other bits zero
//	28       the rest of the datagram:
//	         frame     the whole frame
//	         segment   headers of the super-frame, then a piece of its payload:
//	                   as many bytes as bytes 20-21 say, fewer only in the last
//	         fragment  a piece of the frame; all but the last equally long, at
//	                   least 128 bytes
//	         probe     u64 token, u16 size, and zeros: 14 + size bytes in all,
//	                   but no less than 14
//
// To a neighbour with keys go sealed datagrams only, and only such are taken
// from it: version 2, see package seal. The label is the sender's short id. The
// text is what stands above from byte 12 on, and then the kind. They are 18
// bytes longer.
//
// Answers go where the last datagram that was taken from a neighbour came from,
// and the session or keys of a link that was replaced by another are good for a
// while beside the new ones: see succession.
//
// A segment is made so that its headers can be put right for it alone: when
// some segments of a super-frame are lost, each run of the others still makes
// a valid frame. A datagram that does not fit this is dropped and counted. A
// peer of another version is told apart by byte 0, and its datagrams dropped.
//
// # Flow
//
// Two goroutines serve, each with buffers of its own that are made once:
//
//	TAP → sender: strip tags, look up next hop, cut to the path's MTU, seal → UDP
//	UDP → receiver: open, check tree, join segments and fragments, tag → TAP
//
// TAP and UDP port are queues side by side, the lanes, that they read in turn:
// peers share one by their short ids modulo its number.
package sleeve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/peer"
	"weave.local/router/overlay"
	"weave.local/router/tap"
)

// Config says how to build a Path.
type Config struct {
	Port    int               // UDP port, 1 to 65535; 0 lets the kernel choose
	Bind    netip.Addr        // local address; the zero value means all, of both families
	TapName string            // of the TAP device to make, at most 15 bytes
	Device  *tap.Device       // taken instead of a TAP when set, and closed: one end of a socket pair
	OnProbe overlay.ProbeFunc // told of probes that arrive; nil: nobody
	Log     *slog.Logger
}

// MaxBuffers is how many bytes a Path holds at most for frames on their way,
// besides what waits in the kernel: for each of 8 lanes 4 MiB in each direction at
// its socket, and 512 frames at its TAP. It does not grow with the number of
// neighbours.
const MaxBuffers = 5 << 19

// Path is the data path. It implements overlay.Overlay.
type Path struct {
	onProbe overlay.ProbeFunc
	log     *slog.Logger
	count   *counters
	tap     *tap.Conn
	sock    *socket
	routes  *routes
	table   atomic.Pointer[table]
	applyMu sync.Mutex // one Apply at a time; not held while I/O is done
}

var _ overlay.Overlay = (*Path)(nil)

// New makes the TAP device and the UDP socket in the network namespace of the
// calling thread. Nothing is carried before Run. Errors name what is taken:
// the port or the device. A Path that shall not run must be closed.
func New(cfg Config) (*Path, error) {
	sock, err := openSocket(cfg.Bind, cfg.Port)
	if err != nil {
		return nil, err
	}
	routes, err := openRoutes()
	if err != nil {
		return nil, errors.Join(err, sock.close())
	}
	from := cfg.Device
	if from == nil {
		from, err = tap.Open(cfg.TapName, lanes, cfg.Log)
	}
	var dev *tap.Conn
	if err == nil {
		dev, err = tap.NewConn(from)
	}
	if err != nil {
		routes.close()
		return nil, errors.Join(err, sock.close())
	}
	p := &Path{
		onProbe: cfg.OnProbe,
		log:     cfg.Log,
		count:   new(counters),
		tap:     dev,
		sock:    sock,
		routes:  routes,
	}
	p.table.Store(new(table))
	return p, nil
}

// Name is overlay.Sleeve.
func (p *Path) Name() string { return overlay.Sleeve }

// Port is the UDP port in use.
func (p *Path) Port() int { return p.sock.port }

// Run carries frames until ctx ends, then closes the socket and the TAP, which
// vanishes with it. It may be called once. It returns an error when the TAP or
// the socket fails under it.
func (p *Path) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		<-ctx.Done()
		return p.Close()
	})
	g.Go(func() error { p.age(ctx); return nil })
	g.Go(func() error { return unlessClosed(p.newSender().serve()) })
	g.Go(func() error { return unlessClosed(p.newReceiver().serve()) })
	return g.Wait()
}

// ageEvery is how often keys are looked at whether they are old.
const ageEvery = 5 * time.Second

// age lets keys grow old until ctx ends.
func (p *Path) age(ctx context.Context) {
	tick := time.NewTicker(ageEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, n := range p.table.Load().neighbours {
				if n == nil {
					continue
				}
				n.forgetBefore(now)
				if n.keys != nil {
					n.keys.Tick(now)
				}
			}
		}
	}
}

// Close gives back what New made. Run does it by itself; a second Close does
// nothing.
func (p *Path) Close() error {
	p.routes.close()
	return errors.Join(unlessClosed(p.tap.Close()), unlessClosed(p.sock.close()))
}

// MTU is the largest IP packet, in bytes, that fits into one datagram to a
// neighbour as the kernel's routes see it now, or 0 when the neighbour is
// unknown. Larger packets are carried as well, in several datagrams.
func (p *Path) MTU(to peer.ShortID) int {
	n := p.table.Load().neighbour(to)
	if n == nil {
		return 0
	}
	p.refreshMTU(n)
	return n.maxPacket()
}

// refreshMTU asks the kernel for the path MTU to n.
func (p *Path) refreshMTU(n *neighbour) {
	to := n.place.Load().addr
	mtu, err := p.routes.mtu(to)
	if err != nil {
		p.log.Debug("no path MTU", "peer", n.name, "address", to, "error", err)
		return
	}
	if old := n.pathMTU.Swap(int32(mtu)); old != 0 && int(old) != mtu {
		p.log.Info("path MTU of the underlay changed", "peer", n.name, "from", old, "to", mtu)
	}
}

// moved follows a neighbour whose datagrams come from elsewhere.
func (p *Path) moved(n *neighbour) {
	p.log.Debug("peer heard from another address", "peer", n.name, "address", n.place.Load().addr)
	p.refreshMTU(n)
}

// Counters returns what happened to frames and datagrams since New, under
// stable names.
func (p *Path) Counters() map[string]uint64 { return p.count.snapshot() }

func unlessClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// errUnknown says that a peer is no neighbour.
func errUnknown(id peer.ShortID) error {
	return fmt.Errorf("peer with short id %d is no neighbour of this one", id)
}
