//go:build ignore

// The kernel part of the fast data path.
//
// One VXLAN device in collect-metadata ("external") mode is a port of the
// bridge that holds the containers. Five programs at the tc hooks of the
// devices around that bridge do the forwarding; what they do is decided by
// the maps of tables.h, which the daemon fills and which outlive it.
//
//	container ── veth ──[port_in ]── bridge ──[vxlan_out]── vxlan ══ underlay
//	container ── veth ──[port_out]── bridge ──[vxlan_in ]── vxlan ══ underlay
//	                                    sleeve TAP ──[tap_in]──┘
//
// With FLAG_SHORTCUT, unicast to where it is known to be goes past the
// bridge: port_in sends it into the overlay or into the other container
// itself, and what arrives is put into the container where it is received.
// The checks are the same. All else takes the way through the bridge.
//
// Requests for announced addresses, by ARP or neighbour discovery (RFC 4861), are
// answered by port_in, as far as no rule could be about them.
//
// A port of PORT_ANY_SOURCE may also send from Ethernet addresses that nobody
// announced (of a VM, a virtual router). Such a foreign address is learnt from
// the frames that come from it, where they are sent and where they arrive. It is
// in the subnets of its port; on other hosts, in those of all such ports of the
// peer that it is at. Frames from any other unannounced address are dropped.
//
// A VXLAN network identifier holds two short ids: source peer in bits 0-11,
// destination peer in bits 12-23. Destination 0 marks a flooded frame, which
// follows the broadcast tree of its source: it is accepted from the parent
// only and goes on to the children. The outer TTL is the hop limit.
//
// Towards a peer that VXLAN does not reach, frames leave through the TAP of
// the user-space path with two VLAN tags that carry the same facts:
//
//	S-tag (802.1ad): bits 0-11 source, bits 12-15 hop limit bits 2-5
//	C-tag (802.1Q):  bits 0-11 destination (0 when flooded),
//	                 bits 12-13 hop limit bits 0-1, bit 15 flooded
//
// A frame larger than its hop is proven to carry becomes an ICMP error to its
// sender, before it is encapsulated.
//
// A frame with both Ethernet addresses zero is a probe: never forwarded, its
// token and size are handed to the daemon. One that holds a TCP segment (struct
// segment) shows whether devices on the way do what was left to them: it counts
// only if its checksum is right.
//
// The programs are here; what they are made of is read in this order: tables.h,
// frame.h, toobig.h, send.h, place.h, probe.h, receive.h, port.h, answer.h.
//
// Only helpers of Linux 5.10 are used; what came later is found out by
// test_features and told in cfg.flags.
#include "answer.h"
#include "receive.h"

/* ingress of the VXLAN device */
SEC("tc")
int vxlan_in(struct __sk_buff *skb)
{
	struct cfg *c = get_config();
	struct bpf_tunnel_key key;
	struct outer o;
	__u32 size = __builtin_offsetof(struct bpf_tunnel_key, local_ipv4);

	if (!c)
		return DROP;
	if (skb->mark == MARK_DELIVER) {
		skb->mark = 0;
		return PASS;
	}
	__builtin_memset(&key, 0, sizeof(key));
	__builtin_memset(&o, 0, sizeof(o));
	__u64 flags = c->flags & FLAG_TUNNEL_FLAGS ? BPF_F_TUNINFO_FLAGS : 0;
	if (!bpf_skb_get_tunnel_key(skb, &key, size, flags)) {
		__u32 v4 = bpf_htonl(key.remote_ipv4);
		o.remote.b[10] = o.remote.b[11] = 0xff;
		__builtin_memcpy(&o.remote.b[12], &v4, sizeof(v4));
	} else if (!bpf_skb_get_tunnel_key(skb, &key, size, flags | BPF_F_TUNINFO_IPV6)) {
		__builtin_memcpy(&o.remote, key.remote_ipv6, sizeof(o.remote));
	} else {
		return drop(COUNT_DROPPED_MALFORMED);
	}
	o.vni = key.tunnel_id;
	o.ttl = key.tunnel_ttl;
	if (c->flags & FLAG_TUNNEL_FLAGS)
		o.flags = key.tunnel_flags;
	return receive_vxlan(skb, c, &o);
}

/* ingress of a device of the underlay: all that this host receives by it */
SEC("tc")
int uplink_in(struct __sk_buff *skb)
{
	struct cfg *c = get_config();
	void *data = (void *)(long)*(volatile __u32 *)&skb->data;
	void *end = (void *)(long)*(volatile __u32 *)&skb->data_end;
	struct udphdr *udp = data + ETH_HLEN + sizeof(struct iphdr);

	if (!c || skb->protocol != bpf_htons(ETH_P_IP) || skb->pkt_type || skb->vlan_present || (void *)(udp + 1) > end ||
	    udp->dest != c->port)
		return PASS;
	return receive_direct(skb, c);
}

