package netdev

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// joinerMTU lets super-frames pass, whatever the MTU of those they come from.
const joinerMTU = 65535

// EnsureJoiner makes a pair of veth devices, or adopts it: what is sent by in
// comes out of out, packets of one TCP flow joined to super-frames by generic
// receive offload. Returns the indices of both. On error nothing of a new pair
// is left.
func EnsureJoiner(in, out string) (inIndex, outIndex int, err error) {
	_, err = link(in)
	created := errors.Is(err, ErrNoDevice)
	if created {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = in, joinerMTU
		err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: out, PeerMTU: joinerMTU})
	}
	if err != nil {
		return 0, 0, fmt.Errorf("create %s and %s: %w", in, out, err)
	}
	// Neither has business of its own on a network, and only what is sent
	// without segmentation offload is joined.
	err = errors.Join(
		SetSysctl("ipv6/conf/"+in+"/disable_ipv6", "1"),
		SetSysctl("ipv6/conf/"+out+"/disable_ipv6", "1"),
		setOffload(in, unix.ETHTOOL_STSO, false),
		setOffload(out, unix.ETHTOOL_SGRO, true),
		SetUp(out), SetUp(in))
	a, err1 := DeviceByName(in)
	b, err2 := DeviceByName(out)
	err = errors.Join(err, err1, err2)
	if err != nil && created {
		err = errors.Join(err, DeleteLink(in))
	}
	return a.Index, b.Index, err
}
