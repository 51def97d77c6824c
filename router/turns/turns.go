// Package turns reads from several descriptors in turn, so that one that always
// has something keeps none of the others waiting for long.
package turns

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Max is the most descriptors of a Set.
const Max = 64

// few is how often something may be found, without nothing being there in between,
// by calls that the runtime is not told of: see Syscall.
const few = 3

// Small is the most bytes of a frame or message that is written in no time.
const Small = 2 << 10

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
	read  func(fd int, brief bool) Outcome
	try   func(epoll uintptr) bool
	wait  bool
	found int // how often something was there since nothing was

	ready  uint64 // descriptors that may have something, by index
	at     int    // whose turn it is
	stale  bool   // since a turn ended, others may have got something
	events [Max]unix.EpollEvent
}

// New makes a set of 1 to Max descriptors that do not block, and are open for as
// long as the set is. read reads from one of them by Syscall, which says what brief is.
func New(fds []int, read func(fd int, brief bool) Outcome) (*Set, error) {
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
	return s.found > 0, nil
}

func (s *Set) attempt(epoll uintptr) bool {
	if s.wait && s.ready == 0 {
		s.ready = 1 << s.at // most likely who had something last
	}
	for {
		if s.stale || s.ready == 0 && s.wait {
			s.look(epoll)
		}
		first := s.at
		if s.stale {
			first, s.stale = (s.at+1)%Max, false
		}
		if s.ready == 0 {
			s.found = 0
			return !s.wait
		}
		s.at = next(s.ready, first)
		switch s.read(s.fds[s.at], s.found < few) {
		case Nothing:
			s.ready &^= 1 << s.at
			continue
		case Over:
			s.stale = true
		case More:
		}
		s.found++
		return true
	}
}

// look finds all that have something now.
func (s *Set) look(epoll uintptr) {
	s.ready = 0
	n, errno := Syscall(s.found < few, unix.SYS_EPOLL_PWAIT, epoll, uintptr(unsafe.Pointer(&s.events[0])), uintptr(len(s.fds)), 0)
	for i := 0; errno == 0 && i < int(n); i++ {
		s.ready |= 1 << s.events[i].Fd
	}
}

// next is the index of the first bit of ready, which is not 0, from at on, going
// around.
func next(ready uint64, at int) int {
	return (at + bits.TrailingZeros64(bits.RotateLeft64(ready, -at))) % Max
}

// Syscall makes a system call that does not block. One that is brief as well is not
// told to the Go runtime: of a process that slept, it takes the first call it is told
// of for a reason to wake a thread of its own that watches over calls, which costs a
// small frame more than the call itself. Whoever has much to do must tell of some
// calls: that thread also sees to it that other goroutines get their turn.
//
//go:uintptrescapes
func Syscall(brief bool, trap, a1, a2, a3, a4 uintptr) (uintptr, unix.Errno) {
	if brief {
		r, _, errno := unix.RawSyscall6(trap, a1, a2, a3, a4, 0, 0)
		return r, errno
	}
	r, _, errno := unix.Syscall6(trap, a1, a2, a3, a4, 0, 0)
	return r, errno
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
