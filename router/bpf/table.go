package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Table is a hash map of the kernel with Go types at its surface. Single
// entries are replaced atomically: a program sees the old or the new value.
type Table[K comparable, V comparable] struct {
	name string
	m    *ebpf.Map
	put  func(m *ebpf.Map, k K, v V) error
	del  func(m *ebpf.Map, k K) error
	all  func(m *ebpf.Map) (map[K]V, error)
}

// newTable makes a Table of a map whose entries look like RK and RV in C.
func newTable[K, V, RK, RV comparable](name string, m *ebpf.Map, enc func(K, V) (RK, RV), dec func(RK, RV) (K, V)) Table[K, V] {
	return Table[K, V]{
		name: name,
		m:    m,
		put: func(m *ebpf.Map, k K, v V) error {
			rk, rv := enc(k, v)
			return m.Put(&rk, &rv)
		},
		del: func(m *ebpf.Map, k K) error {
			var v V
			rk, _ := enc(k, v)
			return m.Delete(&rk)
		},
		all: func(m *ebpf.Map) (map[K]V, error) {
			out, err := inBatches(m, dec)
			if errors.Is(err, ebpf.ErrNotSupported) {
				return oneByOne(m, dec)
			}
			return out, err
		},
	}
}

// batchLen is how many entries are read by one system call.
const batchLen = 256

// inBatches reads a map of ten thousand entries in a tenth of the time that it
// takes oneByOne. Not supported before Linux 5.6.
func inBatches[K, V, RK, RV comparable](m *ebpf.Map, dec func(RK, RV) (K, V)) (map[K]V, error) {
	out := map[K]V{}
	keys, values := make([]RK, batchLen), make([]RV, batchLen)
	var at ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&at, keys, values, nil)
		for i := range n {
			k, v := dec(keys[i], values[i])
			out[k] = v
		}
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist): // the end
			return out, nil
		case err != nil:
			return nil, err
		}
	}
}

func oneByOne[K, V, RK, RV comparable](m *ebpf.Map, dec func(RK, RV) (K, V)) (map[K]V, error) {
	out := map[K]V{}
	var rk RK
	var rv RV
	it := m.Iterate()
	for it.Next(&rk, &rv) {
		k, v := dec(rk, rv)
		out[k] = v
	}
	return out, it.Err()
}

// Put adds an entry or replaces it.
func (t *Table[K, V]) Put(k K, v V) error {
	if err := t.put(t.m, k, v); err != nil {
		return fmt.Errorf("BPF map %s: set %v: %w", t.name, k, err)
	}
	return nil
}

// Delete removes an entry; one that is not there is no error.
func (t *Table[K, V]) Delete(k K) error {
	if err := t.del(t.m, k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("BPF map %s: delete %v: %w", t.name, k, err)
	}
	return nil
}

// All returns the content. Entries that others add or remove meanwhile may
// be missing.
func (t *Table[K, V]) All() (map[K]V, error) {
	all, err := t.all(t.m)
	if err != nil {
		return nil, fmt.Errorf("BPF map %s: read: %w", t.name, err)
	}
	return all, nil
}

// Change is what separates a table from its desired content. It comes in two
// halves, so that a set of tables can gain all that is new before it loses
// anything that is old.
type Change struct {
	Grow   func() error // adds and replaces
	Shrink func() error // removes
}

// Towards compares the table with what it ought to hold. Entries that keep
// reports are left alone though not wanted; keep may be nil.
func (t *Table[K, V]) Towards(want map[K]V, keep func(K, V) bool) (Change, error) {
	have, err := t.All()
	if err != nil {
		return Change{}, err
	}
	grow := func() error {
		var errs []error
		for k, v := range want {
			if old, ok := have[k]; !ok || old != v {
				errs = append(errs, t.Put(k, v))
			}
		}
		return errors.Join(errs...)
	}
	shrink := func() error {
		var errs []error
		for k, v := range have {
			if _, ok := want[k]; !ok && (keep == nil || !keep(k, v)) {
				errs = append(errs, t.Delete(k))
			}
		}
		return errors.Join(errs...)
	}
	return Change{Grow: grow, Shrink: shrink}, nil
}
