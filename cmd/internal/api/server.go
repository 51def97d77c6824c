package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"text/template"
	"time"

	"weave.local/ipam"
	"weave.local/peer"
	"weave.local/peer/link"
	"weave.local/proxy/docker"
	"weave.local/router"
	"weave.local/router/attach"
)

// maxRequest caps the body of a request, in bytes.
const maxRequest = 1 << 20

// Config is what the API speaks for. Alloc and Docker may be nil.
type Config struct {
	Hello    Hello
	Mesh     *link.Mesh
	Router   *router.Router
	Alloc    *ipam.Allocator
	Attach   *attach.Manager
	Docker   *docker.Client
	Proxy    []string // addresses of the proxy; empty when it is off
	Plugin   bool
	Sleeve   func() map[string]uint64 // counters
	Bridge   string
	Port     int
	Discover bool
	// Encryption says that there is a password; Trusted are the subnets
	// excepted from it.
	Encryption bool
	Trusted    []netip.Prefix
	// SetPassword makes a new password good beside the one of now, or, given
	// none, ends the change; Changing says that there are two.
	SetPassword func(next string) error
	Changing    func() bool
	// Targets remembers the list of targets after a change.
	Targets func([]string) error
	// Stop and Reset end the daemon, the latter leaving nothing behind;
	// they return warnings once the end is sure.
	Stop, Reset func(context.Context) ([]string, error)
	Log         *slog.Logger
}

// Server answers requests.
type Server struct{ cfg Config }

// New returns a Server.
func New(cfg Config) *Server { return &Server{cfg: cfg} }

type handler func(w http.ResponseWriter, r *http.Request) error

// statusError is an error with the HTTP status it deserves; others are 500.
type statusError struct {
	code int
	err  error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func badRequest(err error) error { return &statusError{http.StatusBadRequest, err} }

// Control returns the handler of the control socket: everything.
func (s *Server) Control() http.Handler {
	mux := http.NewServeMux()
	s.readOnly(mux)
	for pattern, h := range map[string]handler{
		"GET /report":        s.report,
		"GET /hello":         func(w http.ResponseWriter, _ *http.Request) error { return writeJSON(w, s.cfg.Hello) },
		"GET /ps":            s.ps,
		"GET /proxyaddrs":    s.proxyAddrs,
		"GET /ring":          s.prime,
		"POST /connect":      s.connect,
		"POST /forget":       s.forget,
		"POST /attach":       s.attach,
		"POST /detach":       s.detach,
		"POST /expose":       s.expose,
		"POST /hide":         s.hide,
		"DELETE /peer/{who}": s.removePeer,
		"POST /password":     s.password,
		"POST /stop":         s.end(s.cfg.Stop),
		"POST /reset":        s.end(s.cfg.Reset),
	} {
		mux.HandleFunc(pattern, s.wrap(h))
	}
	return mux
}

// Status returns the handler of the public status address: reading only.
func (s *Server) Status() http.Handler {
	mux := http.NewServeMux()
	s.readOnly(mux)
	mux.HandleFunc("GET /report", s.wrap(func(w http.ResponseWriter, r *http.Request) error {
		if r.URL.Query().Has("format") {
			// A template can ask for more work than the daemon could ever do.
			return &statusError{http.StatusForbidden, errors.New("a format is for root alone: use 'weave report --format'")}
		}
		return s.report(w, r)
	}))
	return mux
}

func (s *Server) readOnly(mux *http.ServeMux) {
	mux.HandleFunc("GET /status", s.wrap(func(w http.ResponseWriter, _ *http.Request) error {
		WriteStatus(w, s.Report())
		return nil
	}))
	mux.HandleFunc("GET /status/{part}", s.wrap(s.statusPart))
	mux.Handle("GET /metrics", s.metrics())
}

// wrap turns errors into answers.
func (s *Server) wrap(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
		err := h(w, r)
		if err == nil {
			return
		}
		code := http.StatusInternalServerError
		if se := (*statusError)(nil); errors.As(err, &se) {
			code = se.code
		}
		s.cfg.Log.Info("request refused", "method", r.Method, "path", r.URL.Path, "err", err)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(Problem{Error: err.Error()})
	}
}

