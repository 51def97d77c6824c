//go:build ignore

// Errors about packets that are larger than their way carries.
#pragma once
#include "frame.h"

#define LEAST_MTU4 576	/* what senders believe; below, the way has to fragment */
#define LEAST_MTU6 1280 /* RFC 8200 section 5 */
#define ERROR_TTL 64
#define QUOTE 128 /* bytes of the packet that its sender gets to see */

#define ERROR_MADE 0
#define ERROR_NONE 1 /* there must be none; the frame is as it was */
#define ERROR_FAILED -1

struct icmp_too_big {
	__u8 type, code;
	__u16 csum;
	__be32 mtu; /* in ICMP for IPv4 only the lower half */
};

struct error4 {
	__u8 pad[2];
	struct ethhdr eth;
	struct iphdr ip;
	struct icmp_too_big icmp;
} __attribute__((packed, aligned(4)));

struct error6 {
	__u8 pad[2];
	struct ethhdr eth;
	struct ipv6hdr ip;
	struct icmp_too_big icmp;
} __attribute__((packed, aligned(4)));

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static __always_inline __u16 ip_checksum(const void *ip)
{
	return ~fold(bpf_csum_diff(0, 0, (void *)ip, sizeof(struct iphdr), 0));
}

static __always_inline int is_icmp_error(struct __sk_buff *skb, struct transport *t)
{
	__u8 type;

	if (t->proto != IPPROTO_ICMP && t->proto != IPPROTO_ICMPV6)
		return 0;
	if (bpf_skb_load_bytes(skb, ETH_HLEN + t->at, &type, sizeof(type)))
		return 1;
	if (t->proto == IPPROTO_ICMPV6)
		return type < 128 || type == 137; /* redirect */
	return (type >= 3 && type <= 5) || type == 11 || type == 12;
}

/* Whether an error about a packet may be sent: RFC 1122 section 3.2.2, RFC
 * 4443 section 2.4 e. */
static __always_inline int may_answer4(struct error4 *e)
{
	__u8 first = bpf_ntohl(e->ip.saddr) >> 24;

	return first && first != 127 && first < 224 && bpf_ntohl(e->ip.daddr) >> 28 != 14;
}

static __always_inline int may_answer6(struct error6 *e)
{
	__be32 *a = e->ip.saddr.in6_u.u6_addr32;

	return e->ip.saddr.in6_u.u6_addr8[0] != 0xff && e->ip.daddr.in6_u.u6_addr8[0] != 0xff &&
	       (a[0] | a[1] | a[2] || bpf_ntohl(a[3]) > 1);
}

/* Cuts the frame down to what the error quotes of it, and returns the sum of
 * that, negative when it went wrong.
 *
 * The transport checksum in there may be one that the kernel left to a device
 * to complete, by the sum of all from the transport header on, which a program
 * can neither see nor call off. So it gets the value f that completing does not
 * change: with s the sum of the rest, f = ~(s + f), that is f + f = ~s in the
 * arithmetic of RFC 1071, where doubling is a rotation. */
static __always_inline __s64 make_quote(struct __sk_buff *skb, struct transport *t)
{
	__u8 quote[QUOTE] __attribute__((aligned(4)));
	__u32 field = t->at + (t->proto == IPPROTO_TCP ? 16 : 6);
	int has_field = !t->cut_off && (t->proto == IPPROTO_TCP || t->proto == IPPROTO_UDP) && field <= QUOTE - 2;
	__u16 f = 0;

	if (bpf_skb_change_tail(skb, ETH_HLEN + QUOTE, 0))
		return -1;
	if (has_field && bpf_skb_store_bytes(skb, ETH_HLEN + field, &f, sizeof(f), BPF_F_RECOMPUTE_CSUM))
		return -1;
	if (bpf_skb_load_bytes(skb, ETH_HLEN, quote, sizeof(quote)))
		return -1;
	if (has_field) {
		f = ~fold(bpf_csum_diff((void *)quote, t->at & (QUOTE - 4), (void *)quote, sizeof(quote), 0));
		f = f >> 1 | f << 15;
		if (bpf_skb_store_bytes(skb, ETH_HLEN + field, &f, sizeof(f), BPF_F_RECOMPUTE_CSUM))
			return -1;
	}
	return (__u64)fold(bpf_csum_diff(0, 0, (void *)quote, sizeof(quote), 0)) + f;
}

static __always_inline void turn_round(struct ethhdr *eth)
{
	__u8 mac[ETH_ALEN];

	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
}

