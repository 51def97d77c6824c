package ipam

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"weave.local/ipam/register"
	"weave.local/ipam/space"
	"weave.local/peer"
)

// conflictShown is for how long a conflict is shown after its last sign.
const conflictShown = time.Minute

// Status is what people see of the allocator.
type Status struct {
	// State is one of: idle; priming; awaiting consensus (quorum: Q, known: K);
	// ready; waiting for IP(s) to become available; all IP ranges owned by
	// unreachable peers - use 'rmpeer' if they are dead; waiting for keepers
	// ...; lease over ...; cut off ...; left; or what is wrong with the state file.
	State         string
	Range         netip.Prefix
	RangeSize     uint64
	DefaultSubnet netip.Prefix
	Active        int    // addresses in use here
	Unowned       uint64 // addresses granted to nobody
	Cluster       string // UUID; empty before the first register
	Version       uint64
	Quorum, Known int // while the first register is being agreed
	Keepers       []peer.Name
	Peers         []PeerShare // self first, then by name; empty before the first register
	Entries       []Entry     // by address
	Claims        []Pending
	Allocates     []Pending
	Conflicts     []string // sentences; empty when all is well
	// Lease is how long this peer may go without a majority of keepers, and
	// LeaseLeft how long it may from now on, below 0 when that is over. 0: for
	// ever.
	Lease, LeaseLeft time.Duration
}

// Conflicts returns what is wrong with the address space between this peer and
// others, such as that they belong to another cluster: a sentence for each.
func (a *Allocator) Conflicts() map[peer.Name]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conflictsLocked()
}

func (a *Allocator) conflictsLocked() map[peer.Name]string {
	maps.DeleteFunc(a.conflict, func(_ peer.Name, c conflict) bool { return time.Since(c.at) > conflictShown })
	out := make(map[peer.Name]string, len(a.conflict))
	for name, c := range a.conflict {
		out[name] = c.text
	}
	return out
}

// PeerShare is what one peer holds of the range.
type PeerShare struct {
	Name      peer.Name
	Nick      string
	Addresses uint64
	Percent   float64 // of the range, rounded to tenths
	Active    int     // addresses in use; known of self alone
	Self      bool
	Reachable bool
}

// Entry is one grant of the register.
type Entry struct {
	First, Last netip.Addr
	Size        uint64
	Peer        peer.Name
	Nick        string
	Reachable   bool
	Epoch       uint64
}

// Pending is a call that waits: for an address (Claims) or for any address of
// a subnet (Allocates).
type Pending struct {
	Owner string
	CIDR  netip.Prefix
}

// Status tells how things stand. It never waits for other peers.
func (a *Allocator) Status() Status {
	up := append(a.cfg.Reachable(), a.self.Name)
	a.mu.Lock()
	v := a.viewLocked()
	st := v.state
	out := Status{
		Range: a.cfg.Range, DefaultSubnet: a.cfg.DefaultSubnet,
		RangeSize: space.FromPrefix(a.cfg.Range).Size(), Active: len(a.records),
	}
	if a.founding.working {
		out.Quorum, out.Known = a.founding.quorum, a.founding.known
	}
	for w := range a.waiters {
		if w.want.IsSingleIP() {
			out.Claims = append(out.Claims, Pending{w.owner, w.shown})
		} else {
			out.Allocates = append(out.Allocates, Pending{w.owner, w.shown})
		}
	}
	out.Conflicts = slices.AppendSeq(slices.Clone(a.losses), maps.Values(a.conflictsLocked()))
	if a.leaseEnd != 0 && st != nil {
		out.Lease, out.LeaseLeft = a.lease.Length(st), a.leaseEnd-a.cfg.Uptime()
	}
	a.mu.Unlock()
	out.State = a.words(v, up)
	byOwner := func(p, q Pending) int { return cmp.Or(cmp.Compare(p.Owner, q.Owner), p.CIDR.Compare(q.CIDR)) }
	slices.SortFunc(out.Claims, byOwner)
	slices.SortFunc(out.Allocates, byOwner)
	slices.Sort(out.Conflicts)
	if st != nil {
		a.describeRegister(&out, st, up)
	}
	return out
}

