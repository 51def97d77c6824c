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

// ServeHTTP takes over the calls that are the proxy's and hands on the others.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := unversioned(r.URL.Path)
	switch {
	case r.Method == http.MethodPost && path == "/containers/create":
		p.create(w, r)
	case r.Method == http.MethodPost && startedContainer(path) != "" && p.extras.any():
		p.start(w, r, startedContainer(path))
	case p.cfg.RewriteInspect && r.Method == http.MethodGet && inspectedContainer(path) != "":
		p.inspect(w, r)
	case takesOver(r, path):
		p.tunnel(w, r)
	default:
		// The engine answers a build while it is still reading it.
		_ = http.NewResponseController(w).EnableFullDuplex()
		p.forward.ServeHTTP(w, r)
	}
}

// takesOver says whether the engine may turn the connection of a request into
// a plain stream: it does so for attach and exec/start even if the client does
// not ask for an upgrade.
func takesOver(r *http.Request, path string) bool {
	if r.ContentLength < 0 {
		return false
	}
	if r.Header.Get("Upgrade") != "" {
		return true
	}
	if r.Method != http.MethodPost {
		return false
	}
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	return len(parts) == 3 && (parts[0] == "containers" && parts[2] == "attach" ||
		parts[0] == "exec" && parts[2] == "start")
}

// startedContainer is the container that a path starts or restarts, "" if none.
func startedContainer(path string) string {
	parts := strings.Split(strings.TrimPrefix(path, "/"), "/")
	if len(parts) == 3 && parts[0] == "containers" && (parts[2] == "start" || parts[2] == "restart") {
		return parts[1]
	}
	return ""
}

// writeError answers as the engine does.
func writeError(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"message": err.Error()})
}