static __always_inline int make_too_big4(struct __sk_buff *skb, struct transport *t, __u32 mtu, int also_without_df)
{
	const __u32 len = sizeof(struct error4) - 2;
	struct error4 e = {};
	__be32 from;
	__s64 sum;

	if (bpf_skb_load_bytes(skb, 0, &e.eth, ETH_HLEN + sizeof(e.ip)) || e.eth.h_dest[0] & 1 || !may_answer4(&e))
		return ERROR_NONE;
	if (!(e.ip.frag_off & DF) && !also_without_df)
		return ERROR_NONE;
	sum = make_quote(skb, t);
	if (sum < 0 || bpf_skb_adjust_room(skb, len - ETH_HLEN, BPF_ADJ_ROOM_MAC, 0))
		return ERROR_FAILED;
	turn_round(&e.eth);
	from = e.ip.daddr;
	e.ip = (struct iphdr){.version = 4, .ihl = 5, .tot_len = bpf_htons(len - ETH_HLEN + QUOTE), .ttl = ERROR_TTL,
			      .frag_off = DF, .protocol = IPPROTO_ICMP, .saddr = from, .daddr = e.ip.saddr};
	e.ip.check = ip_checksum(&e.ip);
	e.icmp = (struct icmp_too_big){.type = 3, .code = 4, .mtu = bpf_htonl(mtu)};
	e.icmp.csum = ~fold(bpf_csum_diff(0, 0, (void *)&e.icmp, sizeof(e.icmp), sum));
	return bpf_skb_store_bytes(skb, 0, &e.eth, len, BPF_F_RECOMPUTE_CSUM) ? ERROR_FAILED : ERROR_MADE;
}

static __always_inline int make_too_big6(struct __sk_buff *skb, struct transport *t, __u32 mtu)
{
	const __u32 len = sizeof(struct error6) - 2;
	struct in6_addr from;
	struct error6 e = {};
	__s64 sum;

	if (bpf_skb_load_bytes(skb, 0, &e.eth, ETH_HLEN + sizeof(e.ip)) || e.eth.h_dest[0] & 1 || !may_answer6(&e))
		return ERROR_NONE;
	sum = make_quote(skb, t);
	if (sum < 0 || bpf_skb_adjust_room(skb, len - ETH_HLEN, BPF_ADJ_ROOM_MAC, 0))
		return ERROR_FAILED;
	turn_round(&e.eth);
	from = e.ip.daddr;
	e.ip.daddr = e.ip.saddr;
	e.ip.saddr = from;
	e.ip.priority = 0;
	__builtin_memset(e.ip.flow_lbl, 0, sizeof(e.ip.flow_lbl));
	e.ip.payload_len = bpf_htons(sizeof(e.icmp) + QUOTE);
	e.ip.nexthdr = IPPROTO_ICMPV6;
	e.ip.hop_limit = ERROR_TTL;
	e.icmp = (struct icmp_too_big){.type = 2, .mtu = bpf_htonl(mtu)};
	sum += e.ip.payload_len + bpf_htons(IPPROTO_ICMPV6);
	sum = bpf_csum_diff(0, 0, (void *)&e.ip.saddr, 2 * sizeof(from), sum);
	e.icmp.csum = ~fold(bpf_csum_diff(0, 0, (void *)&e.icmp, sizeof(e.icmp), fold(sum)));
	return bpf_skb_store_bytes(skb, 0, &e.eth, len, BPF_F_RECOMPUTE_CSUM) ? ERROR_FAILED : ERROR_MADE;
}

/* Makes of a frame larger than mtu the ICMP error that tells its sender (RFC
 * 1191, RFC 4443 section 3.2), as if from the receiver: an address that the
 * sender has a route to and that may be where the frame comes from. Returns an
 * ERROR_. A global function: the verifier looks at it once. */
__attribute__((noinline)) int make_too_big(struct __sk_buff *skb, __u32 mtu, int also_without_df)
{
	__u32 least = skb->protocol == bpf_htons(ETH_P_IP) ? LEAST_MTU4 : LEAST_MTU6;
	__u32 limit = mtu < least ? least : mtu;
	struct transport t;

	find_transport(skb, &t, ETH_HLEN, skb->protocol);
	if (!t.at || t.cut_off || packet_len(skb, ETH_HLEN, skb->protocol) <= limit || is_icmp_error(skb, &t))
		return ERROR_NONE;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return make_too_big4(skb, &t, limit, also_without_df);
	return make_too_big6(skb, &t, limit);
}
