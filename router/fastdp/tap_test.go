package fastdp

import (
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// openTAP makes the sleeve's device, without the virtio header of the real one.
func (h *host) openTAP() *os.File {
	h.t.Helper()
	fd := -1
	h.must(func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		ifr, err := unix.NewIfreq(h.cfg.TapName)
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			return err
		}
		return netdev.SetUp(h.cfg.TapName)
	})
	f := os.NewFile(uintptr(fd), h.cfg.TapName)
	h.t.Cleanup(func() { _ = f.Close() })
	return f
}

// splice does what two sleeves with nobody else would do: every frame that
// leaves by one TAP comes in by the other, a flooded one addressed to its
// receiver. It ends when the files are closed.
func splice(t *testing.T, a, b *host, tapA, tapB *os.File) {
	var wg sync.WaitGroup
	for _, way := range []struct {
		from, to *os.File
		receiver *host
	}{{tapA, tapB, b}, {tapB, tapA, a}} {
		wg.Go(func() {
			frame := make([]byte, 65536)
			for {
				n, err := way.from.Read(frame)
				if err != nil {
					return
				}
				if n < 20 || frame[12] != 0x88 || frame[13] != 0xa8 || frame[16] != 0x81 {
					continue // the device's own business
				}
				if frame[18]&0x80 != 0 {
					if frame[18]&0x0f != 0 || frame[19] != 0 {
						t.Errorf("a flooded frame with destination: tags %x", frame[12:20])
					}
					frame[18] |= byte(way.receiver.id >> 8)
					frame[19] = byte(way.receiver.id)
				}
				if _, err := way.to.Write(frame[:n]); err != nil {
					return
				}
			}
		})
	}
	t.Cleanup(func() { _, _ = tapA.Close(), tapB.Close(); wg.Wait() })
}

/*
	a1 ─ A ≈≈ B ══ C ─ c1

A and B reach each other by user space only; B relays between the two paths,
both ways, and floods from one into the other.
*/
func TestSleeveAndRelay(t *testing.T) { eachWay(t, testSleeveAndRelay) }

func testSleeveAndRelay(t *testing.T, k kind) {
	l := newLineOf(t, k, 1500, 1500)
	a, b := l[0], l[1]
	a1, b1, c1 := a.container("10.32.0.1/24"), b.container("10.32.0.2/24"), l[2].container("10.32.0.3/24")
	a1.echo()
	c1.echo()
	tapA, tapB := a.openTAP(), b.openTAP()
	splice(t, a, b, tapA, tapB)
	path := func(x, y int) string {
		if x+y == 1 {
			return overlay.Sleeve
		}
		return overlay.FastDP
	}
	l.apply(path)
	for _, x := range []struct{ from, to *container }{{a1, c1}, {c1, a1}, {b1, a1}, {b1, c1}} {
		for _, size := range []int{10, 1400, 9000} {
			if !x.from.reaches(x.to.addr(), size) {
				t.Errorf("%s does not reach %s with %d bytes", x.from.addr(), x.to.addr(), size)
			}
		}
	}
	if b.counter("relayed") == 0 || b.counter("to_sleeve") == 0 || b.counter("from_sleeve") == 0 || a.counter("from_sleeve") == 0 {
		t.Error("the frames went another way")
	}

	// The daemon of A dies, its TAP with it; the next one has a new TAP.
	_, _ = tapA.Close(), tapB.Close()
	wait(t, "the TAP to go", func() bool {
		_, err := a.output("ip link show " + a.cfg.TapName)
		return err != nil
	})
	l.apply(path)
	if !a1.silent(c1.addr()) {
		t.Error("a1 reaches c1 without the user-space path")
	}
	splice(t, a, b, a.openTAP(), b.openTAP())
	l.apply(path)
	if !a1.reaches(c1.addr(), 1400) {
		t.Error("a1 does not reach c1 by the new TAP")
	}
}
