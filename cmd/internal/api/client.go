package api

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
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotRunning says that no daemon answers on the control socket.
var ErrNotRunning = errors.New("weave is not running: start it with 'weave launch'")

// maxProblem caps how much of a refusal is read.
const maxProblem = 64 << 10

// Client speaks to the daemon.
type Client struct{ http *http.Client }

// NewClient returns a client of the daemon behind the unix socket.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	return &Client{http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableCompression: true}}}
}

// Get reads a resource as text.
func (c *Client) Get(ctx context.Context, path string, query url.Values) (string, error) {
	return c.do(ctx, http.MethodGet, path, query, nil)
}

// Post sends a request without a body.
func (c *Client) Post(ctx context.Context, path string, query url.Values) (string, error) {
	return c.do(ctx, http.MethodPost, path, query, nil)
}

// Delete removes a resource and decodes the answer into out.
func (c *Client) Delete(ctx context.Context, path string, out any) error {
	return c.decode(c.do(ctx, http.MethodDelete, path, nil, nil))(out)
}

// Call posts in as JSON and decodes the answer into out, which may be nil.
func (c *Client) Call(ctx context.Context, path string, in, out any) error {
	return c.decode(c.do(ctx, http.MethodPost, path, nil, in))(out)
}

// GetJSON reads a resource into out.
func (c *Client) GetJSON(ctx context.Context, path string, query url.Values, out any) error {
	return c.decode(c.do(ctx, http.MethodGet, path, query, nil))(out)
}

func (c *Client) decode(body string, err error) func(out any) error {
	return func(out any) error {
		if err != nil || out == nil {
			return err
		}
		if err := json.Unmarshal([]byte(body), out); err != nil {
			return fmt.Errorf("answer of the daemon: %w", err)
		}
		return nil
	}
}

func (c *Client) do(ctx context.Context, method, path string, query url.Values, in any) (string, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return "", fmt.Errorf("request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: "weave", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return "", fmt.Errorf("request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", unreachable(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode/100 != 2 {
		return "", refusal(resp)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("answer of the daemon: %w", err)
	}
	return string(text), nil
}

func unreachable(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return ErrNotRunning
	case errors.Is(err, os.ErrPermission):
		return errors.New("the control socket may be opened by root only: run weave as root")
	}
	return fmt.Errorf("daemon: %w", err)
}

func refusal(resp *http.Response) error {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	var p Problem
	if json.Unmarshal(b, &p) == nil && p.Error != "" {
		return errors.New(p.Error)
	}
	return fmt.Errorf("daemon answered %s: %s", resp.Status, strings.TrimSpace(string(b)))
}

// Hello asks who runs behind the socket.
func (c *Client) Hello(ctx context.Context) (Hello, error) {
	var h Hello
	err := c.GetJSON(ctx, "/hello", nil, &h)
	return h, err
}

// Stop asks the daemon to end, by /stop or /reset, and waits until it has
// gone. Warnings it has on the way are passed to warn.
func (c *Client) Stop(ctx context.Context, path string, warn func(string)) error {
	hello, err := c.Hello(ctx)
	if err != nil {
		return err
	}
	process, err := openProcess(hello.PID)
	if err != nil {
		return fmt.Errorf("daemon %d: %w", hello.PID, err)
	}
	defer func() { _ = unix.Close(process) }()
	var w Warnings
	if err := c.Call(ctx, path, nil, &w); err != nil {
		return err
	}
	for _, text := range w.Warnings {
		warn(text)
	}
	return awaitEnd(ctx, process)
}

// openProcess returns a pidfd, which can't be confused with a later process
// of the same number.
func openProcess(pid int) (int, error) {
	return unix.PidfdOpen(pid, 0)
}

// awaitEnd waits until the process has ended; a pidfd is then readable.
func awaitEnd(ctx context.Context, process int) error {
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, 200)
		if n == 1 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for the daemon: %w", err)
		}
	}
	return ctx.Err()
}
