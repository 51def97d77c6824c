//go:build ignore

// Where Ethernet addresses are, and the ways to the containers of this host.
#pragma once
#include "frame.h"

static __always_inline int share_subnet(struct subnets *a, struct subnets *b)
{
	for (int i = 0; i < MAX_SUBNETS; i++) {
		if (!a->key[i])
			break;
		for (int j = 0; j < MAX_SUBNETS; j++) {
			if (!b->key[j])
				break;
			if (a->key[i] == b->key[j])
				return 1;
		}
	}
	return 0;
}

/* What somebody announced about an Ethernet address */
static __always_inline struct endpoint *endpoint_of(const __u8 *mac)
{
	struct mac m = {};

	__builtin_memcpy(m.b, mac, ETH_ALEN);
	return bpf_map_lookup_elem(&endpoints, &m);
}

/* Takes note of a frame from a foreign address. */
static __always_inline void learn(struct mac *m, __u32 peer, __u32 ifindex)
{
	struct learnt now = {.peer = peer, .ifindex = ifindex, .seen = bpf_ktime_get_ns()};
	struct learnt *l = bpf_map_lookup_elem(&learnts, m);

	if (l && l->peer == peer && l->ifindex == ifindex) {
		l->seen = now.seen;
		return;
	}
	count(COUNT_LEARNT);
	bpf_map_update_elem(&learnts, m, &now, BPF_ANY);
}

/* The same for a frame that arrived from a peer, if it has ports that may send
 * from such addresses. */
static __always_inline void learn_from_peer(struct ethhdr *eth, __u32 peer)
{
	struct mac src = {};

	if (eth->h_source[0] & 1 || !bpf_map_lookup_elem(&foreign, &peer))
		return;
	__builtin_memcpy(src.b, eth->h_source, ETH_ALEN);
	if (!bpf_map_lookup_elem(&endpoints, &src))
		learn(&src, peer, 0);
}

/* Where an Ethernet address is. All of one size: the verifier of 5.10 takes back
 * from the stack only what is as large as what was put there. */
struct place {
	__u64 peer;    /* 0: on this host, */
	__u64 ifindex; /* behind this veth, 0 if it is none */
	__u64 is_foreign;
	struct subnets *subnets;
};

static __always_inline int find_foreign(struct mac *m, struct place *at)
{
	struct learnt *l = bpf_map_lookup_elem(&learnts, m);

	if (!l || bpf_ktime_get_ns() - l->seen > LEARNT_FOR)
		return 0;
	at->is_foreign = 1;
	at->peer = l->peer;
	if (at->peer) {
		__u32 peer = at->peer;
		at->subnets = bpf_map_lookup_elem(&foreign, &peer);
		return at->subnets != 0;
	}
	__u32 ifindex = l->ifindex;
	struct port *p = bpf_map_lookup_elem(&ports, &ifindex);
	if (!p || !(p->flags & PORT_ANY_SOURCE))
		return 0;
	at->ifindex = p->flags & PORT_VETH ? ifindex : 0;
	at->subnets = &p->subnets;
	return 1;
}

/* Finds who announced an address or, if nobody did, behind whom it was heard
 * lately, as far as he may have foreign ones. */
static __always_inline int find(const __u8 *mac, struct place *at)
{
	struct mac m = {};

	__builtin_memcpy(m.b, mac, ETH_ALEN);
	struct endpoint *e = bpf_map_lookup_elem(&endpoints, &m);
	if (!e)
		return find_foreign(&m, at);
	at->peer = e->peer;
	at->ifindex = e->ifindex;
	at->is_foreign = 0;
	at->subnets = &e->subnets;
	return 1;
}

/* Past the bridge into the container behind a veth. The packet's type is not set
 * for us before 6.15; and what is foreign is not for the container itself. */
static __always_inline int into(struct __sk_buff *skb, __u32 ifindex, int is_foreign)
{
	count(COUNT_SHORTCUT);
	bpf_skb_change_type(skb, is_foreign ? 3 /* PACKET_OTHERHOST */ : 0 /* PACKET_HOST */);
	return bpf_redirect_peer(ifindex, 0);
}

/* Into the container behind a port of this host, past the bridge and port_out,
 * whose check it makes. from is the sender's subnets, peer where it is. */
static __always_inline int enter(struct __sk_buff *skb, struct subnets *from, __u32 peer, struct place *to)
{
	if (!share_subnet(from, to->subnets))
		return drop_of(peer, COUNT_DROPPED_ISOLATED);
	return into(skb, to->ifindex, to->is_foreign);
}

/* To the bridge, which sees everything come in by the VXLAN device. */
static __always_inline int deliver(struct __sk_buff *skb, struct cfg *c, int by_tap)
{
	if (!by_tap)
		return PASS;
	skb->mark = MARK_DELIVER;
	return bpf_redirect(c->vxlan_if, BPF_F_INGRESS);
}

/* A unicast frame for this host. by: see receive */
static __always_inline int deliver_unicast(struct __sk_buff *skb, struct cfg *c, struct ethhdr *eth, __u32 by,
					   int by_tap)
{
	struct place from, to;

	if (!(c->flags & FLAG_SHORTCUT) || !find(eth->h_dest, &to) || to.peer || !to.ifindex)
		return deliver(skb, c, by_tap);
	if (!find(eth->h_source, &from))
		return drop_of(by, COUNT_DROPPED_UNKNOWN_MAC);
	return enter(skb, from.subnets, from.peer, &to);
}
