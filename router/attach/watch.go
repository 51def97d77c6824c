package attach

import (
	"context"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/router/netdev"
)

// retry is how long to wait before something that went wrong is tried again.
const retry = time.Second

// release is when the addresses of an owner are freed.
type release struct {
	at    time.Time
	force bool // also when it seems to be attached
}

// Run notices containers that go away and frees their addresses in due time,
// until ctx ends. Attachments stay.
func (m *Manager) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.watch(ctx) })
	g.Go(func() error { return m.expire(ctx) })
	g.Go(func() error { return m.takeLost(ctx) })
	return g.Wait()
}

func (m *Manager) watch(ctx context.Context) error {
	for {
		err := netdev.WatchRemovals(ctx, m.sweep, m.removed)
		if ctx.Err() != nil {
			return nil
		}
		m.cfg.Log.Warn("watch of devices broke, begins anew", "err", err)
		if !pause(ctx, retry) {
			return nil
		}
	}
}

// pause waits and says whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// sweep finds the devices that went while nobody watched.
func (m *Manager) sweep() {
	devices, err := netdev.Devices()
	if err != nil {
		m.cfg.Log.Warn("devices not checked", "err", err)
		return
	}
	there := make(map[int]bool, len(devices))
	for _, d := range devices {
		there[d.Index] = true
	}
	m.mu.Lock()
	var gone []int
	for _, r := range m.records {
		if r.ifIndex != 0 && !there[r.ifIndex] {
			gone = append(gone, r.ifIndex)
		}
	}
	m.mu.Unlock()
	for _, index := range gone {
		m.removed(index)
	}
}

// removed deals with a device that went away by itself: its container died.
func (m *Manager) removed(index int) {
	m.mu.Lock()
	var r *record
	for _, x := range m.records {
		if x.ifIndex == index {
			r = x
		}
	}
	if r == nil {
		m.mu.Unlock()
		return
	}
	r.ifIndex = 0
	id := r.ID
	if r.Kind == KindContainer && !m.running[id] {
		m.releaseLocked(id, release{at: time.Now().Add(m.cfg.Grace)})
	}
	m.mu.Unlock()
	m.cfg.Log.Info("interface went away", "id", id)
	if err := m.cfg.RemovePort(index); err != nil {
		m.cfg.Log.Warn("port not removed", "id", id, "err", err)
	}
}

// ContainerStarted says that a container runs (again): its addresses are kept
// until it dies.
func (m *Manager) ContainerStarted(id string) {
	if !m.holds(id) {
		return
	}
	m.mu.Lock()
	m.running[id] = true
	delete(m.releases, id)
	m.mu.Unlock()
}

// ContainerDied says that a container has ended. Its addresses are freed after
// a while unless it is back by then.
func (m *Manager) ContainerDied(id string) { m.ended(id, m.cfg.Grace, false) }

// ContainerDestroyed says that a container was removed and will not be back:
// what it has is freed at once.
func (m *Manager) ContainerDestroyed(id string) { m.ended(id, 0, true) }

func (m *Manager) ended(id string, after time.Duration, force bool) {
	held := m.holds(id)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.running, id)
	if held {
		m.releaseLocked(id, release{at: time.Now().Add(after), force: force})
	}
}

// holds says whether an id is attached by us or owns addresses.
func (m *Manager) holds(id string) bool {
	if r := m.get(id); r != nil {
		return r.Kind == KindContainer
	}
	return id != HostID && m.cfg.Alloc != nil && len(m.cfg.Alloc.Lookup(id, netip.Prefix{})) > 0
}

func (m *Manager) releaseLocked(id string, r release) {
	m.releases[id] = r
	select {
	case m.waked <- struct{}{}:
	default:
	}
}

func (m *Manager) cancelRelease(id string) {
	m.mu.Lock()
	delete(m.releases, id)
	m.mu.Unlock()
}

// expire frees the addresses of the dead when their time has come.
func (m *Manager) expire(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.waked:
		case <-timer.C:
		}
		now := time.Now()
		due, next := m.due(now)
		for id, r := range due {
			m.let(id, r, now)
		}
		if len(due) > 0 {
			_, next = m.due(now)
		}
		if !next.IsZero() {
			timer.Reset(next.Sub(now))
		}
	}
}

// due returns the releases whose time has come, and the time of the next one.
func (m *Manager) due(now time.Time) (due map[string]release, next time.Time) {
	due = make(map[string]release)
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, r := range m.releases {
		if !r.at.After(now) {
			due[id] = r
		} else if next.IsZero() || r.at.Before(next) {
			next = r.at
		}
	}
	return due, next
}

// let frees what an id holds, unless it is attached again.
func (m *Manager) let(id string, r release, now time.Time) {
	later := release{at: now.Add(retry), force: r.force}
	unlock, _ := m.keys.try(id)
	if unlock == nil { // something is being done with it
		m.postpone(id, r, later)
		return
	}
	defer unlock()
	m.mu.Lock()
	current, wanted := m.releases[id]
	if wanted && current == r {
		delete(m.releases, id)
	} else {
		wanted = false
	}
	m.mu.Unlock()
	rec := m.get(id)
	if !wanted || (rec != nil && rec.ifIndex != 0 && !r.force) {
		return
	}
	if err := m.drop(id, rec); err != nil {
		m.cfg.Log.Warn("addresses not freed, will be tried again", "id", id, "err", err)
		m.mu.Lock()
		m.releases[id] = later
		m.mu.Unlock()
		return
	}
	m.cfg.Log.Info("addresses freed", "id", id)
}

func (m *Manager) postpone(id string, from, to release) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.releases[id] == from {
		m.releases[id] = to
	}
}

// drop removes whatever there is of an id.
func (m *Manager) drop(id string, rec *record) error {
	if rec != nil {
		if err := m.unplug(rec); err != nil {
			return err
		}
	}
	if err := m.freeAll(id); err != nil {
		return err
	}
	if rec != nil {
		return m.forget(rec)
	}
	return nil
}
