// Package uptime reads the clock that leases end by, and tells one boot of this
// machine from another.
package uptime

import (
	"math"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Now is the time since boot, times of sleep included (CLOCK_BOOTTIME,
// clock_gettime(2)). If that cannot be read it is later than anything.
func Now() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return math.MaxInt64
	}
	return time.Duration(t.Nano())
}

// Boot is the id of this boot, random(4); empty when it cannot be read.
func Boot() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
