// Package docker is a small client of the Docker Engine API over a unix
// socket: the handful of calls that the network plugin and the API proxy need,
// and a watch of container events that outlives restarts of the engine.
//
// The API version is negotiated: the client speaks the newest version that
// both it and the engine know. The structures hold only what is used here;
// unknown fields of answers are ignored.
package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
)

// newestAPI is the newest API version this client was tried with. The calls
// it makes are the same from 1.24 on.
const newestAPI = "1.51"

const (
	maxAnswer    = 64 << 20 // bytes of one JSON answer
	maxErrorText = 64 << 10
	maxReference = 512 // bytes of a name or id
)

// Client talks to one engine. Its methods may be called from several
// goroutines; each bounds its waiting by the context it is given.
type Client struct {
	socket string
	http   *http.Client

	mu      sync.Mutex
	version string // negotiated; empty: not yet
}

// New makes a client of the engine that listens on the unix socket. Nothing
// is sent before the first call.
func New(socket string) *Client {
	c := &Client{socket: socket}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx) },
		// A connection kept over a restart of the engine would fail the
		// next call; a new one on a unix socket costs next to nothing.
		DisableKeepAlives:  true,
		DisableCompression: true,
	}}
	return c
}

// Socket is the path of the engine's socket.
func (c *Client) Socket() string { return c.socket }

// Dial opens a connection to the engine's socket.
func (c *Client) Dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", c.socket)
}

// Error is an answer of the engine that is not a success.
type Error struct {
	Status  int    // HTTP status
	Message string // in the engine's words
}

// Error returns the engine's message.
func (e *Error) Error() string { return e.Message }

// IsNotFound says whether the engine answered that there is no such thing.
func IsNotFound(err error) bool { return hasStatus(err, http.StatusNotFound) }

// IsConflict says whether the engine answered that the name is taken or the
// state does not allow it.
func IsConflict(err error) bool {
	return hasStatus(err, http.StatusConflict) || hasStatus(err, http.StatusForbidden)
}

func hasStatus(err error, status int) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == status
}

// APIVersion returns the version in use, asking the engine at the first call.
func (c *Client) APIVersion(ctx context.Context) (string, error) {
	c.mu.Lock()
	v := c.version
	c.mu.Unlock()
	if v != "" {
		return v, nil
	}
	resp, err := c.send(ctx, http.MethodGet, "/_ping", nil)
	if err != nil {
		return "", fmt.Errorf("docker: %w", err)
	}
	defer discard(resp)
	v = resp.Header.Get("Api-Version")
	if resp.StatusCode != http.StatusOK || v == "" {
		return "", fmt.Errorf("docker: ping answered %s with API version %q", resp.Status, v)
	}
	v, err = older(v, newestAPI)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	c.version = v
	c.mu.Unlock()
	return v, nil
}

// Renegotiate forgets the API version: the engine may have been replaced.
func (c *Client) Renegotiate() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.version = ""
}

// older returns the lower of two API versions.
func older(a, b string) (string, error) {
	am, an, err := splitVersion(a)
	if err != nil {
		return "", err
	}
	bm, bn, err := splitVersion(b)
	if err != nil {
		return "", err
	}
	if am < bm || am == bm && an < bn {
		return a, nil
	}
	return b, nil
}

func splitVersion(v string) (major, minor int, err error) {
	x, y, ok := strings.Cut(v, ".")
	major, errMajor := strconv.Atoi(x)
	minor, errMinor := strconv.Atoi(y)
	if !ok || errMajor != nil || errMinor != nil {
		return 0, 0, fmt.Errorf("docker: API version %q: want one such as %s", v, newestAPI)
	}
	return major, minor, nil
}

// send sends one request without a version in its path.
func (c *Client) send(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, r)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return c.http.Do(req)
}

// call sends a request below the negotiated version and decodes a successful
// answer into out, unless that is nil.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, body, out any) error {
	resp, err := c.open(ctx, method, path, query, body)
	if err != nil {
		return err
	}
	defer discard(resp)
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("docker: answer to %s %s: %w", method, path, err)
	}
	return nil
}

// open is call without reading the answer, whose body the caller closes.
func (c *Client) open(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	version, err := c.APIVersion(ctx)
	if err != nil {
		return nil, err
	}
	full := "/v" + version + path
	if len(query) > 0 {
		full += "?" + query.Encode()
	}
	resp, err := c.send(ctx, method, full, body)
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	if resp.StatusCode >= http.StatusBadRequest {
		defer discard(resp)
		return nil, fmt.Errorf("docker: %w", answerError(resp))
	}
	return resp, nil
}

func answerError(resp *http.Response) *Error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorText))
	var m struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(text, &m) != nil || m.Message == "" {
		m.Message = strings.TrimSpace(string(text))
	}
	if m.Message == "" {
		m.Message = resp.Status
	}
	return &Error{Status: resp.StatusCode, Message: m.Message}
}

func discard(resp *http.Response) {
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorText))
	_ = resp.Body.Close()
}

// reference makes a name or id fit to stand in a path.
func reference(kind, ref string) (string, error) {
	if ref == "" || len(ref) > maxReference {
		return "", fmt.Errorf("docker: %s %.40q: want a name or id of 1 to %d bytes", kind, ref, maxReference)
	}
	return url.PathEscape(ref), nil
}

// filters encodes the engine's filter argument: field to accepted values.
func filters(f map[string][]string) (url.Values, error) {
	if len(f) == 0 {
		return url.Values{}, nil
	}
	b, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	return url.Values{"filters": {string(b)}}, nil
}
