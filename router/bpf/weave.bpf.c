//go:build ignore

// The kernel part of the fast data path.
//
// One VXLAN device in collect-metadata ("external") mode is a port of the
// bridge that holds the containers. Five programs at the tc hooks of the
// devices around that bridge do the forwarding; what they do is decided by
// the maps below, which the daemon fills and which outlive it.
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
// Only helpers of Linux 5.10 are used; what came later is found out by
// test_features and told in cfg.flags.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define SHORT_ID 0xfff
#define HOP_LIMIT 63 /* the most that the tags of the TAP can say */
#define ARP_LEN 28 /* for IPv4 over Ethernet */
#define LEARNT_FOR 600000000000ULL /* ns since the last frame from a foreign address */
#define MAX_CHILDREN 512
#define MAX_SHARING 7
#define MAX_SUBNETS 8
#define MAX_ADDRS 8

#define MARK_SENT 0x57560001    /* tunnel key is set: vxlan_out lets it pass */
#define MARK_DELIVER 0x57560002 /* from tap_in: vxlan_in gives it to the bridge */
#define MARK_PROBE 0x57560003	/* from the daemon: vxlan_out sends it to a neighbour */

#define FLAG_LOCAL_ADDR 1   /* the tunnel key has a source address (6.0) */
#define FLAG_TUNNEL_FLAGS 2 /* BPF_F_TUNINFO_FLAGS is known (6.1) */
#define FLAG_SHORTCUT 4     /* wanted by the daemon: past the bridge */
#define FLAG_ARP 8	    /* wanted by the daemon: ARP requests are answered */

/* IP_TUNNEL_NOCACHE_BIT: only bpf_skb_set_tunnel_key sets it, the VXLAN
 * receiver never does. */
#define TUNNEL_NOCACHE bpf_htons(0x2000)

#define TAG_FLOODED 0x8000

/* What one device may cause to be flooded: the time that each frame costs, in
 * ns, and how many may come at once. */
#define UNKNOWN_INTERVAL 1000000ULL /* 1,000 a second */
#define UNKNOWN_BURST 200
#define BROADCAST_INTERVAL 100000ULL /* 10,000 a second */
#define BROADCAST_BURST 2000
#define MULTICAST_INTERVAL 20000ULL /* 50,000 a second */
#define MULTICAST_BURST 10000

#define PASS TC_ACT_UNSPEC /* on to other programs, or by default accepted */
#define DROP TC_ACT_SHOT

struct cfg {
	__u32 self; /* 0: not known yet */
	__u32 vxlan_if;
	__u32 tap_if; /* 0: no TAP */
	__u32 flags;
	__u32 join_if; /* joins TCP packets to super-frames; 0: there is none */
	__u32 port;    /* UDP port of VXLAN, network order */
	__u64 direct_until; /* ns since boot: the direct way is not used any later */
};

/* IPv6, or IPv4 mapped into it; network order */
struct addr {
	__u8 b[16];
};

/* the neighbours behind one underlay address (several behind a NAT) */
struct neighbour {
	__u16 n;
	__u16 id[MAX_SHARING];
	__be32 local; /* IPv4: our address that they send to, */
	__u32 uplink; /* and the device they do it by; 0: not the direct way */
};

enum hop_kind { HOP_VXLAN4 = 1, HOP_VXLAN6, HOP_SLEEVE };

/* how to reach a peer */
struct hop {
	__u16 kind;
	__u16 via; /* the neighbour that takes the frame */
	__u32 mtu; /* largest IP packet proven to get there, 0: not known */
	__u32 remote[4]; /* IPv4: host order in [0], as the helper wants; */
	__u32 local[4];  /* IPv6: network order; local may be zero */
	__u32 uplink;    /* device of the direct way; 0: there is none */
	__be32 gateway;  /* on it: the next hop, or the remote itself */
};

/* where flooded frames of one source come from and go to */
struct tree {
	__u16 parent; /* 0: this peer is the source */
	__u16 n;
	__u16 child[MAX_CHILDREN];
};

struct mac {
	__u8 b[6];
	__u8 pad[2];
};

/* subnets as numbers; the list ends at the first 0 */
struct subnets {
	__u64 key[MAX_SUBNETS];
};

struct endpoint {
	__u16 peer; /* 0: on this host */
	__u16 pad;
	__u32 ifindex; /* on this host: its veth, 0 if it has none */
	struct subnets subnets;
};

#define PORT_VETH 1	  /* the shortcut leads into the other end */
#define PORT_ANY_SOURCE 2 /* may send from any IP address and from foreign MACs */

#define PORT_MOVED 4	  /* its MAC lives elsewhere by now */

/* a device of this host and what may be sent from it */
struct port {
	__u8 mac[6];
	__u16 n_addrs;
	__u32 flags; /* PORT_ */
	__u32 pad;
	struct subnets subnets;
	struct addr addrs[MAX_ADDRS];
};

