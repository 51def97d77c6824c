//go:build ignore

// Frames that arrive from the overlay: by the VXLAN device, the direct way, or the
// TAP.
#pragma once
#include "place.h"
#include "probe.h"
#include "send.h"

static __always_inline int take_flooded(struct __sk_buff *skb, struct cfg *c, struct ethhdr *eth,
					struct neighbour *from, __u32 by, __u32 src, __u32 ttl, int by_tap)
{
	struct tree *t = bpf_map_lookup_elem(&trees, &src);

	/* What comes by the TAP was checked against the tree in user space. */
	if (!t || (from && !is_among(from, t->parent)))
		return drop_of(by, COUNT_DROPPED_REVERSE_PATH);
	count(COUNT_RX_FLOODED);
	learn_from_peer(eth, src);
	if (ttl > 1)
		flood(skb, src, ttl - 1, t->parent);
	if (is_cut_off(c))
		return drop_of(by, COUNT_DROPPED_LEASE);
	return deliver(skb, c, by_tap);
}

/* from is null for what came by the TAP. by: the neighbour it came from, or by
 * the TAP, where that is not told, the source */
static __always_inline int receive(struct __sk_buff *skb, struct cfg *c, struct neighbour *from, __u32 by, __u32 src,
				   __u32 dst, __u32 ttl, int by_tap)
{
	struct ethhdr *eth = header(skb, sizeof(*eth));

	if (!src || !eth)
		return drop_of(by, COUNT_DROPPED_MALFORMED);
	if (src == c->self)
		return drop_of(by, COUNT_DROPPED_OWN);
	if (is_zero_mac(eth->h_dest) && is_zero_mac(eth->h_source))
		return take_probe(skb, c, eth, from, by, src, dst);
	if (!dst)
		return take_flooded(skb, c, eth, from, by, src, ttl, by_tap);
	if (dst == c->self) {
		if (is_cut_off(c))
			return drop_of(by, COUNT_DROPPED_LEASE);
		count(COUNT_RX);
		learn_from_peer(eth, src);
		return deliver_unicast(skb, c, eth, by, by_tap);
	}
	if (ttl <= 1)
		return drop_of(by, COUNT_DROPPED_HOP_LIMIT);
	count(COUNT_RELAYED);
	return send(skb, c, src, dst, ttl - 1, from, 0);
}

/* what the VXLAN header and those around it say */
struct outer {
	struct addr remote;
	__u32 vni, ttl, flags;
};

static __always_inline int receive_vxlan(struct __sk_buff *skb, struct cfg *c, struct outer *o)
{
	__u32 src = o->vni & SHORT_ID, dst = (o->vni >> 12) & SHORT_ID;

	/* When a frame exceeds the path MTU, the kernel makes the ICMP error and
	 * loops it back to here with the tunnel key we set for sending. For our
	 * own frame it goes to the bridge, for a relayed one back to its source. */
	if (o->flags & TUNNEL_NOCACHE) {
		count(COUNT_PMTU);
		if (src == c->self) {
			struct ethhdr *eth = header(skb, sizeof(*eth));
			return eth ? deliver_unicast(skb, c, eth, 0, 0) : PASS;
		}
		if (!dst)
			return DROP;
		return send(skb, c, dst, src, HOP_LIMIT, 0, 0);
	}
	struct neighbour *from = bpf_map_lookup_elem(&neighbours, &o->remote);
	if (!from)
		return drop(COUNT_DROPPED_NOT_NEIGHBOUR);
	/* Of several behind one address it is told only who sends frames of his own. */
	__u32 by = is_among(from, src) ? src : from->id[0];
	count_received(skb, by, dst, c->self, 0);
	return receive(skb, c, from, by, src, dst, o->ttl, 0);
}

/* ---- frames that arrive by the direct way ----
 *
 * What is not of the plainest form, or not for a container here, is left to
 * the VXLAN device. */

static __always_inline __u8 inner_protocol(struct __sk_buff *skb, __be16 protocol)
{
	__u8 proto = 0;

	if (protocol == bpf_htons(ETH_P_IP))
		bpf_skb_load_bytes(skb, TUNNEL_END + 9, &proto, sizeof(proto));
	else if (protocol == bpf_htons(ETH_P_IPV6))
		bpf_skb_load_bytes(skb, TUNNEL_END + 6, &proto, sizeof(proto));
	return proto;
}

