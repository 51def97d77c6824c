package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// engineSide plays the engine towards the driver.
type engineSide struct {
	h       *lab.Host
	client  http.Client
	pool    string
	address string // in CIDR form; of the last answer
	network string
	netns   string
}

func newEngineSide(h *lab.Host) *engineSide {
	e := &engineSide{h: h, network: strings.Repeat("e", 64), netns: "/run/netns/sandbox"}
	e.client.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", h.Path("/run/docker/plugins/weave.sock"))
	}}
	return e
}

// call makes one call, named by its letter: C and N create and delete the
// network, G and g request and release the pool, A and R an address, E and D
// create and delete the endpoint, J and L join and leave the sandbox.
func (e *engineSide) call(ctx context.Context, letter rune, endpoint string) error {
	addr, _, _ := strings.Cut(e.address, "/")
	ids := map[string]any{"NetworkID": e.network, "EndpointID": endpoint}
	var method string
	var body map[string]any
	switch letter {
	case 'C':
		method, body = "NetworkDriver.CreateNetwork", map[string]any{"NetworkID": e.network, "IPv4Data": []map[string]string{{"AddressSpace": localSpace}}}
	case 'N':
		method, body = "NetworkDriver.DeleteNetwork", map[string]any{"NetworkID": e.network}
	case 'G':
		method, body = "IpamDriver.RequestPool", map[string]any{"AddressSpace": localSpace, "Pool": "10.70.0.0/24"}
	case 'g':
		method, body = "IpamDriver.ReleasePool", map[string]any{"PoolID": e.pool}
	case 'A':
		method, body = "IpamDriver.RequestAddress", map[string]any{"PoolID": e.pool, "Address": addr}
	case 'R':
		method, body = "IpamDriver.ReleaseAddress", map[string]any{"PoolID": e.pool, "Address": addr}
	case 'E':
		method, body = "NetworkDriver.CreateEndpoint", map[string]any{"Interface": map[string]string{"Address": e.address}}
	case 'D':
		method, body = "NetworkDriver.DeleteEndpoint", map[string]any{}
	case 'J':
		method, body = "NetworkDriver.Join", map[string]any{"SandboxKey": e.netns}
	case 'L':
		method, body = "NetworkDriver.Leave", map[string]any{}
	}
	if strings.ContainsRune("EDJL", letter) {
		for k, v := range ids {
			body[k] = v
		}
	}
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/"+method, bytes.NewReader(b))
	if err != nil {
		return err
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	var a struct{ PoolID, Address, Err string }
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	if a.PoolID != "" {
		e.pool = a.PoolID
	}
	if letter == 'A' && a.Err == "" {
		e.address = a.Address
	}
	if a.Err != "" || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s %s", method, resp.Status, a.Err)
	}
	return nil
}

// calls makes the driver's calls twice, in wrong orders and after a restart
// that lost their answers: each has one right end, and nothing is left.
func calls(t *testing.T, h *lab.Host, p *helper, start func() *helper) *helper {
	t.Helper()
	if err := h.Run(t.Context(), "ip", "netns", "add", "sandbox").Err(); err != nil {
		t.Fatal(err)
	}
	devices := func() string {
		return h.Run(t.Context(), "sh", "-c", "ip -o link | grep -o 'vethw[^:@]*'").Stdout
	}
	before := devices()
	for i, c := range []struct {
		name string
		// The calls in their order; after ! one that must fail, and at # the
		// plugin is killed and comes back.
		calls string
	}{
		{"as it should be", "CGAEJLDRgN"},
		{"each twice", "CCGGAEEJJLLDDRRggNN"},
		{"nothing but the end", "GLDRgN"},
		{"join before the endpoint is there", "CG!JAEJLDRN"},
		{"join after the end", "CGAEJLD!JRN"},
		{"leave before join", "CGAELJLDRN"},
		{"no leave", "CGAEJDRN"},
		{"never joined", "CGAEDRN"},
		{"address back before the endpoint goes", "CGAEJLRDN"},
		{"address back alone", "CGARN"},
		{"address asked for while an endpoint has it", "CGAER!ADAEJLDRN"},
		{"network gone first", "CGAEJNLDR"},
		{"endpoint made again after its end", "CGAEJLDEJLDRN"},
		{"endpoint made again while joined", "CGAEJEJLDRN"},
		{"no word of the network", "GAEJLDR"},
		{"lost: the address", "CGA#AEJLDRN"},
		{"lost: the endpoint", "CGAE#EJLDRN"},
		{"lost: the join", "CGAEJ#JLDRN"},
		{"lost: leave and the rest", "CGAEJL#LD#DR#RN"},
	} {
		e := newEngineSide(h)
		e.address = netip.AddrFrom4([4]byte{10, 70, 0, byte(10 + i)}).String() + "/24"
		endpoint := fmt.Sprintf("%064x", 0xe0000+i)
		fails := false
		for n, letter := range c.calls {
			switch letter {
			case '!':
				fails = true
				continue
			case '#':
				p.kill(t)
				p = start()
				continue
			}
			if err := e.call(t.Context(), letter, endpoint); (err != nil) != fails {
				t.Errorf("%s: %s, call %d (%c): %v", c.name, c.calls, n, letter, err)
			}
			fails = false
		}
		err := lab.Wait(t.Context(), 10*time.Second, func() error {
			if owned, now := p.ask(t, "owned"), devices(); owned != "map[]" || now != before {
				return fmt.Errorf("addresses %s, devices\n%sbefore\n%s", owned, now, before)
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: left: %v", c.name, err)
		}
	}
	lost(t, h, p, before, devices)
	if err := h.Run(t.Context(), "ip", "netns", "del", "sandbox").Err(); err != nil {
		t.Error(err)
	}
	return p
}

// lost has the engine forget what it asked for: that is found and removed.
func lost(t *testing.T, h *lab.Host, p *helper, before string, devices func() string) {
	t.Helper()
	e := newEngineSide(h)
	for _, letter := range "CGAEJ" {
		if letter == 'A' {
			e.address = "10.70.0.99/24"
		}
		if err := e.call(t.Context(), letter, strings.Repeat("f", 64)); err != nil {
			t.Fatal(err)
		}
	}
	if owned := p.ask(t, "owned"); !strings.Contains(owned, "10.70.0.99") || devices() == before {
		t.Errorf("no endpoint was made: %s, devices\n%s", owned, devices())
	}
	p.ask(t, "reconcile")
	err := lab.Wait(t.Context(), 30*time.Second, func() error {
		p.ask(t, "reconcile")
		if owned, now := p.ask(t, "owned"), devices(); owned != "map[]" || now != before {
			return fmt.Errorf("addresses %s, devices\n%s", owned, now)
		}
		return nil
	})
	if err != nil {
		t.Errorf("what the engine forgot stays: %v", err)
	}
}
