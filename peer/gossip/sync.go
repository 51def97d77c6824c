package gossip

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"weave.local/peer"
	"weave.local/peer/link"
)

const (
	tendEvery  = 250 * time.Millisecond
	expireEach = 5 * time.Second        // look for origins that are dead
	greetAfter = 200 * time.Millisecond // new peers know the way to us by then
	greetFor   = 10 * time.Second       // after the start
	headWait   = 5 * time.Second        // for what a stream carries
	pullWait   = 30 * time.Second
	maxServed  = 64 // streams of others in work
)

// watcher follows the topology.
type watcher struct {
	begun     time.Time
	reachable map[peer.Name]bool
	sessions  map[peer.Name]uint64 // of links
}

// tend pulls when something calls for it and forgets dead origins.
func (g *Gossip) tend(ctx context.Context) error {
	changes, end := g.mesh.Subscribe()
	defer end()
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	w := &watcher{begun: time.Now()}
	w.look(g, w.begun)
	expired := w.begun
	var tasks sync.WaitGroup
	defer tasks.Wait()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changes:
			w.look(g, time.Now())
		case <-g.kick:
		case <-tick.C:
		}
		now := time.Now()
		if now.Sub(expired) >= expireEach {
			expired = now
			g.expire(now)
		}
		g.mu.Lock()
		jobs := g.pulls.start(now)
		greet := !g.greet.IsZero() && !now.Before(g.greet)
		g.mu.Unlock()
		if greet {
			signal(g.send)
		}
		for name, answer := range jobs {
			tasks.Go(func() { g.runPull(ctx, name, answer) })
		}
	}
}

