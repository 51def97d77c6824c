//go:build ignore

// Sending into the overlay: by the VXLAN device, the direct way past it, or the TAP.
#pragma once
#include "frame.h"
#include "toobig.h"

/* An inner IPv4 packet without DF may be fragmented outside; all else asks for
 * an error instead of fragments. */
static __always_inline int wants_df(struct __sk_buff *skb)
{
	struct ethhdr *eth;
	struct iphdr *ip;

	if (skb->protocol != bpf_htons(ETH_P_IP))
		return 1;
	eth = header(skb, sizeof(*eth) + sizeof(*ip));
	if (!eth)
		return 1;
	ip = (void *)(eth + 1);
	return ip->frag_off & DF;
}

/* whole: the frame fits; one that does not has to be fragmented outside */
static __always_inline int encapsulate(struct __sk_buff *skb, struct cfg *c, struct hop *h, __u32 src, __u32 dst,
				       __u32 ttl, int whole)
{
	struct bpf_tunnel_key key;
	__u64 flags = BPF_F_ZERO_CSUM_TX;
	__u32 size = __builtin_offsetof(struct bpf_tunnel_key, local_ipv4);

	__builtin_memset(&key, 0, sizeof(key));
	key.tunnel_id = src | dst << 12;
	key.tunnel_ttl = ttl;
	if (whole && wants_df(skb))
		flags |= BPF_F_DONT_FRAGMENT;
	if (h->kind == HOP_VXLAN6) {
		flags |= BPF_F_TUNINFO_IPV6;
		__builtin_memcpy(key.remote_ipv6, h->remote, sizeof(h->remote));
		__builtin_memcpy(key.local_ipv6, h->local, sizeof(h->local));
	} else {
		key.remote_ipv4 = h->remote[0];
		key.local_ipv4 = h->local[0];
	}
	/* The VXLAN device answers an oversize frame with ICMP only if the frame
	 * is not for or from the host itself; ours are, when the host is exposed. */
	if (skb->pkt_type == 0 /* PACKET_HOST */)
		bpf_skb_change_type(skb, 3 /* PACKET_OTHERHOST */);
	if (c->flags & FLAG_LOCAL_ADDR)
		return bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags);
	return bpf_skb_set_tunnel_key(skb, &key, size, flags);
}

static __always_inline int push_tags(struct __sk_buff *skb, __u32 src, __u32 dst, __u32 ttl)
{
	__u32 limit = ttl > HOP_LIMIT ? HOP_LIMIT : ttl;
	__u16 c_tci = dst | (limit & 3) << 12;
	__u16 s_tci = src | (limit >> 2) << 12;

	if (!dst)
		c_tci |= TAG_FLOODED;
	if (bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), c_tci))
		return -1;
	return bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021AD), s_tci);
}

/* ---- the direct way: past the VXLAN device and this host's IP stack ----
 *
 * On the wire it is all the same. Used where the daemon has found the route to
 * the neighbour, and only while it lives and watches that route; without it,
 * frames take the VXLAN device, which asks the kernel for the way each time. */

/* What the direct way puts before a frame, behind the outer Ethernet header:
 * the same as the VXLAN device does (RFC 7348). */
struct tunnel {
	struct iphdr ip;
	struct udphdr udp;
	__be32 flags;
	__be32 vni; /* in the upper 24 bits */
	struct ethhdr frame;
} __attribute__((packed));

#define TUNNEL_END (ETH_HLEN + sizeof(struct tunnel)) /* where the packet inside starts */
#define VXLAN_FLAGS bpf_htonl(0x08000000) /* the identifier is valid */
#define CE 3 /* congestion was met (RFC 3168) */
#define MAX_DIRECT 65000 /* longer frames cannot have their length told outside */
#define PORTS_FROM 32768 /* source ports: the flow's share of the ephemeral ones */
#define PORTS 28232
#define DECAP_L3_IPV6 (1ULL << 8) /* BPF_F_ADJ_ROOM_DECAP_L3_IPV6 (6.3) */

static __always_inline int is_direct_on(struct cfg *c)
{
	return c->flags & FLAG_SHORTCUT && bpf_ktime_get_ns() < c->direct_until;
}

/* The ECN field that belongs outside, as the VXLAN device has it: CE is met
 * inside this host and not told to the underlay. */