func writeJSON(w http.ResponseWriter, v any) error {
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(v)
}

func readJSON(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return badRequest(fmt.Errorf("body of the request: %w", err))
	}
	return nil
}

func (s *Server) statusPart(w http.ResponseWriter, r *http.Request) error {
	rep := s.Report()
	switch part := r.PathValue("part"); part {
	case "connections":
		WriteConnections(w, rep.Router.Connections)
	case "peers":
		WritePeers(w, rep.Router.Peers)
	case "targets":
		WriteTargets(w, rep.Router.Targets)
	case "ipam":
		WriteIPAM(w, rep.IPAM)
	case "traffic":
		WriteTraffic(w, rep.Router.OverlayDiagnostics.Peers)
	default:
		return &statusError{http.StatusNotFound, fmt.Errorf("status has no part %q", part)}
	}
	return nil
}

func (s *Server) report(w http.ResponseWriter, r *http.Request) error {
	rep := s.Report()
	if !r.URL.Query().Has("format") {
		b, err := json.MarshalIndent(rep, "", "    ")
		if err != nil {
			return fmt.Errorf("report: %w", err)
		}
		w.Header().Set("Content-Type", "application/json")
		_, err = w.Write(b)
		return err
	}
	funcs := template.FuncMap{"json": func(v any) (string, error) {
		b, err := json.Marshal(v)
		return string(b), err
	}}
	t, err := template.New("format").Funcs(funcs).Parse(r.URL.Query().Get("format"))
	if err != nil {
		return badRequest(fmt.Errorf("format: %w", err))
	}
	var out strings.Builder
	if err := t.Execute(&out, rep); err != nil {
		return badRequest(fmt.Errorf("format: %w", err))
	}
	_, err = w.Write([]byte(out.String()))
	return err
}

func (s *Server) proxyAddrs(w http.ResponseWriter, _ *http.Request) error {
	for _, a := range s.cfg.Proxy {
		if _, err := fmt.Fprintln(w, a); err != nil {
			return err
		}
	}
	return nil
}

// ps lists attachments; of the identifiers asked for, one that is not attached
// gives an empty line.
func (s *Server) ps(w http.ResponseWriter, r *http.Request) error {
	list := s.attachments(r.Context())
	asked := r.URL.Query()["id"]
	if len(asked) == 0 {
		return writeJSON(w, list)
	}
	out := make([]Attachment, 0, len(asked))
	for _, id := range asked {
		found := Attachment{}
		full := s.containerID(r.Context(), id)
		for _, a := range list {
			if a.ID == id || a.ID == full {
				found = a
				found.ID = id
			}
		}
		out = append(out, found)
	}
	return writeJSON(w, out)
}

func (s *Server) prime(_ http.ResponseWriter, r *http.Request) error {
	if s.cfg.Alloc == nil {
		return &statusError{http.StatusNotFound, errNoIPAM()}
	}
	return s.cfg.Alloc.Prime(r.Context())
}

func errNoIPAM() error {
	return errors.New("address allocation is switched off: launch with --ipalloc-range")
}

func (s *Server) connect(_ http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	var err error
	if q.Get("replace") == "true" {
		err = s.cfg.Mesh.ReplaceTargets(q["peer"])
	} else {
		err = s.cfg.Mesh.Connect(q["peer"])
	}
	if saved := s.cfg.Targets(s.cfg.Mesh.Targets()); saved != nil {
		return saved
	}
	if err != nil {
		return badRequest(err)
	}
	return nil
}

func (s *Server) forget(_ http.ResponseWriter, r *http.Request) error {
	s.cfg.Mesh.Forget(r.URL.Query()["peer"])
	return s.cfg.Targets(s.cfg.Mesh.Targets())
}

func (s *Server) password(_ http.ResponseWriter, r *http.Request) error {
	var req PasswordRequest
	if err := readJSON(r, &req); err != nil {
		return err
	}
	if (req.Next == "") != req.Finish {
		return badRequest(errors.New("want either a new password or the end of a change"))
	}
	if err := s.cfg.SetPassword(req.Next); err != nil {
		return badRequest(err)
	}
	return nil
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) error {
	return s.join(w, r, s.cfg.Attach.Attach)
}

