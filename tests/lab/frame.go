package lab

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Tap sends and receives raw Ethernet frames on a device.
type Tap struct {
	fd    int
	index int
	mac   net.HardwareAddr
}

const tapBuffer = 16 << 20 // bytes

// Tap opens a device in the network namespace whose file, on the host, is
// netns; "" for the host's own.
func (h *Host) Tap(netns, device string) (*Tap, error) {
	t := &Tap{fd: -1}
	open := func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return fmt.Errorf("device %s: %w", device, err)
		}
		t.index, t.mac = dev.Index, dev.HardwareAddr
		t.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(swap(unix.ETH_P_ALL)))
		if err != nil {
			return fmt.Errorf("packet socket: %w", err)
		}
		// Room for what a busy device sees while a busy machine lets the reader wait.
		if err := unix.SetsockoptInt(t.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, tapBuffer); err != nil {
			return fmt.Errorf("packet socket: buffer: %w", err)
		}
		return unix.Bind(t.fd, &unix.SockaddrLinklayer{Protocol: swap(unix.ETH_P_ALL), Ifindex: t.index})
	}
	var err error
	if netns == "" {
		err = h.Do(open)
	} else {
		err = h.DoIn(netns, open)
	}
	if err != nil {
		if t.fd >= 0 {
			_ = unix.Close(t.fd)
		}
		return nil, err
	}
	return t, nil
}

func swap(v uint16) uint16 { return v<<8 | v>>8 }

// MAC is the address of the device.
func (t *Tap) MAC() net.HardwareAddr { return t.mac }

// Close ends the use of the device.
func (t *Tap) Close() error { return unix.Close(t.fd) }

// Send sends a frame as it is.
func (t *Tap) Send(frame []byte) error {
	return unix.Sendto(t.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: t.index})
}

// ErrNoFrame says that no frame of the wanted kind came in time.
var ErrNoFrame = errors.New("no such frame came")

// Receive returns the first frame that wanted accepts, of those that arrive or
// leave within the time, and ErrNoFrame if there is none.
func (t *Tap) Receive(timeout time.Duration, wanted func(frame []byte) bool) ([]byte, error) {
	end := time.Now().Add(timeout)
	buf := make([]byte, 1<<16)
	for {
		left := time.Until(end)
		if left <= 0 {
			return nil, ErrNoFrame
		}
		fds := []unix.PollFd{{Fd: int32(t.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		if errors.Is(err, unix.EINTR) || (err == nil && n == 0) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("poll: %w", err)
		}
		size, _, err := unix.Recvfrom(t.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			return nil, fmt.Errorf("receive: %w", err)
		}
		if wanted(buf[:size]) {
			return buf[:size], nil
		}
	}
}
