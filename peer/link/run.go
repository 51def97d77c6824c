package link

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"weave.local/peer"
	"weave.local/peer/dialer"
	"weave.local/peer/handshake"
)

const (
	handshakeWait  = 5 * time.Second
	maxGreeting    = 64                    // incoming connections that may be in their handshake
	originateEvery = 50 * time.Millisecond // changes within it make one record; in large clusters longer
	originateStep  = 100                   // peers for which it gets longer by itself
	newsEvery      = 20 * time.Millisecond // news of others within it are handed on together
	discoverStep   = time.Millisecond      // between two looks at what can be dialled, for each peer there is
	acceptPause    = 50 * time.Millisecond // after an error of accept, such as too many open files
)

// Run accepts and dials links and serves them until ctx ends; then neighbours
// are told and all is closed. It may be called once.
func (m *Mesh) Run(ctx context.Context) error {
	m.mu.Lock()
	if m.running || m.closed {
		m.mu.Unlock()
		return ErrClosed
	}
	m.running = true
	m.mu.Unlock()

	m.tasks.Go(func() { m.accept(ctx) })
	m.tasks.Go(func() { m.resolver(ctx) })
	m.loop(ctx)

	m.mu.Lock()
	m.running, m.closed = false, true
	m.mu.Unlock()
	close(m.ended)
	_ = m.listener.Close()
	m.tasks.Wait()
	for {
		select {
		case s := <-m.streams:
			_ = s.Close()
		default:
			return nil
		}
	}
}

// loop does what time or a change demands.
func (m *Mesh) loop(ctx context.Context) {
	timer := time.NewTimer(tickEvery)
	defer timer.Stop()
	var originated, expired, spread, discovered time.Time
	for {
		now, next := time.Now(), tickEvery
		due := func(last *time.Time, every time.Duration) bool {
			if wait := every - now.Sub(*last); wait > 0 {
				next = min(next, wait)
				return false
			}
			*last = now
			return true
		}
		m.mu.Lock()
		if len(m.news) > 0 && due(&spread, newsEvery) {
			m.newsLocked()
		}
		peers := len(m.viewLocked().Records())
		if m.stale && due(&originated, originateEvery*time.Duration(1+peers/originateStep)) || m.overtaken && due(&originated, m.twin.wait()) {
			m.originateLocked()
		}
		if now.Sub(expired) >= expireEvery {
			expired = now
			m.expireLocked(now)
		}
		m.checkLinksLocked(now)
		if m.discovery && due(&discovered, discoverStep*time.Duration(peers)) {
			m.discovery = false
			m.discoverLocked(now)
			m.dials.Wake(m.viewLocked().Reaches, m.linkedLocked, now)
		}
		spare := m.dials.Wanted(len(m.links), peers, now)
		jobs := m.dials.Start(now, m.servedLocked, m.roomLocked(), spare)
		m.mu.Unlock()
		for _, j := range jobs {
			m.tasks.Go(func() { m.attempt(ctx, j) })
		}
		timer.Reset(next)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-m.kick:
		}
	}
}

// expireLocked forgets peers that are gone for long.
func (m *Mesh) expireLocked(now time.Time) {
	gone := m.topo.Expire(now, keepRecords)
	for _, name := range gone {
		delete(m.windows, name)
		m.dials.Lose(name)
	}
	if len(gone) > 0 {
		m.changedLocked()
	}
}

// checkLinksLocked sends hellos and ends links that are dead.
func (m *Mesh) checkLinksLocked(now time.Time) {
	m.trimLocked(now)
	m.excludeLocked(now)
	for _, l := range m.links {
		if m.partLocked(l, now) {
			continue
		}
		if silent := l.conn.silence(now); silent > deadAfter {
			l.stop(fmt.Errorf("nothing heard for %.1fs", silent.Seconds()))
			continue
		}
		if !l.expires.IsZero() && now.After(l.expires) {
			l.stop(errors.New("it was made with a password that is good no more"))
			continue
		}
		if !now.Before(l.helloDue) {
			l.helloDue = now.Add(helloEvery)
			l.hello(m.viewLocked().Digest())
		}
	}
}

func (m *Mesh) linkedLocked(name peer.Name) bool {
	l := m.links[name]
	return l != nil && !l.ended()
}

// accept takes incoming connections until the listener closes.
func (m *Mesh) accept(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = m.listener.Close() })
	defer stop()
	greeting := make(chan struct{}, maxGreeting)
	for {
		conn, err := m.listener.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			m.log.Warn("incoming connection not accepted", "err", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(acceptPause):
			}
			continue
		}
		select {
		case greeting <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		m.tasks.Go(func() {
			l, h, err := m.greet(ctx, conn, false)
			<-greeting
			if err != nil {
				m.refused(conn, h, err)
				return
			}
			m.serve(ctx, l)
		})
	}
}

func (m *Mesh) refused(conn net.Conn, h *handshake.Other, err error) {
	who := ""
	if h != nil {
		who = h.Info.String()
	}
	r := (*handshake.Refusal)(nil)
	tell := errors.As(err, &r) && r.Lasts()
	if tell && r.Code != handshake.RefuseLimit { // which is no fault of theirs
		m.mu.Lock()
		tell = m.turned.add(addrPort(conn.RemoteAddr()), r.Reason, time.Now())
		m.mu.Unlock()
	}
	if tell {
		m.log.Warn("incoming link refused", "from", conn.RemoteAddr(), "peer", who, "err", err)
		return
	}
	m.log.Debug("incoming connection ended", "from", conn.RemoteAddr(), "peer", who, "err", err)
}

