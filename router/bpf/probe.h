//go:build ignore

// Probes that arrive.
#pragma once
#include "frame.h"
#include "toobig.h"

static __always_inline int is_among(struct neighbour *from, __u32 id)
{
	for (int i = 0; i < MAX_SHARING; i++)
		if (i < from->n && from->id[i] == id)
			return 1;
	return 0;
}

/* Tells the daemon of a probe. */
static __always_inline int report_probe(__u64 token, __u32 size, __u32 by, __u32 src)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e)
		return drop_of(by, COUNT_DROPPED_PROBES);
	e->token = token;
	e->size = size;
	e->from = src;
	e->pad = 0;
	bpf_ringbuf_submit(e, 0);
	return drop(COUNT_PROBES);
}

/* Whether the TCP checksum is still left to a device to complete, as between
 * virtual ones: then the kernel does not touch it for what is below TCP. To be
 * asked of a frame that goes no further. */
static __always_inline int is_sum_pending(struct __sk_buff *skb)
{
	const __u32 at = ETH_HLEN + sizeof(struct iphdr) + __builtin_offsetof(struct tcphdr, check);
	__u16 before, after;

	return !bpf_skb_load_bytes(skb, at, &before, sizeof(before)) && !bpf_l4_csum_replace(skb, at, 0, 1, sizeof(before)) &&
	       !bpf_skb_load_bytes(skb, at, &after, sizeof(after)) && before == after;
}

static __always_inline int is_sum_right(struct __sk_buff *skb, struct segment *s)
{
	__u32 sum = bpf_htons(IPPROTO_TCP) + bpf_htons(sizeof(s->tcp) + SEGMENT);
	__be32 part[SEGMENT / 16];

	if (s->ip.tot_len != bpf_htons(sizeof(*s) + SEGMENT))
		return 0;
	sum = bpf_csum_diff(0, 0, &s->ip.saddr, 2 * sizeof(__be32) + sizeof(s->tcp), sum);
	for (int at = ETH_HLEN + sizeof(*s); at < ETH_HLEN + sizeof(*s) + SEGMENT; at += sizeof(part)) {
		if (bpf_skb_load_bytes(skb, at, part, sizeof(part)))
			return 0;
		sum = bpf_csum_diff(0, 0, part, sizeof(part), fold(sum));
	}
	return fold(sum) == 0xffff;
}

/* A probe that is a TCP segment, or several that are one frame. Its token says
 * which, by their numbers. A function of its own, for the room on the stack. */
__attribute__((noinline)) int take_segment(struct __sk_buff *skb, __u32 by, __u32 src)
{
	struct segment s;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &s, sizeof(s)) || s.ip.protocol != IPPROTO_TCP ||
	    !(is_sum_pending(skb) || is_sum_right(skb, &s)))
		return drop_of(by, COUNT_DROPPED_PROBES);
	__u32 first = bpf_ntohl(s.tcp.seq), end = first + bpf_ntohs(s.ip.tot_len) - sizeof(s);
	__u64 token = (__u64)bpf_ntohl(s.ip.saddr) << 32 | (bpf_ntohl(s.ip.daddr) & ~0xffff);
	return report_probe(token | (first / SEGMENT & 0xff) << 8 | (end / SEGMENT & 0xff), 0, by, src);
}

static __always_inline int take_probe(struct __sk_buff *skb, struct cfg *c, struct ethhdr *eth, struct neighbour *from,
				      __u32 by, __u32 src, __u32 dst)
{
	struct { __be64 token; __be32 size; } __attribute__((packed)) said;

	if (!from || dst != c->self || !is_among(from, src))
		return drop_of(by, COUNT_DROPPED_PROBES);
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return take_segment(skb, by, src);
	if (bpf_skb_load_bytes(skb, ETH_HLEN, &said, sizeof(said)))
		return drop_of(by, COUNT_DROPPED_PROBES);
	__u32 size = bpf_ntohl(said.size);
	if (size > skb->len - ETH_HLEN && size > sizeof(said)) /* proves less than it claims */
		return drop_of(by, COUNT_DROPPED_PROBES);
	return report_probe(bpf_be64_to_cpu(said.token), size, by, src);
}
