package main

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"weave.local/tests/lab"
)

const (
	wireguardMTU  = 1420 // wg-quick's on an underlay of 1500
	wireguardPort = 51820
	uapiTimeout   = 5 * time.Second
)

// node is a host with a WireGuard device and, behind it, the subnet of its
// container: 10.98.<number>.0/24.
type node struct {
	host    *lab.Host
	number  byte
	private *ecdh.PrivateKey
}

func (n *node) subnet() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 98, n.number, 0}), 24)
}

func (n *node) container() end {
	return end{n.host, "/run/netns/w", netip.AddrFrom4([4]byte{10, 98, n.number, 2})}
}

// layWireGuard runs wireguard-go on the hosts and routes the subnet of a
// container on the first to that of one on the last, through the others in
// turn: each host has its neighbours as peers.
func (s *scene) layWireGuard(ctx context.Context, hosts ...*lab.Host) (path, error) {
	nodes := make([]node, len(hosts))
	for i, h := range hosts {
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			return path{}, err
		}
		nodes[i] = node{h, byte(i + 1), key}
		if err := nodes[i].start(ctx, s.wireguard); err != nil {
			return path{}, fmt.Errorf("host %s: %w", h.Name, err)
		}
	}
	for i := range nodes {
		if err := configure(nodes, i); err != nil {
			return path{}, fmt.Errorf("wireguard-go on %s: %w", nodes[i].host.Name, err)
		}
	}
	return path{mtu: wireguardMTU, from: nodes[0].container(), to: nodes[len(nodes)-1].container()}, nil
}

// start runs the daemon and makes the container and all routes of the host.
func (n *node) start(ctx context.Context, program string) error {
	// It goes into the background by itself, when the device is there.
	if err := n.host.Run(ctx, program, "wg0").Err(); err != nil {
		return err
	}
	script := fmt.Sprintf(`
set -e
echo 1 >/proc/sys/net/ipv4/ip_forward
ip link set wg0 mtu %[1]d up
ip route add 10.98.0.0/16 dev wg0
ip netns add w
ip link add w0 mtu %[1]d type veth peer name eth0 mtu %[1]d netns w
ip addr add 10.98.%[2]d.1/24 dev w0
ip link set w0 up
ip -n w link set lo up
ip -n w addr add %[3]s/24 dev eth0
ip -n w link set eth0 up
ip -n w route add default via 10.98.%[2]d.1
`, wireguardMTU, n.number, n.container().addr)
	return n.host.Run(ctx, "sh", "-c", script).Err()
}

// configure tells node i of its neighbours, over wireguard-go's own socket
// (https://www.wireguard.com/xplatform/).
func configure(nodes []node, i int) error {
	text := fmt.Sprintf("set=1\nprivate_key=%x\nlisten_port=%d\n", nodes[i].private.Bytes(), wireguardPort)
	for _, j := range []int{i - 1, i + 1} {
		if j < 0 || j >= len(nodes) {
			continue
		}
		text += fmt.Sprintf("public_key=%x\nendpoint=%s\n", nodes[j].private.PublicKey().Bytes(),
			netip.AddrPortFrom(nodes[j].host.Addr, wireguardPort))
		// All that lies on that side of the row.
		for k := range nodes {
			if (k < i) == (j < i) && k != i {
				text += fmt.Sprintf("allowed_ip=%s\n", nodes[k].subnet())
			}
		}
	}
	conn, err := net.DialTimeout("unix", nodes[i].host.Path("/run/wireguard/wg0.sock"), uapiTimeout)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(uapiTimeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "%s\n", text); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err == nil && strings.TrimSpace(answer) != "errno=0" {
		err = errors.New(strings.TrimSpace(answer))
	}
	return err
}
