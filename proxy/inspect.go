package proxy

import (
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
)

// maxInspect is the longest description of a container that is rewritten, in
// bytes.
const maxInspect = 16 << 20

// inspectedContainer is the container that a path describes, "" if none.
func inspectedContainer(path string) string {
	if kind, id, verb := call(path); kind == "containers" && verb == "json" {
		return id
	}
	return ""
}

// defaultNetwork is the engine's own network in a container's description.
const defaultNetwork = "bridge"

// inspect serves the description of a container with our address in the fields
// that once were those of the engine's own network, as some clients read no
// others, and in the entry of that network, as some, such as Nomad, read that of
// any network.
func (p *Proxy) inspect(w http.ResponseWriter, r *http.Request) {
	a, err := p.roundTripUpTo(r.Context(), r, nil, maxInspect)
	if err != nil {
		p.forward.ErrorHandler(w, r, err)
		return
	}
	if a.status == http.StatusOK {
		if body, ok := rewriteInspect(a.body, p.cfg.Attach.List()); ok {
			a.body = body
			a.header.Set("Content-Length", strconv.Itoa(len(body)))
		}
	}
	a.send(w)
}

// rewriteInspect puts the first of our endpoints of a container into the legacy
// fields and the entry of the engine's own network; false if there is none. The
// rest stays as it is.
func rewriteInspect(body []byte, all []attach.Attachment) ([]byte, bool) {
	var info docker.ContainerInfo
	if json.Unmarshal(body, &info) != nil {
		return nil, false
	}
	ours := make(map[string]attach.Attachment)
	for _, a := range all {
		if a.Kind == attach.KindEndpoint && len(a.Addrs) > 0 {
			ours[a.ID] = a
		}
	}
	networks := info.NetworkSettings.Networks
	names := slices.Sorted(maps.Keys(networks))
	i := slices.IndexFunc(names, func(n string) bool { _, ok := ours[networks[n].EndpointID]; return ok })
	if i < 0 {
		return nil, false
	}
	found := ours[networks[names[i]].EndpointID]
	var object, settings, entries map[string]json.RawMessage
	err := errors.Join(json.Unmarshal(body, &object), json.Unmarshal(object["NetworkSettings"], &settings), json.Unmarshal(settings["Networks"], &entries))
	for field, value := range map[string]any{
		"MacAddress": found.MAC.String(), "IPAddress": found.Addrs[0].Addr().String(), "IPPrefixLen": found.Addrs[0].Bits(),
	} {
		if _, ok := entries[defaultNetwork]; ok {
			err = errors.Join(err, setField(entries, defaultNetwork, field, value))
		}
		err = errors.Join(err, setField(object, "NetworkSettings", field, value))
	}
	if errors.Join(err, setField(object, "NetworkSettings", "Networks", entries)) != nil {
		return nil, false
	}
	out, err := json.Marshal(object)
	return out, err == nil
}
