// Package ipam hands out the addresses of one range to containers, so that
// no address is ever held twice in the cluster.
//
// The register (package register) says which peer owns which addresses. A
// peer hands out its own without asking anybody, also when it is cut off; when
// it has none left in a subnet it asks the register for a block of the pool
// and, when the pool is empty, another peer for some of its free ones. All
// that a peer must not forget is durable before it acts on it: the register it
// knows, what it promised as a keeper, which addresses it handed out, and
// which it is giving away. A crash may leave an address with nobody for a
// while, never with two.
//
// Messages are in package message.
//
// # Records
//
// Keys of the bucket: "store" format=1 and eight octets that name this store;
// "register" and "acceptor" as in package register; "own/<address>" format=1,
// u8 bits of the subnet, owner; "give/<first>-<last>" format=1, name of the
// peer it goes to; "lease" format=1, eight octets of nanoseconds since boot, and
// the id of that boot. A record that cannot be read is moved to "corrupt/<key>".
package ipam

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"weave.local/ipam/message"
	"weave.local/ipam/register"
	"weave.local/ipam/space"
	"weave.local/ipam/uptime"
	"weave.local/peer"
	"weave.local/peer/state"
)

// Bootstrap says how the first register of a cluster comes about.
type Bootstrap struct {
	Mode  BootstrapMode
	N     int         // Consensus: how many peers the cluster starts with; below 1 counts as 1
	Seeds []peer.Name // Seed: the same list on every peer
}

// BootstrapMode is one of Consensus, Seed and Observer.
type BootstrapMode int

// Ways in which the first register comes about.
const (
	Consensus BootstrapMode = iota // a majority of N peers agrees
	Seed                           // computed by every peer from the same list
	Observer                       // asks others to begin, takes no part
)

// Config is what an Allocator needs.
type Config struct {
	Self          peer.Info
	Range         netip.Prefix
	DefaultSubnet netip.Prefix // zero: Range
	Init          Bootstrap
	Store         *state.Bucket
	// Send sends to a peer, best effort; payloads are below 256 KiB.
	Send      func(to peer.Name, payload []byte) error
	Reachable func() []peer.Name     // live peers without self
	Nick      func(peer.Name) string // for people; nil or "": the name
	Changed   func()                 // the register changed; may be nil
	// Stranger says that a peer belongs to another cluster that can never be one
	// with ours, in words: there should be no link to it. May be nil.
	Stranger func(peer peer.Name, reason string)

	// Lease is how long this peer may go without a majority of keepers before
	// it hands out nothing more and its containers are cut off; a little later
	// the others take its addresses over. 0: for ever, and only a person's word
	// takes them from it. A cluster of one or two has no leases.
	Lease time.Duration
	// Fence has the containers of this host cut off from the others from until
	// on, a time since boot on the clock that counts sleep (CLOCK_BOOTTIME); 0:
	// never. The cut must come even if this program is dead by then. May be nil.
	Fence func(until time.Duration) error
	// Lost says that an address in use here is another peer's: the owner is to
	// lose it, and Free is to be called then. It must not wait. May be nil.
	Lost func(owner string, addr netip.Prefix)
	// Holder is the id of the container that has an address of Anonymous, "" when
	// nobody can tell. It must not wait: false says to ask again soon. May be nil.
	Holder func(addr netip.Addr) (id string, known bool)
	// Uptime and Boot are CLOCK_BOOTTIME and what tells this boot from others;
	// nil and "": those of this machine.
	Uptime func() time.Duration
	Boot   string
	Log    *slog.Logger
}

// Errors that callers branch on.
var (
	// ErrExhausted is in the error of Allocate when every owner of addresses
	// in the subnet says that it has none free.
	ErrExhausted = errors.New("range exhausted")
	// ErrHeld is in the error of Claim when the address is in use.
	ErrHeld = errors.New("held")
	// ErrGone ends requests of an owner that was freed meanwhile, and all
	// requests after Leave.
	ErrGone = errors.New("cancelled")
)

// Anonymous as an owner of Allocate takes a new address with every call; the
// owner on record becomes "_" and the text of the address.
const Anonymous = "_"

// Allocator hands out addresses. It is safe for concurrent use.
type Allocator struct {
	cfg   Config
	self  register.ID
	inbox chan event
	held  atomic.Int64  // octets in the inbox
	kick  chan struct{} // capacity 1: look at what is wanted

	// Owned by Run's goroutine.
	node      *register.Node
	rand      *rand.Rand
	pending   register.Effects
	writes    map[string][]byte
	out       []envelope
	searches  map[netip.Prefix]*search
	served    map[peer.Name]message.Answer // the last answer to each asker
	strange   map[peer.Name]*stranger
	lastID    uint64
	lease     register.Lease
	leaseKept time.Duration // its end on disk
	fenced    time.Duration // what Fence was told last; below 0: nothing yet
	retry     time.Time     // of a write that went wrong
	tellNext  time.Time     // when to tell again that we left

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced with every change of what follows
	state    *register.State
	encoded  []byte
	digest   uint64
	member   bool // the register has us, with this store
	space    space.Space
	records  map[netip.Addr]*record
	giving   map[space.Range]peer.Name // ours in the register still, but given away
	leaseEnd time.Duration             // end of the lease since boot; 0: there is none
	disputed bool                      // an address in use here is not ours
	losses   []string                  // sentences about addresses that were lost, the newest last
	waiters  map[*waiter]bool
	removing map[peer.Name]bool // peers that are off for good, on a person's word
	tell     map[peer.Name]bool // peers that are to know we left; true: they do
	reach    []peer.Name        // reachable when Run last looked
	primed   bool
	leaving  bool
	founding founding
	conflict map[peer.Name]conflict
	lastWord string // what went wrong with the file last, empty when all is well
}

