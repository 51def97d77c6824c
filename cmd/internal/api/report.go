// Package api is the control API of the daemon: HTTP over a unix socket that
// only root may open. Server and client share the types of this package; the
// command line is nothing but a client of it.
package api

import "time"

// Report is everything the daemon tells of itself: the JSON of `weave report`
// and the value its templates are applied to.
type Report struct {
	Ready        bool
	Version      string
	VersionCheck VersionCheck
	Router       *RouterReport
	IPAM         *IPAMReport   `json:",omitempty"`
	Proxy        *ProxyReport  `json:",omitempty"`
	Plugin       *PluginReport `json:",omitempty"`
}

// VersionCheck is kept for those who read it: no check is ever made.
type VersionCheck struct {
	Enabled bool
}

// RouterReport is the state of links, peers and forwarding.
type RouterReport struct {
	Protocol           string
	ProtocolMinVersion int
	ProtocolMaxVersion int
	Encryption         bool
	PasswordChange     bool // two passwords are good
	PeerDiscovery      bool
	Name               string
	NickName           string
	Port               int
	Peers              []PeerReport
	UnicastRoutes      []UnicastRoute
	BroadcastRoutes    []BroadcastRoute
	Connections        []Connection
	Targets            []string
	TrustedSubnets     []string
	OverlayDiagnostics OverlayDiagnostics
	Interface          string
	MACs               []MACReport
}

// PeerReport is one peer of the link state with the links it says it has.
type PeerReport struct {
	Name        string
	NickName    string
	UID         uint64
	ShortID     uint16
	Version     uint64 // sequence number of its link-state record
	Connections []PeerConnection
}

// PeerConnection is one link of a peer. Established means that both ends
// announce it.
type PeerConnection struct {
	Name        string
	NickName    string
	Address     string
	Outbound    bool
	Established bool
}

// UnicastRoute is the next hop to a peer.
type UnicastRoute struct{ Dest, Via string }

// BroadcastRoute names the neighbours that broadcasts of Source go on to.
type BroadcastRoute struct {
	Source string
	Via    []string
}

// Connection is one line of `weave status connections`.
type Connection struct {
	Address  string
	Outbound bool
	State    string // established, pending, retrying, failed, connecting
	Info     string
	Attrs    map[string]string

	path      string // in use; empty when none is
	encrypted bool   // frames over it are sealed
}

// OverlayDiagnostics holds the counters of the data paths: frames by event for
// all peers, and what was exchanged with each.
type OverlayDiagnostics struct {
	FastDP map[string]uint64 `json:"fastdp"`
	Sleeve map[string]uint64 `json:"sleeve"`
	Peers  []PeerTraffic     `json:"peers"`
}

// PeerTraffic is what went to and came from a peer by one data path. Dropped
// are frames by reason, where it is known whom they came from or were for.
type PeerTraffic struct {
	Peer     string
	NickName string
	Path     string // fastdp or sleeve
	Tx, Rx   Flow
	Dropped  map[string]uint64 `json:",omitempty"`
}

// Flow counts packets of frames one way, with super-frames as the packets they
// stand for, and bytes of these frames.
type Flow struct {
	Packets, Bytes uint64
	Flooded        uint64 // packets of these that went to all peers
	Relayed        uint64 // packets of these that the receiver was to pass on to another peer
}

// MACReport is an endpoint known on the overlay.
type MACReport struct {
	Mac       string
	Name      string // peer
	NickName  string
	Addresses []string
}

// IPAMReport is the state of address allocation.
type IPAMReport struct {
	Status        string
	Cluster       string // id; empty before there is one
	Range         string
	RangeNumIPs   uint64
	ActiveIPs     int
	DefaultSubnet string
	Unowned       uint64 // addresses no peer holds yet
	Entries       []IPAMEntry
	PendingClaims []PendingClaim
	// PendingAllocates holds "<ident> <cidr>" for each waiting request.
	PendingAllocates []string
	Conflict         string `json:",omitempty"`
	Lease            string `json:",omitempty"` // in words; empty when there is none
}

// IPAMEntry is what one peer holds.
type IPAMEntry struct {
	Peer        string
	Nickname    string
	Size        uint64
	IsKnownPeer bool
	Self        bool
}

// PendingClaim is a claim that waits.
type PendingClaim struct{ Ident, CIDR string }

// ProxyReport names where the Docker API proxy listens.
type ProxyReport struct{ Addresses []string }

// PluginReport names the Docker network driver.
type PluginReport struct{ DriverName string }

// Attachment is one line of `weave ps`.
type Attachment struct {
	ID    string
	MAC   string
	CIDRs []string
}

// AttachRequest asks to join or leave a container (ID or name) or a network
// namespace (path of its file) to the network. Addresses are in the grammar of
// WEAVE_CIDR; none means net:default.
type AttachRequest struct {
	Container        string   `json:",omitempty"`
	NetNS            string   `json:",omitempty"`
	Addresses        []string `json:",omitempty"`
	NoMulticastRoute bool     `json:",omitempty"`
	AnySource        bool     `json:",omitempty"` // may send from any address
}

// PasswordRequest asks for a change of the password: that Next is good, too, and
// preferred, or, to finish, that it is the only one.
type PasswordRequest struct {
	Next   string `json:",omitempty"`
	Finish bool   `json:",omitempty"`
}

// ExposeRequest asks for addresses on the host itself.
type ExposeRequest struct {
	Addresses    []string `json:",omitempty"`
	NoMasquerade bool     `json:",omitempty"`
}

// Addresses answers requests that allocate or release: prefixes in the order
// asked for.
type Addresses struct{ CIDRs []string }

// Removed answers the removal of a peer.
type Removed struct {
	Peer  string
	Count uint64 // addresses taken over
}

// Hello tells who runs behind the socket.
type Hello struct {
	Version string
	Name    string
	PID     int
	Started time.Time
}

// Problem is the body of every answer that is not a success.
type Problem struct{ Error string }

// Warnings answers an operation that went through with something to say.
type Warnings struct{ Warnings []string }
