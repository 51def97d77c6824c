package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"weave.local/tests/lab"
)

const (
	// fullSubnet is what the three hosts hand out to the last address, and
	// donationBar how long one may take that another host gives away.
	fullSubnet  = "10.32.1.0/24"
	donationBar = 50 * time.Millisecond
)

// TestAddresses: a subnet is used up on both sides of a cut, addresses go from
// host to host, and daemons are killed in the middle of it.
func TestAddresses(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3"}})
	for _, h := range l.Hosts {
		launch(t, h, append([]string{
			"--no-dns", "--docker-api=/run/none.sock", "--ipalloc-range=10.32.0.0/21",
			"--ipalloc-default-subnet=" + fullSubnet,
		}, others(l, h)...)...)
	}
	established(t, l, patience)
	var hs []*handedOut
	for _, h := range l.Hosts {
		hs = append(hs, newHandedOut(h))
	}
	step(t, "cut in two", func(t *testing.T) { testUsedUp(t, l, hs) })
	step(t, "who has what", func(t *testing.T) { testWhoHasWhat(t, hs) })
	step(t, "donations", func(t *testing.T) { testDonations(t, hs) })
	step(t, "killed in a storm", func(t *testing.T) { testKilledInStorm(t, l, hs[0]) })
}

// handedOut asks the daemon of a host for addresses as Docker does, and knows
// which it got.
type handedOut struct {
	*lab.Host
	plugin, control *http.Client

	mu    sync.Mutex
	addrs map[netip.Addr]bool
}

func newHandedOut(h *lab.Host) *handedOut {
	return &handedOut{
		Host: h, addrs: map[netip.Addr]bool{},
		plugin: clientOf(h, "/run/docker/plugins/weave.sock"), control: clientOf(h, "/run/weave/control.sock"),
	}
}

// clientOf speaks to a socket on a host.
func clientOf(h *lab.Host, socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		MaxIdleConnsPerHost: 16,
		DialContext: func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
			err = h.Do(func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, "unix", socket)
				return err
			})
			return conn, err
		},
	}}
}

// post sends in as JSON and reads the answer into out. An error of the daemon
// is an error.
func post(ctx context.Context, c *http.Client, call string, in, out any) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://weave/"+call, bytes.NewReader(b))
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var said struct{ Err, Error string }
	if err := json.Unmarshal(text, &said); err == nil && said.Err+said.Error != "" {
		return errors.New(said.Err + said.Error)
	}
	return json.Unmarshal(text, out)
}