/* where a foreign address was seen last */
struct learnt {
	__u32 peer;    /* 0: on this host, */
	__u32 ifindex; /* behind this port */
	__u64 seen;    /* in ns since boot */
};

/* A token bucket as a time: when it will be full again, in ns since boot. Two
 * processors may take the same token, which does no harm. */
struct bucket {
	__u64 full;
};

/* What was exchanged with a neighbour by VXLAN; a super-frame counts as the
 * packets it stands for. Of the packets, those flooded and those relayed: sent
 * for the neighbour to pass on, or received from it to pass on from here. */
struct traffic {
	__u64 tx_packets, tx_bytes, tx_flooded, tx_relayed;
	__u64 rx_packets, rx_bytes, rx_flooded, rx_relayed;
};

/* frames dropped on the way from or to a peer */
struct loss {
	__u16 peer;
	__u16 why; /* COUNT_DROPPED_ */
};

/* a probe that arrived */
struct event {
	__u64 token;
	__u32 size; /* of the IP packet that would fit, in bytes */
	__u16 from;
	__u16 pad;
};

#define SEGMENT 256 /* bytes of data in each segment of a probe */

/* the packet of a probe that is TCP; its data follow */
struct segment {
	struct iphdr ip; /* the addresses are the token, but for its last two bytes */
	struct tcphdr tcp; /* to the port of the number of the neighbour's short id */
};

/* names in the daemon are these in lower case, without the prefix */
enum counter {
	COUNT_TX,
	COUNT_RX,
	COUNT_RELAYED,
	COUNT_FLOODED,
	COUNT_FLOODED_UNKNOWN,
	COUNT_RX_FLOODED,
	COUNT_TO_SLEEVE,
	COUNT_FROM_SLEEVE,
	COUNT_PROBES,
	COUNT_PMTU,
	COUNT_TOO_BIG,
	COUNT_SHORTCUT,
	COUNT_DIRECT_TX,
	COUNT_DIRECT_RX,
	COUNT_DIRECT_RELAYED,
	COUNT_ARP_ANSWERED,
	COUNT_ND_ANSWERED,
	COUNT_LEARNT,
	COUNT_DROPPED_NO_PATH,
	COUNT_DROPPED_NOT_NEIGHBOUR,
	COUNT_DROPPED_OWN,
	COUNT_DROPPED_HOP_LIMIT,
	COUNT_DROPPED_REVERSE_PATH,
	COUNT_DROPPED_BACKWARDS,
	COUNT_DROPPED_SPOOFED,
	COUNT_DROPPED_ISOLATED,
	COUNT_DROPPED_UNKNOWN_MAC,
	COUNT_DROPPED_UNKNOWN_PORT,
	COUNT_DROPPED_LOCAL,
	COUNT_DROPPED_MALFORMED,
	COUNT_DROPPED_SEND,
	COUNT_DROPPED_PROBES,
	COUNT_DROPPED_FLOOD_LIMIT,
	COUNT_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cfg);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct addr);
	__type(value, struct neighbour);
} neighbours SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct hop);
} hops SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct tree);
} trees SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct mac);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct port);
} ports SEC(".maps");

/* who has an IP address that somebody announced or that is of a port here */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct addr);
	__type(value, struct mac);
} addresses SEC(".maps");

/* the subnets that foreign addresses at a peer may be in; none, none */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct subnets);
} foreign SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct mac);
	__type(value, struct learnt);
} learnts SEC(".maps");

/* by the device that flooded frames come from, and their kind */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct bucket);
} limits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNT_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* by short id of the neighbour */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SHORT_ID + 1);
	__type(key, __u32);
	__type(value, struct traffic);
} traffics SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct loss);
	__type(value, __u64);
} losses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} events SEC(".maps");

/* keep types that no map names reachable from BTF */
const struct event *event_type __attribute__((unused));
const enum counter *counter_type __attribute__((unused));
const enum hop_kind *hop_kind_type __attribute__((unused));

static __always_inline void count(__u32 which)
{
	__u64 *v = bpf_map_lookup_elem(&counters, &which);
	if (v)
		(*v)++;
}

/* One frame to the peer dst, or to all when that is 0, by way of a neighbour.
 * around: bytes of it that are not the frame's own */
static __always_inline void count_sent(struct __sk_buff *skb, __u32 neighbour, __u32 dst, __u32 around)
{
	struct traffic *t = bpf_map_lookup_elem(&traffics, &neighbour);
	__u32 packets = skb->gso_segs ? skb->gso_segs : 1;

	if (!t)
		return;
	t->tx_packets += packets;
	t->tx_bytes += skb->len - around;
	if (!dst)
		t->tx_flooded += packets;
	else if (dst != neighbour)
		t->tx_relayed += packets;
}

