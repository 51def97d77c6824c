package proxy

import (
	"encoding/json"
	"net/http"
	"strings"
)

// unversioned takes the API version off a path.
func unversioned(path string) string {
	rest, ok := strings.CutPrefix(path, "/v")
	if !ok {
		return path
	}
	version, rest, ok := strings.Cut(rest, "/")
	if !ok || version == "" || strings.Trim(version, "0123456789.") != "" {
		return path
	}
	return "/" + rest
}

// call takes an unversioned path apart that is /kind/id/verb. Of any other, all
// is empty.
func call(path string) (kind, id, verb string) {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(parts) != 3 {
		return "", "", ""
	}
	return parts[0], parts[1], parts[2]
}

// ServeHTTP takes over the calls that are the proxy's and hands on the others.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := unversioned(r.URL.Path)
	switch {
	case creates(r.Method, path):
		p.create(w, r)
	case p.completes(r.Method, path):
		p.start(w, r, startedContainer(path))
	case p.rewrites(r.Method, path):
		p.inspect(w, r)
	case r.ContentLength >= 0 && (r.Header.Get("Upgrade") != "" || streams(r.Method, path)):
		p.tunnel(w, r)
	case uploads(r):
		p.upload(w, r)
	default:
		p.forward.ServeHTTP(w, r)
	}
}

// uploads says whether the engine may answer before it has read the whole body,
// as it does for a build and for the end of an archive that it has no use for.
func uploads(r *http.Request) bool {
	return (r.ContentLength < 0 || r.ContentLength > smallBody) && r.ProtoAtLeast(1, 1) && r.ProtoMajor == 1 && r.Header.Get("Upgrade") == ""
}

// part says whether a call is one that the proxy does something about.
func (p *Proxy) part(method, path string) bool {
	return creates(method, path) || p.completes(method, path) || p.rewrites(method, path) || streams(method, path)
}

func creates(method, path string) bool {
	return method == http.MethodPost && path == "/containers/create"
}

// completes says whether the call may start a container that lacks addresses
// then.
func (p *Proxy) completes(method, path string) bool {
	return method == http.MethodPost && startedContainer(path) != "" && p.extras.any()
}

func (p *Proxy) rewrites(method, path string) bool {
	return p.cfg.RewriteInspect && method == http.MethodGet && inspectedContainer(path) != ""
}

// streams says whether the engine may turn the connection of a request into a
// plain stream even if the client does not ask for an upgrade: it does so for
// attach and exec/start.
func streams(method, path string) bool {
	if method != http.MethodPost {
		return false
	}
	kind, _, verb := call(path)
	return kind == "containers" && verb == "attach" || kind == "exec" && verb == "start"
}

// startedContainer is the container that a path starts or restarts, "" if none.
func startedContainer(path string) string {
	if kind, id, verb := call(path); kind == "containers" && (verb == "start" || verb == "restart") {
		return id
	}
	return ""
}

// writeError answers as the engine does.
func writeError(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": err.Error()})
}
