package userdp

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/frame"
)

// Layout of a message: virtio-net header, Ethernet addresses, and towards the
// sleeve the two tags.
const (
	vnetLen  = frame.VirtioNetLen
	tagsLen  = frame.TagsLen
	frontLen = vnetLen + frame.AddrsLen
	maxLen   = 1<<16 + frontLen + tagsLen
	hopLimit = 63
)

// serveBridge takes frames from the bridge to the sleeve, until the TAP is
// closed.
func (s *Switch) serveBridge() error {
	buf := make([]byte, maxLen)
	for {
		n, err := s.tap.Read(buf[tagsLen:])
		if err != nil {
			return err
		}
		if n < vnetLen+frame.EthernetLen {
			s.count.add(droppedMalformed)
			continue
		}
		if s.cutOff() {
			s.count.add(droppedLease)
			continue
		}
		t := s.table.Load()
		way, event := t.fromBridge(buf[tagsLen+vnetLen:tagsLen+n], segments(buf[tagsLen:], n), s.limits)
		s.count.add(event)
		if event.dropped() {
			continue
		}
		copy(buf, buf[tagsLen:tagsLen+frontLen])
		shift(buf, tagsLen)
		way.put(buf[frontLen:])
		if err := s.toSleeve(buf[:tagsLen+n]); err != nil {
			return err
		}
	}
}

// servePeers takes frames from the sleeve, until the socket is closed.
func (s *Switch) servePeers() error {
	buf := make([]byte, maxLen)
	for {
		n, err := s.near.Read(buf)
		if err != nil {
			return closedAt(err)
		}
		if n < frontLen+tagsLen+2 {
			s.count.add(droppedMalformed)
			continue
		}
		s.count.add(fromSleeve)
		var w way
		w.get(buf[frontLen:])
		fate := s.table.Load().fromPeer(w, buf[vnetLen:frontLen])
		s.count.add(fate.event)
		if fate.onward {
			w.hops--
			if w.flood {
				w.dst = 0
			}
			w.put(buf[frontLen:])
			if err := s.toSleeve(buf[:n]); err != nil {
				return err
			}
		}
		if !fate.deliver {
			continue
		}
		if s.cutOff() {
			s.count.add(droppedLease)
			continue
		}
		copy(buf[tagsLen:], buf[:frontLen])
		shift(buf[tagsLen:], -tagsLen)
		if _, err := s.tap.Write(buf[tagsLen:n]); errors.Is(err, os.ErrClosed) {
			return err
		} else if err != nil { // it makes no sense to the kernel
			s.count.add(droppedSend)
		}
	}
}

// closedAt makes the end of a socket look as that of a device.
func closedAt(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return os.ErrClosed
	}
	return err
}

// toSleeve hands a tagged frame to the sleeve. It waits while that is busy: the
// kernel drops then what the TAP has no room for.
func (s *Switch) toSleeve(b []byte) error {
	if _, err := s.near.Write(b); err != nil {
		return closedAt(err)
	}
	s.count.add(toSleeve)
	return nil
}

// shift moves what the virtio-net header says of places in the frame.
func shift(b []byte, by int) {
	v := frame.VirtioNet(b)
	if headers := v.HeaderLen(); headers > 0 {
		v.SetHeaderLen(uint16(int(headers) + by))
	}
	if start, at, left := v.ChecksumLeft(); left {
		v.LeaveChecksum(uint16(int(start)+by), at)
	}
}

// segments is how many packets a message of n bytes stands for.
func segments(b []byte, n int) int {
	kind, size := frame.VirtioNet(b).GSO()
	if kind == frame.GSONone || size == 0 {
		return 1
	}
	return n/int(size) + 1
}

// way is what the two tags of a frame say.
type way struct {
	src, dst peer.ShortID // dst is 0 when a flooded frame is on its way to the sleeve
	hops     uint8
	flood    bool
}

func (w way) put(b []byte) {
	frame.Tags{Src: uint16(w.src), Dst: uint16(w.dst), Hops: w.hops, Flood: w.flood}.Put(b)
}

func (w *way) get(b []byte) {
	t, _ := frame.ParseTags(b) // sleeve writes no others
	*w = way{src: peer.ShortID(t.Src), dst: peer.ShortID(t.Dst), hops: t.Hops, flood: t.Flood}
}