static __always_inline void count_received(struct __sk_buff *skb, __u32 neighbour, __u32 dst, __u32 self, __u32 around)
{
	struct traffic *t = bpf_map_lookup_elem(&traffics, &neighbour);
	__u32 packets = skb->gso_segs ? skb->gso_segs : 1;

	if (!t)
		return;
	t->rx_packets += packets;
	t->rx_bytes += skb->len - around;
	if (!dst)
		t->rx_flooded += packets;
	else if (dst != self)
		t->rx_relayed += packets;
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

/* ---- what fits ---- */

/* Where the transport header of an IP packet starts, from the packet's start. */
struct transport {
	__u32 at; /* 0: no IP packet, or none we understand */
	__u8 proto;
	__u8 cut_off; /* a fragment other than the first: there is none */
};

#define MAX_EXTENSIONS 4

static __always_inline void find_transport6(struct __sk_buff *skb, struct transport *t, __u32 base)
{
	__u32 at = sizeof(struct ipv6hdr);
	__u8 proto, ext[4];

	if (bpf_skb_load_bytes(skb, base + 6, &proto, sizeof(proto)))
		return;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		if (proto != IPPROTO_HOPOPTS && proto != IPPROTO_ROUTING && proto != IPPROTO_DSTOPTS && proto != IPPROTO_FRAGMENT)
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

/* ---- errors about packets that are too big ---- */

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

/* ---- sending into the overlay ---- */

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

/* ---- frames that arrive from the overlay ---- */

static __always_inline int is_among(struct neighbour *from, __u32 id)
{
	for (int i = 0; i < MAX_SHARING; i++)
		if (i < from->n && from->id[i] == id)
			return 1;
	return 0;
}

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

/* ---- foreign addresses ---- */

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

/* ---- to the containers of this host ---- */

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
	struct mac dst = {}, src = {};
	__u64 flags = BPF_F_ADJ_ROOM_NO_CSUM_RESET;

	/* A super-frame needs more than its headers taken off, and a TCP packet
	 * must not overtake it. */
	if (!proto || skb->gso_size || (proto == IPPROTO_TCP && !c->join_if))
		return PASS;
	if (eth.h_proto == bpf_htons(ETH_P_IPV6))
		flags |= DECAP_L3_IPV6;
	__builtin_memcpy(dst.b, eth.h_dest, ETH_ALEN);
	struct endpoint *to = bpf_map_lookup_elem(&endpoints, &dst);
	if (!to || to->peer || !to->ifindex)
		return PASS;
	__builtin_memcpy(src.b, eth.h_source, ETH_ALEN);
	struct endpoint *from = bpf_map_lookup_elem(&endpoints, &src);
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
	struct addr remote __attribute__((aligned(8))) = {.b = {[10] = 0xff, [11] = 0xff}};

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &t, sizeof(t)) || !is_plain(&t, c))
		return PASS;
	__u32 vni = bpf_ntohl(t.vni) >> 8, src = vni & SHORT_ID, dst = vni >> 12;
	if (!src || !dst || src == c->self || !is_direct_on(c))
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
	struct mac dst = {};

	if (!eth)
		return drop(COUNT_DROPPED_MALFORMED);
	__builtin_memcpy(dst.b, eth->h_dest, ETH_ALEN);
	struct endpoint *to = bpf_map_lookup_elem(&endpoints, &dst);
	if (!to || to->peer || !to->ifindex)
		return drop(COUNT_DROPPED_LOCAL);
	return into(skb, to->ifindex, 0);
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

/* ---- isolation: the host side of a container's veth pair ---- */

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
	struct addr a __attribute__((aligned(8))) = {.b = {[10] = 0xff, [11] = 0xff}};
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
		return !bpf_skb_load_bytes(skb, ETH_HLEN, rare, sizeof(struct ipv6hdr)) && may_send_ipv6(p, rare + 8);
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

/* A broadcast ARP request for IPv4 over Ethernet with its Ethernet header */
struct arp_frame {
	struct ethhdr eth;
	__u8 form[6]; /* kinds and lengths of addresses */
	__be16 op;
	__u8 sender_mac[ETH_ALEN], sender[4];
	__u8 target_mac[ETH_ALEN], target[4];
} __attribute__((packed));

static __always_inline int is_zero_addr(const __u8 *a)
{
	return !(a[0] | a[1] | a[2] | a[3]);
}

static __always_inline int is_same4(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

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
	struct addr target __attribute__((aligned(8))) = {.b = {[10] = 0xff, [11] = 0xff}};

	if (f->op != bpf_htons(1) || f->form[0] || f->form[1] != 1 || f->form[2] != 8 || f->form[3] || f->form[4] != ETH_ALEN ||
	    f->form[5] != 4 || is_zero_addr(f->sender) || is_same4(f->sender, f->target))
		return 0;
	__builtin_memcpy(&target.b[12], f->target, sizeof(f->target));
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
	for (int i = 0; i < 4; i++) {
		__u8 asker = f.sender[i];
		f.sender[i] = f.target[i];
		f.target[i] = asker;
	}
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
#define ND_ADVERTISE 136
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
	return f->ip[0] >> 4 == 6 && f->len == bpf_htons(ND_LEN) && f->proto == IPPROTO_ICMPV6 && f->hop_limit == 255 &&
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
