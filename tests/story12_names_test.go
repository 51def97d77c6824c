package tests

import (
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"weave.local/tests/lab"
)

// TestNames: peers are named, and what a name server says of them comes late,
// changes or does not come at all.
func TestNames(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3"}})
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	names := serveNames(t, u1)
	alone := []string{"--docker-api", "", "--no-discovery"}

	step(t, "none resolves", func(t *testing.T) {
		before := state(t, u1)
		refused(t, u1, 1, []string{`"one.test"`, `"two.test"`, "does not resolve", "give a host name that does, or an IP address"},
			"weave", "launch", "one.test", "two.test:6783")
		asBefore(t, u1, before)
	})
	launch(t, u2, alone...)
	launch(t, u3, alone...)
	names.set("moves.test", u2.Addr)
	names.set("silent.test", netip.Addr{})
	step(t, "one resolves", func(t *testing.T) {
		if _, took := launch(t, u1, append(alone, "silent.test", "late.test", "moves.test")...); took > silentBar {
			t.Errorf("a name server that says nothing held up the start for %v", took)
		}
		linkedTo(t, u1, u2.Addr.String())
		refusedBy(t, u1, `peer "late.test" does not resolve (no such host)`)
	})
	step(t, "one resolves later", func(t *testing.T) {
		begin := time.Now()
		names.set("late.test", u3.Addr)
		linkedTo(t, u1, u3.Addr.String())
		t.Logf("linked %v after its name is known", time.Since(begin).Round(time.Millisecond))
	})
	step(t, "a name leads elsewhere", func(t *testing.T) {
		const elsewhere = "192.0.2.102"
		begin := time.Now()
		names.set("moves.test", netip.MustParseAddr(elsewhere))
		renumber(t, u2, u2.Addr.String(), elsewhere)
		linkedTo(t, u1, elsewhere)
		t.Logf("linked to the new address after %v", time.Since(begin).Round(time.Millisecond))
		refusedBy(t, u1, `peer "silent.test" does not resolve`)
	})
}

// silentBar is how long a start may take while a name server is silent: less
// than a resolver waits for it.
const silentBar = 4 * time.Second

// nameServer answers for names under test.
type nameServer struct {
	mu    sync.Mutex
	addrs map[string]netip.Addr // invalid: no answer at all
}

// serveNames runs the name server that a host asks, until the test ends. It
// knows no names yet.
func serveNames(t *testing.T, h *lab.Host) *nameServer {
	t.Helper()
	s := &nameServer{addrs: make(map[string]netip.Addr)}
	var conn *net.UDPConn
	err := h.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.Addr, 53)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	wait.Go(func() { s.serve(conn) })
	t.Cleanup(func() { _ = conn.Close(); wait.Wait() })
	return s
}

func (s *nameServer) set(name string, addr netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addrs[name+"."] = addr
}

func (s *nameServer) serve(conn net.PacketConn) {
	buf := make([]byte, 512)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 || !s.answer(&m) {
			continue
		}
		if b, err := m.Pack(); err == nil {
			_, _ = conn.WriteTo(b, from)
		}
	}
}

// answer makes a question its answer; false is none.
func (s *nameServer) answer(m *dnsmessage.Message) bool {
	q := m.Questions[0]
	s.mu.Lock()
	defer s.mu.Unlock()
	addr, known := s.addrs[q.Name.String()]
	m.Response, m.Authoritative, m.Additionals = true, true, nil
	switch {
	case !known:
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA && addr.IsValid():
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
			Body:   &dnsmessage.AResource{A: addr.As4()},
		}}
	}
	return !known || addr.IsValid()
}
