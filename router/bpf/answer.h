//go:build ignore

// Answers to requests for announced addresses, by ARP and neighbour discovery.
#pragma once
#include "port.h"

/* A broadcast ARP request for IPv4 over Ethernet with its Ethernet header */
struct arp_frame {
	struct ethhdr eth;
	__u8 form[6]; /* kinds and lengths of addresses */
	__be16 op;
	__u8 sender_mac[ETH_ALEN];
	__be32 sender;
	__u8 target_mac[ETH_ALEN];
	__be32 target;
} __attribute__((packed));

/* Who has the address that a container asks for: null when it is not known,
 * cannot be reached, or is none of the asker's business. */
static __always_inline struct mac *find_holder(struct port *p, struct addr *target)
{
	struct mac *m = bpf_map_lookup_elem(&addresses, target);
	if (!m || is_mac_of(p, m->b))
		return 0;
	struct endpoint *e = bpf_map_lookup_elem(&endpoints, m);
	if (!e || !share_subnet(&p->subnets, &e->subnets))
		return 0;
	__u32 peer = e->peer;
	if (peer && !bpf_map_lookup_elem(&hops, &peer))
		return 0;
	return m;
}

/* The same by an ARP request. There is no answer to probes for duplicates and
 * to announcements: these are for all. */
static __always_inline struct mac *find_target(struct port *p, struct arp_frame *f)
{
	struct addr target __attribute__((aligned(8))) = MAPPED;

	if (f->op != bpf_htons(1) || f->form[0] || f->form[1] != 1 || f->form[2] != 8 || f->form[3] || f->form[4] != ETH_ALEN ||
	    f->form[5] != 4 || !f->sender || f->sender == f->target)
		return 0;
	__builtin_memcpy(&target.b[12], &f->target, sizeof(f->target));
	return find_holder(p, &target);
}

/* Answers an ARP request in the name of the one who has the address. */
static __always_inline int answer_arp(struct __sk_buff *skb, struct port *p)
{
	struct arp_frame f;

	if (bpf_skb_load_bytes(skb, 0, &f, sizeof(f)))
		return PASS;
	struct mac *m = find_target(p, &f);
	if (!m)
		return PASS;
	__builtin_memcpy(f.eth.h_dest, f.sender_mac, ETH_ALEN);
	__builtin_memcpy(f.eth.h_source, m->b, ETH_ALEN);
	f.op = bpf_htons(2);
	__builtin_memcpy(f.target_mac, f.sender_mac, ETH_ALEN);
	__builtin_memcpy(f.sender_mac, m->b, ETH_ALEN);
	__be32 asker = f.sender;
	f.sender = f.target;
	f.target = asker;
	if (bpf_skb_store_bytes(skb, 0, &f, sizeof(f), 0))
		return drop(COUNT_DROPPED_SEND);
	count(COUNT_ARP_ANSWERED);
	return bpf_redirect(skb->ifindex, 0);
}

/* A neighbour solicitation or advertisement (RFC 4861 §4.3, §4.4) with just the
 * option for an Ethernet address (§4.6.1), in its frame */
struct nd_frame {
	__u8 pad[2];
	struct ethhdr eth;
	__u8 ip[4]; /* version, class, label */
	__be16 len;
	__u8 proto, hop_limit;
	struct addr src, dst;
	__u8 type, code;
	__sum16 sum;
	__be32 flags;
	struct addr target;
	__u8 option, option_len, mac[ETH_ALEN];
} __attribute__((aligned(8)));

#define ND_FRAME_LEN (sizeof(struct nd_frame) - __builtin_offsetof(struct nd_frame, eth))
#define ND_LEN (sizeof(struct nd_frame) - __builtin_offsetof(struct nd_frame, type))
#define ND_SOLICIT 135
#define ND_SOLICITED 0x40000000
#define ND_OVERRIDE 0x20000000

/* The ICMPv6 checksum (RFC 4443 §2.3); 0 over a message that has the right one. */
static __always_inline __u16 nd_sum(struct nd_frame *f)
{
	__u64 sum = bpf_htonl(ND_LEN) + (__u64)bpf_htonl(IPPROTO_ICMPV6);
	const __be32 *words = (const void *)&f->src;

	for (int i = 0; i < (2 * sizeof(struct addr) + ND_LEN) / 4; i++)
		sum += words[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Whether a container asks all neighbours for an address in the way that can be
 * answered (RFC 4861 §7.1.1). Nobody else answers what only looks like it, nor a
 * probe for duplicates, which comes from the unspecified address. */
static __always_inline int is_solicitation(struct nd_frame *f)
{
	struct addr group __attribute__((aligned(8))) = {.b = {0xff, 0x02, [11] = 1, [12] = 0xff}};
	const __u64 *src = (const void *)&f->src;

	__builtin_memcpy(&group.b[13], &f->target.b[13], 3); /* RFC 4291 §2.7.1 */
	return f->ip[0] >> 4 == 6 && f->len == bpf_htons(ND_LEN) && f->proto == IPPROTO_ICMPV6 && f->hop_limit == ND_HOP_LIMIT &&
	       f->type == ND_SOLICIT && !f->code && f->option == 1 && f->option_len == 1 && (src[0] | src[1]) &&
	       same_addr(&f->dst, &group) && !nd_sum(f);
}

/* Answers a neighbour solicitation in the name of the one who has the address.
 * A function of its own, for the room on the stack. */
__attribute__((noinline)) int answer_nd(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	struct port *p = bpf_map_lookup_elem(&ports, &ifindex);
	struct nd_frame f;

	if (!p || bpf_skb_load_bytes(skb, 0, &f.eth, ND_FRAME_LEN) || !is_solicitation(&f))
		return PASS;
	struct mac *m = find_holder(p, &f.target);
	if (!m)
		return PASS;
	__builtin_memcpy(f.eth.h_dest, f.eth.h_source, ETH_ALEN);
	__builtin_memcpy(f.eth.h_source, m->b, ETH_ALEN);
	f.dst = f.src;
	f.src = f.target;
	f.type = ND_ADVERTISE;
	f.flags = bpf_htonl(ND_SOLICITED | ND_OVERRIDE);
	f.option = 2; /* the target's address */
	__builtin_memcpy(f.mac, m->b, ETH_ALEN);
	f.sum = 0;
	f.sum = nd_sum(&f);
	if (bpf_skb_store_bytes(skb, 0, &f.eth, ND_FRAME_LEN, 0))
		return drop(COUNT_DROPPED_SEND);
	count(COUNT_ND_ANSWERED);
	return bpf_redirect(ifindex, 0);
}
