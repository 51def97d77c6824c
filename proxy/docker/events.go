package docker

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

// Action is what happened to a container.
type Action string

// The actions a Watcher reports.
const (
	ActionCreate  Action = "create"
	ActionStart   Action = "start"
	ActionDie     Action = "die"
	ActionDestroy Action = "destroy"
)

// Event is a change in the life of a container.
type Event struct {
	Action Action
	ID     string // full id of the container
	Name   string
	// Attributes holds the container's labels, among other things.
	Attributes map[string]string
	Time       time.Time
}

// Waits between attempts to reach the engine, and the bound on one line of the
// event stream.
const (
	minBackoff = 500 * time.Millisecond
	maxBackoff = 10 * time.Second
	maxLine    = 1 << 20
	callLimit  = 20 * time.Second
)

// Watcher follows the lives of containers. Each time it (re)connects to the
// engine it first tells its listeners of all containers there are, so that
// they can catch up with what they missed.
type Watcher struct {
	client *Client
	log    *slog.Logger

	mu        sync.Mutex
	connected []func(context.Context, []Container)
	events    []func(Event)
}

// NewWatcher makes a watcher; Run starts it.
func NewWatcher(c *Client, log *slog.Logger) *Watcher {
	return &Watcher{client: c, log: log}
}

// OnConnect registers f to be called with all containers, running or not,
// each time the watcher has subscribed to an engine's events. To be called
// before Run. No event is delivered before f returns.
func (w *Watcher) OnConnect(f func(ctx context.Context, all []Container)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.connected = append(w.connected, f)
}

// OnEvent registers f to be called with each event, in order, one at a time.
// To be called before Run. While f runs, the events wait in the engine and in
// the socket.
func (w *Watcher) OnEvent(f func(Event)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, f)
}

// Run watches until ctx ends, whose error it returns. An engine that is not
// there is waited for.
func (w *Watcher) Run(ctx context.Context) error {
	backoff := minBackoff
	said := false
	for {
		began := time.Now()
		err := w.watch(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(began) > maxBackoff {
			backoff, said = minBackoff, false
		}
		if !said {
			w.log.Info("docker events: waiting for the engine", "err", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(backoff/2 + rand.N(backoff/2)):
		}
		backoff = min(backoff*3/2, maxBackoff)
	}
}

// watch serves one subscription until it breaks.
func (w *Watcher) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.client.Renegotiate()
	q, err := filters(map[string][]string{
		"type":  {"container"},
		"event": {string(ActionCreate), string(ActionStart), string(ActionDie), string(ActionDestroy)},
	})
	if err != nil {
		return err
	}
	resp, err := w.client.open(ctx, http.MethodGet, "/events", q, nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	listCtx, listed := context.WithTimeout(ctx, callLimit)
	all, err := w.client.ListContainers(listCtx, true, nil)
	listed()
	if err != nil {
		return err
	}
	w.mu.Lock()
	connected, events := w.connected, w.events
	w.mu.Unlock()
	for _, f := range connected {
		f(ctx, all)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		e, ok := parseEvent(lines.Bytes())
		if !ok {
			continue
		}
		for _, f := range events {
			f(e)
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return errors.Join(io.EOF, ctx.Err())
}

// parseEvent reads one line of the event stream; false for what is no event of
// interest.
func parseEvent(line []byte) (Event, bool) {
	var m struct {
		Type   string
		Action Action
		Actor  struct {
			ID         string
			Attributes map[string]string
		}
		TimeNano int64 `json:"timeNano"`
	}
	if json.Unmarshal(line, &m) != nil || m.Actor.ID == "" || m.Type != "container" {
		return Event{}, false
	}
	switch m.Action {
	case ActionCreate, ActionStart, ActionDie, ActionDestroy:
		return Event{Action: m.Action, ID: m.Actor.ID, Name: m.Actor.Attributes["name"],
			Attributes: m.Actor.Attributes, Time: time.Unix(0, m.TimeNano)}, true
	}
	return Event{}, false
}
