package attach

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// Keys of the journal: a kind, a slash and an id; for the host, an address.
const (
	keyHost       = string(KindHost) + "/"
	keyForwarding = "forwarding" // netdev.Forwarding to go back to
)

// journalVersion is the layout of the journal's values: JSON of record,
// exposure or netdev.Forwarding.
const journalVersion = 1

// record is an attachment as the journal keeps it.
type record struct {
	Version          int `json:"v"`
	ID               string
	Kind             Kind
	MAC              overlay.MAC
	Addrs            []netip.Prefix
	HostIf           string
	PeerIf           string           // the other end, as it was named when made
	NetNS            string           `json:",omitempty"`
	NS               netdev.Namespace // of NetNS, to notice when the path means another one
	NoMulticastRoute bool             `json:",omitempty"`
	AnySource        bool             `json:",omitempty"` // may send from any address
	Since            time.Time        `json:",omitzero"`  // when it was made

	ifIndex int // of HostIf; 0 when there is no such device (any more)
}

// exposure is one address of the host.
type exposure struct {
	Version      int `json:"v"`
	Addr         netip.Prefix
	NoMasquerade bool `json:",omitempty"`
}

func (r *record) clone() *record {
	if r == nil {
		return nil
	}
	c := *r
	c.Addrs = slices.Clone(r.Addrs)
	return &c
}

func (r *record) key() string { return string(r.Kind) + "/" + r.ID }

func (r *record) attachment() Attachment {
	return Attachment{ID: r.ID, Kind: r.Kind, MAC: r.MAC, Addrs: slices.Clone(r.Addrs),
		HostIf: r.HostIf, IfIndex: r.ifIndex, NetNS: r.NetNS}
}

func (r *record) port() overlay.Port {
	return overlay.Port{IfIndex: r.ifIndex, IfName: r.HostIf, Since: r.Since,
		Endpoint: overlay.Endpoint{MAC: r.MAC, Addrs: slices.Clone(r.Addrs), AnySource: r.AnySource}}
}

// alias marks the host end of a pair as ours, and tells whose it is should the
// journal be lost.
func (r *record) alias() string { return aliasPrefix + string(r.Kind) + " " + r.ID }

const aliasPrefix = "weave "

// parseAlias is the inverse of alias.
func parseAlias(s string) (kind Kind, id string, ok bool) {
	rest, ours := strings.CutPrefix(s, aliasPrefix)
	k, id, found := strings.Cut(rest, " ")
	kind = Kind(k)
	return kind, id, ours && found && id != "" && (kind == KindContainer || kind == KindEndpoint)
}

const (
	containerPrefix = "vethwepl"
	containerHex    = 7
	endpointPrefix  = "vethwl"
	endpointPeer    = "vethwg"
	endpointChars   = 9
)

// containerHostIf is the name of the host end for a container in a namespace.
// A container that is started again gets another one, since the old device may
// still be on its way out.
func containerHostIf(id string, ns netdev.Namespace) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %d", id, ns.Dev, ns.Ino))
	return containerPrefix + hex.EncodeToString(sum[:])[:containerHex]
}

// save writes a record to the journal and makes it known.
func (m *Manager) save(r *record) error {
	r.Version = journalVersion
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("journal of %s: %w", r.ID, err)
	}
	if err := m.cfg.Store.Put(r.key(), b); err != nil {
		return fmt.Errorf("journal of %s: %w", r.ID, err)
	}
	m.set(r)
	return nil
}

func (m *Manager) set(r *record) {
	m.mu.Lock()
	m.records[r.ID] = r.clone()
	m.mu.Unlock()
}

// forget removes a record from the journal and from what is known.
func (m *Manager) forget(r *record) error {
	m.mu.Lock()
	delete(m.records, r.ID)
	m.mu.Unlock()
	if err := m.cfg.Store.Delete(r.key()); err != nil {
		return fmt.Errorf("journal of %s: %w", r.ID, err)
	}
	return nil
}

func (m *Manager) get(id string) *record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.records[id].clone()
}

// unplug takes away the device of a record and its port.
func (m *Manager) unplug(r *record) error {
	// Nobody is to take the end of the device for that of the container.
	m.setIndex(r.ID, 0)
	if err := netdev.DeleteLink(r.HostIf); err != nil {
		m.setIndex(r.ID, r.ifIndex)
		return err
	}
	if r.ifIndex == 0 {
		return nil
	}
	return m.cfg.RemovePort(r.ifIndex)
}

func (m *Manager) setIndex(id string, index int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r := m.records[id]; r != nil {
		r.ifIndex = index
	}
}

// holder returns who has an address, "" when nobody here has.
func (m *Manager) holder(addr netip.Addr) (id string, as netip.Prefix) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.exposed {
		if e.Addr.Addr() == addr {
			return HostID, e.Addr
		}
	}
	for _, r := range m.records {
		if i := indexAddr(r.Addrs, addr); i >= 0 {
			return r.ID, r.Addrs[i]
		}
	}
	return "", netip.Prefix{}
}

func indexAddr(list []netip.Prefix, addr netip.Addr) int {
	return slices.IndexFunc(list, func(p netip.Prefix) bool { return p.Addr() == addr })
}

// without returns the members of list that are not in drop.
func without(list, drop []netip.Prefix) []netip.Prefix {
	var rest []netip.Prefix
	for _, p := range list {
		if !slices.Contains(drop, p) {
			rest = append(rest, p)
		}
	}
	return rest
}
