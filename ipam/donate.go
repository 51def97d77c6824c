package ipam

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"weave.local/ipam/message"
	"weave.local/ipam/register"
	"weave.local/ipam/space"
	"weave.local/peer"
)

// serve answers a peer that asks for addresses of ours. What is given is out
// of our own space, durably, before the register hears of it.
func (a *Allocator) serve(now time.Time, from peer.Name, q message.Ask) {
	st := a.node.State()
	if st == nil {
		return
	}
	if q.Cluster != st.Cluster {
		a.foreign(register.Foreign{Peer: from, Cluster: q.Cluster, Range: a.cfg.Range})
		return
	}
	n, ok := a.served[from]
	if !ok || n.ID != q.ID {
		n = message.Answer{Cluster: st.Cluster, ID: q.ID, Term: st.Term, Version: st.Version}
		n.Code, n.Text = a.donate(from, q.Want)
		switch n.Code {
		case message.None:
			n.Text = strconv.FormatUint(a.usedIn(q.Want), 10)
		case message.Held:
			who, known := a.who(n.Text, q.Want.Addr())
			if n.Text = who; !known {
				n.Code = message.Later
			}
		case message.Given, message.Later:
		}
		if n.Code == message.Given {
			a.served[from] = n // a doubled question is not to be given to twice
		}
	}
	if q.Term != st.Term || q.Version < st.Version {
		a.collect(a.node.Inform(now, from))
	}
	a.post(from, n.Append())
}

// donate marks a block as given away to a peer, if there is one. Of an address
// that is held, the text is by whom.
func (a *Allocator) donate(to peer.Name, want netip.Prefix) (message.Code, string) {
	sought := space.FromPrefix(want)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pending.Learned {
		return message.Later, "" // the register is about to change
	}
	transit := false
	for r, heir := range a.giving {
		if _, ok := r.Intersect(sought); ok {
			if heir == to {
				return message.Given, ""
			}
			transit = true
		}
	}
	var block space.Range
	var ok bool
	if want.IsSingleIP() {
		block, ok = sought, a.space.Free().Covers(sought)
	} else {
		block, ok = register.Donation(a.space.Free(), want)
	}
	switch {
	case ok:
		a.giving[block] = to
		a.writes[giveKey(block)] = encodeGive(to)
		a.ownLocked()
		return message.Given, ""
	case transit:
		return message.Later, ""
	case want.IsSingleIP() && a.records[want.Addr()] != nil:
		return message.Held, a.records[want.Addr()].owner
	}
	return message.None, ""
}

// answered takes what an asked peer says.
func (a *Allocator) answered(now time.Time, from peer.Name, n message.Answer) {
	st := a.node.State()
	if st == nil || n.Cluster != st.Cluster {
		return
	}
	for key, s := range a.searches {
		if s.asked != from || s.id != n.ID {
			continue
		}
		same := n.Term == st.Term && n.Version == st.Version && s.term == st.Term && s.version == st.Version
		switch {
		case n.Code == message.Given:
			s.tries, s.next = askTimes, now.Add(givenWait)
		case n.Code == message.Held:
			a.taken(now, key, s, from, n.Text)
		case n.Code == message.None && same && !key.IsSingleIP():
			s.denied[from], _ = strconv.ParseUint(n.Text, 10, 64) // older peers say nothing
			s.asked, s.next = 0, time.Time{}
		default:
			s.asked, s.next = 0, now.Add(laterWait)
		}
		if n.Term < st.Term || n.Term == st.Term && n.Version < st.Version {
			a.collect(a.node.Inform(now, from))
		}
		return
	}
}

// taken ends the search for one address that somebody on another peer holds.
func (a *Allocator) taken(now time.Time, key netip.Prefix, s *search, from peer.Name, by string) {
	there := a.nick(from)
	a.fail(key, fmt.Errorf("%s is %w by %s on %s", key.Addr(), ErrHeld, by, there))
	a.lose(key.Addr(), from)
	a.mu.Lock()
	defer a.mu.Unlock()
	if r := a.records[key.Addr()]; r != nil {
		a.conflict[from] = conflict{fmt.Sprintf("%s is in use by %s here and by %s on %s; detach one of them",
			key.Addr(), InWords(r.owner), by, there), now}
		a.searches[key] = s
		s.asked, s.next = 0, now.Add(30*time.Second)
	}
}