type founding struct {
	working       bool
	quorum, known int
}

// conflict is what is wrong between this peer and another.
type conflict struct {
	text string
	at   time.Time
}

// New makes an allocator from what its bucket holds. Run must be running for
// anything that needs other peers.
func New(cfg Config) (*Allocator, error) {
	if err := check(&cfg); err != nil {
		return nil, err
	}
	var seed [32]byte
	if _, err := crand.Read(seed[:]); err != nil {
		return nil, fmt.Errorf("random seed: %w", err)
	}
	a := &Allocator{
		cfg: cfg, inbox: make(chan event, inboxLen), kick: make(chan struct{}, 1),
		rand: rand.New(rand.NewChaCha8(seed)), writes: map[string][]byte{},
		searches: map[netip.Prefix]*search{}, served: map[peer.Name]message.Answer{}, strange: map[peer.Name]*stranger{},
		changed: make(chan struct{}), records: map[netip.Addr]*record{}, giving: map[space.Range]peer.Name{},
		waiters: map[*waiter]bool{}, removing: map[peer.Name]bool{}, tell: map[peer.Name]bool{},
		conflict: map[peer.Name]conflict{},
	}
	a.lastID, a.fenced = a.rand.Uint64(), -1
	if err := a.load(); err != nil {
		return nil, err
	}
	return a, nil
}

func check(cfg *Config) error {
	if !cfg.Range.IsValid() || cfg.Range != cfg.Range.Masked() || cfg.Range.Addr().BitLen()-cfg.Range.Bits() < 2 {
		return fmt.Errorf("address range %v: want a network of at least four addresses such as 10.32.0.0/12", cfg.Range)
	}
	if !cfg.DefaultSubnet.IsValid() {
		cfg.DefaultSubnet = cfg.Range
	}
	if !cfg.DefaultSubnet.Overlaps(cfg.Range) {
		return fmt.Errorf("default subnet %v is outside the address range %v; choose one that overlaps it", cfg.DefaultSubnet, cfg.Range)
	}
	if _, ok := space.Hosts(cfg.DefaultSubnet); !ok || cfg.DefaultSubnet != cfg.DefaultSubnet.Masked() {
		return fmt.Errorf("default subnet %v: want a network of at least four addresses without host bits", cfg.DefaultSubnet)
	}
	if cfg.Lease < 0 || cfg.Lease > register.MaxLease {
		return fmt.Errorf("lease of addresses %v: want 0, for none, to %v", cfg.Lease, register.MaxLease)
	}
	if cfg.Uptime == nil {
		cfg.Uptime = uptime.Now
	}
	if cfg.Boot == "" {
		cfg.Boot = uptime.Boot()
	}
	if cfg.Init.Mode == Seed && len(cfg.Init.Seeds) == 0 {
		return errors.New("seed list is empty; name at least one peer")
	}
	return nil
}

// nodeConfig is what the register's part of this peer needs.
func (a *Allocator) nodeConfig() register.Config {
	quorum := max(1, a.cfg.Init.N)
	if a.cfg.Init.Mode == Observer {
		quorum = 0
	}
	return register.Config{Self: a.self, Range: a.cfg.Range, Quorum: quorum, Rand: a.rand}
}

// Range is the range that addresses come from.
func (a *Allocator) Range() netip.Prefix { return a.cfg.Range }

// DefaultSubnet is the subnet used when none is named.
func (a *Allocator) DefaultSubnet() netip.Prefix { return a.cfg.DefaultSubnet }

// Digest tells two registers apart; 0 is none. With Encode and Merge it makes
// the allocator a replicated state of gossip.
func (a *Allocator) Digest() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.digest
}

// Encode is the register; empty when there is none.
func (a *Allocator) Encode() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.encoded
}

// Merge takes the register of another peer. An error says that b is no
// register; a register of another cluster is dealt with and is no error.
func (a *Allocator) Merge(from peer.Name, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	s, err := register.ParseState(b)
	if err != nil {
		return err
	}
	a.enqueue(event{from: from, state: s, octets: int64(len(b))})
	return nil
}

// Receive takes a message of another peer; it never blocks. A message that
// finds no room is lost like any other datagram.
func (a *Allocator) Receive(from peer.Name, payload []byte) {
	a.enqueue(event{from: from, payload: append([]byte(nil), payload...), octets: int64(len(payload))})
}

// Prime blocks until this peer is a member of a cluster, founding one if need
// be.
func (a *Allocator) Prime(ctx context.Context) error {
	a.mu.Lock()
	a.primed = true
	a.mu.Unlock()
	a.poke()
	return a.until(ctx, func() (bool, error) { return a.member, nil })
}

// until waits for done, which is called with the lock held.
func (a *Allocator) until(ctx context.Context, done func() (bool, error)) error {
	for {
		a.mu.Lock()
		ok, err := done()
		changed := a.changed
		a.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", a.why(), ctx.Err())
		}
	}
}

// changedLocked wakes all who wait.
func (a *Allocator) changedLocked() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// poke makes Run look at what is wanted.
func (a *Allocator) poke() {
	select {
	case a.kick <- struct{}{}:
	default:
	}
}
