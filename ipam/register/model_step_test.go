package register

import (
	"bytes"
	"net/netip"
	"slices"
	"time"

	"weave.local/ipam/space"
	"weave.local/peer"
)

// ---- a run ----

func (w *model) step() {
	h := w.hosts[w.rand.IntN(len(w.hosts))]
	switch what := w.rand.IntN(100); {
	case h.dead:
	case !h.on:
		if w.rand.IntN(3) == 0 {
			w.did["power"]++
			h.power()
		}
	case h.asleep:
		if w.rand.IntN(3) == 0 {
			h.asleep = false
			h.slept += h.uptime() - h.sleepAt
			h.due = w.now
		}
	case h.stalled:
		if w.rand.IntN(2) == 0 {
			h.resume()
		}
	case h.node == nil:
		if w.rand.IntN(2) == 0 {
			w.did["restart"]++
			h.start()
		}
	case what < 30:
		h.allocate()
	case what < 36:
		all := space.FromPrefix(netip.MustParsePrefix(modelRange))
		a := all.First
		for range w.rand.IntN(int(all.Size()) - 1) {
			a = a.Next()
		}
		h.claim(a)
	case what < 44:
		h.free()
	case what < 48:
		h.give()
	case what < 54:
		h.fuse = 1 + w.rand.IntN(20)
	case what < 59:
		w.split()
		if w.rand.IntN(2) == 0 { // long enough to be given up
			for range 4 {
				w.pass(time.Duration(w.rand.Int64N(int64(modelLease))))
				w.gossip()
				h = w.hosts[w.rand.IntN(len(w.hosts))]
				if h.on && !h.asleep && h.node != nil {
					h.allocate()
				}
				w.check()
			}
		}
	case what < 70:
	default:
		w.harm(h, what)
	}
	w.gossip()
	switch w.rand.IntN(12) {
	case 0:
		w.pass(time.Duration(w.rand.Int64N(int64(modelLease / 2))))
	case 1, 2, 3, 4, 5, 6:
	default:
		w.pass(time.Duration(w.rand.Int64N(int64(100 * time.Millisecond))))
	}
	w.check()
}

// harm lets something happen to a whole host.
func (w *model) harm(h *machine, what int) {
	switch {
	case what < 74:
		w.did["stall"]++
		h.stalled = true
	case what < 78:
		w.did["sleep"]++
		h.asleep, h.sleepAt = true, h.uptime()
	case what < 82: // power goes
		h.on = false
		h.die()
		clear(h.live)
	case what < 84 && w.canLose(h): // the disk is new; containers run on
		w.did["wipe"]++
		h.die()
		h.disk = disk{own: map[netip.Addr]bool{}, giving: map[space.Range]peer.Name{}}
	case what < 86 && w.canLose(h):
		w.did["corrupt"]++
		h.die()
		h.disk.acceptor = []byte{0xff}
	case what == 86 && w.dead() < 2 && w.canLose(h):
		w.did["dead"]++
		h.dead, h.on = true, false
		h.die()
		clear(h.live)
	case what >= 87 && what < 90: // a person says so
		off := w.hosts[w.rand.IntN(len(w.hosts))]
		if off.dead {
			w.did["rmpeer"]++
			h.removes = []peer.Name{off.name}
		}
	}
}

// canLose says whether a majority of keepers is left when loser loses what it
// promised: without, the register is at an end, and people have to help. So it is
// when the newest version is nowhere else, as of a keeper that agreed with itself.
func (w *model) canLose(loser *machine) bool {
	s := w.newest
	if s == nil {
		return false
	}
	for _, h := range w.hosts {
		if !h.dead && (h.node == nil || h.node.acc.state != nil || h.node.round != nil) {
			return false // another version may be agreed that nobody knows yet
		}
	}
	newest := s.Append(nil)
	if !slices.ContainsFunc(w.hosts, func(h *machine) bool {
		return h != loser && !h.dead && bytes.Equal(h.disk.register, newest)
	}) {
		return false
	}
	up := 0
	for _, m := range s.Members {
		h := w.hosts[m.Name-1]
		switch {
		case h.dead:
		case !m.Is(ID{m.Name, h.disk.store}) || len(h.disk.acceptor) < 2:
			return false // it may become a keeper before it is a member again
		default:
			up += bit(slices.Contains(s.Keepers, m.Name))
		}
	}
	return majority(up-1, len(s.Keepers))
}

func (w *model) dead() (n int) {
	for _, h := range w.hosts {
		n += bit(h.dead)
	}
	return n
}

// split cuts some directions, in no regular way, or heals all.
func (w *model) split() {
	clear(w.cut)
	if w.rand.IntN(3) == 0 {
		return
	}
	part := 1 + w.rand.IntN(4)
	for _, a := range w.hosts {
		for _, b := range w.hosts {
			if w.rand.IntN(8) < part {
				w.cut[[2]peer.Name{a.name, b.name}] = true
			}
		}
	}
}

// heal ends all trouble and demands what must be true then.
func (w *model) heal() {
	clear(w.cut)
	w.loss = 0
	for _, h := range w.hosts {
		switch {
		case h.dead:
			continue
		case !h.on:
			h.power()
		case h.asleep:
			h.asleep = false
			h.slept += h.uptime() - h.sleepAt
		case h.stalled:
			h.resume()
		}
		if h.node == nil {
			h.start()
		}
		h.fuse, h.wanted = 0, nil
	}
	for range 32 {
		w.pass(modelLease / 4)
		for range 5 {
			w.gossip()
		}
		w.check()
	}
	for _, h := range w.hosts {
		if h.dead || w.err != nil {
			continue
		}
		s := h.node.State()
		for _, g := range s.Grants {
			if m, _ := s.Member(g.Owner); w.hosts[g.Owner-1].dead && m.Lease > 0 && w.alive(s) {
				w.fail("%v still has %v, and will not be back", g.Owner, g.Range)
			}
		}
		h.free()
		for try := 0; !h.allocate(); try++ {
			if try == 100 {
				w.fail("%v gets no address: lease until %v, clock %v, wants %v, owns %v, pool %v", h.name, h.lease.Until(), h.uptime(), h.wanted, h.owned().Ranges(), s.Pool().Ranges())
				break
			}
			w.share(h)
			w.pass(50 * time.Millisecond)
			s = h.node.State()
		}
	}
	w.check()
}

// alive says whether a majority of the keepers is not dead, and there are leases.
func (w *model) alive(s *State) bool {
	up := 0
	for _, k := range s.Keepers {
		up += 1 - bit(w.hosts[k-1].dead)
	}
	return majority(up, len(s.Keepers))
}

// share stands for a donation: with an empty pool, some peer gives to h.
func (w *model) share(h *machine) {
	if hosts, _ := space.Hosts(netip.MustParsePrefix(modelRange)); h.node.State().Pool().SizeIn(hosts) > 0 {
		return
	}
	for _, o := range w.hosts {
		if o.node != nil && o != h && len(o.disk.giving) == 0 {
			o.give()
			for r := range o.disk.giving {
				o.disk.giving[r] = h.name
			}
		}
	}
}

func (w *model) run(steps int) error {
	w.pass(3 * time.Second)
	w.loss = 0.1
	for range steps {
		if w.err != nil {
			return w.err
		}
		w.step()
	}
	w.heal()
	return w.err
}