static __always_inline __u8 outer_ecn(struct __sk_buff *skb)
{
	__u8 b[2];

	if (bpf_skb_load_bytes(skb, ETH_HLEN, b, sizeof(b)))
		return 0;
	__u8 ecn = (skb->protocol == bpf_htons(ETH_P_IP) ? b[1] : b[1] >> 4) & 3;
	return ecn == CE ? 2 : ecn;
}

static __always_inline int leave(struct hop *h)
{
	struct bpf_redir_neigh to = {.nh_family = 2 /* AF_INET */, .ipv4_nh = h->gateway};
	return bpf_redirect_neigh(h->uplink, &to, sizeof(to), 0);
}

/* Sends a frame as VXLAN without the VXLAN device. Negative when that cannot
 * be done; the frame is then as it was. */
static __always_inline int send_direct(struct __sk_buff *skb, struct cfg *c, struct hop *h, __u32 src, __u32 dst, __u32 ttl)
{
	struct tunnel t = {};
	__u16 len = skb->len + sizeof(t) - ETH_HLEN; /* past the inner Ethernet header */

	if (!h->uplink || !h->mtu || skb->len > MAX_DIRECT || !is_direct_on(c) || bpf_skb_load_bytes(skb, 0, &t.frame, sizeof(t.frame)))
		return -1;
	t.ip.version = 4;
	t.ip.ihl = 5;
	t.ip.tos = outer_ecn(skb);
	t.ip.tot_len = bpf_htons(len);
	t.ip.frag_off = DF;
	t.ip.ttl = ttl;
	t.ip.protocol = IPPROTO_UDP;
	t.ip.saddr = bpf_htonl(h->local[0]);
	t.ip.daddr = bpf_htonl(h->remote[0]);
	t.ip.check = ip_checksum(&t.ip);
	t.udp.source = bpf_htons(PORTS_FROM + ((__u64)bpf_get_hash_recalc(skb) * PORTS >> 32));
	t.udp.dest = c->port;
	t.udp.len = bpf_htons(len - sizeof(t.ip));
	t.flags = VXLAN_FLAGS;
	t.vni = bpf_htonl((src | dst << 12) << 8);
	if (bpf_skb_adjust_room(skb, sizeof(t), BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
					BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH))
		return -1;
	if (bpf_skb_store_bytes(skb, ETH_HLEN, &t, sizeof(t), 0))
		return drop_of(h->via, COUNT_DROPPED_SEND);
	count_sent(skb, h->via, dst, sizeof(t));
	count(COUNT_DIRECT_TX);
	return leave(h);
}

static __always_inline int send_by(struct __sk_buff *skb, struct cfg *c, struct hop *h, __u32 src, __u32 dst,
				   __u32 ttl, int whole, int on_vxlan)
{
	if (h->kind == HOP_SLEEVE) { /* which cuts by itself what does not fit */
		if (!c->tap_if)
			return drop_of(dst, COUNT_DROPPED_NO_PATH);
		if (push_tags(skb, src, dst, ttl))
			return drop_of(h->via, COUNT_DROPPED_SEND);
		count(COUNT_TO_SLEEVE);
		return bpf_redirect(c->tap_if, 0);
	}
	if (!on_vxlan && whole) {
		int r = send_direct(skb, c, h, src, dst, ttl);
		if (r >= 0)
			return r;
	}
	if (encapsulate(skb, c, h, src, dst, ttl, whole))
		return drop_of(h->via, COUNT_DROPPED_SEND);
	count_sent(skb, h->via, dst, 0);
	if (on_vxlan)
		return PASS;
	skb->mark = MARK_SENT;
	return bpf_redirect(c->vxlan_if, 0);
}

/* The error about a frame of src to dst goes back to where that came from. */
static __always_inline int return_error(struct __sk_buff *skb, struct cfg *c, __u32 src, __u32 dst, int on_vxlan)
{
	struct hop *h;

	count(COUNT_TOO_BIG);
	if (on_vxlan) { /* the bridge */
		skb->mark = MARK_DELIVER;
		return bpf_redirect(c->vxlan_if, BPF_F_INGRESS);
	}
	if (src == c->self) /* a container */
		return bpf_redirect(skb->ifindex, 0);
	h = bpf_map_lookup_elem(&hops, &src);
	if (!h)
		return drop_of(src, COUNT_DROPPED_NO_PATH);
	return send_by(skb, c, h, dst, src, HOP_LIMIT, 1, 0);
}

