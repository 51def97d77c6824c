package proxy

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"weave.local/router/attach"
	"weave.local/router/overlay"
)

func TestHostnames(t *testing.T) {
	cases := []struct {
		how         Hostnames
		query, body string
		want        string // host name in the result; "-": as it came
	}{
		{Hostnames{}, "name=a", `{"Image":"x"}`, "-"},
		{Hostnames{Match: "^aws-[0-9]+-(.*)$", Replacement: "my-app-$1"}, "name=aws-12798186823-foo", `{"Image":"x"}`, "my-app-foo"},
		{Hostnames{Match: "_", Replacement: "-"}, "name=a_b_c", `{"hostname":""}`, "a-b-c"},
		{Hostnames{FromLabel: "h"}, "name=a", `{"Labels":{"h":"from-label"}}`, "from-label"},
		{Hostnames{FromLabel: "h"}, "name=a", `{"Labels":{"i":"x"}}`, "a"},
		{Hostnames{FromLabel: "h", Match: "x", Replacement: "y"}, "", `{"Labels":{"h":"xx"}}`, "yy"},
		{Hostnames{FromLabel: "h"}, "name=a", `{"Hostname":"own","Labels":{"h":"b"}}`, "-"},
		{Hostnames{FromLabel: "h"}, "", `{}`, "-"},
		{Hostnames{FromLabel: "h"}, "name=" + strings.Repeat("x", 65), `{}`, "-"},
		{Hostnames{FromLabel: "h"}, "name=a", `{"Labels":7}`, "-"},
	}
	for _, c := range cases {
		n, err := newNamer(c.how)
		if err != nil {
			t.Fatal(err)
		}
		query, _ := url.ParseQuery(c.query)
		got, err := n.rewrite([]byte(c.body), query)
		if err != nil {
			t.Errorf("%+v %s: %v", c.how, c.body, err)
		}
		var made struct{ Hostname string }
		_ = json.Unmarshal(got, &made)
		if c.want == "-" && string(got) != c.body || c.want != "-" && made.Hostname != c.want {
			t.Errorf("%+v %s %s: got %s, want %s", c.how, c.query, c.body, got, c.want)
		}
	}
	if _, err := newNamer(Hostnames{Match: "("}); err == nil || !strings.Contains(err.Error(), `"("`) {
		t.Errorf("a bad pattern: %v", err)
	}
}

