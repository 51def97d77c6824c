package link

import "sync"

const (
	queueFrames = 1024
	queueBytes  = 2 << 20
)

// queue holds the frames that wait to be written to one link. Urgent frames,
// which keep the mesh itself together, go first. It is bounded: what does not
// fit is dropped. Urgent frames have room of their own, of the same size.
type queue struct {
	mu       sync.Mutex
	ready    sync.Cond // some lane has frames, or ended
	urgent   lane
	ordinary lane
	last     []byte
	ended    bool
}

type lane struct {
	frames [][]byte
	bytes  int
}

func newQueue() *queue {
	q := &queue{}
	q.ready.L = &q.mu
	return q
}

// push adds a frame, or returns false when there is no room for it.
func (q *queue) push(f []byte, urgent bool) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := &q.ordinary
	if urgent {
		l = &q.urgent
	}
	if q.ended || len(l.frames) >= queueFrames || len(l.frames) > 0 && l.bytes+len(f) > queueBytes {
		return false
	}
	l.frames = append(l.frames, f)
	l.bytes += len(f)
	q.ready.Signal()
	return true
}

// pop returns the next frame, waiting for one; false after the last.
func (q *queue) pop() ([]byte, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		switch {
		case q.ended:
			f := q.last
			q.last = nil
			return f, f != nil
		case len(q.urgent.frames) > 0:
			return q.urgent.take(), true
		case len(q.ordinary.frames) > 0:
			return q.ordinary.take(), true
		}
		q.ready.Wait()
	}
}

func (l *lane) take() []byte {
	f := l.frames[0]
	l.frames[0] = nil
	l.frames = l.frames[1:]
	l.bytes -= len(f)
	return f
}

// end drops all frames; pop returns last and then no more.
func (q *queue) end(last []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.urgent, q.ordinary = lane{}, lane{}
	q.ended, q.last = true, last
	q.ready.Broadcast()
}
