package ipam

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"

	"weave.local/ipam/register"
	"weave.local/ipam/space"
	"weave.local/peer"
)

// Keys of the bucket.
const (
	keyStore    = "store"
	keyRegister = "register"
	keyAcceptor = "acceptor"
	keyOwn      = "own/"
	keyGive     = "give/"
	keyLease    = "lease"
	keyCorrupt  = "corrupt/"
)

// Unknown is the owner of an address whose record cannot be read: it may be in
// use.
const Unknown = "unknown"

// record is an address that somebody here holds.
type record struct {
	owner  string
	prefix netip.Prefix // the address with its subnet's length
	// busy is true while the record is being written or removed; nobody may
	// rely on it then.
	busy bool
	lost bool // Config.Lost was called
}

func ownKey(a netip.Addr) string { return keyOwn + a.String() }

func (r *record) encode() []byte {
	return append([]byte{register.Format, byte(r.prefix.Bits())}, r.owner...)
}

func parseRecord(key string, b []byte) (*record, error) {
	addr, err := netip.ParseAddr(strings.TrimPrefix(key, keyOwn))
	if err != nil {
		return nil, err
	}
	r := &record{owner: Unknown, prefix: netip.PrefixFrom(addr, addr.BitLen())}
	if len(b) < 3 || b[0] != register.Format || int(b[1]) > addr.BitLen() {
		return r, fmt.Errorf("record of %d octets", len(b))
	}
	r.owner, r.prefix = string(b[2:]), netip.PrefixFrom(addr, int(b[1]))
	return r, nil
}

func giveKey(r space.Range) string { return keyGive + r.First.String() + "-" + r.Last.String() }

func encodeGive(to peer.Name) []byte { return peer.AppendName([]byte{register.Format}, to) }

func parseGive(key string, b []byte) (space.Range, peer.Name, error) {
	first, last, _ := strings.Cut(strings.TrimPrefix(key, keyGive), "-")
	f, err := netip.ParseAddr(first)
	if err != nil {
		return space.Range{}, 0, err
	}
	l, err := netip.ParseAddr(last)
	if err != nil {
		return space.Range{}, 0, err
	}
	r := space.Range{First: f, Last: l}
	if !r.Valid() {
		return space.Range{}, 0, fmt.Errorf("range %v", r)
	}
	rd := register.Reader{B: b}
	if rd.Byte() != register.Format {
		return r, 0, nil // to the pool
	}
	to := rd.Name()
	if rd.Done() != nil {
		to = 0
	}
	return r, to, nil
}

// load reads the bucket, sets aside what cannot be read, and makes the node.
func (a *Allocator) load() error {
	all := a.cfg.Store.All()
	fix := map[string][]byte{}
	corrupt := func(key string, err error) {
		a.cfg.Log.Warn("record of the address allocator is damaged; set aside", "key", key, "damage", err)
		fix[keyCorrupt+key], fix[key] = all[key], nil
	}
	a.loadOwn(all, corrupt)
	a.loadGiving(all, corrupt)
	st, acc := a.loadRegister(all, corrupt)
	if !a.loadStore(all[keyStore]) {
		fix[keyStore] = binary.BigEndian.AppendUint64([]byte{register.Format}, a.self.Store)
	}
	node, err := register.New(a.nodeConfig(), st, acc)
	if err != nil {
		// What this peer promised is lost: under another store it no longer
		// counts as the keeper that it was.
		corrupt(keyAcceptor, err)
		a.newStore()
		fix[keyStore] = binary.BigEndian.AppendUint64([]byte{register.Format}, a.self.Store)
		if node, err = register.New(a.nodeConfig(), st, nil); err != nil {
			return err
		}
	}
	a.node = node
	a.loadLease(all[keyLease], st)
	if err := a.cfg.Store.Update(fix); err != nil {
		return err
	}
	a.applyLocked(st)
	a.disputeLocked()
	return nil
}

func (a *Allocator) loadOwn(all map[string][]byte, corrupt func(string, error)) {
	for key, b := range all {
		if !strings.HasPrefix(key, keyOwn) {
			continue
		}
		r, err := parseRecord(key, b)
		if err != nil {
			corrupt(key, err)
		}
		if r != nil {
			a.records[r.prefix.Addr()] = r
			a.space.Use(r.prefix.Addr())
		}
	}
}

