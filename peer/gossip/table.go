package gossip

import "fmt"

// Table is a map that all peers share. Each entry belongs to the peer that set
// it; two peers may each have an entry of one key. Its methods may be called
// from several goroutines.
type Table struct {
	g       *Gossip
	name    string
	changes chan struct{}
}

// Table returns the table of a name of 1 to 32 bytes. Call it before Run.
func (g *Gossip) Table(name string) *Table {
	checkName(name)
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.tables[name]
	if t == nil {
		t = &Table{g: g, name: name, changes: make(chan struct{}, 1)}
		g.tables[name] = t
	}
	return t
}

func checkName(name string) {
	if name == "" || len(name) > maxName {
		panic(fmt.Sprintf("gossip: name %q, want 1 to %d bytes", name, maxName))
	}
}

// Load makes entries all that we own in this table. Called before Run it is
// published in one step, together with our new epoch: a restarted peer that
// loads what it had leaves no hole for readers elsewhere.
func (t *Table) Load(entries map[string][]byte) {
	t.g.change(t.name, func(s *store) error { return s.load(t.name, entries) })
}

// Set makes value our entry under key and tells all peers. Limits are MaxKey
// and MaxValue; what exceeds them is logged as an error and not set. The value
// is copied.
func (t *Table) Set(key string, value []byte) {
	t.g.change(t.name, func(s *store) error { return s.set(ident{t.name, key}, value, false) })
}

// Delete withdraws our entry under key, if there is one.
func (t *Table) Delete(key string) {
	t.g.change(t.name, func(s *store) error { return s.set(ident{t.name, key}, nil, true) })
}

// All returns the entries of all peers, ours included, by origin and key. Those
// of a peer that is dead stay for 60 s. The values must not be modified.
func (t *Table) All() []Entry {
	t.g.mu.Lock()
	defer t.g.mu.Unlock()
	return t.g.store.all(t.name)
}

// Changes gets a value after entries changed, whoever owns them. It has one
// reader.
func (t *Table) Changes() <-chan struct{} { return t.changes }