func TestHostnameReachesTheEngine(t *testing.T) {
	e := newEngine(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"Id":"c1"}`)
	})
	p := startProxy(t, e, func(netip.Prefix) (string, error) { return "n", nil })
	p.namer, _ = newNamer(Hostnames{FromLabel: "h"})
	p.post(t, "/containers/create?name=web", `{"Image":"x"}`)
	p.post(t, "/containers/create?name=web", `{"Image":"x","HostConfig":{"NetworkMode":"host"}}`)
	calls := e.calls()
	if want := `{"Hostname":"web","Image":"x"}`; !strings.HasSuffix(calls[0], want) {
		t.Errorf("the engine saw %s, want %s", calls[0], want)
	}
	if last := calls[len(calls)-1]; strings.Contains(last, "Hostname") {
		t.Errorf("a container that is left alone was changed: %s", last)
	}
}

func TestRewriteInspect(t *testing.T) {
	all := []attach.Attachment{
		{ID: "e1", Kind: attach.KindEndpoint, MAC: overlay.MAC{0x7a, 0, 0, 0, 0, 1}, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.5/12")}},
		{ID: "c1", Kind: attach.KindContainer, Addrs: []netip.Prefix{netip.MustParsePrefix("10.33.0.5/16")}},
	}
	body := `{"Id":"c1","Big":9007199254740993,"NetworkSettings":{"Networks":{"bridge":{"EndpointID":"e0"},"weave":{"EndpointID":"e1"}},` +
		`"IPAddress":"172.17.0.2","IPPrefixLen":16,"MacAddress":"02:42:ac:11:00:02","Ports":{}}}`
	want := `{"Big":9007199254740993,"Id":"c1","NetworkSettings":{"IPAddress":"10.32.0.5","IPPrefixLen":12,"MacAddress":"7a:00:00:00:00:01",` +
		`"Networks":{"bridge":{"EndpointID":"e0","IPAddress":"10.32.0.5","IPPrefixLen":12,"MacAddress":"7a:00:00:00:00:01"},"weave":{"EndpointID":"e1"}},"Ports":{}}}`
	if got, ok := rewriteInspect([]byte(body), all); !ok || string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for _, other := range []string{strings.Replace(body, "e1", "e9", 1), `{`, `[]`, `{"NetworkSettings":3}`,
		strings.Replace(body, "Networks", "networks", 1)} {
		if got, ok := rewriteInspect([]byte(other), all); ok {
			t.Errorf("%s became %s", other, got)
		}
	}
}

// What can't be rewritten comes through as it is.
func TestInspectOfOthers(t *testing.T) {
	const text = "{\"Id\" : \"c1\"}\n"
	e := newEngine(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })
	p := startProxy(t, e, nil)
	p.cfg.RewriteInspect = true
	resp, err := p.client.Get("http://docker/v1.41/containers/c1/json?size=1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if got, _ := io.ReadAll(resp.Body); string(got) != text || e.calls()[0] != "GET /v1.41/containers/c1/json?size=1" {
		t.Errorf("got %s for %s", got, e.calls())
	}
}

// authority makes a certificate authority, a certificate by it for 127.0.0.1,
// good for both sides, and returns their files.
func authority(t *testing.T, name string) TLSFiles {
	t.Helper()
	dir := t.TempDir()
	write := func(file, kind string, der []byte) string {
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := write("cert.pem", "CERTIFICATE", der)
	return TLSFiles{Cert: cert, Key: write("key.pem", "PRIVATE KEY", private), CA: cert, Verify: true}
}

// Only clients with the right certificate get through, streams with half-close
// included; nobody does without TLS.
func TestTLS(t *testing.T) {
	const head = "HTTP/1.1 101 UPGRADED\r\n\r\n"
	e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/attach") {
			hijack(t, w, head)
			return
		}
		_, _ = io.WriteString(w, "hello")
	})
	ours, strange := authority(t, "ours"), authority(t, "strange")
	cfg := config(t, e)
	cfg.Listen = []string{"127.0.0.1:0"}
	cfg.Network = func(context.Context, netip.Prefix) (string, error) { return "", nil }
	var err error
	if cfg.TLS, err = ours.Load(); err != nil {
		t.Fatal(err)
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	address := strings.TrimPrefix(p.Addresses()[0], "tcp://")
	client := func(f *TLSFiles) *tls.Config {
		roots := x509.NewCertPool()
		text, _ := os.ReadFile(ours.CA)
		roots.AppendCertsFromPEM(text)
		c := &tls.Config{RootCAs: roots}
		if f != nil {
			pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
			if err != nil {
				t.Fatal(err)
			}
			c.Certificates = []tls.Certificate{pair}
		}
		return c
	}
	get := func(c *tls.Config) (string, error) {
		tr := &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}
		scheme := "https"
		if c == nil {
			scheme = "http"
		}
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, scheme+"://"+address+"/info", nil)
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return "", err
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(resp.Body)
		return string(text), err
	}
	if got, err := get(client(&ours)); err != nil || got != "hello" {
		t.Errorf("with the right certificate: %q, %v", got, err)
	}
	for name, c := range map[string]*tls.Config{"no certificate": client(nil), "a strange certificate": client(&strange), "no TLS": nil} {
		if got, err := get(c); err == nil && got == "hello" {
			t.Errorf("with %s: %q", name, got)
		}
	}
	conn, err := tls.Dial("tcp", address, client(&ours))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(conn, "POST /containers/x/attach HTTP/1.1\r\nHost: docker\r\n\r\nabc")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != head+"ready\nABC" {
		t.Errorf("stream: %q, %v", got, err)
	}
}

func TestTLSFilesAreNamedInErrors(t *testing.T) {
	good := authority(t, "x")
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range []TLSFiles{
		{Cert: empty, Key: good.Key}, {Cert: good.Cert, Key: empty},
		{Cert: good.Cert, Key: good.Key, CA: empty, Verify: true}, {Cert: good.Cert, Key: good.Key, CA: empty + "x", Verify: true},
	} {
		if _, err := f.Load(); err == nil || !strings.Contains(err.Error(), "empty.pem") {
			t.Errorf("%+v: %v", f, err)
		}
	}
}