func (a *Allocator) loadGiving(all map[string][]byte, corrupt func(string, error)) {
	for key, b := range all {
		if !strings.HasPrefix(key, keyGive) {
			continue
		}
		r, to, err := parseGive(key, b)
		if err != nil {
			corrupt(key, err)
			continue
		}
		a.giving[r] = to
	}
}

// loadRegister is the register and the acceptor's record; both are void when
// the register cannot be used.
func (a *Allocator) loadRegister(all map[string][]byte, corrupt func(string, error)) (*register.State, []byte) {
	var st *register.State
	if b, ok := all[keyRegister]; ok {
		s, err := register.ParseState(b)
		switch {
		case err != nil:
			corrupt(keyRegister, err)
			delete(all, keyStore) // see load: the acceptor goes with it
			delete(all, keyAcceptor)
		case s.Range != a.cfg.Range:
			a.cfg.Log.Warn("address range changed; the register of the old one is forgotten", "old", s.Range, "new", a.cfg.Range)
			delete(all, keyStore)
			delete(all, keyAcceptor)
		default:
			st = s
		}
	}
	if st == nil && a.cfg.Init.Mode == Seed {
		names := slices.Clone(a.cfg.Init.Seeds)
		slices.Sort(names)
		names = slices.Compact(names)
		return register.Computed(register.SeedCluster(a.cfg.Range, names), a.cfg.Range, names), nil
	}
	return st, all[keyAcceptor]
}

// loadStore takes the store's name, and makes one when there is none.
func (a *Allocator) loadStore(b []byte) bool {
	a.self.Name = a.cfg.Self.Name
	if len(b) == 9 && b[0] == register.Format {
		a.self.Store = binary.BigEndian.Uint64(b[1:])
	}
	if a.self.Store != 0 {
		return true
	}
	a.newStore()
	return false
}

func (a *Allocator) newStore() {
	for a.self.Store = 0; a.self.Store == 0; {
		a.self.Store = a.rand.Uint64()
	}
}

// applyLocked makes s the register that allocation goes by.
func (a *Allocator) applyLocked(s *register.State) {
	if s == nil {
		return
	}
	a.state = s
	a.encoded = s.Append(nil)
	h := fnv.New64a()
	_, _ = h.Write(a.encoded)
	a.digest = max(1, h.Sum64())
	m, ok := s.Member(a.self.Name)
	a.member = ok && m.Is(a.self)
	if a.leaving && !a.member {
		clear(a.giving)
	}
	for r := range a.giving {
		if len(a.ours().In(r)) == 0 {
			delete(a.giving, r)
		}
	}
	a.ownLocked()
	a.changedLocked()
}

// ours is what the register grants to this peer with this store.
func (a *Allocator) ours() *space.Set {
	if !a.member || a.state == nil {
		return &space.Set{}
	}
	return a.state.Owned(a.self.Name)
}

// ownLocked brings the space to what the register grants, without what is
// being given away.
func (a *Allocator) ownLocked() {
	own := a.ours()
	for r := range a.giving {
		own.Remove(r)
	}
	if a.leaving {
		own = &space.Set{}
	}
	a.space.SetOwned(own)
	a.disputeLocked()
}

// sortedGiving are the keys of m in a fixed order.
func sortedGiving(m map[space.Range]peer.Name) []space.Range {
	out := make([]space.Range, 0, len(m))
	for r := range m {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b space.Range) int { return cmp.Or(a.First.Compare(b.First), a.Last.Compare(b.Last)) })
	return out
}

// save writes what the node and the loop want durable, as one. Nothing that
// depends on it is sent or seen before.
func (a *Allocator) save() error {
	if a.pending.Dirty {
		if s := a.node.State(); s != nil {
			a.writes[keyRegister] = s.Append(nil)
			if a.pending.Learned {
				a.forgetGiven(s)
			}
		}
		a.writes[keyAcceptor] = a.node.Acceptor()
	}
	a.saveLease()
	if len(a.writes) == 0 {
		return nil
	}
	return a.cfg.Store.Update(a.writes)
}

// forgetGiven drops the records of what s shows to be no longer ours.
func (a *Allocator) forgetGiven(s *register.State) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var own *space.Set
	if m, ok := s.Member(a.self.Name); ok && m.Is(a.self) {
		own = s.Owned(a.self.Name)
	} else {
		own = &space.Set{}
	}
	for r := range a.giving {
		if len(own.In(r)) == 0 {
			a.writes[giveKey(r)] = nil
		}
	}
}
