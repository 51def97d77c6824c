package link

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"weave.local/peer"
	"weave.local/peer/dialer"
	"weave.local/peer/handshake"
	"weave.local/peer/target"
)

const (
	dialWait = 4 * time.Second // two repetitions of a lost SYN
)

// Connection is a live link or something to be dialled.
type Connection = dialer.Connection

// States of a Connection, see package dialer.
const (
	Connecting = dialer.Connecting
	Retrying   = dialer.Retrying
	Failed     = dialer.Failed
	Connected  = dialer.Connected
)

// Connections returns one entry for each live link, by name of the peer, then
// one for each target or discovered peer without link, one for another live
// peer of our name, and one for each address that was turned away lately
// because of the password or a name.
func (m *Mesh) Connections() []Connection {
	var out []Connection
	for _, n := range m.Neighbours() {
		out = append(out, Connection{
			Addr: n.Remote.String(), Outbound: n.Outbound, State: Connected, Peer: n.Info, Session: n.Session, Sealed: n.Keys != nil,
		})
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	rows := m.dials.Rows(m.linkedLocked)
	for i := range rows {
		if r, ok := m.topo.Record(rows[i].Peer.Name); ok {
			rows[i].Peer = r.Info
		}
	}
	out = append(out, rows...)
	now := time.Now()
	out = append(out, m.twin.rows(now)...)
	return append(out, m.turned.rows(out, now)...)
}

// Targets returns the targets as they were given, sorted.
func (m *Mesh) Targets() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dials.Targets()
}

// Connect adds targets and dials them at once, also those it has already. The
// error names those that are malformed or do not resolve; the others are added.
func (m *Mesh) Connect(targets []string) error { return m.setTargets(targets, false) }

// ReplaceTargets makes these the only targets; links that exist stay. Errors
// as with Connect.
func (m *Mesh) ReplaceTargets(targets []string) error { return m.setTargets(targets, true) }

// Forget drops targets, written as they were given. Links that exist stay.
func (m *Mesh) Forget(targets []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, t := range targets {
		m.dials.Forget(t)
	}
	m.changedLocked()
}

func (m *Mesh) setTargets(targets []string, replace bool) error {
	bad := make(map[string]error, len(targets))
	for _, t := range targets {
		bad[t] = m.lookup(t)
	}
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.strangers)
	if replace {
		for _, t := range m.dials.Targets() {
			if _, keep := bad[t]; !keep {
				m.dials.Forget(t)
			}
		}
	}
	var errs []error
	for _, t := range targets {
		err := bad[t]
		if err == nil {
			err = m.dials.Add(t, now)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	m.changedLocked()
	return target.OneLine(errs)
}

// lookup is a request to the resolver, whose context ends with Run.
type lookup struct {
	target string
	answer chan error // with room for one
}

// lookup checks that a target resolves. A mesh that does not run yet cannot
// tell.
func (m *Mesh) lookup(target string) error {
	m.mu.Lock()
	running := m.running
	m.mu.Unlock()
	if !running {
		return nil
	}
	req := lookup{target: target, answer: make(chan error, 1)}
	select {
	case m.lookups <- req:
		return <-req.answer
	case <-m.ended:
		return ErrClosed
	}
}

// resolver serves lookups.
func (m *Mesh) resolver(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case req := <-m.lookups:
			m.tasks.Go(func() {
				req.answer <- target.Check(ctx, req.target, m.cfg.Self.Port)
			})
		}
	}
}

// Resolve checks targets before a start, see target.Resolve.
func Resolve(ctx context.Context, targets []string, port uint16) error {
	return target.Resolve(ctx, targets, port)
}

// attempt dials one target or peer and, on success, serves the link.
func (m *Mesh) attempt(ctx context.Context, j dialer.Job) {
	l, o := m.connect(ctx, j)
	m.mu.Lock()
	m.dials.Finish(j, o, time.Now())
	m.changedLocked()
	m.mu.Unlock()
	if l != nil {
		m.serve(ctx, l)
		return
	}
	if o.Err != nil {
		m.log.Debug("not linked", "target", j.Target, "peer", j.Peer, "err", o.Err)
	}
}

