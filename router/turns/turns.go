// Package turns reads from several descriptors in turn, so that one that always
// has something keeps none of the others waiting for long.
package turns

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Max is the most descriptors of a Set.
const Max = 64

// Outcome is what became of an attempt to read.
type Outcome int

// The outcomes: nothing was there (EAGAIN), something was and the descriptor's
// turn goes on, or it ends.
const (
	Nothing Outcome = iota
	More
	Over
)

// Set is descriptors that are read in turn. It is for one goroutine, but for
// Hold and Close.
type Set struct {
	file  *os.File // epoll(7), which tells of all descriptors
	conn  syscall.RawConn
	fds   []int
	read  func(fd int) Outcome
	try   func(epoll uintptr) bool
	wait  bool
	found bool

	ready  uint64 // descriptors that may have something, by index
	at     int    // whose turn it is
	stale  bool   // since a turn ended, others may have got something
	events [Max]unix.EpollEvent
}

// New makes a set of 1 to Max descriptors that do not block, and are open for as
// long as the set is. read reads from one of them.
func New(fds []int, read func(fd int) Outcome) (*Set, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	for i, fd := range fds {
		e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
		if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &e); err != nil {
			return nil, errors.Join(os.NewSyscallError("epoll_ctl", err), unix.Close(epoll))
		}
	}
	// Only what does not block is polled by the runtime.
	if err := unix.SetNonblock(epoll, true); err != nil {
		return nil, errors.Join(os.NewSyscallError("fcntl", err), unix.Close(epoll))
	}
	s := &Set{file: os.NewFile(uintptr(epoll), "epoll"), fds: fds, read: read}
	s.try = s.attempt
	if s.conn, err = s.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, s.file.Close())
	}
	return s, nil
}

// Read calls read until it found something, and says whether it did. When
// nothing is there it waits or, without wait, returns; what others than those
// seen at the last wait have got since need not be seen then. The error, of a set
// that was closed, is os.ErrClosed.
func (s *Set) Read(wait bool) (bool, error) {
	s.wait = wait
	if err := s.conn.Read(s.try); err != nil {
		return false, fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	return s.found, nil
}

func (s *Set) attempt(epoll uintptr) bool {
	s.found = false
	if s.wait && s.ready == 0 {
		s.ready = 1 << s.at // most likely who had something last
	}
	for {
		if s.stale || s.ready == 0 && s.wait {
			s.look(int(epoll))
		}
		first := s.at
		if s.stale {
			first, s.stale = (s.at+1)%Max, false
		}
		if s.ready == 0 {
			return !s.wait
		}
		s.at = next(s.ready, first)
		switch s.read(s.fds[s.at]) {
		case Nothing:
			s.ready &^= 1 << s.at
			continue
		case Over:
			s.stale = true
		case More:
		}
		s.found = true
		return true
	}
}

// look finds all that have something now.
func (s *Set) look(epoll int) {
	s.ready = 0
	n, err := unix.EpollWait(epoll, s.events[:len(s.fds)], 0)
	for i := 0; err == nil && i < n; i++ {
		s.ready |= 1 << s.events[i].Fd
	}
}

// next is the index of the first bit of ready, which is not 0, from at on, going
// around.
func next(ready uint64, at int) int {
	return (at + bits.TrailingZeros64(bits.RotateLeft64(ready, -at))) % Max
}

// Hold calls f, while which the descriptors do not close; os.ErrClosed when they
// have. Any goroutine may call it.
func (s *Set) Hold(f func(epoll uintptr)) error {
	if err := s.conn.Control(f); err != nil {
		return fmt.Errorf("%w: %w", os.ErrClosed, err)
	}
	return nil
}

// Close ends all reading. When it returns nobody uses the descriptors any more:
// the caller may close them. A second Close is refused with os.ErrClosed.
func (s *Set) Close() error { return s.file.Close() }
