//go:build ignore

// The programs with their surroundings replaced: what a VXLAN header or the
// tags of the TAP would say comes from a map, and what became of the frame
// goes to another.
#include "weave.bpf.c"

struct scene {
	struct outer outer;
	__u16 s_tci, c_tci;
};

struct outcome {
	__u32 verdict, mark, has_key, vni, ttl, remote4, whole;
	__u16 vlan_proto, s_tci, inner_proto, c_tci;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scene);
} scenes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct outcome);
} outcomes SEC(".maps");

static __always_inline struct scene *get_scene(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&scenes, &zero);
}

static __always_inline int report(struct __sk_buff *skb, int verdict)
{
	struct outcome o = {.verdict = verdict, .mark = skb->mark};
	struct bpf_tunnel_key key = {};
	__u32 zero = 0;

	if (!bpf_skb_get_tunnel_key(skb, &key, __builtin_offsetof(struct bpf_tunnel_key, local_ipv4), 0)) {
		o.has_key = 1;
		o.vni = key.tunnel_id;
		o.ttl = key.tunnel_ttl;
		o.remote4 = key.remote_ipv4;
	}
	/* whether fragments are forbidden outside, where the kernel tells */
	if (!bpf_skb_get_tunnel_key(skb, &key, __builtin_offsetof(struct bpf_tunnel_key, local_ipv4), BPF_F_TUNINFO_FLAGS))
		o.whole = !!(key.tunnel_flags & bpf_htons(0x100));
	if (skb->vlan_present) {
		__u16 tag[2] = {};
		o.vlan_proto = bpf_ntohs(skb->vlan_proto);
		o.s_tci = skb->vlan_tci;
		bpf_skb_load_bytes(skb, 2 * ETH_ALEN, tag, sizeof(tag));
		o.inner_proto = bpf_ntohs(tag[0]);
		o.c_tci = bpf_ntohs(tag[1]);
	}
	bpf_map_update_elem(&outcomes, &zero, &o, BPF_ANY);
	return verdict;
}

SEC("tc")
int scene_vxlan_in(struct __sk_buff *skb)
{
	struct cfg *c = get_config();
	struct scene *s = get_scene();
	if (!c || !s)
		return DROP;
	struct outer o = s->outer;
	return report(skb, receive_vxlan(skb, c, &o));
}

SEC("tc")
int scene_tap_in(struct __sk_buff *skb)
{
	struct cfg *c = get_config();
	struct scene *s = get_scene();
	if (!c || !s)
		return DROP;
	bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), s->c_tci);
	bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021AD), s->s_tci);
	return report(skb, receive_tap(skb, c));
}

SEC("tc")
int scene_vxlan_out(struct __sk_buff *skb)
{
	struct cfg *c = get_config();
	return c ? report(skb, transmit(skb, c)) : DROP;
}

SEC("tc")
int scene_port_in(struct __sk_buff *skb)
{
	return report(skb, from_port(skb));
}
