package sleeve

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"weave.local/peer"
	"weave.local/router/frame"
	"weave.local/router/overlay"
)

// inject sends a frame out by the TAP's kernel side, tagged.
func inject(t *testing.T, fd int, p *packet) {
	t.Helper()
	if _, err := unix.Write(fd, tapFrame(p)); err != nil {
		t.Fatalf("writing to the packet socket: %v", err)
	}
}

// tapFrame is p as the TAP carries it, virtio-net header first.
func tapFrame(p *packet) []byte {
	h := header{src: p.src, dst: p.dst, hops: p.hops, flood: p.flood, offload: p.offload}
	front := make([]byte, tapOverhead+frame.AddrsLen)
	putTapHeader(front, &h, p.data, len(p.data))
	return append(front, p.data[frame.AddrsLen:]...)
}

// arrival takes the next tagged frame from the kernel's side of the TAP. The
// kernel keeps the outer tag apart from the frame; it is put back.
func arrival(t *testing.T, fd int) *packet {
	t.Helper()
	b := make([]byte, 1<<17)
	oob := make([]byte, 128)
	n, oobn, _, _, err := unix.Recvmsg(fd, b, oob, 0)
	if err != nil {
		t.Fatalf("no frame comes: %v", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("auxiliary data: %d messages, %v", len(msgs), err)
	}
	const tciAt, tpidAt = 16, 18 // in struct tpacket_auxdata
	aux := msgs[0].Data
	tag := []byte{0, 0, 0, 0}
	binary.BigEndian.PutUint16(tag, binary.NativeEndian.Uint16(aux[tpidAt:]))
	binary.BigEndian.PutUint16(tag[2:], binary.NativeEndian.Uint16(aux[tciAt:]))
	b = slices.Insert(b[:n], vnetLen+frame.AddrsLen, tag...)
	if start, at, left := frame.VirtioNet(b).ChecksumLeft(); left {
		frame.VirtioNet(b).LeaveChecksum(start+frame.TagLen, at)
	}
	// Unlike on its way out, a flooded frame has a destination now.
	inner := b[vnetLen+frame.AddrsLen+frame.TagLen+2:]
	dst := binary.BigEndian.Uint16(inner) & 0xfff
	if inner[0]&0x80 != 0 {
		inner[0], inner[1] = inner[0]&0xf0, 0
	}
	p := new(packet)
	if !p.parse(b) {
		t.Fatalf("a frame without proper tags: % x", b[:min(len(b), 60)])
	}
	p.dst = peer.ShortID(dst)
	return p
}

// none says that no frame has come.
func none(t *testing.T, fd int) {
	t.Helper()
	b := make([]byte, 100)
	if n, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("a frame came: % x, %v", b[:n], err)
	}
}

// Frames come out of the other TAP as they went into this one: super-frames,
// large ones in fragments, small ones; with tags and offload data.
func TestRawFrames(t *testing.T) {
	for _, mtu := range []int{1280, 1500, 9000} {
		a, b := pair(t, mtu)
		a.apply(t, forwarding(1, addr4, 2))
		b.apply(t, forwarding(2, addr4, 1))
		a.serve(t)
		b.serve(t)
		out, in := a.packetSocket(t), b.packetSocket(t)
		for _, p := range []*packet{
			testTCP(false, 64000, 1200), testTCP(true, 64000, 1200), testTCP(false, 64000, 8800),
			testTCP(false, 1000, 0), testTCP(true, 9000, 0),
			testUDP(false, 60000, 1000), testUDP(true, 60000, 3000), testUDP(false, 100, 0), testUDP(true, 30000, 0),
			testPlain(60), testPlain(5000), testPlain(30000),
		} {
			p.src, p.dst, p.hops = 1, 2, 42
			inject(t, out, p)
			checkArrival(t, in, p)
		}
		none(t, in)
		a.quiet(t)
		b.quiet(t)
	}
}

// checkArrival waits for the frame p. A super-frame that the path has cut may
// come in several, when the receiver is faster than the sender.
func checkArrival(t *testing.T, in int, p *packet) {
	t.Helper()
	got := arrival(t, in)
	rest := [][]byte{p.data}
	segments := func(p *packet) [][]byte { return [][]byte{p.data} }
	if p.gsoType != gsoNone || len(got.data) < len(p.data) {
		size := int(got.gsoSize)
		if size == 0 && len(got.data) < len(p.data) { // one segment alone
			size = len(got.data) - p.headLen()
		}
		segments = func(p *packet) [][]byte { return slowSegments(p, size) }
		rest = segments(p)
	}
	for {
		if got.src != 1 || got.dst != 2 || got.hops != 42 || got.flood || got.partial != p.partial {
			t.Fatalf("frame %+v for %+v", got.offload, p.offload)
		}
		if err := checkSums(got); err != nil {
			t.Error(err)
		}
		for _, s := range segments(got) {
			if len(rest) == 0 || !bytes.Equal(s, rest[0]) {
				t.Fatalf("of a frame of %d bytes, offload %+v, comes a piece that is not of it", len(p.data), p.offload)
			}
			rest = rest[1:]
		}
		if len(rest) == 0 {
			return
		}
		got = arrival(t, in)
	}
}

