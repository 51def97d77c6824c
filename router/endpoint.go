package router

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"weave.local/router/overlay"
)

// An announced endpoint in the replicated table: the key is its six-octet
// Ethernet address, the value is
//
//	1 byte   version (1)
//	8 bytes  mobility sequence number, big endian: of two peers that announce
//	         one address, the higher number is where it lives now
//	1 byte   number of IP addresses, at most maxAddrs
//	each     1 byte length of the address (4 or 16), the address, 1 byte
//	         length of its subnet's prefix
//	1 byte   flags, may be missing: bit 0 any source (overlay.Endpoint)
//
// What follows is ignored, so that fields can be added.
const (
	endpointVersion = 1
	maxAddrs        = 64
	flagAnySource   = 1
)

var errEndpoint = errors.New("malformed endpoint")

func encodeEndpoint(seq uint64, ep overlay.Endpoint) []byte {
	addrs := ep.Addrs[:min(len(ep.Addrs), maxAddrs)]
	b := []byte{endpointVersion}
	b = binary.BigEndian.AppendUint64(b, seq)
	b = append(b, byte(len(addrs)))
	for _, a := range addrs {
		raw := a.Addr().AsSlice()
		b = append(b, byte(len(raw)))
		b = append(b, raw...)
		b = append(b, byte(a.Bits()))
	}
	if ep.AnySource {
		b = append(b, flagAnySource)
	}
	return b
}

func parseEndpoint(key string, b []byte) (ep overlay.Endpoint, seq uint64, err error) {
	if len(key) != len(ep.MAC) || len(b) < 10 {
		return ep, 0, errEndpoint
	}
	if b[0] != endpointVersion {
		return ep, 0, fmt.Errorf("endpoint of version %d, want %d", b[0], endpointVersion)
	}
	copy(ep.MAC[:], key)
	seq = binary.BigEndian.Uint64(b[1:])
	n := int(b[9])
	b = b[10:]
	if n > maxAddrs {
		return ep, 0, errEndpoint
	}
	for range n {
		if len(b) < 1 || len(b) < int(b[0])+2 {
			return ep, 0, errEndpoint
		}
		l := int(b[0])
		addr, ok := netip.AddrFromSlice(b[1 : 1+l])
		if !ok {
			return ep, 0, errEndpoint
		}
		p := netip.PrefixFrom(addr, int(b[1+l]))
		if !p.IsValid() {
			return ep, 0, errEndpoint
		}
		ep.Addrs = append(ep.Addrs, p)
		b = b[2+l:]
	}
	ep.AnySource = len(b) > 0 && b[0]&flagAnySource != 0
	return ep, seq, nil
}