/* Lets a copy of a frame leave in fragments and keeps the frame. */
static __always_inline int send_copy(struct __sk_buff *skb, struct cfg *c, struct hop *h, __u32 src, __u32 dst,
				     __u32 ttl)
{
	__u32 mark = skb->mark;

	skb->mark = MARK_SENT;
	if (encapsulate(skb, c, h, src, dst, ttl, 0) || bpf_clone_redirect(skb, c->vxlan_if, 0))
		drop_of(h->via, COUNT_DROPPED_SEND);
	else
		count_sent(skb, h->via, dst, 0);
	skb->mark = mark;
	return 1;
}

/* One frame of src to the peer dst. from: whom it came from, if by VXLAN.
 * on_vxlan: the program runs where the frame leaves by the VXLAN device. */
static __always_inline int send(struct __sk_buff *skb, struct cfg *c, __u32 src, __u32 dst, __u32 ttl,
				struct neighbour *from, int on_vxlan)
{
	struct hop *h = bpf_map_lookup_elem(&hops, &dst);
	int whole, copied = 0;

	if (!h)
		return drop_of(dst, COUNT_DROPPED_NO_PATH);
	if (from && from->n == 1 && from->id[0] == h->via)
		return drop_of(h->via, COUNT_DROPPED_BACKWARDS);
	whole = h->kind == HOP_SLEEVE || fits(skb, h);
	if (!whole) {
		/* IPv6 is fragmented here or nowhere, by what the kernel knows of the
		 * way. So senders that did not ask to be told are told as well. */
		if (h->kind == HOP_VXLAN6 && !wants_df(skb))
			copied = send_copy(skb, c, h, src, dst, ttl);
		int r = make_too_big(skb, h->mtu, copied);
		if (r == ERROR_MADE)
			return return_error(skb, c, src, dst, on_vxlan);
		if (r != ERROR_NONE)
			return drop_of(h->via, COUNT_DROPPED_SEND);
		if (copied)
			return DROP;
	}
	return send_by(skb, c, h, src, dst, ttl, whole, on_vxlan);
}

#define COPY_FOR_SLEEVE 1

/* One copy of a flooded frame to the neighbour child. A global function: the
 * verifier looks at it once, however long the list of children. */
__attribute__((noinline)) int flood_copy(struct __sk_buff *skb, __u32 src, __u32 child, __u32 ttl)
{
	struct cfg *c = get_config();
	struct hop *h = bpf_map_lookup_elem(&hops, &child);

	if (!c || !h)
		return -1;
	if (h->kind == HOP_SLEEVE)
		return COPY_FOR_SLEEVE;
	if (encapsulate(skb, c, h, src, 0, ttl, fits(skb, h)))
		return -1;
	count_sent(skb, child, 0, 0);
	return bpf_clone_redirect(skb, c->vxlan_if, 0) ? -1 : 0;
}

/* Copies a frame of src to the children of src's tree, except to one. The
 * frame itself stays as it was but for its tunnel key. */
__attribute__((noinline)) int flood(struct __sk_buff *skb, __u32 src, __u32 ttl, __u32 except)
{
	struct cfg *c = get_config();
	struct tree *t = bpf_map_lookup_elem(&trees, &src);
	__u32 mark = skb->mark;
	int sleeve = 0;

	if (!c || !t)
		return 0;
	skb->mark = MARK_SENT;
	for (int i = 0; i < MAX_CHILDREN; i++) {
		if (i >= t->n)
			break;
		if (t->child[i] == except)
			continue;
		int r = flood_copy(skb, src, t->child[i], ttl);
		if (r == COPY_FOR_SLEEVE)
			sleeve = 1;
		else if (r)
			drop_of(t->child[i], COUNT_DROPPED_SEND);
	}
	skb->mark = mark;
	/* The user-space path copies to those children that it serves. */
	if (sleeve && c->tap_if && !push_tags(skb, src, 0, ttl)) {
		if (bpf_clone_redirect(skb, c->tap_if, 0))
			count(COUNT_DROPPED_SEND);
		else
			count(COUNT_TO_SLEEVE);
		bpf_skb_vlan_pop(skb);
		bpf_skb_vlan_pop(skb);
	}
	return 0;
}