func (m *Mesh) connect(ctx context.Context, j dialer.Job) (*link, dialer.Outcome) {
	addrs := j.Addrs
	if len(addrs) == 0 {
		var err error
		if addrs, err = m.cfg.resolve(ctx, j.Host, j.Port); err != nil { // again each time: it may have moved
			return nil, dialer.Outcome{Err: err}
		}
	}
	o := dialer.Outcome{Addrs: addrs, Err: errors.New("no address")}
	for _, a := range addrs {
		if name := m.linkedAt(a); name != 0 {
			o = dialer.Outcome{Addrs: addrs, Peer: name}
			if want := j.Peer; want == 0 || want == name {
				return nil, o
			}
			continue // several peers behind one address
		}
		l, got := m.dialAddr(ctx, a)
		got.Addrs = addrs
		o = got
		if l != nil || o.Err == nil || o.Self || ctx.Err() != nil {
			return l, o
		}
	}
	return nil, o
}

// linkedAt returns the peer that listens at an address as far as a link tells;
// 0 when there is none.
func (m *Mesh) linkedAt(a netip.AddrPort) peer.Name {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, l := range m.links {
		if m.servedLocked(name) && listening(l.outbound, l.remote, l.peer.Port) == a {
			return name
		}
	}
	return 0
}

// listening is where a peer at the other end of a link listens.
func listening(outbound bool, remote netip.AddrPort, port uint16) netip.AddrPort {
	if outbound {
		return remote
	}
	return netip.AddrPortFrom(remote.Addr(), port)
}

func (m *Mesh) dialAddr(ctx context.Context, a netip.AddrPort) (*link, dialer.Outcome) {
	conn, err := m.cfg.dial(ctx, a)
	if err != nil {
		return nil, dialer.Outcome{Err: plain(err)}
	}
	l, h, err := m.greet(ctx, conn, true)
	o := dialer.Outcome{Err: err}
	if h != nil {
		o.Peer = h.Info.Name
	}
	if r := (*handshake.Refusal)(nil); errors.As(err, &r) {
		o.Self = r.Code == handshake.RefuseSelf
		o.Collision = r.Code == handshake.RefuseCollision
		o.Refused = r.Lasts()
		if r.Code == handshake.RefuseDuplicate {
			o.Err = nil
		}
	} else if err != nil {
		o.Err = plain(err)
	}
	return l, o
}

func (cfg Config) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	if cfg.Dial != nil {
		return cfg.Dial(ctx, to)
	}
	var d net.Dialer
	if b := cfg.Bind; b.IsValid() && b.Is4() == to.Addr().Is4() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(b, 0))
	}
	return d.DialContext(ctx, "tcp", to.String())
}

// plain is what went wrong without the words of the net package around it.
func plain(err error) error {
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return errors.New("no answer")
	}
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return errno
	}
	return err
}

// discoverLocked looks for peers without link in what others announce.
func (m *Mesh) discoverLocked(now time.Time) {
	if !m.cfg.Discovery {
		return
	}
	found := make(map[peer.Name][]netip.AddrPort)
	ports := make(map[peer.Name]peer.Info)
	snap := m.viewLocked()
	for _, r := range snap.Records() {
		if r.Name != m.self.Name && m.links[r.Name] == nil && m.strangeLocked(r.Info) == nil {
			ports[r.Name] = r.Info
			found[r.Name] = nil
		}
	}
	if len(found) == 0 {
		return
	}
	for _, r := range snap.Records() {
		for _, a := range r.Neighbours {
			info, wanted := ports[a.Name]
			if !wanted || !a.Addr.Addr().IsValid() {
				continue
			}
			at := listening(a.Outbound, a.Addr, info.Port)
			if !slices.Contains(found[a.Name], at) {
				found[a.Name] = append(found[a.Name], at)
			}
		}
	}
	small := len(snap.Records()) <= dialer.MeshMost // else whether they can be reached anyhow shows first
	for name, addrs := range found {
		m.dials.Discover(name, addrs, now, small && dialer.First(m.self.UID, ports[name].UID))
	}
}