func (s *Server) detach(w http.ResponseWriter, r *http.Request) error {
	return s.join(w, r, s.cfg.Attach.Detach)
}

func (s *Server) join(w http.ResponseWriter, r *http.Request,
	do func(context.Context, attach.Target, []attach.Request) ([]netip.Prefix, error),
) error {
	var req AttachRequest
	if err := readJSON(r, &req); err != nil {
		return err
	}
	reqs, err := requests(req.Addresses)
	if err != nil {
		return err
	}
	t, err := s.target(r.Context(), req)
	if err != nil {
		return err
	}
	got, err := do(r.Context(), t, reqs)
	if err != nil {
		return err
	}
	return writeJSON(w, addresses(got))
}

func (s *Server) expose(w http.ResponseWriter, r *http.Request) error {
	return s.host(w, r, func(ctx context.Context, reqs []attach.Request, o attach.ExposeOptions) ([]netip.Prefix, error) {
		return s.cfg.Attach.Expose(ctx, reqs, o)
	})
}

func (s *Server) hide(w http.ResponseWriter, r *http.Request) error {
	return s.host(w, r, func(ctx context.Context, reqs []attach.Request, _ attach.ExposeOptions) ([]netip.Prefix, error) {
		return s.cfg.Attach.Hide(ctx, reqs)
	})
}

func (s *Server) host(w http.ResponseWriter, r *http.Request,
	do func(context.Context, []attach.Request, attach.ExposeOptions) ([]netip.Prefix, error),
) error {
	var req ExposeRequest
	if err := readJSON(r, &req); err != nil {
		return err
	}
	reqs, err := requests(req.Addresses)
	if err != nil {
		return err
	}
	got, err := do(r.Context(), reqs, attach.ExposeOptions{NoMasquerade: req.NoMasquerade})
	if err != nil {
		return err
	}
	return writeJSON(w, addresses(got))
}

func requests(words []string) ([]attach.Request, error) {
	if len(words) == 0 {
		return []attach.Request{{}}, nil
	}
	var out []attach.Request
	for _, word := range words {
		r, err := attach.ParseRequest(word)
		if err != nil {
			return nil, badRequest(err)
		}
		out = append(out, r)
	}
	return out, nil
}

func addresses(ps []netip.Prefix) Addresses {
	out := Addresses{CIDRs: make([]string, 0, len(ps))}
	for _, p := range ps {
		out.CIDRs = append(out.CIDRs, p.String())
	}
	return out
}

// endWait is how long leaving may take before the daemon ends regardless.
const endWait = 20 * time.Second

func (s *Server) end(do func(context.Context) ([]string, error)) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		ctx, cancel := context.WithTimeout(r.Context(), endWait)
		defer cancel()
		warnings, err := do(ctx)
		if err != nil {
			return err
		}
		return writeJSON(w, Warnings{Warnings: warnings})
	}
}

// removePeer takes over the addresses of a peer given by name or nickname.
func (s *Server) removePeer(w http.ResponseWriter, r *http.Request) error {
	if s.cfg.Alloc == nil {
		return badRequest(errNoIPAM())
	}
	who := r.PathValue("who")
	var found []peer.Name
	for _, p := range s.cfg.Alloc.Status().Peers {
		if p.Self {
			continue
		}
		if p.Name.String() == who || p.Nick == who {
			found = append(found, p.Name)
		}
	}
	switch len(found) {
	case 0:
		return &statusError{http.StatusNotFound, fmt.Errorf("no other peer that holds addresses is called %q: see 'weave status ipam'", who)}
	case 1:
	default:
		return badRequest(fmt.Errorf("%d peers are called %q: give the peer name from 'weave status ipam'", len(found), who))
	}
	n, err := s.cfg.Alloc.RemovePeer(r.Context(), found[0])
	if err != nil {
		return err
	}
	s.cfg.Router.Forget(found[0])
	return writeJSON(w, Removed{Peer: who, Count: n})
}
