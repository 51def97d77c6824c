package proxy

import (
	"context"
	"net"
	"net/http"
	"time"

	"weave.local/proxy/docker"
)

// Connections to the engine that are kept for further requests: how many, and
// how long.
const (
	keptConns = 4
	keptFor   = 10 * time.Second
)

// carrier takes requests to the engine. Those that may be sent again use kept
// connections: should the engine have been restarted meanwhile, the transport
// repeats them on a new one. Any other request gets a connection of its own,
// since it could be lost or done twice.
type carrier struct{ kept, single *http.Transport }

func newCarrier(c *docker.Client) *carrier {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx) }
	return &carrier{
		kept:   &http.Transport{DialContext: dial, MaxIdleConnsPerHost: keptConns, IdleConnTimeout: keptFor, DisableCompression: true},
		single: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true},
	}
}

// RoundTrip sends one request.
func (c *carrier) RoundTrip(r *http.Request) (*http.Response, error) {
	repeatable := (r.Method == http.MethodGet || r.Method == http.MethodHead) && (r.Body == nil || r.Body == http.NoBody)
	if repeatable && r.Header.Get("Upgrade") == "" {
		return c.kept.RoundTrip(r)
	}
	return c.single.RoundTrip(r)
}
