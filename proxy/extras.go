package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
	"weave.local/router/netdev"
)

const (
	// maxStarts is how many started containers may wait for their further
	// addresses.
	maxStarts = 1024
	// extraLimit bounds giving one container its further addresses.
	extraLimit = 30 * time.Second
)

// extras gives containers the addresses that the engine can't.
type extras struct {
	cfg    Config
	starts chan string          // ids of containers that were started
	lists  chan map[string]bool // capacity 1: all containers, by id; true for running ones
}

func newExtras(cfg Config) *extras {
	e := &extras{cfg: cfg, starts: make(chan string, maxStarts), lists: make(chan map[string]bool, 1)}
	cfg.Watch.OnEvent(func(ev docker.Event) {
		if len(e.wanted(ev.ID)) == 0 {
			return
		}
		switch ev.Action {
		case docker.ActionStart:
			e.started(ev.ID)
		case docker.ActionDestroy:
			e.forget(ev.ID)
		case docker.ActionCreate, docker.ActionDie:
		}
	})
	cfg.Watch.OnConnect(func(_ context.Context, all []docker.Container) {
		list := make(map[string]bool, len(all))
		for _, c := range all {
			list[c.ID] = c.State == "running"
		}
		select {
		case <-e.lists: // nobody looked at the one before
		default:
		}
		e.lists <- list
	})
	return e
}

func (e *extras) started(id string) {
	select {
	case e.starts <- id:
	default:
		e.cfg.Log.Warn("proxy: further addresses are not added, too many containers start at once", "container", id)
	}
}

// keep notes the addresses a container gets at each start.
func (e *extras) keep(id string, reqs []attach.Request) error {
	if len(reqs) == 0 {
		return nil
	}
	words := make([]string, len(reqs))
	for i, r := range reqs {
		words[i] = r.String()
	}
	return e.cfg.Store.Put(id, []byte(strings.Join(words, " ")))
}

func (e *extras) forget(id string) {
	if err := e.cfg.Store.Delete(id); err != nil {
		e.cfg.Log.Warn("proxy: note of a container's addresses", "container", id, "err", err)
	}
}

// any says whether there are containers with further addresses at all.
func (e *extras) any() bool { return len(e.cfg.Store.All()) > 0 }

// wanted returns the further addresses of a container.
func (e *extras) wanted(id string) []attach.Request {
	words, ok := e.cfg.Store.Get(id)
	if !ok {
		return nil
	}
	reqs, err := attach.ParseRequests(string(words))
	if err != nil {
		e.cfg.Log.Warn("proxy: note of a container's addresses", "container", id, "err", err)
	}
	return reqs
}

// run serves starts that did not come through the proxy, such as those by a
// restart policy.
func (e *extras) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case id := <-e.starts:
			if err := e.add(ctx, id); err != nil && ctx.Err() == nil {
				e.cfg.Log.Warn("proxy: further addresses", "container", id, "err", err)
			}
		case list := <-e.lists:
			e.catchUp(ctx, list)
		}
	}
}

// catchUp makes up for events that were missed.
func (e *extras) catchUp(ctx context.Context, list map[string]bool) {
	for id := range e.cfg.Store.All() {
		switch running, known := list[id]; {
		case running:
			e.started(id)
		case !known: // perhaps it was made after the list
			limited, cancel := context.WithTimeout(ctx, extraLimit)
			if _, err := e.cfg.Docker.InspectContainer(limited, id); docker.IsNotFound(err) {
				e.forget(id)
			}
			cancel()
		}
	}
}

// add gives a running container its further addresses; those it has already
// are no error.
func (e *extras) add(ctx context.Context, id string) error {
	reqs := e.wanted(id)
	if len(reqs) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, extraLimit)
	defer cancel()
	info, err := e.cfg.Docker.InspectContainer(ctx, id)
	if err != nil {
		return err
	}
	if !info.State.Running || info.State.Pid == 0 {
		return nil // it has ended
	}
	_, err = e.cfg.Attach.Attach(ctx, attach.Target{
		ID:    id,
		NetNS: fmt.Sprintf("/proc/%d/ns/net", info.State.Pid),
		// The engine's own endpoint has it already.
		NoMulticastRoute: true,
		AnySource:        docker.AllowsAnySource(info.Config.Labels),
	}, reqs)
	if errors.Is(err, netdev.ErrNoNamespace) {
		return nil // it has ended meanwhile
	}
	return err
}

// start serves the request to start or restart a container: the answer waits
// until further addresses are there. If that fails, the container is stopped.
func (p *Proxy) start(w http.ResponseWriter, r *http.Request, ref string) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxCreate))
	if err != nil {
		writeError(w, http.StatusBadRequest, fmt.Errorf("weave: request: %w", err))
		return
	}
	ctx := context.WithoutCancel(r.Context())
	a, err := p.roundTrip(ctx, r, body)
	if err != nil {
		p.forward.ErrorHandler(w, r, err)
		return
	}
	if a.status/100 == 2 {
		if err := p.addExtras(ctx, ref); err != nil {
			writeError(w, http.StatusInternalServerError, fmt.Errorf("weave: %w", err))
			return
		}
	}
	a.send(w)
}

func (p *Proxy) addExtras(ctx context.Context, ref string) error {
	limited, cancel := context.WithTimeout(ctx, extraLimit)
	defer cancel()
	info, err := p.cfg.Docker.InspectContainer(limited, ref)
	if docker.IsNotFound(err) {
		return nil // it has ended and is gone, as with --rm
	}
	if err == nil {
		err = p.extras.add(ctx, info.ID)
	}
	if err == nil {
		return nil
	}
	tidy, done := context.WithTimeout(ctx, tidyLimit)
	defer done()
	return errors.Join(err, p.cfg.Docker.KillContainer(tidy, ref))
}
