package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// agentWord, as the first argument, makes this program an agent: an end of a
// measurement, started by the bench in the namespace it is for.
//
//	agent sink             counts datagrams until its standard input closes
//	agent echo             answers datagrams until then
//	agent blast ADDR SECS  sends datagrams to a sink as fast as it can
//	agent ping ADDR SECS   sends one datagram to an echo and waits for the answer, again and again
//	agent crowd N M        fills tables of fastdp with N endpoints on M peers and empties them, see crowdAgent
//
// sink and echo print "ready" first; all but echo end by printing a tally.
const agentWord = "agent"

const (
	agentPort = 5202
	// datagramLen is the payload of a datagram in bytes.
	datagramLen = 64
	// receiveBuffer in bytes: a burst while the receiver does not run is not lost.
	receiveBuffer = 8 << 20
	// answerTimeout is after how long an answer counts as lost.
	answerTimeout = 200 * time.Millisecond
	// drainTimeout is how long a receiver stays after the end for what is
	// still on its way.
	drainTimeout = 50 * time.Millisecond
	// maxAgentSeconds bounds the life of a sender.
	maxAgentSeconds = 3600
)

// tally is what an agent counted.
type tally struct {
	Packets int64   `json:"packets"`          // received by sink, sent by blast, answered for ping
	Lost    int64   `json:"lost,omitempty"`   // ping
	Seconds float64 `json:"seconds"`          // blast and ping
	P50     float64 `json:"p50_us,omitempty"` // ping, round trip in microseconds
	P99     float64 `json:"p99_us,omitempty"`
}

func agent(args []string) error {
	runtime.LockOSThread()
	if len(args) == 1 && (args[0] == "sink" || args[0] == "echo") {
		return receive(netip.AddrPortFrom(netip.Addr{}, agentPort), args[0] == "echo", os.Stdin, os.Stdout)
	}
	if len(args) == 3 && args[0] == "crowd" {
		endpoints, err1 := strconv.Atoi(args[1])
		peers, err2 := strconv.Atoi(args[2])
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		return crowdAgent(crowd{endpoints, peers}, os.Stdin, os.Stdout)
	}
	if len(args) != 3 || (args[0] != "blast" && args[0] != "ping") {
		return fmt.Errorf("agent %q: not made for typing", args)
	}
	to, err := netip.ParseAddr(args[1])
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	seconds, err := strconv.ParseFloat(args[2], 64)
	if err != nil || seconds <= 0 || seconds > maxAgentSeconds {
		return fmt.Errorf("agent: %q seconds", args[2])
	}
	send := blast
	if args[0] == "ping" {
		send = pingPong
	}
	t, err := send(netip.AddrPortFrom(to, agentPort), time.Duration(seconds*float64(time.Second)))
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(t)
}

// blocking returns the socket of conn for plain system calls, outside of Go's
// poller, which would cost time that is not the network's.
func blocking(conn *net.UDPConn, timeout time.Duration) (*os.File, int, error) {
	f, err := conn.File()
	if err != nil {
		return nil, 0, fmt.Errorf("socket: %w", err)
	}
	fd := int(f.Fd())
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	err = errors.Join(
		unix.SetNonblock(fd, false),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer),
	)
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("socket: %w", err), f.Close())
	}
	return f, fd, nil
}

func receive(at netip.AddrPort, answer bool, stop io.Reader, out io.Writer) error {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	f, fd, err := blocking(conn, drainTimeout)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var over atomic.Bool
	go func() {
		_, _ = io.Copy(io.Discard, stop)
		over.Store(true)
	}()
	fmt.Fprintln(out, "ready")
	var t tally
	buf := make([]byte, 2048)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if over.Load() {
				return json.NewEncoder(out).Encode(t)
			}
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("receive: %w", err)
		}
		t.Packets++
		if answer {
			// What cannot be sent is lost, and the other end counts it.
			_ = unix.Sendto(fd, buf[:n], 0, from)
		}
	}
}

func dial(to netip.AddrPort) (*net.UDPConn, *os.File, int, error) {
	conn, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return nil, nil, 0, err
	}
	f, fd, err := blocking(conn, answerTimeout)
	if err != nil {
		return nil, nil, 0, errors.Join(err, conn.Close())
	}
	return conn, f, fd, nil
}

func blast(to netip.AddrPort, d time.Duration) (tally, error) {
	conn, f, fd, err := dial(to)
	if err != nil {
		return tally{}, err
	}
	defer func() { _, _ = conn.Close(), f.Close() }()
	var t tally
	buf := make([]byte, datagramLen)
	start := time.Now()
	for t.Packets%64 != 0 || time.Since(start) < d {
		_, err := unix.Write(fd, buf)
		switch {
		case err == nil:
			t.Packets++
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNREFUSED):
			if time.Since(start) > d {
				t.Seconds = time.Since(start).Seconds()
				return t, nil
			}
		default:
			return t, fmt.Errorf("send: %w", err)
		}
	}
	t.Seconds = time.Since(start).Seconds()
	return t, nil
}

func pingPong(to netip.AddrPort, d time.Duration) (tally, error) {
	conn, f, fd, err := dial(to)
	if err != nil {
		return tally{}, err
	}
	defer func() { _, _ = conn.Close(), f.Close() }()
	var t tally
	trips := make([]time.Duration, 0, 1<<20)
	out, in := make([]byte, datagramLen), make([]byte, 2048)
	begin := time.Now()
	for seq := uint64(1); time.Since(begin) < d; seq++ {
		binary.BigEndian.PutUint64(out, seq)
		sent := time.Now()
		if _, err := unix.Write(fd, out); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
			return t, fmt.Errorf("send: %w", err)
		}
		if err := answerTo(fd, in, seq); err != nil {
			t.Lost++
			continue
		}
		trips = append(trips, time.Since(sent))
	}
	t.Seconds = time.Since(begin).Seconds()
	t.Packets = int64(len(trips))
	slices.Sort(trips)
	t.P50, t.P99 = quantile(trips, 0.50), quantile(trips, 0.99)
	return t, nil
}

// answerTo waits for the answer with number seq; those that come late for an
// earlier one are passed over.
func answerTo(fd int, buf []byte, seq uint64) error {
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == datagramLen && binary.BigEndian.Uint64(buf) == seq:
			return nil
		}
	}
}

// quantile of sorted times, in microseconds; 0 of none.
func quantile(sorted []time.Duration, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	i := int(q * float64(len(sorted)))
	return float64(sorted[min(i, len(sorted)-1)]) / float64(time.Microsecond)
}