/* ingress of the device where joined frames come out. They were checked when
 * they went in. */
SEC("tc")
int join_in(struct __sk_buff *skb)
{
	struct ethhdr *eth = header(skb, sizeof(*eth));

	if (!eth)
		return drop(COUNT_DROPPED_MALFORMED);
	struct endpoint *to = endpoint_of(eth->h_dest);
	if (!to || to->peer || !to->ifindex)
		return drop(COUNT_DROPPED_LOCAL);
	return into(skb, to->ifindex, 0);
}

/* ingress of the TAP: what the user-space path received */
SEC("tc")
int tap_in(struct __sk_buff *skb)
{
	struct cfg *c = get_config();
	return c ? receive_tap(skb, c) : DROP;
}

/* ---- frames that the bridge sends into the overlay ---- */

static __always_inline int is_link_local_mac(const __u8 *m)
{
	return m[0] == 0x01 && m[1] == 0x80 && m[2] == 0xc2 && !m[3] && !m[4] && m[5] < 16;
}

enum flooding { FLOOD_UNKNOWN, FLOOD_BROADCAST, FLOOD_MULTICAST, FLOOD_KINDS };

static __always_inline enum flooding kind_of_flood(const __u8 *dst)
{
	if (!(dst[0] & 1))
		return FLOOD_UNKNOWN;
	return (dst[0] & dst[1] & dst[2] & dst[3] & dst[4] & dst[5]) == 0xff ? FLOOD_BROADCAST : FLOOD_MULTICAST;
}

static __always_inline int exceeds_limit(struct __sk_buff *skb, enum flooding kind)
{
	__u32 key = skb->ingress_ifindex * FLOOD_KINDS + kind; /* 0: the host itself */
	__u64 interval = kind == FLOOD_UNKNOWN ? UNKNOWN_INTERVAL :
			 kind == FLOOD_BROADCAST ? BROADCAST_INTERVAL : MULTICAST_INTERVAL;
	__u64 burst = kind == FLOOD_UNKNOWN ? UNKNOWN_BURST :
		      kind == FLOOD_BROADCAST ? BROADCAST_BURST : MULTICAST_BURST;
	__u64 now = bpf_ktime_get_ns();
	__u64 cost = interval * (skb->gso_segs ? skb->gso_segs : 1);
	struct bucket *b = bpf_map_lookup_elem(&limits, &key);

	if (!b) {
		struct bucket fresh = {.full = now + cost};
		bpf_map_update_elem(&limits, &key, &fresh, BPF_ANY);
		return 0;
	}
	__u64 full = b->full < now ? now : b->full;
	if (full - now > burst * interval)
		return 1;
	b->full = full + cost;
	return 0;
}

/* A probe that the daemon wants sent as the frames of containers are. */
static __always_inline int send_probe(struct __sk_buff *skb, struct cfg *c)
{
	__be16 dst;

	skb->mark = 0;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(struct iphdr) + __builtin_offsetof(struct tcphdr, dest), &dst, sizeof(dst)))
		return drop(COUNT_DROPPED_MALFORMED);
	return send(skb, c, c->self, bpf_ntohs(dst), HOP_LIMIT, 0, 0);
}

static __always_inline int transmit(struct __sk_buff *skb, struct cfg *c)
{
	struct ethhdr *eth;
	struct place to;

	if (skb->mark == MARK_SENT) {
		skb->mark = 0;
		return PASS;
	}
	eth = header(skb, sizeof(*eth));
	if (!eth)
		return drop(COUNT_DROPPED_MALFORMED);
	if (!c->self)
		return drop(COUNT_DROPPED_NO_PATH);
	if (skb->mark == MARK_PROBE)
		return send_probe(skb, c);
	if (is_zero_mac(eth->h_dest) || is_link_local_mac(eth->h_dest))
		return drop(COUNT_DROPPED_LOCAL);
	if (is_cut_off(c))
		return drop(COUNT_DROPPED_LEASE);
	if (!(eth->h_dest[0] & 1) && find(eth->h_dest, &to)) {
		/* The bridge floods what it has not learnt yet. */
		if (!to.peer)
			return drop(COUNT_DROPPED_LOCAL);
		count(COUNT_TX);
		return send(skb, c, c->self, to.peer, HOP_LIMIT, 0, 1);
	}
	enum flooding kind = kind_of_flood(eth->h_dest);
	if (exceeds_limit(skb, kind))
		return drop(COUNT_DROPPED_FLOOD_LIMIT);
	if (kind == FLOOD_UNKNOWN)
		count(COUNT_FLOODED_UNKNOWN);
	count(COUNT_FLOODED);
	flood(skb, c->self, HOP_LIMIT, 0);
	return DROP; /* the copies are on their way */
}

