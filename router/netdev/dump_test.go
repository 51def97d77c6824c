package netdev

import (
	"errors"
	"testing"

	"github.com/vishvananda/netlink"
)

// TestInterruptedLists: a list that changed under way is asked for again, but
// not for ever, and other errors stand.
func TestInterruptedLists(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		interrupted int // the first so many lists
		then        error
		want        error
		calls       int
	}{
		{0, nil, nil, 1}, {3, nil, nil, 4}, {0, broken, broken, 1}, {2, broken, broken, 3},
		{dumpTries, nil, netlink.ErrDumpInterrupted, dumpTries},
	} {
		calls := 0
		got, err := whole(func() ([]int, error) {
			if calls++; calls <= c.interrupted {
				return nil, netlink.ErrDumpInterrupted
			}
			return []int{7}, c.then
		})
		if !errors.Is(err, c.want) || calls != c.calls || err == nil && len(got) != 1 {
			t.Errorf("%+v: %v, %v after %d calls", c, got, err, calls)
		}
	}
}
