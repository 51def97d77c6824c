package gossip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"weave.local/peer"
)

const (
	maxPackets  = 1024 // waiting for memberlist
	virtualPort = 1
)

// transport carries memberlist over the links, by name of the peer. The
// addresses memberlist sees never change, wherever a peer is: they are made
// from its name.
type transport struct {
	g       *Gossip
	packets chan *memberlist.Packet
	streams chan net.Conn
	dial    atomic.Pointer[dialFunc] // nil while not running
}

type dialFunc func(to peer.Name, timeout time.Duration) (net.Conn, error)

func newTransport(g *Gossip) *transport {
	return &transport{
		g:       g,
		packets: make(chan *memberlist.Packet, maxPackets),
		streams: make(chan net.Conn),
	}
}

// open lets the transport dial until ctx ends.
func (t *transport) open(ctx context.Context) {
	f := dialFunc(func(to peer.Name, timeout time.Duration) (net.Conn, error) {
		wait, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		conn, err := t.g.mesh.Dial(wait, to)
		if err != nil {
			return nil, err
		}
		_ = conn.SetWriteDeadline(time.Now().Add(timeout)) // fails on a closed one, as Write will
		if _, err := conn.Write([]byte{streamMembers}); err != nil {
			_ = conn.Close()
			return nil, err
		}
		_ = conn.SetWriteDeadline(time.Time{})
		return conn, nil
	})
	t.dial.Store(&f)
}

// receive takes a packet from the links. Packets that find no room are lost, as
// with UDP.
func (t *transport) receive(from peer.Name, b []byte) {
	if t.dial.Load() == nil {
		return
	}
	b = doubtDeaths(slices.Clone(b), t.g.mesh.Topology().Reaches)
	p := &memberlist.Packet{Buf: b, From: virtualAddr(from), Timestamp: time.Now()}
	select {
	case t.packets <- p:
	default:
		t.g.count.lostPackets.Add(1)
	}
}

// virtualAddr is an address of fd00::/8 (RFC 4193) that ends with the name.
func virtualAddr(name peer.Name) *net.UDPAddr {
	raw := [16]byte{0xfd, 'w', 'e', 'a', 'v', 'e'}
	mac := name.MAC()
	copy(raw[16-len(mac):], mac[:])
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom16(raw), virtualPort))
}

// joinAddr is how memberlist is told of a peer.
func joinAddr(name peer.Name) string { return name.String() + "/" + virtualAddr(name).String() }

// FinalAdvertiseAddr returns our virtual address.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return virtualAddr(t.g.self).IP, virtualPort, nil
}

// WriteTo is WriteToAddress without a name, which memberlist is told not to
// use.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	return t.WriteToAddress(b, memberlist.Address{Addr: addr})
}

// WriteToAddress sends a packet. One that cannot be sent is lost without an
// error: given one, memberlist would never suspect the peer.
func (t *transport) WriteToAddress(b []byte, addr memberlist.Address) (time.Time, error) {
	now := time.Now()
	name, err := peer.ParseName(addr.Name)
	if err != nil {
		return now, fmt.Errorf("packet to %s: %w", addr.Addr, err)
	}
	if err := t.g.mesh.Send(name, PacketKind, b); err != nil {
		t.g.log.Debug("packet not sent", "to", name, "err", err)
	}
	return now, nil
}

// PacketCh gets the packets of other peers.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh gets the streams of other peers.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// DialTimeout is DialAddressTimeout without a name, which memberlist is told
// not to use.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// DialAddressTimeout opens a stream to a peer by its name.
func (t *transport) DialAddressTimeout(addr memberlist.Address, timeout time.Duration) (net.Conn, error) {
	name, err := peer.ParseName(addr.Name)
	if err != nil {
		return nil, fmt.Errorf("stream to %s: %w", addr.Addr, err)
	}
	dial := t.dial.Load()
	if dial == nil {
		return nil, errors.New("gossip does not run")
	}
	return (*dial)(name, timeout)
}

// Shutdown does nothing: the links belong to the mesh.
func (t *transport) Shutdown() error { return nil }

// logWriter hands memberlist's log to ours, without its time.
type logWriter struct{ g *Gossip }

// Write logs one line.
func (w logWriter) Write(b []byte) (int, error) {
	text := strings.TrimSpace(string(b))
	if _, rest, ok := strings.Cut(text, "memberlist: "); ok {
		text = rest
	}
	w.g.log.Debug("memberlist", "says", text)
	return len(b), nil
}
