package attach

import (
	"fmt"
	"net/netip"
	"strings"
)

// minSubnetBits is how many bits a subnet must leave to its addresses: the
// first and the last address of a subnet are never given out, so less than
// four addresses make no network.
const minSubnetBits = 2

// Request asks for one address: a given one (IP), any one of a subnet (Net),
// or, when both are zero, any one of the default subnet.
type Request struct {
	Net netip.Prefix // masked
	IP  netip.Prefix // the address with the length of its subnet
}

// String writes the request as it would be typed.
func (r Request) String() string {
	switch {
	case r.IP.IsValid():
		return "ip:" + r.IP.String()
	case r.Net.IsValid():
		return "net:" + r.Net.String()
	}
	return "net:default"
}

// ParseRequests reads addresses separated by white space, as in WEAVE_CIDR.
// An empty text asks for one address of the default subnet.
func ParseRequests(s string) ([]Request, error) {
	fields := strings.Fields(s)
	if len(fields) == 0 {
		return []Request{{}}, nil
	}
	reqs := make([]Request, 0, len(fields))
	for _, f := range fields {
		r, err := ParseRequest(f)
		if err != nil {
			return nil, err
		}
		reqs = append(reqs, r)
	}
	return reqs, nil
}

// ParseRequest reads net:default, net:<subnet>, ip:<address>/<length> or
// <address>/<length>. The error is a sentence that names the text.
func ParseRequest(s string) (Request, error) {
	if rest, ok := strings.CutPrefix(s, "net:"); ok {
		if rest == "default" {
			return Request{}, nil
		}
		p, err := parseCIDR(s, rest)
		if err != nil {
			return Request{}, err
		}
		if p != p.Masked() {
			return Request{}, fmt.Errorf("subnet %q has host bits set: want net:%s", s, p.Masked())
		}
		return Request{Net: p}, nil
	}
	p, err := parseCIDR(s, strings.TrimPrefix(s, "ip:"))
	if err != nil {
		return Request{}, err
	}
	if p == p.Masked() {
		return Request{}, fmt.Errorf("address %q is the address of the network itself: want a host in it such as %s, or net:%s for any",
			s, netip.PrefixFrom(p.Addr().Next(), p.Bits()), p)
	}
	return Request{IP: p}, nil
}

func parseCIDR(whole, s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is no address: want net:default, net:10.2.1.0/24, ip:10.2.1.5/24 or 10.2.1.5/24", whole)
	}
	if !p.Addr().Is4() {
		return netip.Prefix{}, fmt.Errorf("%q is an IPv6 address: only IPv4 is supported so far", whole)
	}
	if p.Addr().BitLen()-p.Bits() < minSubnetBits {
		return netip.Prefix{}, fmt.Errorf("%q leaves fewer than four addresses: want a length of at most /%d",
			whole, p.Addr().BitLen()-minSubnetBits)
	}
	return p, nil
}
