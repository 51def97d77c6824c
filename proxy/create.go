package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
)

const (
	maxCreate   = 16 << 20 // bytes of a request to make a container
	maxCreated  = 1 << 20  // bytes of the answer
	createLimit = 5 * time.Minute
	tidyLimit   = 30 * time.Second
)

// variable is the environment variable that says which addresses a container
// gets.
const variable = "WEAVE_CIDR"

// Network modes of a container.
const (
	modeNone    = "none"
	modeDefault = "default"
	modeBridge  = "bridge"
)

// wish is what a request to make a container asks of the overlay.
type wish struct {
	attach   bool
	isolated bool // NetworkMode none: nothing but the overlay
	addrs    []attach.Request
}

// parseWish reads a request to make a container. The error is for the user.
func parseWish(body []byte, noDefault bool) (wish, error) {
	var c struct {
		Env             []string
		NetworkDisabled bool
		HostConfig      struct{ NetworkMode string }
	}
	if json.Unmarshal(body, &c) != nil || c.NetworkDisabled {
		return wish{}, nil // if it is wrong, the engine says so better
	}
	var w wish
	switch c.HostConfig.NetworkMode {
	case "", modeDefault, modeBridge:
	case modeNone:
		w.isolated = true
	default:
		return wish{}, nil
	}
	value, set := lookup(c.Env, variable)
	if value == "none" || !set && noDefault {
		return wish{}, nil
	}
	var err error
	if w.addrs, err = attach.ParseRequests(value); err != nil {
		return wish{}, fmt.Errorf("weave: %s: %w", variable, err)
	}
	w.attach = true
	return w, nil
}

// lookup finds the first entry of an environment.
func lookup(env []string, name string) (string, bool) {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v, true
		}
	}
	return "", false
}

// membership is a network a container shall be on.
type membership struct {
	subnet   netip.Prefix // zero: the default one
	settings docker.EndpointSettings
}

// split divides what a container asks for: the networks the engine attaches
// it to by itself, one for each subnet, and the rest. The engine takes no
// second address of a subnet, nor one of a subnet that overlaps another.
func (w wish) split(defaultSubnet netip.Prefix) (list []membership, rest []attach.Request) {
	var taken []netip.Prefix
	for _, r := range w.addrs {
		m := membership{subnet: r.Net}
		if r.IP.IsValid() {
			m.subnet = r.IP.Masked()
			m.settings.IPAMConfig = &docker.EndpointIPAM{IPv4Address: r.IP.Addr().String()}
		}
		if w.isolated {
			m.settings.DriverOpts = map[string]string{docker.OptionGateway: "false"}
		}
		subnet := m.subnet
		if !subnet.IsValid() {
			subnet = defaultSubnet
		}
		if slices.ContainsFunc(taken, subnet.Overlaps) {
			rest = append(rest, r)
			continue
		}
		taken = append(taken, subnet)
		list = append(list, m)
	}
	return list, rest
}

// create serves the request to make a container.
func (p *Proxy) create(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxCreate))
	if err != nil {
		writeError(w, http.StatusBadRequest, fmt.Errorf("weave: request: %w", err))
		return
	}
	wanted, err := parseWish(body, p.cfg.NoDefaultIPAlloc)
	if err != nil {
		writeError(w, http.StatusBadRequest, err)
		return
	}
	if wanted.attach {
		if body, err = p.namer.rewrite(body, r.URL.Query()); err != nil {
			writeError(w, http.StatusInternalServerError, fmt.Errorf("weave: %w", err))
			return
		}
	}
	list, rest := wanted.split(p.cfg.DefaultSubnet)
	// Once the engine has made the container, it is put on its networks or
	// removed, whether the client waits for it or not.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), createLimit)
	defer cancel()
	if wanted.isolated && len(list) > 0 {
		// The engine lets no container of mode none onto a network later.
		if body, err = p.replaceNone(ctx, body, list[0]); err != nil {
			writeError(w, http.StatusInternalServerError, fmt.Errorf("weave: %w", err))
			return
		}
		list = list[1:]
	}
	a, err := p.roundTrip(ctx, r, body)
	if err != nil {
		p.forward.ErrorHandler(w, r, err)
		return
	}
	if wanted.attach && a.status == http.StatusCreated {
		if err := p.join(ctx, a.body, list, rest); err != nil {
			writeError(w, http.StatusInternalServerError, fmt.Errorf("weave: %w", err))
			return
		}
	}
	a.send(w)
}