/* Takes off what the frame travelled in and puts it into its container. */
static __always_inline int enter_direct(struct __sk_buff *skb, struct cfg *c, struct ethhdr eth, __u32 neighbour)
{
	__u8 proto = inner_protocol(skb, eth.h_proto);
	__u64 flags = BPF_F_ADJ_ROOM_NO_CSUM_RESET;

	/* A super-frame needs more than its headers taken off, and a TCP packet
	 * must not overtake it. */
	if (!proto || skb->gso_size || (proto == IPPROTO_TCP && !c->join_if))
		return PASS;
	if (eth.h_proto == bpf_htons(ETH_P_IPV6))
		flags |= DECAP_L3_IPV6;
	struct endpoint *to = endpoint_of(eth.h_dest);
	if (!to || to->peer || !to->ifindex)
		return PASS;
	struct endpoint *from = endpoint_of(eth.h_source);
	if (!from || bpf_skb_adjust_room(skb, -(int)sizeof(struct tunnel), BPF_ADJ_ROOM_MAC, flags))
		return PASS;
	/* What a device says of checksums begins with the outer one. */
	bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
	if (bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), BPF_F_INVALIDATE_HASH))
		return drop_of(neighbour, COUNT_DROPPED_SEND);
	count_received(skb, neighbour, c->self, c->self, 0);
	count(COUNT_RX);
	count(COUNT_DIRECT_RX);
	if (!share_subnet(&from->subnets, &to->subnets))
		return drop_of(from->peer, COUNT_DROPPED_ISOLATED);
	return proto == IPPROTO_TCP ? bpf_redirect(c->join_if, 0) : into(skb, to->ifindex, 0);
}

/* Sends a frame for another peer on, in the packet it came in. */
static __always_inline int relay_direct(struct __sk_buff *skb, struct neighbour *from, struct iphdr ip, __be16 protocol,
					__u32 neighbour, __u32 dst)
{
	struct hop *h = bpf_map_lookup_elem(&hops, &dst);
	__u32 len = packet_len(skb, TUNNEL_END, protocol);

	if (!h || h->kind != HOP_VXLAN4 || !h->uplink || ip.ttl <= 1 || !len || len > h->mtu ||
	    (from->n == 1 && from->id[0] == h->via))
		return PASS;
	count_received(skb, neighbour, dst, 0, sizeof(struct tunnel));
	ip.ttl--;
	ip.saddr = bpf_htonl(h->local[0]);
	ip.daddr = bpf_htonl(h->remote[0]);
	ip.check = 0;
	ip.check = ip_checksum(&ip);
	if (bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), 0))
		return drop_of(h->via, COUNT_DROPPED_SEND);
	count_sent(skb, h->via, dst, sizeof(struct tunnel));
	count(COUNT_RELAYED);
	count(COUNT_DIRECT_RELAYED);
	return leave(h);
}

static __always_inline int is_plain(struct tunnel *t, struct cfg *c)
{
	return t->ip.version == 4 && t->ip.ihl == 5 && t->ip.protocol == IPPROTO_UDP && !(t->ip.frag_off & ~DF) &&
	       (t->ip.tos & CE) != CE && t->udp.dest == c->port && !t->udp.check && t->flags == VXLAN_FLAGS &&
	       !is_zero_mac(t->frame.h_dest);
}

static __always_inline int receive_direct(struct __sk_buff *skb, struct cfg *c)
{
	struct tunnel t;
	struct addr remote __attribute__((aligned(8))) = MAPPED;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &t, sizeof(t)) || !is_plain(&t, c))
		return PASS;
	__u32 vni = bpf_ntohl(t.vni) >> 8, src = vni & SHORT_ID, dst = vni >> 12;
	if (!src || !dst || src == c->self || !is_direct_on(c) || (dst == c->self && is_cut_off(c)))
		return PASS;
	__builtin_memcpy(&remote.b[12], &t.ip.saddr, sizeof(t.ip.saddr));
	struct neighbour *from = bpf_map_lookup_elem(&neighbours, &remote);
	if (!from || from->uplink != skb->ifindex || from->local != t.ip.daddr)
		return PASS;
	__u32 neighbour = is_among(from, src) ? src : from->id[0];
	if (dst == c->self)
		return enter_direct(skb, c, t.frame, neighbour);
	return relay_direct(skb, from, t.ip, t.frame.h_proto, neighbour, dst);
}

/* ---- frames that arrive by the TAP ---- */

static __always_inline int receive_tap(struct __sk_buff *skb, struct cfg *c)
{
	if (!skb->vlan_present || skb->vlan_proto != bpf_htons(ETH_P_8021AD))
		return drop(COUNT_DROPPED_MALFORMED);
	__u32 s_tci = skb->vlan_tci;
	if (bpf_skb_vlan_pop(skb) || !skb->vlan_present)
		return drop(COUNT_DROPPED_MALFORMED);
	__u32 c_tci = skb->vlan_tci;
	if (bpf_skb_vlan_pop(skb))
		return drop(COUNT_DROPPED_MALFORMED);
	count(COUNT_FROM_SLEEVE);
	__u32 ttl = ((s_tci >> 12) & 15) << 2 | ((c_tci >> 12) & 3);
	__u32 dst = c_tci & TAG_FLOODED ? 0 : c_tci & SHORT_ID;
	if (!dst && !(c_tci & TAG_FLOODED))
		return drop(COUNT_DROPPED_MALFORMED);
	return receive(skb, c, 0, s_tci & SHORT_ID, s_tci & SHORT_ID, dst, ttl, 1);
}
