//go:build ignore

// What a container may send: isolation, at the host side of its veth pair.
#pragma once
#include "place.h"

static __always_inline int same_addr(const struct addr *a, const struct addr *b)
{
	const __u64 *x = (const void *)a, *y = (const void *)b;
	return x[0] == y[0] && x[1] == y[1];
}

static __always_inline int owns_addr(struct port *p, struct addr *a)
{
	if (p->flags & PORT_ANY_SOURCE)
		return 1;
	for (int i = 0; i < MAX_ADDRS; i++) {
		if (i >= p->n_addrs)
			break;
		if (same_addr(&p->addrs[i], a))
			return 1;
	}
	return 0;
}

/* 0.0.0.0 (DHCP, ARP probes) is anybody's */
static __always_inline int may_send_ipv4(struct port *p, const void *src)
{
	struct addr a __attribute__((aligned(8))) = MAPPED;
	__u32 v4;

	__builtin_memcpy(&v4, src, sizeof(v4));
	__builtin_memcpy(&a.b[12], src, sizeof(v4));
	return !v4 || owns_addr(p, &a);
}

/* link-local and unspecified sources (address resolution) are anybody's */
static __always_inline int may_send_ipv6(struct port *p, const void *src)
{
	struct addr a __attribute__((aligned(8)));
	const __u64 *half = (const void *)&a;

	__builtin_memcpy(&a, src, sizeof(a));
	if (a.b[0] == 0xfe && (a.b[1] & 0xc0) == 0x80)
		return 1;
	return !(half[0] | half[1]) || owns_addr(p, &a);
}

#define ND_ADVERTISE 136
#define ND_HOP_LIMIT 255

/* Whether an IPv6 packet of a container does not claim an address that is not its
 * own by a neighbour advertisement (RFC 4861 §4.4), which is one only with that hop
 * limit. What is behind more headers than we look behind may be one. A function of
 * its own, for the room on the stack. */
__attribute__((noinline)) int is_honest_nd(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&ports, &ifindex);
	struct addr target __attribute__((aligned(8)));
	struct transport t = {};
	__u8 type;

	find_transport6(skb, &t, ETH_HLEN);
	if (!p || !t.at || is_extension(t.proto))
		return 0;
	if (t.proto != IPPROTO_ICMPV6 || t.cut_off || bpf_skb_load_bytes(skb, ETH_HLEN + t.at, &type, sizeof(type)) ||
	    type != ND_ADVERTISE)
		return 1;
	return !bpf_skb_load_bytes(skb, ETH_HLEN + t.at + 8, &target, sizeof(target)) && may_send_ipv6(p, &target);
}

static __always_inline int is_mac_of(struct port *p, const __u8 *mac)
{
	__u8 differ = 0;

	for (int i = 0; i < ETH_ALEN; i++)
		differ |= mac[i] ^ p->mac[i];
	return !differ;
}

/* A frame of a port of any source from a MAC that is not the port's: whether it
 * may be. An address that somebody announced is his alone, and says which
 * subnets he is in. */
static __always_inline int admit_foreign(struct __sk_buff *skb, struct ethhdr *eth)
{
	struct mac src = {};

	__builtin_memcpy(src.b, eth->h_source, ETH_ALEN);
	if (src.b[0] & 1 || is_zero_mac(src.b) || eth->h_proto == bpf_htons(ETH_P_8021Q) ||
	    eth->h_proto == bpf_htons(ETH_P_8021AD) || bpf_map_lookup_elem(&endpoints, &src))
		return 0;
	learn(&src, 0, skb->ifindex);
	return 1;
}

/* Whether the frame claims to come from the port's own addresses. A frame
 * with VLAN tag does not: a receiver may take VLAN 0 for none. */
static __always_inline int is_honest(struct __sk_buff *skb, struct port *p)
{
	struct ethhdr *eth = header(skb, sizeof(*eth));
	__u8 rare[sizeof(struct ipv6hdr)]; /* headers that need not be fast */
	__u8 *h;

	if (!eth || skb->vlan_present)
		return 0;
	if (!is_mac_of(p, eth->h_source))
		return p->flags & PORT_ANY_SOURCE && admit_foreign(skb, eth);
	if (p->flags & PORT_MOVED)
		return 0;
	switch (eth->h_proto) {
	case bpf_htons(ETH_P_IP):
		h = header(skb, ETH_HLEN + sizeof(struct iphdr));
		return h && may_send_ipv4(p, h + ETH_HLEN + 12);
	case bpf_htons(ETH_P_IPV6):
		return !bpf_skb_load_bytes(skb, ETH_HLEN, rare, sizeof(struct ipv6hdr)) && may_send_ipv6(p, rare + 8) &&
		       (rare[7] != ND_HOP_LIMIT || is_honest_nd(skb));
	case bpf_htons(ETH_P_ARP):
		if (p->flags & PORT_ANY_SOURCE)
			return 1;
		return !bpf_skb_load_bytes(skb, ETH_HLEN, rare, ARP_LEN) && is_mac_of(p, rare + 8) &&
		       may_send_ipv4(p, rare + 14);
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
		return 0;
	}
	return 1;
}