// floodForwarding is what host id of TestFlood goes by.
func floodForwarding(id peer.ShortID) overlay.Forwarding {
	others := slices.DeleteFunc([]peer.ShortID{1, 2, 3}, func(o peer.ShortID) bool { return o == id })
	f := forwarding(id, addr4, others...)
	if id == 2 {
		f.Hops[1] = overlay.Hop{Via: 1, Path: overlay.FastDP}
	}
	f.Trees = map[peer.ShortID]map[peer.ShortID]overlay.Tree{
		1: {1: {Children: []peer.ShortID{2}}, 2: {Parent: 2, Children: []peer.ShortID{3}}},
		2: {1: {Parent: 1, Children: []peer.ShortID{3}}, 2: {Children: []peer.ShortID{1, 3}}},
		3: {1: {Parent: 2}, 2: {Parent: 2}},
	}[id]
	return f
}

// Frames flood along the tree of their source, and only along it:
//
//	1 ── 2 ── 3        tree of 1: 1 → 2 → 3
//	└─────────┘        tree of 2: 2 → 3, and 2 → 1 by fastdp
func TestFlood(t *testing.T) {
	stop := map[peer.ShortID]func(){}
	hosts := map[peer.ShortID]*host{1: newHost(t, 1), 2: newHost(t, 2), 3: newHost(t, 3)}
	join(hosts[1].space, hosts[2].space, 1, 2, 1500)
	join(hosts[2].space, hosts[3].space, 2, 3, 1500)
	join(hosts[1].space, hosts[3].space, 1, 3, 1500)
	fd := map[peer.ShortID]int{}
	for id, h := range hosts {
		h.apply(t, floodForwarding(id))
		stop[id], fd[id] = h.serve(t), h.packetSocket(t)
	}
	send := func(at, src peer.ShortID) *packet {
		p := testPlain(60)
		p.src, p.hops, p.flood = src, 9, true
		inject(t, fd[at], p)
		return p
	}
	expect := func(at, src peer.ShortID, sent *packet) {
		t.Helper()
		got := arrival(t, fd[at])
		if got.src != src || got.dst != at || !got.flood || !bytes.Equal(got.data, sent.data) {
			t.Errorf("host %d: %+v", at, got)
		}
	}
	expect(2, 1, send(1, 1))
	expect(3, 1, send(2, 1)) // the kernel of 2 sends it on
	expect(3, 2, send(2, 2))
	marker := testPlain(60)
	marker.src, marker.dst, marker.hops = 3, 1, 1
	inject(t, fd[3], marker)
	if got := arrival(t, fd[1]); got.flood {
		t.Error("host 1 got a flooded frame by sleeve that is to come by fastdp")
	}
	// A copy that comes another way than by the parent is dropped.
	stray := forwarding(1, addr4, 2, 3)
	stray.Trees[1] = overlay.Tree{Children: []peer.ShortID{2, 3}}
	hosts[1].apply(t, stray)
	expect(2, 1, send(1, 1))
	marker.src, marker.dst = 1, 3
	inject(t, fd[1], marker)
	if got := arrival(t, fd[3]); got.flood {
		t.Error("host 3 took a flooded frame of 1 that did not come by 2")
	}
	for id := range hosts {
		none(t, fd[id])
		stop[id]()
	}
	if n := hosts[3].path.Counters()["dropped_reverse_path"]; n != 1 {
		t.Errorf("dropped_reverse_path is %d", n)
	}
	hosts[1].quiet(t)
	hosts[2].quiet(t)
	hosts[3].quiet(t, "dropped_reverse_path")
}

