package proxy

import (
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
)

// maxHostname is the longest host name the kernel takes, in bytes.
const maxHostname = 64

// Hostnames says how a container that brings no host name gets one: from its
// name or a label. The zero value leaves it to the engine.
type Hostnames struct {
	FromLabel   string // label to take instead of the container's name, where it is set
	Match       string // regular expression (RE2); each match is replaced
	Replacement string // may refer to groups, as in $1
}

// namer derives host names; nil derives none.
type namer struct {
	label       string
	match       *regexp.Regexp // nil: nothing is replaced
	replacement string
}

func newNamer(h Hostnames) (*namer, error) {
	if h == (Hostnames{}) {
		return nil, nil
	}
	n := &namer{label: h.FromLabel, replacement: h.Replacement}
	if h.Match == "" {
		return n, nil
	}
	var err error
	if n.match, err = regexp.Compile(h.Match); err != nil {
		return nil, fmt.Errorf("pattern of host names %q: want a regular expression: %w", h.Match, err)
	}
	return n, nil
}

// derive is the host name for a container; empty if there is none to give.
func (n *namer) derive(container string, labels map[string]string) string {
	if v, ok := labels[n.label]; ok && n.label != "" {
		container = v
	}
	if n.match != nil {
		container = n.match.ReplaceAllString(container, n.replacement)
	}
	if len(container) > maxHostname {
		return ""
	}
	return container
}

// rewrite sets the host name in a request to make a container, unless it names
// one. All else stays as it is.
func (n *namer) rewrite(body []byte, query url.Values) ([]byte, error) {
	var c struct {
		Hostname string
		Labels   map[string]string
	}
	var request map[string]json.RawMessage
	if n == nil || json.Unmarshal(body, &c) != nil || c.Hostname != "" || json.Unmarshal(body, &request) != nil {
		return body, nil
	}
	name := n.derive(query.Get("name"), c.Labels)
	if name == "" {
		return body, nil
	}
	set, err := json.Marshal(name)
	if err != nil {
		return nil, err
	}
	for _, k := range foldedKeys(request, "Hostname") {
		request[k] = set
	}
	return json.Marshal(request)
}
