package attach

import (
	"context"
	"errors"
	"log/slog"
	"sync"
)

// keys lets one operation at a time work on each id.
type keys struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed when the id is free again
}

func newKeys() *keys { return &keys{held: make(map[string]chan struct{})} }

// lock waits until the id is free and returns the function that frees it again.
func (k *keys) lock(ctx context.Context, id string) (func(), error) {
	for {
		unlock, busy := k.try(id)
		if unlock != nil {
			return unlock, nil
		}
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// try returns nil and the channel to wait on when the id is not free.
func (k *keys) try(id string) (unlock func(), busy <-chan struct{}) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if ch, held := k.held[id]; held {
		return nil, ch
	}
	ch := make(chan struct{})
	k.held[id] = ch
	return func() {
		k.mu.Lock()
		delete(k.held, id)
		k.mu.Unlock()
		close(ch)
	}, nil
}

// undo collects how to take back what was done so far.
type undo []func() error

func (u *undo) add(f func() error) { *u = append(*u, f) }

// run takes everything back, last things first.
func (u *undo) run(log *slog.Logger) {
	var errs []error
	for i := len(*u) - 1; i >= 0; i-- {
		errs = append(errs, (*u)[i]())
	}
	if err := errors.Join(errs...); err != nil {
		log.Warn("not everything could be undone", "err", err)
	}
}