/* egress of the VXLAN device */
SEC("tc")
int vxlan_out(struct __sk_buff *skb)
{
	struct cfg *c = get_config();
	return c ? transmit(skb, c) : DROP;
}

/* ---- the host side of a container's veth pair ---- */

/* A frame to many, which the bridge passes on unless it can be answered. */
static __always_inline int take_question(struct __sk_buff *skb, struct cfg *c, struct port *p, struct ethhdr *eth)
{
	if (eth->h_proto == bpf_htons(ETH_P_ARP))
		return c->flags & FLAG_ARP ? answer_arp(skb, p) : PASS;
	/* A rule for IPv6 packets may be about a solicitation. */
	if (eth->h_proto == bpf_htons(ETH_P_IPV6) && c->flags & FLAG_SHORTCUT)
		return answer_nd(skb);
	return PASS;
}

/* Unicast to where it is known to be, past the bridge if it may go there. */
static __always_inline int take_unicast(struct __sk_buff *skb, struct cfg *c, struct port *p, struct ethhdr *eth)
{
	struct place to;

	/* Elsewhere, a foreign sender is known by its peer alone. */
	int from_foreign = p->flags & PORT_ANY_SOURCE && !is_mac_of(p, eth->h_source);
	if (!(c->flags & FLAG_SHORTCUT) && !from_foreign)
		return PASS;
	if (!find(eth->h_dest, &to))
		return PASS;
	if (from_foreign && !share_subnet(&p->subnets, to.subnets))
		return drop(COUNT_DROPPED_ISOLATED);
	if (!(c->flags & FLAG_SHORTCUT))
		return PASS;
	if (to.peer) {
		if (is_cut_off(c))
			return drop(COUNT_DROPPED_LEASE);
		count(COUNT_TX);
		count(COUNT_SHORTCUT);
		return send(skb, c, c->self, to.peer, HOP_LIMIT, 0, 0);
	}
	if (!to.ifindex || to.ifindex == skb->ifindex)
		return PASS;
	return enter(skb, &p->subnets, 0, &to);
}

static __always_inline int from_port(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&ports, &ifindex);
	struct cfg *c = get_config();

	if (!p || !c)
		return drop(COUNT_DROPPED_UNKNOWN_PORT);
	if (!is_honest(skb, p))
		return drop(COUNT_DROPPED_SPOOFED);
	struct ethhdr *eth = header(skb, sizeof(*eth));
	if (!eth)
		return drop(COUNT_DROPPED_MALFORMED);
	if (!c->self)
		return PASS;
	if (eth->h_dest[0] & 1)
		return take_question(skb, c, p, eth);
	return take_unicast(skb, c, p, eth);
}

/* ingress of the host side: what the container sends */
SEC("tc")
int port_in(struct __sk_buff *skb)
{
	return from_port(skb);
}

/* egress of the host side: what the container is about to receive */
SEC("tc")
int port_out(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&ports, &ifindex);
	struct ethhdr *eth = header(skb, sizeof(*eth));
	struct place from;

	if (!p)
		return drop(COUNT_DROPPED_UNKNOWN_PORT);
	if (!eth)
		return drop(COUNT_DROPPED_MALFORMED);
	if (!find(eth->h_source, &from))
		return drop(COUNT_DROPPED_UNKNOWN_MAC);
	if (!share_subnet(from.subnets, &p->subnets))
		return drop_of(from.peer, COUNT_DROPPED_ISOLATED);
	return PASS;
}

/* Run once by the daemon, on a frame of its own: which of the newer features
 * this kernel has, as FLAG_ bits. */
SEC("tc")
int test_features(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = {.remote_ipv4 = 0x7f000001};
	__u32 size = __builtin_offsetof(struct bpf_tunnel_key, local_ipv4);
	int flags = 0;

	if (!bpf_skb_set_tunnel_key(skb, &key, sizeof(key), 0))
		flags |= FLAG_LOCAL_ADDR;
	else if (bpf_skb_set_tunnel_key(skb, &key, size, 0))
		return 0;
	if (!bpf_skb_get_tunnel_key(skb, &key, size, BPF_F_TUNINFO_FLAGS) && (key.tunnel_flags & TUNNEL_NOCACHE))
		flags |= FLAG_TUNNEL_FLAGS;
	return flags;
}

char license_text[] SEC("license") = "Apache-2.0";
