// Package peer says who the peers of an overlay network are and how frames
// and messages find their way between them. It is pure: no I/O, no clock, no
// goroutine.
package peer

import (
	"fmt"
	"strconv"
	"strings"
)

// Name identifies a peer for its whole life: 48 bits, written like a MAC
// address. The zero Name names nobody.
type Name uint64

// NameSize is the length of a Name on the wire, in bytes.
const NameSize = 6

// ParseName reads a name in the form 7a:0b:1c:2d:3e:4f. One run of zero
// octets may be written as "::", as in ::1, 1:: and 1::1.
func ParseName(s string) (Name, error) {
	bad := fmt.Errorf("peer name %q: want six hexadecimal octets such as 7a:0b:1c:2d:3e:4f, or ::1", s)
	head, tail, short := strings.Cut(s, "::")
	var octets [NameSize]byte
	front, err := parseOctets(head)
	if err != nil {
		return 0, bad
	}
	back, err := parseOctets(tail)
	if err != nil {
		return 0, bad
	}
	switch n := len(front) + len(back); {
	case short && n >= NameSize, !short && n != NameSize:
		return 0, bad
	}
	copy(octets[:], front)
	copy(octets[NameSize-len(back):], back)
	name := NameFromMAC(octets)
	if name == 0 {
		return 0, fmt.Errorf("peer name %q: all zero names nobody", s)
	}
	return name, nil
}

func parseOctets(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var out []byte
	for part := range strings.SplitSeq(s, ":") {
		v, err := strconv.ParseUint(part, 16, 8)
		if err != nil || len(part) > 2 {
			return nil, fmt.Errorf("octet %q", part)
		}
		out = append(out, byte(v))
	}
	return out, nil
}

// NameFromMAC is the name whose octets are mac.
func NameFromMAC(mac [6]byte) Name {
	var n Name
	for _, b := range mac {
		n = n<<8 | Name(b)
	}
	return n
}

// MAC returns the octets of the name, most significant first; the weave
// bridge of the peer carries them as its address.
func (n Name) MAC() [6]byte {
	var mac [NameSize]byte
	for i := range mac {
		mac[i] = byte(n >> (8 * (NameSize - 1 - i)))
	}
	return mac
}

// String writes the name as six octets.
func (n Name) String() string {
	m := n.MAC()
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// UID tells two runs of a daemon under the same name apart; it is random for
// each run and never zero.
type UID uint64

// ShortID stands for a peer on the data path: 12 bits, 1 to MaxShortID. A
// VXLAN network identifier holds two of them. Zero means "none yet".
type ShortID uint16

// MaxShortID is the largest short id: 4095 is kept free, since IEEE 802.1Q
// reserves it where short ids travel as VLAN identifiers.
const MaxShortID ShortID = 4094

// Info is what a peer says of itself.
type Info struct {
	Name     Name
	UID      UID
	ShortID  ShortID
	NickName string // at most 64 bytes; for people, not unique
	Port     uint16 // control port: TCP links and UDP sleeve; VXLAN is Port+1
}

// String writes name(nickname), as status shows it.
func (i Info) String() string { return fmt.Sprintf("%s(%s)", i.Name, i.NickName) }