// request asks for an address of the subnet, or for that one.
func (h *handedOut) request(ctx context.Context, want string) (netip.Addr, error) {
	var got struct{ Address string }
	pool := "weave-" + fullSubnet + "-" + fullSubnet
	err := post(ctx, h.plugin, "IpamDriver.RequestAddress", map[string]string{"PoolID": pool, "Address": want}, &got)
	if err != nil {
		return netip.Addr{}, err
	}
	p, err := netip.ParsePrefix(got.Address)
	if err != nil {
		return netip.Addr{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.addrs[p.Addr()] {
		return p.Addr(), fmt.Errorf("%s was handed out twice on %s", p.Addr(), h.Name)
	}
	h.addrs[p.Addr()] = true
	return p.Addr(), nil
}

func (h *handedOut) release(ctx context.Context, a netip.Addr) error {
	h.mu.Lock()
	delete(h.addrs, a)
	h.mu.Unlock()
	var none struct{}
	return post(ctx, h.plugin, "IpamDriver.ReleaseAddress", map[string]string{"PoolID": "weave-" + fullSubnet + "-" + fullSubnet, "Address": a.String()}, &none)
}

// useUp asks for addresses until one has to be waited for and the status says
// why; that one is given up then.
func (h *handedOut) useUp(t *testing.T, why string) {
	t.Helper()
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	done := make(chan error, 1)
	for waits := false; !waits; {
		go func() {
			_, err := h.request(ctx, "")
			done <- err
		}()
		within(t, patience, h.Name+": an address or a reason to wait", func() error {
			select {
			case err := <-done:
				if err != nil {
					t.Fatalf("%s: %v", h.Name, err)
				}
				return nil
			case <-time.After(200 * time.Millisecond):
			}
			err := says(t, h.Host, why)
			waits = err == nil
			return err
		})
	}
	giveUp()
	if err := <-done; err == nil {
		t.Errorf("%s: an address after all", h.Name)
	}
}

// once checks that no address is with two, and returns how many there are.
func once(t *testing.T, hs []*handedOut) int {
	t.Helper()
	where := map[netip.Addr]string{}
	for _, h := range hs {
		for a := range h.addrs {
			if other, twice := where[a]; twice {
				t.Errorf("%s is on %s and on %s", a, other, h.Name)
			}
			where[a] = h.Name
		}
	}
	return len(where)
}

// testUsedUp: u3 is cut off. Each side hands out all it has, and together that
// is the whole subnet; when they meet again, all say so.
func testUsedUp(t *testing.T, l *lab.Lab, hs []*handedOut) {
	for _, h := range hs { // a block for each
		if _, err := h.request(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
	}
	u3 := l.Host("u3")
	apart(t, l, u3)
	hs[2].useUp(t, "waiting for keepers u[12], u[12] (1 of 3 reachable)")
	for _, h := range hs[:2] {
		h.useUp(t, "waiting for IP(s) to become available")
	}
	if n := once(t, hs); n != 254 {
		t.Errorf("%d of 254 addresses were handed out", n)
	}
	t.Logf("handed out: u1 %d, u2 %d, u3, alone, %d", len(hs[0].addrs), len(hs[1].addrs), len(hs[2].addrs))
	for _, h := range l.Hosts[:2] {
		if err := l.Heal(t.Context(), h, u3); err != nil {
			t.Fatal(err)
		}
	}
	established(t, l, patience)
	for _, h := range hs {
		_, err := h.request(t.Context(), "")
		want := fmt.Sprintf("range exhausted in %s: 254 of 254 in use (", fullSubnet)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", h.Name, err, want)
			continue
		}
		for _, o := range hs {
			if part := fmt.Sprintf("%s %d", o.Name, len(o.addrs)); !strings.Contains(err.Error(), part) {
				t.Errorf("%s: %q says nothing of %q", h.Name, err, part)
			}
		}
	}
	once(t, hs)
}

// testWhoHasWhat: whoever asks for an address that is taken is told by whom.
func testWhoHasWhat(t *testing.T, hs []*handedOut) {
	u1, u2 := hs[0], hs[1]
	if err := u1.release(t.Context(), u1.some()); err != nil {
		t.Fatal(err)
	}
	c := runBare(t, u1.Host, "held")
	for h, where := range map[*handedOut]string{u1: "this host", u2: "u1"} {
		_, err := h.request(t.Context(), c.addr.Addr().String())
		want := fmt.Sprintf("%s is held by /run/netns/held on %s", c.addr.Addr(), where)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s asks for %s: %v, want %q", h.Name, c.addr, err, want)
		}
	}
}

// testDonations: there is nothing left in the pool, so what one host gives back
// another one gets from it.
func testDonations(t *testing.T, hs []*handedOut) {
	var took []time.Duration
	for i := range 20 {
		from, to := hs[i%2], hs[1-i%2]
		a := from.some()
		if err := from.release(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		got, err := to.request(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(begin))
		if got != a {
			t.Errorf("%s got %s, want %s, which %s gave back", to.Name, got, a, from.Name)
		}
	}
	slices.Sort(took)
	t.Logf("an address from another host: %v", times(took))
	if took[0] > donationBar {
		t.Errorf("the quickest of %d took %s, want %s at most", len(took), took[0], donationBar)
	}
	once(t, hs)
}

// some is one of the addresses.
func (h *handedOut) some() netip.Addr {
	return slices.SortedFunc(maps.Keys(h.addrs), netip.Addr.Compare)[0]
}
