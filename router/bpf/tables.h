//go:build ignore

// What the programs know: the tables, which the daemon fills, and their types.
#pragma once

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
	__u64 lease_until;  /* ns since boot, sleep included: the ports here are cut off from then on; 0: never */
};

/* IPv6, or IPv4 mapped into it; network order */
struct addr {
	__u8 b[16];
};
#define MAPPED {.b = {[10] = 0xff, [11] = 0xff}} /* an IPv4 address before it is set */

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
	struct flow { __u64 packets, bytes, flooded, relayed; } tx, rx;
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
	COUNT_DROPPED_LEASE,
	COUNT_MAX,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cfg);
} config SEC(".maps");

/* a table that the daemon fills */
#define TABLE(name, most, key_type, value_type)          \
	struct {                                         \
		__uint(type, BPF_MAP_TYPE_HASH);         \
		__uint(map_flags, BPF_F_NO_PREALLOC);    \
		__uint(max_entries, most);               \
		__type(key, key_type);                   \
		__type(value, value_type);               \
	} name SEC(".maps")

TABLE(neighbours, 4096, struct addr, struct neighbour);
TABLE(hops, 4096, __u32, struct hop);
TABLE(trees, 4096, __u32, struct tree);
TABLE(endpoints, 65536, struct mac, struct endpoint);
TABLE(ports, 4096, __u32, struct port);

/* who has an IP address that somebody announced or that is of a port here */
TABLE(addresses, 131072, struct addr, struct mac);

/* the subnets that foreign addresses at a peer may be in; none, none */
TABLE(foreign, 4096, __u32, struct subnets);

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
