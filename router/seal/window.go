package seal

const windowWords = 256

// WindowLen is how many counters behind the newest a datagram may be late.
const WindowLen = (windowWords - 1) * 64

// window remembers which counters were seen (RFC 6479: a ring of words, of
// which one is always being filled, so that nothing is ever shifted).
type window struct {
	next uint64 // above the highest seen
	bits [windowWords]uint64
}

// fresh says whether counter was not seen. What is too late to tell counts as
// seen.
func (w *window) fresh(counter uint64) bool {
	if counter >= w.next {
		return true
	}
	return w.next-counter <= WindowLen && w.bits[counter/64%windowWords]>>(counter%64)&1 == 0
}

// note marks a fresh counter as seen.
func (w *window) note(counter uint64) {
	if counter >= w.next {
		begun := (w.next + 63) / 64
		for i := range min(counter/64+1-begun, windowWords) {
			w.bits[(begun+i)%windowWords] = 0
		}
		w.next = counter + 1
	}
	w.bits[counter/64%windowWords] |= 1 << (counter % 64)
}
