package fastdp

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/bpf"
	"weave.local/router/netdev"
	"weave.local/router/netdev/netdevtest"
)

// examined is two hosts that examine the devices between them; what they say is
// in their logs.
type examined struct {
	line
	logs [2]*strings.Builder
	now  time.Time // as the hosts' exams have it
}

// newExamined makes the hosts. lay lays the cable.
func newExamined(t *testing.T, k kind, lay func(a, b *host)) *examined {
	t.Helper()
	x := &examined{now: time.Now()}
	for i := range x.logs {
		h := newHost(t, peer.ShortID(i+1))
		h.ipv6, h.direct, h.cfg.NoShortcut, h.cfg.directFor = k.ipv6, k.direct, k.bridged, time.Hour
		x.logs[i] = new(strings.Builder)
		h.cfg.Log = slog.New(slog.NewTextHandler(x.logs[i], nil))
		t.Cleanup(h.remove)
		h.start()
		x.line = append(x.line, h)
	}
	lay(x.line[0], x.line[1])
	for i, h := range x.line {
		h.prove(x.line[1-i], 1500)
		other := x.line[1-i].dp
		ended := make(chan error, 1)
		go func() {
			// The answer of a router goes by another way.
			ended <- h.dp.objs.ReadProbes(t.Context(), func(p bpf.Probe) { other.Answered(h.id, p.Token) })
		}()
		t.Cleanup(func() {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	return x
}

// exam lets the hosts examine once, for as long as that takes.
func (x *examined) exam(after time.Duration) {
	const step = examEvery / 2 // of real time, in which an answer arrives
	x.now = x.now.Add(after)
	for range examRounds + int(examWait/examEvery) + 2 {
		for i, h := range x.line {
			h.must(func() error {
				h.dp.MTU(x.line[1-i].id)
				h.dp.stepExams(x.now)
				if h.direct {
					return errors.Join(h.dp.refreshDirect(), h.dp.extendDirect())
				}
				return nil
			})
		}
		x.now = x.now.Add(examEvery)
		<-time.After(step)
	}
}

// Where devices do their part, or leave it to the kernel as any may, nothing
// changes, whatever the way.
func TestExamOfGoodDevices(t *testing.T) {
	const whole, cut = "tx on tso on gso on gro on", "tx off gro off"
	for name, c := range map[string]struct {
		kind
		features []string
	}{
		"shortcut": {kind{}, []string{whole, cut, "tx on tso off gso off gro on"}},
		"direct":   {kind{direct: true}, []string{whole, "tx off gro on"}},
		"bridged":  {kind{bridged: true}, []string{whole}},
		"ipv6":     {kind{ipv6: true}, []string{whole}},
	} {
		t.Run(name, func(t *testing.T) {
			x := newExamined(t, c.kind, func(a, b *host) { join(a, b, 1500) })
			x.apply(nil)
			for _, features := range c.features {
				for i, h := range x.line {
					if _, err := h.output(fmt.Sprintf("ethtool -K to%d %s", 2-i, features)); err != nil {
						t.Fatal(err)
					}
					h.dp.offloads[x.line[1-i].id].known = false
				}
				x.exam(examAgain)
				for i, h := range x.line {
					o := h.dp.offloads[x.line[1-i].id]
					if !o.known || o.fault != "" || h.dp.software || strings.Contains(x.logs[i].String(), "relieved") {
						t.Errorf("%s: host %d: known %t, fault %q, log %s", features, h.id, o.known, o.fault, x.logs[i])
					}
				}
			}
		})
	}
}

// What is lost by chance is not taken for a fault, and a way on which complete
// frames are lost as well tells nothing.
func TestExamVerdict(t *testing.T) {
	const runs = 10000
	rnd := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // chance that can be repeated
	for _, c := range []struct {
		name        string
		loss        float64 // of frames and answers
		sums, super bool    // what devices do right
		most        float64 // of verdicts that are wrong
		told        float64 // of exams that tell something, at least
	}{
		{"good", 0, true, true, 0, 1},
		{"lossy", 0.2, true, true, 0.0002, 1},
		{"very lossy", 0.5, true, true, 0.003, 0.9},
		{"no sums", 0, false, false, 0, 1},
		{"no sums, lossy", 0.2, false, false, 0, 0.7},
		{"no super-frames", 0.05, true, false, 0, 0.9},
		{"dead", 1, true, true, 0, 0},
	} {
		wrong, told := 0, 0
		for range runs {
			x, now := newExam(rnd.Uint64()), time.Unix(0, 0)
			for ; !x.over(now); now = now.Add(examEvery) {
				for kind, p := range x.due(now) {
					for first := range p.n { // as separate packets
						right := kind == complete || c.sums && (kind == withoutSum || c.super)
						if right && rnd.Float64() >= c.loss && !x.answered(bpf.SegmentToken(p.token, first, first+1)) {
							t.Fatal("an answer is not known")
						}
					}
				}
			}
			fault, ok := x.verdict()
			if ok {
				told++
			}
			if ok && (strings.HasPrefix(fault, "checksums") == c.sums || (fault == "") != (c.sums && c.super)) {
				wrong++
			}
		}
		if float64(wrong) > c.most*runs || float64(told) < c.told*runs || c.loss == 1 && told > 0 {
			t.Errorf("%s: of %d exams %d told something, %d of these what is wrong", c.name, runs, told, wrong)
		}
	}
	if x := newExam(1); x.answered(bpf.SegmentToken(1<<40, 0, 1)) {
		t.Error("an answer to another probe is taken")
	}
}

// joinBy lays a cable with a NIC in it.
func joinBy(n *netdevtest.NIC, a, b *host) {
	a.t.Helper()
	w := newSpace(a.t)
	for i, h := range []*host{a, b} {
		other := []*host{b, a}[i]
		h.ip(fmt.Sprintf("link add to%d mtu 1500 type veth peer name end%d netns %s", other.id, i, w.path))
		h.ip(fmt.Sprintf("link set to%d up", other.id))
		h.ip(fmt.Sprintf("addr add %s/32 peer %s dev to%d", h.addr(), other.addr(), other.id))
		w.ip(fmt.Sprintf("link set end%d up", i))
	}
	w.must(func() error {
		stop, err := n.Carry("end0", "end1")
		if err == nil {
			a.t.Cleanup(stop)
		}
		return err
	})
}

// passes says whether bytes get to another container by TCP in a while.
func (c *container) passes(to *container, size int, within time.Duration) bool {
	c.t.Helper()
	var server net.Listener
	at := netip.AddrPortFrom(to.addr(), bulkPort).String()
	to.must(func() (err error) { server, err = net.Listen("tcp4", at); return err })
	defer server.Close() //nolint:errcheck // nothing is lost
	got := make(chan int64, 1)
	go func() {
		conn, err := server.Accept()
		if err != nil {
			got <- 0
			return
		}
		defer conn.Close() //nolint:errcheck // nothing is lost
		_ = conn.SetDeadline(time.Now().Add(within))
		n, _ := io.Copy(io.Discard, conn)
		got <- n
	}()
	_ = c.do(func() error {
		conn, err := net.DialTimeout("tcp4", at, within)
		if err != nil {
			return errors.Join(err, server.Close())
		}
		defer conn.Close() //nolint:errcheck // nothing is lost
		_ = conn.SetDeadline(time.Now().Add(within))
		_, err = conn.Write(make([]byte, size))
		return err
	})
	return <-got == int64(size)
}

// Devices that do not do what is left to them stall TCP, until an exam finds it
// out; with others all is as before.
func TestExamOfBadDevices(t *testing.T) {
	t.Run("checksums", func(t *testing.T) {
		n := &netdevtest.NIC{Port: testPort}
		testBadDevices(t, kind{}, n, "checksums", func() { n.NoSums.Store(true); n.NoSuper.Store(true) })
	})
	t.Run("super-frames", func(t *testing.T) {
		n := &netdevtest.NIC{Port: testPort}
		testBadDevices(t, kind{direct: true}, n, "super-frames", func() { n.NoSuper.Store(true) })
	})
}

func testBadDevices(t *testing.T, k kind, n *netdevtest.NIC, what string, spoil func()) {
	const size = 1 << 20
	x := newExamined(t, k, func(a, b *host) { joinBy(n, a, b) })
	a, b := x.line[0], x.line[1]
	a1, b1 := a.container("10.32.0.1/24"), b.container("10.32.0.2/24")
	b1.echo()
	x.apply(nil)
	x.exam(0)
	if !a1.passes(b1, size, 20*time.Second) || a.dp.software || x.logs[0].Len() > 0 && strings.Contains(x.logs[0].String(), "relieved") {
		t.Fatalf("with good devices: %s", x.logs[0])
	}
	spoil()
	if !a1.reaches(b1.addr(), 100) && what != "checksums" {
		t.Error("complete frames do not pass")
	}
	if a1.passes(b1, size, 2*time.Second) {
		t.Fatal("nothing is wrong without checksums or super-frames")
	}
	x.exam(examAgain)
	if !a1.passes(b1, size, 20*time.Second) {
		t.Errorf("after the exam nothing passes: %s", x.logs[0])
	}
	if a.grows("direct_tx", func() { a1.reaches(b1.addr(), 100) }) {
		t.Error("frames take the direct way past the kernel")
	}
	if remark := a.dp.Remark(b.id); !strings.HasPrefix(remark, what) || !strings.Contains(remark, "to2") {
		t.Errorf("remark %q", remark)
	}
	x.exam(examAgain)
	if n := strings.Count(x.logs[0].String(), "relieved"); n != 1 {
		t.Errorf("said %d times: %s", n, x.logs[0])
	}
	if whole := a.txOffload(); whole {
		t.Error("after another exam devices are trusted again")
	}
	n.NoSums.Store(false)
	n.NoSuper.Store(false)
	x.exam(examAgain)
	if a.dp.Remark(b.id) != "" || !a.txOffload() || a.grows("direct_tx", func() { a1.reaches(b1.addr(), 100) }) != k.direct {
		t.Errorf("good devices are not used: %s", x.logs[0])
	}
	if !a1.passes(b1, size, 20*time.Second) {
		t.Error("nothing passes in the end")
	}
}

func (h *host) txOffload() (on bool) {
	h.t.Helper()
	h.must(func() (err error) {
		on, err = netdev.TxOffload(vxlanName(testPort))
		return err
	})
	return on
}
