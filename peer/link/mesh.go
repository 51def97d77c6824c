package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"weave.local/peer"
	"weave.local/peer/dialer"
	"weave.local/peer/handshake"
	"weave.local/peer/linkstate"
	"weave.local/peer/target"
	"weave.local/router/seal"
)

// MaxPayload is the largest payload of a message, in bytes.
const MaxPayload = 256 << 10

// Range of protocol versions spoken.
const (
	MinVersion = handshake.MinVersion
	MaxVersion = handshake.MaxVersion
)

const (
	helloEvery  = time.Second
	deadAfter   = 2500 * time.Millisecond
	tickEvery   = 100 * time.Millisecond
	expireEvery = 10 * time.Second
	// summaryEvery is the least time between two summaries because of hellos:
	// while much changes, all neighbours differ, and one is enough to learn.
	summaryEvery = 500 * time.Millisecond
	keepRecords  = 10 * time.Minute // of peers that cannot be reached

	maxStreams = 64 // streams that wait to be taken from Streams
)

// Errors of Send and Dial.
var (
	ErrNoRoute = errors.New("no route to peer")
	ErrTooBig  = errors.New("message is too large")
	ErrFull    = errors.New("send queue is full")
	ErrBusy    = errors.New("peer takes no streams")
	ErrClosed  = errors.New("links are closed")
)

// Config is what a Mesh is made of.
type Config struct {
	// Self is who we are. With ShortID 0 the mesh picks one, with Port 0 the
	// kernel; Mesh.Self tells.
	Self peer.Info
	// Bind is the address to listen on and to dial from; zero: all.
	Bind netip.Addr
	// Targets are dialled for ever: host name or IP, optionally with :port
	// (default Self.Port). Names need not resolve yet.
	Targets []string
	// Discovery says to dial also the peers that others know.
	Discovery bool
	// ConnLimit is how many links there may be; 0: any number.
	ConnLimit int
	// Keys are those of the password, with which all links are sealed, and of
	// the one before it as long as that is good; the preferred one first, and
	// at most handshake.MaxKeys. None: links are in clear.
	Keys []*seal.Key
	// Trusted are the subnets in which the data path to a peer may go in
	// clear, although there is a password, if that peer says the same.
	Trusted []netip.Prefix
	Log     *slog.Logger

	// Listener and Dial stand for TCP in simulations; nil: TCP itself.
	Listener net.Listener
	Dial     func(ctx context.Context, to netip.AddrPort) (net.Conn, error)

	resolve func(ctx context.Context, host string, port uint16) ([]netip.AddrPort, error) // nil: target.Host
}

// Neighbour is a peer to which there is a live link.
type Neighbour struct {
	peer.Info
	Local    netip.AddrPort // underlay address of our end of the TCP connection
	Remote   netip.AddrPort // underlay address of the other end
	Outbound bool           // dialled by us
	Session  uint64         // random, known to both ends of this link only

	// Keys are for the data path to this neighbour. Nil: it goes in clear,
	// because there is no password or both ends trust the network.
	Keys    *seal.Session
	Trusted bool // there is a password, and both ends trust the network
}

// Stream is a stream that another peer opened to us.
type Stream struct {
	net.Conn
	From peer.Name
}

// HandleFunc takes a message. The payload is shared and must not be modified.
// It must return soon: meanwhile the link it came over stands still.
type HandleFunc func(from peer.Name, payload []byte)

// Mesh is this peer's part in the mesh of links. Its methods may be called from
// several goroutines.
type Mesh struct {
	cfg      Config
	log      *slog.Logger
	listener net.Listener
	changes  chan struct{}
	streams  chan Stream
	kick     chan struct{} // wakes the loop of Run
	lookups  chan lookup
	ended    chan struct{} // closed when Run is about to return
	count    counters
	handlers map[byte]HandleFunc // not changed after Run began
	tasks    sync.WaitGroup      // goroutines below Run

	mu        sync.Mutex // guards what follows; never held during I/O
	running   bool
	closed    bool
	self      peer.Info
	keys      []*seal.Key // as Config.Keys; the slice is never changed, but replaced
	topo      *linkstate.DB
	news      news          // of others, not handed on yet
	view      peer.Snapshot // of topo without them
	links     map[peer.Name]*link
	dials     *dialer.Dialer
	turned    turned
	nonces    map[uint64]time.Time // of our handshakes of late
	readers   map[chan struct{}]struct{}
	windows   map[peer.Name]*window   // broadcasts seen, by source
	lastSeq   uint64                  // of our broadcasts
	outdated  map[peer.Name]time.Time // peers whose link ended while its password was good no more, and when that would have ended it
	excluded  []peer.Name             // those that had none by then; not handed on yet
	strangers map[peer.Name]unwanted
	trimmed   time.Time          // when links over the limit were last looked at
	summed    time.Time          // when we last sent a summary
	noData    map[peer.Name]bool // neighbours over whose links no data path works
	stale     bool               // our record does not say what is
	overtaken bool               // a record under our name supersedes ours
	twin      twin
	discovery bool // addresses to dial have to be looked at again
}

