package turns

import (
	"errors"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// pipes are n pipes that do not block: ends to read, and ends to write.
func pipes(t *testing.T, n int) (r, w []int) {
	t.Helper()
	for range n {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		r, w = append(r, p[0]), append(w, p[1])
		t.Cleanup(func() { _, _ = unix.Close(p[0]), unix.Close(p[1]) })
	}
	return r, w
}

func put(t *testing.T, fd int, b []byte) {
	t.Helper()
	if _, err := unix.Write(fd, b); err != nil {
		t.Fatal(err)
	}
}

// TestTurns: two bytes are a turn, and each that has something gets one.
func TestTurns(t *testing.T) {
	r, w := pipes(t, 4)
	order, one := make([]int, 0, 1000), make([]byte, 1)
	left := 2
	s, err := New(r, func(fd int, _ bool) Outcome {
		if n, _ := unix.Read(fd, one); n < 1 {
			left = 2
			return Nothing
		}
		order = append(order, slices.Index(r, fd))
		if left--; left > 0 {
			return More
		}
		left = 2
		return Over
	})
	if err != nil {
		t.Fatal(err)
	}
	read := func(n int) {
		t.Helper()
		for range n {
			if found, err := s.Read(true); !found || err != nil {
				t.Fatalf("found %v, error %v", found, err)
			}
		}
	}
	put(t, w[1], make([]byte, 5))
	put(t, w[3], make([]byte, 3))
	read(3)
	put(t, w[0], one) // comes while others wait
	read(6)
	if want := []int{1, 1, 3, 3, 0, 1, 1, 3, 1}; !slices.Equal(order, want) {
		t.Errorf("read in order %v, want %v", order, want)
	}
	if found, err := s.Read(false); found || err != nil {
		t.Errorf("with nothing there: found %v, error %v", found, err)
	}
	if allocs := testing.AllocsPerRun(100, func() { put(t, w[2], one); read(1) }); allocs > 0 {
		t.Errorf("%g allocations", allocs)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestClose ends a Read that waits, and all others.
func TestClose(t *testing.T) {
	r, _ := pipes(t, 2)
	tried := make(chan struct{}, 2)
	s, err := New(r, func(int, bool) Outcome { tried <- struct{}{}; return Nothing })
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := s.Read(true)
		ended <- err
	}()
	<-tried // who had something last
	held := false
	if err := s.Hold(func(uintptr) { held = true }); !held || err != nil {
		t.Errorf("held %v, error %v", held, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read ended with %v", err)
	}
	if err := s.Hold(func(uintptr) { t.Error("called after Close") }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Hold: %v", err)
	}
	if len(tried) != 0 {
		t.Error("read from what has nothing")
	}
}

// TestBrief: the runtime is told of calls once a few have found something in a row.
func TestBrief(t *testing.T) {
	r, w := pipes(t, 1)
	var found []bool // whether it was brief, of each read that found something
	s, err := New(r, func(fd int, brief bool) Outcome {
		if n, _ := unix.Read(fd, make([]byte, 1)); n < 1 {
			return Nothing
		}
		found = append(found, brief)
		return Over
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	for range 2 {
		put(t, w[0], make([]byte, few+2))
		found = nil
		for wait, more := true, true; more; wait = false {
			if more, err = s.Read(wait); err != nil {
				t.Fatal(err)
			}
		}
		want := []bool{true, true, true, false, false}
		if !slices.Equal(found, want) {
			t.Errorf("brief %v, want %v", found, want)
		}
	}
}
