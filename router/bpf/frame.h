//go:build ignore

// Counting, dropping and looking at a frame.
#pragma once
#include "tables.h"

static __always_inline void count(__u32 which)
{
	__u64 *v = bpf_map_lookup_elem(&counters, &which);
	if (v)
		(*v)++;
}

/* One frame to the peer dst, or to all when that is 0, that is passed on unless dst
 * is end. around: bytes of it that are not the frame's own */
static __always_inline void count_flow(struct __sk_buff *skb, struct flow *f, __u32 dst, __u32 end, __u32 around)
{
	__u32 packets = skb->gso_segs ? skb->gso_segs : 1;

	f->packets += packets;
	f->bytes += skb->len - around;
	if (!dst)
		f->flooded += packets;
	else if (dst != end)
		f->relayed += packets;
}

static __always_inline void count_sent(struct __sk_buff *skb, __u32 neighbour, __u32 dst, __u32 around)
{
	struct traffic *t = bpf_map_lookup_elem(&traffics, &neighbour);
	if (t)
		count_flow(skb, &t->tx, dst, neighbour, around);
}

static __always_inline void count_received(struct __sk_buff *skb, __u32 neighbour, __u32 dst, __u32 self, __u32 around)
{
	struct traffic *t = bpf_map_lookup_elem(&traffics, &neighbour);
	if (t)
		count_flow(skb, &t->rx, dst, self, around);
}

static __always_inline int drop(__u32 why)
{
	count(why);
	return DROP;
}

/* Drops a frame and notes the peer that it came from or would have gone to, if
 * it is not 0. A global function, as it is called from many places. */
__attribute__((noinline)) int drop_of(__u32 peer, __u32 why)
{
	struct loss l = {.peer = peer, .why = why};
	__u64 *v = bpf_map_lookup_elem(&losses, &l), first = 1;

	if (v)
		(*v)++;
	else if (peer)
		bpf_map_update_elem(&losses, &l, &first, BPF_NOEXIST);
	return drop(why);
}

static __always_inline struct cfg *get_config(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&config, &zero);
}

/* Whether the lease of this host's addresses is over: others may have them by
 * now. Nothing goes from its ports to other peers, or from there to them; what
 * it relays goes on. */
static __always_inline int is_cut_off(struct cfg *c)
{
	return c->lease_until && bpf_ktime_get_boot_ns() >= c->lease_until;
}

/* The first len bytes of the frame, or null when it is shorter. Helpers that
 * change the frame make the pointer invalid. The reads are volatile: a pointer
 * that the compiler keeps in a register as 32 bits is none to the verifier. */
static __always_inline void *header(struct __sk_buff *skb, __u32 len)
{
	void *data = (void *)(long)*(volatile __u32 *)&skb->data;

	if (data + len > (void *)(long)*(volatile __u32 *)&skb->data_end) {
		if (bpf_skb_pull_data(skb, len))
			return 0;
		data = (void *)(long)*(volatile __u32 *)&skb->data;
		if (data + len > (void *)(long)*(volatile __u32 *)&skb->data_end)
			return 0;
	}
	return data;
}

static __always_inline int is_zero_mac(const __u8 *m)
{
	return !(m[0] | m[1] | m[2] | m[3] | m[4] | m[5]);
}

#define DF bpf_htons(0x4000) /* in frag_off of an IPv4 header */

/* Where the transport header of an IP packet starts, from the packet's start. */
struct transport {
	__u32 at; /* 0: no IP packet, or none we understand */
	__u8 proto;
	__u8 cut_off; /* a fragment other than the first: there is none */
};

#define MAX_EXTENSIONS 4

static __always_inline int is_extension(__u8 proto)
{
	return proto == IPPROTO_HOPOPTS || proto == IPPROTO_ROUTING || proto == IPPROTO_DSTOPTS || proto == IPPROTO_FRAGMENT;
}

static __always_inline void find_transport6(struct __sk_buff *skb, struct transport *t, __u32 base)
{
	__u32 at = sizeof(struct ipv6hdr);
	__u8 proto, ext[4];

	if (bpf_skb_load_bytes(skb, base + 6, &proto, sizeof(proto)))
		return;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		if (!is_extension(proto))
			break;
		if (bpf_skb_load_bytes(skb, base + at, ext, sizeof(ext)))
			return;
		if (proto == IPPROTO_FRAGMENT)
			t->cut_off = ext[2] || ext[3] & 0xf8;
		at += proto == IPPROTO_FRAGMENT ? 8 : 8 * (ext[1] + 1);
		proto = ext[0];
	}
	t->proto = proto;
	t->at = at;
}

/* base: where in the frame the packet starts */
static __always_inline void find_transport(struct __sk_buff *skb, struct transport *t, __u32 base, __be16 protocol)
{
	struct iphdr ip;

	__builtin_memset(t, 0, sizeof(*t));
	if (protocol == bpf_htons(ETH_P_IPV6)) {
		find_transport6(skb, t, base);
		return;
	}
	if (protocol != bpf_htons(ETH_P_IP) || bpf_skb_load_bytes(skb, base, &ip, sizeof(ip)))
		return;
	t->at = ip.ihl * 4;
	t->proto = ip.protocol;
	t->cut_off = !!(ip.frag_off & bpf_htons(0x1fff));
}

/* The size of the largest packet that the frame holds, 0 when it is not known:
 * a super-frame is cut into packets that have all its headers and gso_size
 * bytes each. */
static __always_inline __u32 packet_len(struct __sk_buff *skb, __u32 base, __be16 protocol)
{
	struct transport t;
	__u8 offset;

	if (!skb->gso_size)
		return skb->len - base;
	find_transport(skb, &t, base, protocol);
	if (t.at && t.proto == IPPROTO_UDP)
		return t.at + 8 + skb->gso_size;
	if (!t.at || t.proto != IPPROTO_TCP || bpf_skb_load_bytes(skb, base + t.at + 12, &offset, sizeof(offset)))
		return 0;
	return t.at + 4 * (offset >> 4) + skb->gso_size;
}

/* Whether all that the frame holds is proven to arrive whole at the neighbour
 * that the hop leads to. To be asked before the frame is encapsulated. What
 * does not fit has two ways: make_too_big turns it into an error for its
 * sender, or else it may only leave where it can be fragmented outside. */
static __always_inline int fits(struct __sk_buff *skb, struct hop *h)
{
	__u32 len;

	if (!h->mtu)
		return 1;
	len = packet_len(skb, ETH_HLEN, skb->protocol);
	return len && len <= h->mtu;
}
