package gossip

import "fmt"

// assembler joins the parts of sets, which arrive one set after the other.
type assembler struct {
	open *set
	size int
}

// add takes a part and returns the set when it is whole.
func (a *assembler) add(p set) (*set, error) {
	if a.open == nil {
		whole := p
		a.open, a.size = &whole, 0
	} else {
		o := a.open
		if p.origin != o.origin || p.epoch != o.epoch || p.base != o.base || p.seq != o.seq || p.complete != o.complete {
			a.open = nil
			return nil, fmt.Errorf("set of %s: %w: parts of two sets", p.origin, errWire)
		}
		o.items = append(o.items, p.items...)
	}
	for _, c := range p.items {
		a.size += c.size()
	}
	if len(a.open.items) > 2*maxItems || a.size > 2*maxOwned {
		a.open = nil
		return nil, fmt.Errorf("set of %s: %w: larger than a peer may own", p.origin, errWire)
	}
	if p.more {
		return nil, nil
	}
	whole := a.open
	a.open = nil
	whole.more = false
	return whole, nil
}
