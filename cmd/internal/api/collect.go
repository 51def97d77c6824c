package api

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"weave.local/peer"
	"weave.local/peer/link"
	"weave.local/router"
)

// Report gathers what the daemon knows, from snapshots: it never waits for
// anybody.
func (s *Server) Report() *Report {
	r := &Report{Ready: true, Version: s.cfg.Hello.Version, Router: s.routerReport(), IPAM: s.ipamReport()}
	if len(s.cfg.Proxy) > 0 {
		r.Proxy = &ProxyReport{Addresses: s.cfg.Proxy}
	}
	if s.cfg.Plugin {
		r.Plugin = &PluginReport{DriverName: driverName}
	}
	return r
}

func (s *Server) routerReport() *RouterReport {
	topo := s.cfg.Mesh.Topology()
	self := s.cfg.Mesh.Self()
	nick, owner := make(map[peer.Name]string), make(map[peer.ShortID]peer.Info)
	for _, rec := range topo.Records() {
		nick[rec.Name], owner[rec.ShortID] = rec.NickName, rec.Info
	}
	r := &RouterReport{
		Protocol:           "weave",
		ProtocolMinVersion: link.MinVersion,
		ProtocolMaxVersion: link.MaxVersion,
		Encryption:         s.cfg.Encryption,
		PasswordChange:     s.cfg.Changing(),
		PeerDiscovery:      s.cfg.Discover,
		Name:               self.Name.String(),
		NickName:           self.NickName,
		Port:               s.cfg.Port,
		Connections:        s.connections(topo),
		Targets:            s.cfg.Mesh.Targets(),
		Interface:          s.cfg.Bridge,
	}
	for _, p := range s.cfg.Trusted {
		r.TrustedSubnets = append(r.TrustedSubnets, p.String())
	}
	for _, rec := range topo.Records() {
		r.Peers = append(r.Peers, peerReport(rec, topo, nick))
		name := rec.Name
		if via, ok := topo.FrameHop(name); ok {
			r.UnicastRoutes = append(r.UnicastRoutes, UnicastRoute{Dest: name.String(), Via: via.String()})
		}
		if _, kids, ok := topo.FrameTree(name); ok {
			b := BroadcastRoute{Source: name.String(), Via: []string{}}
			for _, k := range kids {
				b.Via = append(b.Via, k.String())
			}
			r.BroadcastRoutes = append(r.BroadcastRoutes, b)
		}
	}
	for _, ep := range s.cfg.Router.Endpoints() {
		m := MACReport{Mac: ep.MAC.String()}
		if o, ok := owner[ep.Peer]; ok {
			m.Name, m.NickName = o.Name.String(), o.NickName
		}
		for _, a := range ep.Addrs {
			m.Addresses = append(m.Addresses, a.String())
		}
		r.MACs = append(r.MACs, m)
	}
	if counters, err := s.cfg.Router.Counters(); err == nil {
		r.OverlayDiagnostics.FastDP = counters
	} else {
		s.cfg.Log.Warn("counters of the data path", "err", err)
	}
	r.OverlayDiagnostics.Sleeve = s.cfg.Sleeve()
	r.OverlayDiagnostics.Peers = s.peerTraffic()
	return r
}

func (s *Server) peerTraffic() []PeerTraffic {
	all, err := s.cfg.Router.Traffic()
	if err != nil {
		s.cfg.Log.Warn("traffic by peer", "err", err)
	}
	out := make([]PeerTraffic, 0, len(all))
	for _, t := range all {
		out = append(out, PeerTraffic{
			Peer: t.Peer.Name.String(), NickName: t.Peer.NickName, Path: t.Path,
			Tx: Flow(t.Tx), Rx: Flow(t.Rx), Dropped: t.Dropped,
		})
	}
	return out
}

func peerReport(rec peer.Record, topo peer.Snapshot, nick map[peer.Name]string) PeerReport {
	p := PeerReport{
		Name: rec.Name.String(), NickName: rec.NickName,
		UID: uint64(rec.UID), ShortID: uint16(rec.ShortID), Version: rec.Seq,
	}
	for _, a := range rec.Neighbours {
		p.Connections = append(p.Connections, PeerConnection{
			Name: a.Name.String(), NickName: nick[a.Name], Address: a.Addr.String(),
			Outbound: a.Outbound, Established: topo.Connected(rec.Name, a.Name),
		})
	}
	return p
}