// Datagrams from strangers change a counter and nothing else.
func TestJunk(t *testing.T) {
	a, b := pair(t, 1500)
	b.apply(t, forwarding(2, addr4, 1))
	stop := b.serve(t)
	in := b.packetSocket(t)
	var conn *net.UDPConn
	var err error
	a.do(func() {
		conn, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr4(2), testPort)))
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()

	good := make([]byte, headerLen+60)
	h := header{kind: kindFrame, src: 1, dst: 2, hops: 1, last: true}
	h.put(good)
	sealed := &neighbour{session: sessionOf(1, 2)}
	sealed.seal(1, good)
	spoil := func(at int, v byte) []byte {
		d := bytes.Clone(good)
		d[at] = v
		return d
	}
	random := make([]byte, 500)
	_, _ = rand.NewChaCha8([32]byte{}).Read(random)
	strangers := [][]byte{
		{}, {version}, good[:headerLen-1], random,
		spoil(0, version+1), spoil(3, 7), spoil(11, 0xff), spoil(2, 0xff),
	}
	malformed := [][]byte{good[:headerLen], spoil(1, 9), spoil(13, 0), spoil(27, 0x80), spoil(26, 1), spoil(15, 0)}
	for _, d := range append(slices.Clone(strangers), malformed...) {
		if _, err := conn.Write(d); err != nil {
			t.Fatal(err)
		}
	}
	// From an unknown address, but with the session: good.
	good[headerLen+12] = 0x12
	if _, err := conn.Write(good); err != nil {
		t.Fatal(err)
	}
	if got := arrival(t, in); !bytes.Equal(got.data, good[headerLen:]) {
		t.Errorf("arrived % x", got.data)
	}
	none(t, in)
	stop()
	n := b.path.Counters()
	if n["dropped_unknown_sender"] != uint64(len(strangers)) || n["dropped_malformed"] != uint64(len(malformed)) || n["frames_to_tap"] != 1 {
		t.Errorf("%d strangers and %d malformed counted as %v", len(strangers), len(malformed), n)
	}
	b.quiet(t, "dropped_unknown_sender", "dropped_malformed")
}

// What has no tags or nowhere to go is dropped at the TAP.
func TestNowhere(t *testing.T) {
	a, b := pair(t, 1500)
	a.apply(t, forwarding(1, addr4, 2))
	b.apply(t, forwarding(2, addr4, 1))
	stop := a.serve(t)
	b.serve(t)
	out, in := a.packetSocket(t), b.packetSocket(t)
	p := testPlain(60)
	p.src, p.dst, p.hops = 1, 9, 1
	inject(t, out, p) // no route
	p.dst, p.hops = 2, 0
	inject(t, out, p) // no hops left
	if _, err := unix.Write(out, append(make([]byte, vnetLen), testPlain(60).data...)); err != nil {
		t.Fatal(err)
	}
	p.hops = 1
	inject(t, out, p)
	arrival(t, in)
	none(t, in)
	stop()
	if n := a.path.Counters(); n["dropped_no_path"] != 1 || n["dropped_bad_tags"] != 2 {
		t.Errorf("counters %v", n)
	}
}

func TestPortTaken(t *testing.T) {
	h := newHost(t, 1)
	var err error
	h.do(func() { _, err = New(Config{Port: testPort, TapName: "other", Log: slog.New(slog.DiscardHandler)}) })
	if err == nil || !strings.Contains(err.Error(), "6783") || !strings.Contains(err.Error(), "taken") {
		t.Errorf("second on the port: %v", err)
	}
	if h.try("ip link show other") == nil {
		t.Error("a TAP device is left behind")
	}
	h.do(func() { _, err = New(Config{Port: 7000, TapName: "weave-sleeve", Log: slog.New(slog.DiscardHandler)}) })
	if err == nil || !strings.Contains(err.Error(), "weave-sleeve") {
		t.Errorf("second on the device: %v", err)
	}
	// The port is free again after that.
	h.do(func() { _, err = net.ListenUDP("udp", &net.UDPAddr{Port: 7000}) })
	if err != nil {
		t.Errorf("port of the failed one: %v", err)
	}
}

func TestDevice(t *testing.T) {
	h := newHost(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- h.path.Run(ctx) }()
	var ifi *net.Interface
	var addrs []net.Addr
	var err error
	h.do(func() {
		if ifi, err = net.InterfaceByName("weave-sleeve"); err == nil {
			addrs, err = ifi.Addrs()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if ifi.Flags&net.FlagUp == 0 || ifi.MTU < 65000 || len(addrs) != 0 {
		t.Errorf("device: %v, MTU %d, addresses %v", ifi.Flags, ifi.MTU, addrs)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if h.try("ip link show weave-sleeve") == nil {
		t.Error("the device outlives Run")
	}
	if err := h.path.Probe(2, 1, 1); err == nil {
		t.Error("a probe goes out after Run")
	}
}

// Bound to one IPv4 address, IPv6 neighbours cannot be served, and the others
// can.
func TestBind(t *testing.T) {
	a, b := pair(t, 1500)
	if err := b.path.Close(); err != nil {
		t.Fatal(err)
	}
	b.start(t, addr4(2))
	f := forwarding(2, addr4, 1)
	six := forwarding(2, addr6, 3)
	f.Neighbours = append(f.Neighbours, six.Neighbours...)
	if err := b.path.Apply(f); err == nil || !strings.Contains(err.Error(), "IPv6") {
		t.Errorf("Apply with an IPv6 neighbour: %v", err)
	}
	a.apply(t, forwarding(1, addr4, 2))
	a.serve(t)
	b.serve(t)
	in := b.packetSocket(t)
	p := testPlain(60)
	p.src, p.dst, p.hops = 1, 2, 1
	inject(t, a.packetSocket(t), p)
	arrival(t, in)
}