// Listen opens the TCP port. Nothing is accepted or dialled before Run.
func Listen(ctx context.Context, cfg Config) (*Mesh, error) {
	cfg.Self.NickName = peer.CleanNickName(cfg.Self.NickName)
	if cfg.resolve == nil {
		cfg.resolve = target.Host
	}
	l, err := cfg.listen(ctx)
	if err != nil {
		return nil, err
	}
	if cfg.Self.Port == 0 {
		cfg.Self.Port = addrPort(l.Addr()).Port()
	}
	now := time.Now()
	m := &Mesh{
		cfg:       cfg,
		log:       cfg.Log,
		listener:  l,
		changes:   make(chan struct{}, 1),
		streams:   make(chan Stream, maxStreams),
		kick:      make(chan struct{}, 1),
		lookups:   make(chan lookup),
		ended:     make(chan struct{}),
		handlers:  make(map[byte]HandleFunc),
		self:      cfg.Self,
		keys:      cfg.Keys,
		topo:      linkstate.New(cfg.Self, uint64(now.UnixNano())),
		links:     make(map[peer.Name]*link),
		dials:     dialer.New(cfg.Self.Port),
		turned:    make(turned),
		nonces:    make(map[uint64]time.Time),
		outdated:  make(map[peer.Name]time.Time),
		strangers: make(map[peer.Name]unwanted),
		readers:   make(map[chan struct{}]struct{}),
		windows:   make(map[peer.Name]*window),
		lastSeq:   uint64(now.UnixNano()),
		stale:     true,
	}
	m.readers[m.changes] = struct{}{}
	m.chooseShortIDLocked()
	for _, t := range cfg.Targets {
		if err := m.dials.Add(t, now); err != nil {
			_ = l.Close()
			return nil, err
		}
	}
	return m, nil
}

func (cfg Config) listen(ctx context.Context) (net.Listener, error) {
	if cfg.Listener != nil {
		return cfg.Listener, nil
	}
	host := ""
	if cfg.Bind.IsValid() {
		host = cfg.Bind.String()
	}
	addr := net.JoinHostPort(host, strconv.Itoa(int(cfg.Self.Port)))
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("TCP port %d is in use by another program: stop it or choose another with --port", cfg.Self.Port)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%s is no address of this host: choose one that is, or none to listen on all", cfg.Bind)
	case err != nil:
		return nil, fmt.Errorf("control port: %w", err)
	}
	return l, nil
}

// Close gives the port back. A Mesh that runs is ended by its context instead.
func (m *Mesh) Close() error {
	if err := m.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Self returns who we are; the short id may change at any time.
func (m *Mesh) Self() peer.Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.self
}

// Handle sets the receiver of messages of a kind. Call it before Run.
func (m *Mesh) Handle(kind byte, f HandleFunc) { m.handlers[kind] = f }

// Changes gets a value after neighbours, link state or routes changed. It has
// one reader.
func (m *Mesh) Changes() <-chan struct{} { return m.changes }

// Subscribe returns a channel like Changes for one more reader, and a function
// that ends the subscription.
func (m *Mesh) Subscribe() (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.readers[ch] = struct{}{}
	return ch, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.readers, ch)
	}
}

// SetNoData says to which neighbours no data path works, instead of what it
// said before. All peers learn it with the link state and let frames take
// another way; messages and streams go on over those links. The map must not
// be modified afterwards.
func (m *Mesh) SetNoData(names map[peer.Name]bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.noData, m.stale = names, true
	signal(m.kick)
}

func (m *Mesh) changedLocked() {
	m.discovery = true
	for ch := range m.readers {
		signal(ch)
	}
	signal(m.kick)
}

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// Topology returns the link state and routes as they are now.
func (m *Mesh) Topology() peer.Snapshot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.viewLocked()
}

// Neighbours returns the peers to which there is a live link, by name.
func (m *Mesh) Neighbours() []Neighbour {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Neighbour, 0, len(m.links))
	for _, l := range m.links {
		n := Neighbour{Info: l.peer, Local: l.local, Remote: l.remote, Outbound: l.outbound, Session: l.session, Keys: l.keys, Trusted: l.trusted}
		if r, ok := m.topo.Record(n.Name); ok && r.UID == n.UID {
			n.Info = r.Info // its short id may have changed since the handshake
		}
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b Neighbour) int { return int(a.Name) - int(b.Name) })
	return out
}

// Streams gets the streams that other peers open to us. A peer that does not
// read it in time refuses further streams.
func (m *Mesh) Streams() <-chan Stream { return m.streams }

// chooseShortIDLocked gives us another short id if ours belongs to somebody
// else.
func (m *Mesh) chooseShortIDLocked() {
	if !m.topo.MustChangeShortID() {
		return
	}
	start := peer.ShortID(rand.N(uint16(peer.MaxShortID))) + 1
	id := m.topo.FreeShortID(start)
	if id == m.self.ShortID {
		return
	}
	if m.self.ShortID != 0 {
		m.log.Info("short id belongs to another peer, took a new one", "was", m.self.ShortID, "now", id)
	}
	m.self.ShortID = id
	m.originateLocked()
}

// originateLocked announces what we are and to whom we have links.
func (m *Mesh) originateLocked() {
	if m.overtaken {
		if m.twin.answered++; m.twin.answered == twinTimes {
			m.log.Warn("another live peer has our name: start one of them with another --name", "name", m.self.Name, "nickname", m.twin.info.NickName)
		}
	}
	m.stale, m.overtaken = false, false
	adj := make([]peer.Adjacency, 0, len(m.links))
	for _, l := range m.links {
		adj = append(adj, peer.Adjacency{Name: l.peer.Name, Outbound: l.outbound, NoData: m.noData[l.peer.Name], Addr: l.remote})
	}
	m.floodLocked(m.topo.Announce(m.self, adj), 0)
	m.changedLocked()
}
