// Package attach joins containers and the host to the network, and is the only
// place that does: it makes the veth pairs, gives them their addresses, tells
// the router of the ports and undoes all of it.
//
// What is attached is written to the journal before it is made, so that
// nothing outlives a crash unnoticed: at its start the daemon compares the
// journal with the devices it finds, adopts what is there and gives back the
// addresses of what is gone.
package attach

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"weave.local/ipam"
	"weave.local/peer/state"
	"weave.local/router/firewall"
	"weave.local/router/overlay"
)

// HostID is the identity under which the exposed host holds its addresses.
const HostID = "weave:expose"

// InsideName is the name of the interface in an attached container.
const InsideName = "ethwe"

// DefaultGrace is how long the addresses of a container that died are kept for
// its return.
const DefaultGrace = 30 * time.Second

// Config is what a Manager is made of.
type Config struct {
	Bridge string          // name of the bridge, which must exist
	MTU    int             // of the devices in containers, in bytes
	Alloc  *ipam.Allocator // nil: address allocation is switched off
	Store  *state.Bucket   // the journal
	// SetPort and RemovePort tell the router of local ports. A port is set
	// before its device goes up, so that it is known before it speaks.
	SetPort          func(overlay.Port) error
	RemovePort       func(ifIndex int) error
	Firewall         *firewall.Firewall
	NoMulticastRoute bool          // leave 224.0.0.0/4 alone in all containers
	Grace            time.Duration // zero: DefaultGrace
	Log              *slog.Logger
}

// Target names what to attach.
type Target struct {
	ID               string // owner of the addresses: the container's full id
	NetNS            string // path of its network namespace
	NoMulticastRoute bool   // leave 224.0.0.0/4 alone in this one
	AnySource        bool   // see overlay.Endpoint; stays until it is detached
}

// Kind tells who made an attachment.
type Kind string

// The kinds of attachments.
const (
	KindContainer Kind = "container" // by Attach
	KindEndpoint  Kind = "endpoint"  // by CreateEndpoint
	KindHost      Kind = "host"      // by Expose
)

// Attachment is one local port of the network.
type Attachment struct {
	ID      string // container id, endpoint id, or HostID
	Kind    Kind
	MAC     overlay.MAC
	Addrs   []netip.Prefix
	HostIf  string // device on the host; the bridge for KindHost
	IfIndex int    // of HostIf
	NetNS   string // path of the namespace it is in, "" when not known
}

// Manager attaches and detaches. Its methods may be called from several
// goroutines; calls for the same id are done one after the other.
type Manager struct {
	cfg     Config
	keys    *keys
	waked   chan struct{} // capacity 1: a release was set
	lostAny chan struct{} // capacity 1: an address was lost

	mu       sync.Mutex // guards what follows; never held during I/O
	records  map[string]*record
	exposed  []exposure
	hostMAC  overlay.MAC
	hostIf   int
	releases map[string]release // by owner
	lost     []claim            // addresses to be taken away, as another host has them
	running  map[string]bool    // containers known to run, for as long as they hold addresses
}

// New makes a Manager. Reconcile must be called before anything is attached.
func New(cfg Config) (*Manager, error) {
	switch {
	case cfg.Bridge == "":
		return nil, errors.New("attach: no bridge named")
	case cfg.Store == nil || cfg.Firewall == nil || cfg.SetPort == nil || cfg.RemovePort == nil || cfg.Log == nil:
		return nil, errors.New("attach: incomplete configuration")
	}
	if cfg.Grace == 0 {
		cfg.Grace = DefaultGrace
	}
	return &Manager{
		cfg:      cfg,
		keys:     newKeys(),
		waked:    make(chan struct{}, 1),
		lostAny:  make(chan struct{}, 1),
		records:  make(map[string]*record),
		releases: make(map[string]release),
		running:  make(map[string]bool),
	}, nil
}

// List returns what is attached, the exposed host first, then by id.
func (m *Manager) List() []Attachment {
	m.mu.Lock()
	defer m.mu.Unlock()
	host := Attachment{ID: HostID, Kind: KindHost, MAC: m.hostMAC, HostIf: m.cfg.Bridge, IfIndex: m.hostIf}
	for _, e := range m.exposed {
		host.Addrs = append(host.Addrs, e.Addr)
	}
	list := []Attachment{host}
	for _, r := range m.records {
		if r.ifIndex != 0 {
			list = append(list, r.attachment())
		}
	}
	slices.SortFunc(list[1:], func(a, b Attachment) int { return strings.Compare(a.ID, b.ID) })
	return list
}

func errNoAllocation(r Request) error {
	return fmt.Errorf("%s: address allocation is switched off; name the address, as in ip:10.2.1.5/24", r)
}
