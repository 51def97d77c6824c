package register

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"weave.local/peer"
)

// AppendAddr writes an address: its length in octets (4 or 16), then them.
func AppendAddr(b []byte, a netip.Addr) []byte {
	s := a.AsSlice()
	return append(append(b, byte(len(s))), s...)
}

// AppendPrefix writes a prefix: its address, then the number of bits.
func AppendPrefix(b []byte, p netip.Prefix) []byte {
	return append(AppendAddr(b, p.Addr()), byte(p.Bits()))
}

func appendID(b []byte, id ID) []byte {
	return binary.BigEndian.AppendUint64(peer.AppendName(b, id.Name), id.Store)
}

func appendBallot(b []byte, v Ballot) []byte {
	return peer.AppendName(binary.AppendUvarint(b, v.N), v.Name)
}

func appendCommittee(b []byte, c Committee) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, c.Term), c.Version)
}

func appendTenancy(b []byte, t Tenancy) []byte {
	return binary.AppendUvarint(peer.AppendName(b, t.Name), t.Epoch)
}

func appendMillis(b []byte, d time.Duration) []byte {
	return binary.AppendUvarint(b, uint64(d.Milliseconds()))
}

// Reader reads what the Append functions wrote. After the first fault it
// yields zeros, and Done tells of it.
type Reader struct {
	B   []byte
	err error
}

// Fail notes a fault; the first one counts.
func (r *Reader) Fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.B = nil
}

// Done is nil when all was well and every byte was read.
func (r *Reader) Done() error {
	if r.err == nil && len(r.B) != 0 {
		return fmt.Errorf("%d bytes too many", len(r.B))
	}
	return r.err
}

// Bytes takes the next n bytes; n zeros when there are fewer.
func (r *Reader) Bytes(n int) []byte {
	if len(r.B) < n {
		r.Fail(errShort)
		return make([]byte, n)
	}
	out := r.B[:n]
	r.B = r.B[n:]
	return out
}

// Byte takes one byte.
func (r *Reader) Byte() byte { return r.Bytes(1)[0] }

// Uint64 takes eight octets, most significant first.
func (r *Reader) Uint64() uint64 { return binary.BigEndian.Uint64(r.Bytes(8)) }

// Uvarint takes a number in base 128, least significant group first.
func (r *Reader) Uvarint() uint64 {
	v, n := binary.Uvarint(r.B)
	if n <= 0 {
		r.Fail(errShort)
		return 0
	}
	r.B = r.B[n:]
	return v
}

// Count takes the length of a list whose items take at least each bytes: a
// length that cannot be true is a fault, before anything is made for it.
func (r *Reader) Count(each int) int {
	v := r.Uvarint()
	if v > uint64(len(r.B)) {
		r.Fail(errShort)
		return 0
	}
	return r.count(int(v), each)
}

func (r *Reader) count(n, each int) int {
	if n*each > len(r.B) {
		r.Fail(errShort)
		return 0
	}
	return n
}

// Name takes a peer name.
func (r *Reader) Name() peer.Name { return peer.NameFromMAC([6]byte(r.Bytes(6))) }

// Addr takes an address.
func (r *Reader) Addr() netip.Addr {
	n := int(r.Byte())
	if n != 4 && n != 16 {
		r.Fail(fmt.Errorf("address of %d octets", n))
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(r.Bytes(n))
	return a
}

// Prefix takes a prefix without host bits.
func (r *Reader) Prefix() netip.Prefix {
	p := netip.PrefixFrom(r.Addr(), int(r.Byte()))
	if !p.IsValid() || p != p.Masked() {
		r.Fail(fmt.Errorf("prefix %v", p))
		return netip.Prefix{}
	}
	return p
}

func (r *Reader) id() ID { return ID{r.Name(), r.Uint64()} }

func (r *Reader) ballot() Ballot { return Ballot{r.Uvarint(), r.Name()} }

func (r *Reader) committee() Committee { return Committee{r.Uvarint(), r.Uvarint()} }

func (r *Reader) tenancy() Tenancy { return Tenancy{r.Name(), r.Uvarint()} }

func (r *Reader) millis() time.Duration {
	v := r.Uvarint()
	if v > uint64(MaxLease.Milliseconds()) {
		r.Fail(fmt.Errorf("%d ms", v))
		return 0
	}
	return time.Duration(v) * time.Millisecond
}