// look takes in what changed: it pulls from new neighbours and, when peers
// farther away appeared, from one of them; what that one does not have comes by
// comparing roots.
func (w *watcher) look(g *Gossip, now time.Time) {
	reachable := make(map[peer.Name]bool)
	sessions := make(map[peer.Name]uint64)
	for _, name := range g.mesh.Topology().Reachable() {
		reachable[name] = true
	}
	for _, n := range g.mesh.Neighbours() {
		sessions[n.Name] = n.Session
	}
	var far []peer.Name
	grown := false
	for name := range reachable {
		if !w.reachable[name] {
			grown = true
			if _, near := sessions[name]; !near {
				far = append(far, name)
			}
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.store.reach = reachable
	for name, session := range sessions {
		if w.sessions[name] != session {
			g.pulls.want(name, now.Add(rand.N(100*time.Millisecond)), false)
		}
	}
	if len(far) > 0 {
		g.pulls.want(far[rand.IntN(len(far))], now.Add(300*time.Millisecond+rand.N(700*time.Millisecond)), false)
	}
	if grown && now.Sub(w.begun) < greetFor && g.greet.IsZero() {
		g.greet = now.Add(greetAfter)
	}
	w.reachable, w.sessions = reachable, sessions
}

func (g *Gossip) expire(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.store.expire(now, func(n peer.Name) bool { return g.members[n] || g.store.reach[n] })
	g.notifyLocked()
}

// runPull pulls once and takes note of how that went.
func (g *Gossip) runPull(ctx context.Context, name peer.Name, answer bool) {
	err := g.pull(ctx, name, answer)
	if err != nil && ctx.Err() == nil {
		g.count.pullErrors.Add(1)
		g.log.Debug("pull did not end well", "from", name, "err", err)
	}
	g.mu.Lock()
	g.pulls.done(name, answer, err, g.store.reach[name], time.Now())
	g.mu.Unlock()
}

// pull asks a peer for what we lack and takes it over.
func (g *Gossip) pull(ctx context.Context, from peer.Name, answer bool) error {
	g.count.pulled.Add(1)
	conn, err := g.mesh.Dial(ctx, from)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	stop := guard(ctx, conn, pullWait)
	defer stop()
	q := request{answer: answer, root: g.root(), states: g.digests()}
	g.mu.Lock()
	q.heads = g.store.heads()
	g.mu.Unlock()
	if _, err := conn.Write([]byte{streamPull}); err != nil {
		return err
	}
	if err := writeFrame(conn, frameRequest, encodeRequest(q)); err != nil {
		return err
	}
	var parts assembler
	for {
		typ, body, err := readFrame(conn, maxFrame)
		if err != nil {
			return err
		}
		switch typ {
		case frameSet:
			err = g.pulledSet(from, &parts, body)
		case frameState:
			r := reader{b: body}
			g.merge(from, string(r.short()), r.b)
		case frameEnd:
			return nil
		}
		if err != nil {
			g.count.malformed.Add(1)
			g.complain(from, err.Error())
			return err
		}
	}
}

func (g *Gossip) pulledSet(from peer.Name, parts *assembler, body []byte) error {
	p, err := parseSet(body)
	if err != nil {
		return err
	}
	whole, err := parts.add(p)
	if err != nil || whole == nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if v := g.store.apply(*whole); v == behind {
		g.log.Debug("pulled set does not fit", "from", from, "origin", whole.origin)
	}
	g.notifyLocked()
	if g.store.anew {
		signal(g.send)
	}
	return nil
}

// guard bounds what is done with a connection by a time and by ctx.
func guard(ctx context.Context, conn net.Conn, wait time.Duration) (stop func() bool) {
	_ = conn.SetDeadline(time.Now().Add(wait)) // fails on a closed one, as what follows will
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
}

// acceptStreams hands the streams of other peers to memberlist or serves them.
func (g *Gossip) acceptStreams(ctx context.Context) error {
	slots := make(chan struct{}, maxServed)
	var tasks sync.WaitGroup
	defer tasks.Wait()
	for {
		var s link.Stream
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s = <-g.mesh.Streams():
		}
		select {
		case slots <- struct{}{}:
			tasks.Go(func() {
				defer func() { <-slots }()
				g.takeStream(ctx, s)
			})
		default:
			_ = s.Close()
		}
	}
}

func (g *Gossip) takeStream(ctx context.Context, s link.Stream) {
	var typ [1]byte
	stop := guard(ctx, s, headWait)
	_, err := io.ReadFull(s, typ[:])
	stop()
	switch {
	case err != nil:
	case typ[0] == streamMembers:
		_ = s.SetDeadline(time.Time{})
		select {
		case g.wire.streams <- s:
			return // it is memberlist's now
		case <-ctx.Done():
		}
	case typ[0] == streamPull:
		stop = guard(ctx, s, pullWait)
		err = g.serve(s, s.From)
		stop()
	default:
		err = fmt.Errorf("stream: %w: type %d", errWire, typ[0])
	}
	_ = s.Close()
	if errors.Is(err, errWire) {
		g.count.malformed.Add(1)
		g.complain(s.From, err.Error())
	} else if err != nil && ctx.Err() == nil {
		g.log.Debug("stream not served", "from", s.From, "err", err)
	}
}

// serve answers a pull.
func (g *Gossip) serve(conn io.ReadWriter, from peer.Name) error {
	g.count.served.Add(1)
	typ, body, err := readFrame(conn, maxFrame)
	if err != nil {
		return err
	}
	if typ != frameRequest {
		return fmt.Errorf("pull: %w: frame of type %d", errWire, typ)
	}
	q, err := parseRequest(body)
	if err != nil {
		return err
	}
	root := g.root()
	if root != q.root {
		if err := g.answer(conn, from, q); err != nil {
			return err
		}
	}
	return writeFrame(conn, frameEnd, binary.BigEndian.AppendUint64(nil, root))
}

// answer sends what the other lacks, and pulls in turn when it has more.
func (g *Gossip) answer(w io.Writer, from peer.Name, q request) error {
	g.mu.Lock()
	sets, ahead := g.store.lacking(q.heads)
	if g.store.anew {
		signal(g.send)
	}
	g.mu.Unlock()
	for _, s := range sets {
		for _, p := range s.parts(setLimit) {
			if err := writeFrame(w, frameSet, appendSet(nil, p)); err != nil {
				return err
			}
		}
	}
	for name, s := range g.shared() {
		theirs, has := q.states[name]
		if has && theirs == s.Digest() {
			continue
		}
		ahead = ahead || has
		b := s.Encode()
		if len(b) == 0 || len(b) > maxFrame-maxName-1 {
			continue
		}
		if err := writeFrame(w, frameState, append(appendShort(nil, name), b...)); err != nil {
			return err
		}
	}
	if ahead && !q.answer {
		g.mu.Lock()
		g.pulls.want(from, time.Now(), true)
		g.mu.Unlock()
		signal(g.kick)
	}
	return nil
}