// describeRegister fills in what the register says.
func (a *Allocator) describeRegister(out *Status, st *register.State, up []peer.Name) {
	out.Cluster, out.Version, out.Keepers = st.Cluster.String(), st.Version, slices.Clone(st.Keepers)
	out.Unowned = st.Pool().Size()
	sizes := map[peer.Name]uint64{}
	for _, g := range st.Grants {
		sizes[g.Owner] += g.Size()
		out.Entries = append(out.Entries, Entry{
			First: g.First, Last: g.Last, Size: g.Size(), Peer: g.Owner, Nick: a.nick(g.Owner),
			Reachable: slices.Contains(up, g.Owner), Epoch: g.Epoch,
		})
	}
	for _, m := range st.Members {
		share := PeerShare{
			Name: m.Name, Nick: a.nick(m.Name), Addresses: sizes[m.Name], Self: m.Name == a.self.Name,
			Reachable: slices.Contains(up, m.Name),
			Percent:   math.Round(float64(sizes[m.Name])/float64(out.RangeSize)*1000) / 10,
		}
		if share.Self {
			share.Active = out.Active
		}
		out.Peers = append(out.Peers, share)
	}
	rank := map[bool]int{true: -1} // self goes first
	slices.SortStableFunc(out.Peers, func(p, q PeerShare) int { return rank[p.Self] - rank[q.Self] })
}

// view is what the words about the allocator are made of; it is taken under
// the lock, and put into words without.
type view struct {
	state           *register.State
	founding        founding
	member, leaving bool
	waiting         bool
	over, disputed  bool
	lastWord        string
	reach           []peer.Name
}

func (a *Allocator) viewLocked() view {
	return view{a.state, a.founding, a.member, a.leaving, len(a.waiters) > 0,
		a.overLocked(), a.disputed && (a.leaseEnd != 0 || a.state == nil && a.cfg.Lease > 0), a.lastWord, a.reach}
}

// words is the one line that says how things stand.
func (a *Allocator) words(v view, up []peer.Name) string {
	st := v.state
	switch {
	case v.lastWord != "":
		return v.lastWord
	case st == nil && v.disputed:
		v.disputed = false
		return "register lost: containers here are cut off from other hosts until it is met again; " + a.words(v, up)
	case v.leaving:
		return "left"
	case st == nil && v.founding.working && a.cfg.Init.Mode == Observer:
		return "priming"
	case st == nil && v.founding.working:
		return fmt.Sprintf("awaiting consensus (quorum: %d, known: %d)", v.founding.quorum, v.founding.known)
	case st == nil:
		return "idle"
	case len(st.Grants) > 0 && !slices.ContainsFunc(st.Grants, func(g register.Grant) bool { return slices.Contains(up, g.Owner) }) &&
		st.Pool().Empty():
		return "all IP ranges owned by unreachable peers - use 'rmpeer' if they are dead"
	case v.over:
		text := "lease over: nothing is handed out and containers here are cut off from other hosts"
		if why := a.missing(st, up); why != "" {
			text += "; " + why
		}
		return text
	case v.disputed:
		return "cut off from other hosts until it is settled whose the addresses in use here are"
	case !v.member || v.waiting:
		if why := a.missing(st, up); why != "" {
			return why
		}
		if v.waiting {
			return "waiting for IP(s) to become available"
		}
		return "joining"
	}
	return "ready"
}

// missing says which keepers are missed when there is no majority.
func (a *Allocator) missing(st *register.State, up []peer.Name) string {
	var missing []string
	for _, k := range st.Keepers {
		if !slices.Contains(up, k) {
			missing = append(missing, a.nick(k))
		}
	}
	if 2*len(missing) < len(st.Keepers) {
		return ""
	}
	return fmt.Sprintf("waiting for keepers %s (%d of %d reachable)", strings.Join(missing, ", "),
		len(st.Keepers)-len(missing), len(st.Keepers))
}

// why says what a call waits for.
func (a *Allocator) why() string {
	a.mu.Lock()
	v := a.viewLocked()
	a.mu.Unlock()
	up := append(slices.Clone(v.reach), a.self.Name)
	text := a.words(v, up)
	if v.state == nil || text == "ready" {
		return text
	}
	var lost []string
	for _, m := range v.state.Members {
		if !slices.Contains(up, m.Name) {
			lost = append(lost, a.nick(m.Name))
		}
	}
	if len(lost) > 0 {
		text += "; not reachable: " + strings.Join(lost, ", ")
	}
	return text
}

// nick is how people know a peer.
func (a *Allocator) nick(name peer.Name) string {
	if name == a.self.Name && a.cfg.Self.NickName != "" {
		return a.cfg.Self.NickName
	}
	if a.cfg.Nick != nil {
		if s := a.cfg.Nick(name); s != "" {
			return s
		}
	}
	return name.String()
}