// answer is one of the engine's that was read to its end.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// send hands the answer on.
func (a answer) send(w http.ResponseWriter) {
	maps.Copy(w.Header(), a.header)
	w.Header().Del("Connection")
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body)
}

// roundTrip sends a request with the given body and reads the answer.
func (p *Proxy) roundTrip(ctx context.Context, r *http.Request, body []byte) (answer, error) {
	return p.roundTripUpTo(ctx, r, body, maxCreated)
}

// roundTripUpTo is roundTrip for an answer of at most limit bytes.
func (p *Proxy) roundTripUpTo(ctx context.Context, r *http.Request, body []byte, limit int64) (answer, error) {
	out := r.Clone(ctx)
	out.URL.Scheme, out.URL.Host, out.RequestURI = "http", "docker", ""
	// An empty body must be none: a chunked one of no bytes counts as a body.
	out.Body, out.ContentLength, out.TransferEncoding = http.NoBody, int64(len(body)), nil
	if len(body) > 0 {
		out.Body = io.NopCloser(bytes.NewReader(body))
	}
	out.Header.Del("Connection")
	out.Header.Del("Content-Length")
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header.Set("User-Agent", "") // none, instead of ours
	}
	resp, err := p.forward.Transport.RoundTrip(out)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	read, err := io.ReadAll(io.LimitReader(resp.Body, limit))
	return answer{resp.StatusCode, resp.Header, read}, err
}

// join puts a container that was just made on its networks and notes the rest,
// or removes it.
func (p *Proxy) join(ctx context.Context, created []byte, list []membership, rest []attach.Request) error {
	var made struct {
		ID string `json:"Id"`
	}
	if err := json.Unmarshal(created, &made); err != nil {
		return fmt.Errorf("answer to containers/create: %w", err)
	}
	var err error
	for _, m := range list {
		if err = p.connect(ctx, made.ID, m); err != nil {
			break
		}
	}
	if err == nil {
		err = p.extras.keep(made.ID, rest)
	}
	if err == nil {
		return nil
	}
	tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyLimit)
	defer cancel()
	return errors.Join(err, p.cfg.Docker.RemoveContainer(tidy, made.ID))
}

func (p *Proxy) connect(ctx context.Context, container string, m membership) error {
	name, err := p.cfg.Network(ctx, m.subnet)
	if err != nil {
		return err
	}
	return p.cfg.Docker.ConnectNetwork(ctx, name, container, &m.settings)
}

// replaceNone rewrites the network mode of a request from none to the network
// of m, which then is the only one. All else stays as it is.
func (p *Proxy) replaceNone(ctx context.Context, body []byte, m membership) ([]byte, error) {
	name, err := p.cfg.Network(ctx, m.subnet)
	if err != nil {
		return nil, err
	}
	return rewriteMode(body, name, m.settings)
}

func rewriteMode(body []byte, network string, settings docker.EndpointSettings) ([]byte, error) {
	var request map[string]json.RawMessage
	if err := json.Unmarshal(body, &request); err != nil {
		return nil, err
	}
	if err := setField(request, "HostConfig", "NetworkMode", network); err != nil {
		return nil, err
	}
	endpoints := map[string]docker.EndpointSettings{network: settings}
	if err := setField(request, "NetworkingConfig", "EndpointsConfig", endpoints); err != nil {
		return nil, err
	}
	return json.Marshal(request)
}

// setField sets request[object][field]. Like the engine, it takes names in any
// case.
func setField(request map[string]json.RawMessage, object, field string, value any) error {
	set, err := json.Marshal(value)
	if err != nil {
		return err
	}
	for _, key := range foldedKeys(request, object) {
		var inner map[string]json.RawMessage
		if raw, ok := request[key]; ok {
			if err := json.Unmarshal(raw, &inner); err != nil {
				return err
			}
		}
		if inner == nil {
			inner = make(map[string]json.RawMessage)
		}
		for _, k := range foldedKeys(inner, field) {
			inner[k] = set
		}
		if request[key], err = json.Marshal(inner); err != nil {
			return err
		}
	}
	return nil
}

// foldedKeys returns the keys that mean name; name itself when there is none.
// Of several the engine takes the last one, so all have to be set.
func foldedKeys(m map[string]json.RawMessage, name string) (keys []string) {
	for k := range m {
		if strings.EqualFold(k, name) {
			keys = append(keys, k)
		}
	}
	if len(keys) == 0 {
		keys = []string{name}
	}
	return keys
}