// stranger is a peer with another register.
type stranger struct {
	sent time.Time // of the last meet message
	// into is the cluster of the stranger when this peer is to go over to it,
	// as decided until then.
	into  register.Cluster
	until time.Time
}

// foreign deals with the sign of another cluster.
func (a *Allocator) foreign(f register.Foreign) {
	now := time.Now()
	if f.Range != a.cfg.Range {
		a.disagree(now, f.Peer, fmt.Sprintf("%s allocates from %s and this peer from %s; launch both with the same --ipalloc-range",
			a.nick(f.Peer), f.Range, a.cfg.Range))
		return
	}
	s := a.stranger(f.Peer)
	if f.State != nil && f.State.Cluster == s.into && now.Before(s.until) {
		a.goOver(now, f.Peer, f.State)
		return
	}
	a.sendMeet(now, f.Peer, s)
}

func (a *Allocator) stranger(name peer.Name) *stranger {
	s := a.strange[name]
	if s == nil {
		s = &stranger{}
		a.strange[name] = s
	}
	return s
}

func (a *Allocator) sendMeet(now time.Time, to peer.Name, s *stranger) {
	st := a.node.State()
	if st == nil || now.Sub(s.sent) < time.Second {
		return
	}
	s.sent = now
	m := message.Meeting{Cluster: st.Cluster, Range: a.cfg.Range, Empty: a.empty()}
	a.post(to, m.Append())
}

// empty says whether nothing would be lost if this peer gave up its cluster.
func (a *Allocator) empty() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.emptyLocked()
}

func (a *Allocator) emptyLocked() bool {
	if a.pending.Learned || len(a.giving) > 0 || a.leaving {
		return false
	}
	for addr := range a.records {
		if a.cfg.Range.Contains(addr) {
			return false
		}
	}
	st := a.state
	return st == nil || !slices.ContainsFunc(st.Members, func(m register.Member) bool { return m.Name != a.self.Name })
}

// meet decides what comes of two clusters that meet: one that is a single
// peer without an address in use goes over to the other; of two such the one
// with the higher id. Else both stay, and the quarrel is reported.
func (a *Allocator) meet(now time.Time, from peer.Name, m message.Meeting) {
	st := a.node.State()
	if m.Range != a.cfg.Range {
		a.foreign(register.Foreign{Peer: from, Cluster: m.Cluster, Range: m.Range})
		return
	}
	if st == nil || m.Cluster == st.Cluster {
		return
	}
	s := a.stranger(from)
	mine := a.empty()
	switch {
	case mine && (!m.Empty || string(st.Cluster[:]) > string(m.Cluster[:])):
		s.into, s.until = m.Cluster, now.Add(5*time.Second)
		// Asked like this, by one without a cluster, it sends its register.
		start := register.Message{Kind: register.KindStart, Range: a.cfg.Range, Store: a.self.Store}
		a.post(from, start.Append([]byte{message.KindRegister}))
	case !mine && !m.Empty:
		text := fmt.Sprintf("%s belongs to cluster %s and this peer to cluster %s, and both have addresses in use; run weave reset on one side",
			a.nick(from), m.Cluster, st.Cluster)
		a.disagree(now, from, text)
		if a.cfg.Stranger != nil {
			a.cfg.Stranger(from, text)
		}
	}
	a.sendMeet(now, from, s)
}

// disagree notes what is wrong between this peer and another, and logs it
// when it is new.
func (a *Allocator) disagree(now time.Time, with peer.Name, text string) {
	a.mu.Lock()
	was := a.conflict[with]
	a.conflict[with] = conflict{text, now}
	a.mu.Unlock()
	if was.text != text {
		a.cfg.Log.Warn("address space in conflict", "peer", with, "conflict", text)
	}
}

// goOver gives up this peer's own cluster for another.
func (a *Allocator) goOver(now time.Time, from peer.Name, s *register.State) {
	a.mu.Lock()
	ok := a.emptyLocked()
	if ok { // from here on nothing is handed out until the other register has us
		a.member = false
		a.ownLocked()
	}
	a.mu.Unlock()
	if !ok {
		return
	}
	a.cfg.Log.Info("address space: joining the cluster of another peer; nothing was in use here", "peer", from, "cluster", s.Cluster)
	a.lease.Set(0)
	clear(a.strange)
	a.collect(a.node.Adopt(now, s))
}