// greet does the handshake. On success the link is registered and must be
// served; otherwise the connection is closed.
func (m *Mesh) greet(ctx context.Context, conn net.Conn, outbound bool) (*link, *handshake.Other, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(handshakeWait))
	self := handshake.Self{Info: m.Self(), Nonce: m.nonce(), Keys: m.goodKeys(), Trusted: m.trusts(conn.RemoteAddr())}
	h, err := handshake.Greet(conn, self, outbound)
	if err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	heard := newHeardConn(h.Conn, &m.count)
	var l *link
	err = h.Conclude(func() *handshake.Refusal {
		m.mu.Lock()
		defer m.mu.Unlock()
		r := m.admitLocked(h)
		if r == nil && h.Chair {
			l = m.registerLocked(h, heard)
		}
		return r
	})
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = conn.Close()
		if l != nil {
			l.stop(err)
			m.unregister(l)
		}
		return nil, h, err
	}
	if l == nil {
		m.mu.Lock()
		l = m.registerLocked(h, heard)
		m.mu.Unlock()
	}
	return l, h, nil
}

// nonce is one for a handshake, remembered for as long as one may take.
func (m *Mesh) nonce() uint64 {
	n, now := rand.Uint64(), time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.DeleteFunc(m.nonces, func(_ uint64, since time.Time) bool { return now.Sub(since) > 2*handshakeWait })
	m.nonces[n] = now
	return n
}

// ourselvesLocked says whether the other end is this very process: it uses a
// nonce of ours. A copy of a running machine has name and UID in common, too.
func (m *Mesh) ourselvesLocked(h *handshake.Other) bool {
	_, ours := m.nonces[h.Nonce]
	return ours && h.Info.Name == m.self.Name && h.Info.UID == m.self.UID
}

// admitLocked decides whether we want a link.
func (m *Mesh) admitLocked(h *handshake.Other) *handshake.Refusal {
	p := h.Info
	if m.closed || !m.running {
		return &handshake.Refusal{Code: handshake.RefuseOther, Reason: "this peer stops"}
	}
	if p.Name == m.self.Name {
		if m.ourselvesLocked(h) {
			return &handshake.Refusal{Code: handshake.RefuseSelf, Reason: "both ends are the same peer"}
		}
		return &handshake.Refusal{Code: handshake.RefuseCollision, Reason: fmt.Sprintf(
			"both ends have the name %s: start one of them with another --name", p.Name)}
	}
	if r := m.strangeLocked(p); r != nil {
		return r
	}
	old := m.links[p.Name]
	if old == nil || old.ended() {
		if !m.roomLocked() && !m.guestLocked(p.Name) {
			return &handshake.Refusal{Code: handshake.RefuseLimit, Reason: fmt.Sprintf("limit of %d links reached", m.cfg.ConnLimit)}
		}
		return nil
	}
	if old.peer.UID != p.UID {
		return &handshake.Refusal{Code: handshake.RefuseCollision, Reason: fmt.Sprintf(
			"another peer with the name %s is linked from %s: start one of them with another --name", p.Name, old.remote)}
	}
	if h.Chair && m.rankLocked(h.Key) <= m.rankLocked(old.key) {
		return &handshake.Refusal{Code: handshake.RefuseDuplicate, Reason: "there is a link already"}
	}
	return nil // the chair knows best
}

// registerLocked makes a link part of the mesh.
func (m *Mesh) registerLocked(h *handshake.Other, conn *heardConn) *link {
	now := time.Now()
	l := newLink(h, conn, now)
	if old := m.links[h.Info.Name]; old != nil {
		old.stop(errors.New("replaced by a newer link"))
	}
	m.links[h.Info.Name] = l
	delete(m.outdated, l.peer.Name)
	m.outdateLocked(l, now) // the password may have changed during the handshake
	snap := m.topo.Snapshot()
	l.before, l.joins = snap.Digest(), !snap.Reaches(h.Info.Name)
	l.helloDue = now.Add(helloEvery)
	l.hello(l.before)
	m.stale = true
	m.turned.forget(l.remote)
	m.count.links.Add(1)
	m.changedLocked()
	return l
}

// unregister takes an ended link out of the mesh.
func (m *Mesh) unregister(l *link) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.links[l.peer.Name] != l {
		return
	}
	delete(m.links, l.peer.Name)
	if !l.expires.IsZero() {
		m.outdated[l.peer.Name] = l.expires
	}
	m.stale = true
	m.count.lost.Add(1)
	m.dials.Down(l.peer.Name, l.reason, now.Sub(l.began), now)
	if m.cfg.Discovery && m.strangeLocked(l.peer) == nil {
		m.dials.Discover(l.peer.Name, []netip.AddrPort{listening(l.outbound, l.remote, l.peer.Port)}, now, dialer.First(m.self.UID, l.peer.UID))
	}
	m.changedLocked()
}

// serve runs a registered link to its end.
func (m *Mesh) serve(ctx context.Context, l *link) {
	m.log.Info("link up", "peer", l.peer.String(), "remote", l.remote, "outbound", l.outbound)
	err := l.serve(ctx, m)
	m.log.Info("link down", "peer", l.peer.String(), "remote", l.remote, "reason", err)
}