// connections lists the links with the state of the data path over each, then
// the targets that are not connected.
func (s *Server) connections(topo peer.Snapshot) []Connection {
	paths := s.cfg.Router.Paths()
	conflicts := map[peer.Name]string{}
	if s.cfg.Alloc != nil {
		conflicts = s.cfg.Alloc.Conflicts()
	}
	var out []Connection
	all := s.cfg.Mesh.Connections()
	linked := linkedAddresses(all)
	for _, c := range all {
		if c.State != link.Connected && linked[c.Addr] {
			continue // the peer there dialled us meanwhile
		}
		row := Connection{Address: c.Addr, Outbound: c.Outbound, Attrs: map[string]string{}}
		switch c.State {
		case link.Connected:
			s.connected(&row, c, paths[c.Peer.Name], topo)
			if text := conflicts[c.Peer.Name]; text != "" {
				row.Attrs["conflict"] = text
			}
		case link.Connecting:
			row.State = "connecting"
		case link.Retrying:
			row.State, row.Info = "retrying", c.Err
		case link.Failed:
			row.State, row.Info = "failed", c.Err
			if c.Outbound {
				row.Info += ", retry: " + retry(c.Retry)
			}
		}
		out = append(out, row)
	}
	slices.SortStableFunc(out, func(a, b Connection) int { return rank(a.State) - rank(b.State) })
	return out
}

func (s *Server) connected(row *Connection, c link.Connection, p router.PathStatus, topo peer.Snapshot) {
	row.State = "pending"
	path := p.Path
	if path != "" {
		row.State = "established"
		row.Attrs["mtu"] = strconv.Itoa(p.MTU)
	} else {
		path = "none"
	}
	if p.Reason != "" {
		row.Attrs["reason"] = p.Reason
	}
	if relay, ok := topo.Record(p.Via); ok {
		row.Attrs["relay"] = relay.String()
	}
	row.path, row.encrypted = p.Path, c.Sealed
	row.Info = fmt.Sprintf("%-6s %s", path, c.Peer)
	if s.cfg.Encryption {
		word := "unencrypted"
		if c.Sealed {
			word = "encrypted"
		}
		row.Info = fmt.Sprintf("%-11s %s", word, row.Info)
	}
}

// linkedAddresses are those where peers with a live link listen, whichever end
// dialled.
func linkedAddresses(all []link.Connection) map[string]bool {
	out := make(map[string]bool)
	for _, c := range all {
		if c.State != link.Connected {
			continue
		}
		if remote, err := netip.ParseAddrPort(c.Addr); err == nil {
			out[netip.AddrPortFrom(remote.Addr(), c.Peer.Port).String()] = true
		}
	}
	return out
}

func rank(state string) int { return slices.Index(connectionStates(), state) }

func retry(at time.Time) string {
	if at.IsZero() {
		return "never"
	}
	return max(0, time.Until(at).Round(time.Second)).String()
}

func (s *Server) ipamReport() *IPAMReport {
	if s.cfg.Alloc == nil {
		return nil
	}
	st := s.cfg.Alloc.Status()
	r := &IPAMReport{
		Status: st.State, Cluster: st.Cluster, Range: st.Range.String(), RangeNumIPs: st.RangeSize,
		ActiveIPs: st.Active, DefaultSubnet: st.DefaultSubnet.String(), Unowned: st.Unowned,
	}
	for _, p := range st.Peers {
		r.Entries = append(r.Entries, IPAMEntry{
			Peer: p.Name.String(), Nickname: p.Nick, Size: p.Addresses, IsKnownPeer: p.Reachable || p.Self, Self: p.Self,
		})
	}
	for _, c := range st.Claims {
		r.PendingClaims = append(r.PendingClaims, PendingClaim{Ident: c.Owner, CIDR: c.CIDR.String()})
	}
	for _, a := range st.Allocates {
		r.PendingAllocates = append(r.PendingAllocates, a.Owner+" "+a.CIDR.String())
	}
	if st.LeaseLeft > 0 {
		r.Lease = "ends in " + st.LeaseLeft.Round(time.Second).String() + " without a majority"
	} else if st.LeaseLeft < 0 {
		r.Lease = "over since " + (-st.LeaseLeft).Round(time.Second).String()
	}
	for _, c := range st.Conflicts {
		if r.Conflict != "" {
			r.Conflict += "; "
		}
		r.Conflict += c
	}
	return r
}
