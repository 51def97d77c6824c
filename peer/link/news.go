package link

import (
	"weave.local/peer"
	"weave.local/peer/linkstate"
)

const newsSize = 64 << 10 // bytes of a message that others are added to, at most

// news are messages about link state that wait to be handed on, by the
// neighbour they came from, each in order.
type news []heard

type heard struct {
	from peer.Name
	list []linkstate.Message
}

// add appends messages. Their bodies are taken over.
func (n news) add(from peer.Name, list []linkstate.Message) news {
	i := 0
	for i < len(n) && n[i].from != from {
		i++
	}
	if i == len(n) {
		n = append(n, heard{from: from})
	}
	h := &n[i]
	for _, x := range list {
		if last := len(h.list) - 1; last >= 0 && h.list[last].Type == x.Type && len(h.list[last].Body)+len(x.Body) <= newsSize {
			h.list[last].Body = append(h.list[last].Body, x.Body...)
			continue
		}
		h.list = append(h.list, x)
	}
	return n
}
