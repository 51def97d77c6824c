package api

import (
	"strings"
	"testing"
)

func sample() *Report {
	return &Report{
		Ready:   true,
		Version: "3.0.0",
		Router: &RouterReport{
			ProtocolMinVersion: 1, ProtocolMaxVersion: 1,
			Name: "7a:00:00:00:00:01", NickName: "u1", PeerDiscovery: true,
			Targets: []string{"u2", "u3"},
			Connections: []Connection{
				{Address: "192.0.2.2:6783", Outbound: true, State: "established", Info: "fastdp 7a:00:00:00:00:02(u2)", Attrs: map[string]string{"mtu": "1450"}},
				{Address: "192.0.2.3:40001", State: "established", Info: "sleeve 7a:00:00:00:00:03(u3)", Attrs: map[string]string{"reason": "fastdp: no answer to probes for 2.6s", "mtu": "1430"}},
				{Address: "192.0.2.4:6783", Outbound: true, State: "failed", Info: "connection refused, retry: 1m0s"},
			},
			Peers: []PeerReport{
				{Name: "7a:00:00:00:00:01", NickName: "u1", Connections: []PeerConnection{{Name: "7a:00:00:00:00:02", NickName: "u2", Address: "192.0.2.2:6783", Outbound: true, Established: true}}},
				{Name: "7a:00:00:00:00:02", NickName: "u2", Connections: []PeerConnection{{Name: "7a:00:00:00:00:01", NickName: "u1", Address: "192.0.2.1:40000"}}},
			},
		},
		IPAM: &IPAMReport{
			Status: "ready", Cluster: "x", Range: "10.32.0.0/24", DefaultSubnet: "10.32.0.0/24", RangeNumIPs: 256, ActiveIPs: 2, Unowned: 184,
			Entries: []IPAMEntry{{Peer: "7a:00:00:00:00:01", Nickname: "u1", Size: 64, IsKnownPeer: true, Self: true}, {Peer: "7a:00:00:00:00:02", Nickname: "u2", Size: 8}},
		},
		Proxy:  &ProxyReport{Addresses: []string{"unix:///run/weave/weave.sock"}},
		Plugin: &PluginReport{DriverName: "weave"},
	}
}

func text(write func(*strings.Builder)) string {
	var b strings.Builder
	write(&b)
	return b.String()
}

func TestStatusText(t *testing.T) {
	got := text(func(b *strings.Builder) { WriteStatus(b, sample()) })
	want := `
        Version: 3.0.0 (version check update disabled)

        Service: router
       Protocol: weave 1
           Name: 7a:00:00:00:00:01(u1)
     Encryption: disabled
  PeerDiscovery: enabled
        Targets: 2
    Connections: 3 (2 established, 1 failed)
          Peers: 2 (with 1 established, 1 pending connections)
 TrustedSubnets: none

        Service: ipam
         Status: ready
          Range: 10.32.0.0/24
  DefaultSubnet: 10.32.0.0/24

        Service: proxy
        Address: unix:///run/weave/weave.sock

        Service: plugin (legacy)
     DriverName: weave

`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestConnectionsText(t *testing.T) {
	got := text(func(b *strings.Builder) { WriteConnections(b, sample().Router.Connections) })
	want := `-> 192.0.2.2:6783        established fastdp 7a:00:00:00:00:02(u2) mtu=1450
<- 192.0.2.3:40001       established sleeve 7a:00:00:00:00:03(u3) mtu=1430 reason="fastdp: no answer to probes for 2.6s"
-> 192.0.2.4:6783        failed      connection refused, retry: 1m0s
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestPeersText(t *testing.T) {
	got := text(func(b *strings.Builder) { WritePeers(b, sample().Router.Peers) })
	want := `7a:00:00:00:00:01(u1)
   -> 192.0.2.2:6783        7a:00:00:00:00:02(u2)                 established
7a:00:00:00:00:02(u2)
   <- 192.0.2.1:40000       7a:00:00:00:00:01(u1)                 pending
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestTrafficText(t *testing.T) {
	got := text(func(b *strings.Builder) {
		WriteTraffic(b, []PeerTraffic{{
			Peer: "7a:00:00:00:00:02", NickName: "u2", Path: "sleeve",
			Tx: Flow{Packets: 12, Bytes: 3400, Flooded: 2, Relayed: 1}, Rx: Flow{Packets: 5, Bytes: 600},
			Dropped: map[string]uint64{"too_big": 3, "own": 1},
		}})
	})
	want := "7a:00:00:00:00:02(u2)                 sleeve tx=12 tx_bytes=3400 tx_flooded=2 tx_relayed=1 rx=5 rx_bytes=600 rx_flooded=0 rx_relayed=0 dropped_own=1 dropped_too_big=3\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestIPAMText(t *testing.T) {
	got := text(func(b *strings.Builder) { WriteIPAM(b, sample().IPAM) })
	want := `7a:00:00:00:00:01(u1)                       64 IPs (25.0% of total) (2 active)
7a:00:00:00:00:02(u2)                        8 IPs (03.1% of total) - unreachable!
unclaimed                                  184 IPs (71.9% of total) 
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := text(func(b *strings.Builder) { WriteIPAM(b, &IPAMReport{RangeNumIPs: 1}) }); got != "" {
		t.Errorf("before there is a cluster: %q, want nothing", got)
	}
}

func TestAttachmentsText(t *testing.T) {
	as := []Attachment{
		{ID: "weave:expose", MAC: "7a:00:00:00:00:01", CIDRs: []string{"10.32.0.1/12"}},
		{ID: "0123456789abcdef", MAC: "7a:00:00:00:00:02", CIDRs: []string{"10.32.0.2/12", "10.33.0.1/16"}},
		{},
	}
	got := text(func(b *strings.Builder) { WriteAttachments(b, as) })
	want := "weave:expose 7a:00:00:00:00:01 10.32.0.1/12\n0123456789ab 7a:00:00:00:00:02 10.32.0.2/12 10.33.0.1/16\n\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
