package proxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"weave.local/router/attach"
)

func TestWishes(t *testing.T) {
	cases := []struct {
		name, body string
		noDefault  bool
		want       string // addresses asked for; "-": left alone
		isolated   bool
	}{
		{"no variable", `{"Image":"x"}`, false, "net:default", false},
		{"no variable, off", `{"Image":"x"}`, true, "-", false},
		{"empty variable, off", `{"Env":["WEAVE_CIDR="]}`, true, "net:default", false},
		{"none", `{"Env":["A=b","WEAVE_CIDR=none"]}`, false, "-", false},
		{"first one counts", `{"Env":["WEAVE_CIDR=net:10.2.2.0/24","WEAVE_CIDR=none"]}`, false, "net:10.2.2.0/24", false},
		{"several", `{"Env":["WEAVE_CIDR=net:default net:10.2.2.0/24 10.3.9.1/24"]}`, false,
			"net:default net:10.2.2.0/24 ip:10.3.9.1/24", false},
		{"name begins alike", `{"Env":["WEAVE_CIDR_X=none"]}`, false, "net:default", false},
		{"default", `{"HostConfig":{"NetworkMode":"default"}}`, false, "net:default", false},
		{"bridge", `{"HostConfig":{"NetworkMode":"bridge"}}`, false, "net:default", false},
		{"--net=none", `{"HostConfig":{"NetworkMode":"none"}}`, false, "net:default", true},
		{"--net=none, none", `{"HostConfig":{"NetworkMode":"none"},"Env":["WEAVE_CIDR=none"]}`, false, "-", false},
		{"host", `{"HostConfig":{"NetworkMode":"host"},"Env":["WEAVE_CIDR=net:default"]}`, false, "-", false},
		{"container", `{"HostConfig":{"NetworkMode":"container:abc"}}`, false, "-", false},
		{"own network", `{"HostConfig":{"NetworkMode":"mine"}}`, false, "-", false},
		{"names in any case", `{"env":["WEAVE_CIDR=none"],"hostconfig":{"networkmode":"none"}}`, false, "-", false},
		{"not ours to judge", `{"Env":7}`, false, "-", false},
	}
	for _, c := range cases {
		w, err := parseWish([]byte(c.body), c.noDefault)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got := "-"
		if w.attach {
			var s []string
			for _, a := range w.addrs {
				s = append(s, a.String())
			}
			got = strings.Join(s, " ")
		}
		if got != c.want || w.isolated != c.isolated && w.attach {
			t.Errorf("%s: got %s isolated=%v, want %s isolated=%v", c.name, got, w.isolated, c.want, c.isolated)
		}
	}
}

func TestBadTokensAreNamed(t *testing.T) {
	for _, value := range []string{"net:10.2.2.0", "none net:default", "ip:10.2.2.300/24", "foo"} {
		body, _ := json.Marshal(map[string][]string{"Env": {"WEAVE_CIDR=" + value}})
		_, err := parseWish(body, false)
		if err == nil || !strings.Contains(err.Error(), strings.Fields(value)[0]) || !strings.Contains(err.Error(), "WEAVE_CIDR") {
			t.Errorf("%q: %v", value, err)
		}
	}
}

func TestRewritingKeepsTheRest(t *testing.T) {
	body := `{"Image":"x","hostConfig":{"Memory":9007199254740993,"NetworkMode":"none","New":{"a":[1.50]}},
"NetworkingConfig":{"EndpointsConfig":{"none":{}},"Later":true},"Unknown":null}`
	w, err := parseWish([]byte(body), false)
	if err != nil {
		t.Fatal(err)
	}
	list, _ := w.split(netip.Prefix{})
	got, err := rewriteMode([]byte(body), "weave", list[0].settings)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"Image":"x","NetworkingConfig":{"EndpointsConfig":{"weave":{"DriverOpts":{"works.weave.gateway":"false"}}},"Later":true},` +
		`"Unknown":null,"hostConfig":{"Memory":9007199254740993,"NetworkMode":"weave","New":{"a":[1.50]}}}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func FuzzRewrite(f *testing.F) {
	f.Add([]byte(`{"HostConfig":{"NetworkMode":"none"},"NetworkingConfig":null}`))
	f.Add([]byte(`{"Env":["WEAVE_CIDR=net:10.1.0.0/16"],"hostconfig":{}}`))
	f.Add([]byte(`{"HostConfig":{"Memory":1},"hostconfig":{"NetworkMode":"none"}}`)) // the engine takes the last one
	f.Fuzz(func(t *testing.T, body []byte) {
		w, err := parseWish(body, false)
		if err != nil || !w.isolated || !w.attach {
			return
		}
		list, _ := w.split(netip.Prefix{})
		out, err := rewriteMode(body, "weave", list[0].settings)
		if err != nil {
			return
		}
		again, err := parseWish(out, false)
		if err != nil || again.attach {
			t.Errorf("%q became %q, which is attached again or wrong: %v", body, out, err)
		}
	})
}

// In each case the engine sees these calls in this order.
func TestCreate(t *testing.T) {
	const created = "{\"Id\":\"c1\",\"Warnings\":[]}\n"
	cases := []struct {
		name, path, body string
		answer           int // of the engine to create
		connect          int // of the engine to connect
		calls            []string
		status           int
		text             string
	}{
		{"default", "/v1.41/containers/create?name=a", `{"Image":"x", "N":1.0}`, 201, 200,
			[]string{`POST /v1.41/containers/create?name=a {"Image":"x", "N":1.0}`, `network default`,
				`POST /v1.41/networks/net-default/connect {"Container":"c1","EndpointConfig":{}}`}, 201, created},
		{"no version", "/containers/create", `{"Env":["WEAVE_CIDR=net:10.2.2.0/24 ip:192.168.7.9/24"]}`, 201, 200,
			[]string{`POST /containers/create {"Env":["WEAVE_CIDR=net:10.2.2.0/24 ip:192.168.7.9/24"]}`,
				`network 10.2.2.0/24`, `POST /v1.41/networks/net-10.2.2.0-24/connect {"Container":"c1","EndpointConfig":{}}`,
				`network 192.168.7.0/24`,
				`POST /v1.41/networks/net-192.168.7.0-24/connect {"Container":"c1","EndpointConfig":{"IPAMConfig":{"IPv4Address":"192.168.7.9"}}}`},
			201, created},
		{"no image", "/v1.41/containers/create", `{"Image":"x"}`, 404, 200,
			[]string{`POST /v1.41/containers/create {"Image":"x"}`}, 404, `{"message":"No such image: x"}`},
		{"left alone", "/v1.41/containers/create", `{"HostConfig":{"NetworkMode":"host"}}`, 201, 200,
			[]string{`POST /v1.41/containers/create {"HostConfig":{"NetworkMode":"host"}}`}, 201, created},
		{"connect fails", "/v1.41/containers/create", `{}`, 201, 500,
			[]string{`POST /v1.41/containers/create {}`, `network default`,
				`POST /v1.41/networks/net-default/connect {"Container":"c1","EndpointConfig":{}}`,
				`DELETE /v1.41/containers/c1?force=1&v=1`}, 500, "{\"message\":\"weave: docker: connect: out of luck\"}\n"},
		{"network fails", "/v1.41/containers/create", `{"Env":["WEAVE_CIDR=net:10.66.0.0/24"]}`, 201, 200,
			[]string{`POST /v1.41/containers/create {"Env":["WEAVE_CIDR=net:10.66.0.0/24"]}`, `network 10.66.0.0/24`,
				`DELETE /v1.41/containers/c1?force=1&v=1`}, 500, "{\"message\":\"weave: no such luck\"}\n"},
		{"bad token", "/v1.41/containers/create", `{"Env":["WEAVE_CIDR=bad"]}`, 201, 200, nil, 400, `is no address`},
		{"overlap", "/v1.41/containers/create", `{"Env":["WEAVE_CIDR=net:default 10.32.2.1/24 10.2.2.1/24 10.2.2.2/24"]}`, 201, 200,
			[]string{`POST /v1.41/containers/create {"Env":["WEAVE_CIDR=net:default 10.32.2.1/24 10.2.2.1/24 10.2.2.2/24"]}`,
				`network default`, `POST /v1.41/networks/net-default/connect {"Container":"c1","EndpointConfig":{}}`,
				`network 10.2.2.0/24`,
				`POST /v1.41/networks/net-10.2.2.0-24/connect {"Container":"c1","EndpointConfig":{"IPAMConfig":{"IPv4Address":"10.2.2.1"}}}`,
				`extras ip:10.32.2.1/24 ip:10.2.2.2/24`},
			201, created},
		{"none", "/v1.41/containers/create", `{"HostConfig":{"NetworkMode":"none"},"Env":["WEAVE_CIDR=net:10.2.2.0/24 net:default"]}`, 201, 200,
			[]string{`network 10.2.2.0/24`,
				`POST /v1.41/containers/create {"Env":["WEAVE_CIDR=net:10.2.2.0/24 net:default"],"HostConfig":{"NetworkMode":"net-10.2.2.0-24"},` +
					`"NetworkingConfig":{"EndpointsConfig":{"net-10.2.2.0-24":{"DriverOpts":{"works.weave.gateway":"false"}}}}}`,
				`network default`,
				`POST /v1.41/networks/net-default/connect {"Container":"c1","EndpointConfig":{"DriverOpts":{"works.weave.gateway":"false"}}}`},
			201, created},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			e := newEngine(t, func(w http.ResponseWriter, r *http.Request) {
				switch {
				case strings.HasSuffix(r.URL.Path, "/containers/create"):
					w.WriteHeader(c.answer)
					if c.answer == http.StatusCreated {
						_, _ = io.WriteString(w, created)
					} else {
						_, _ = io.WriteString(w, `{"message":"No such image: x"}`)
					}
				case strings.HasSuffix(r.URL.Path, "/connect"):
					w.WriteHeader(c.connect)
					if c.connect >= 400 {
						_, _ = io.WriteString(w, `{"message":"connect: out of luck"}`)
					}
				}
			})
			p := startProxy(t, e, func(subnet netip.Prefix) (string, error) {
				name := "default"
				if subnet.IsValid() {
					name = subnet.String()
				}
				e.note("network " + name)
				if name == "10.66.0.0/24" {
					return "", errors.New("no such luck")
				}
				return "net-" + strings.ReplaceAll(name, "/", "-"), nil
			})
			status, text := p.post(t, c.path, c.body)
			if status != c.status || !strings.Contains(text, c.text) {
				t.Errorf("answer %d %s, want %d %s", status, text, c.status, c.text)
			}
			if rest, ok := p.cfg.Store.Get("c1"); ok {
				e.note("extras " + string(rest))
			}
			got, want := strings.Join(e.calls(), "\n"), strings.Join(c.calls, "\n")
			if got != want {
				t.Errorf("the engine saw\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// FuzzHostname gives a name to whatever container: it has that one then, and
// nothing else changes.
func FuzzHostname(f *testing.F) {
	f.Add([]byte(`{"Image":"x"}`), "db-1")
	f.Add([]byte(`{"Hostname":"","hostname":null,"Labels":{"name":"y"},"Memory":9007199254740993}`), "a")
	n, err := newNamer(Hostnames{FromLabel: "name", Match: "-[0-9]+$", Replacement: ""})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte, name string) {
		out, err := n.rewrite(body, url.Values{"name": {name}})
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(out, body) {
			return
		}
		type named struct {
			Hostname string
			Labels   map[string]string
		}
		var was, is named
		if err := errors.Join(json.Unmarshal(body, &was), json.Unmarshal(out, &is)); err != nil {
			t.Fatalf("%q became %q: %v", body, out, err)
		}
		if is.Hostname == "" || len(is.Hostname) > 3*maxHostname || was.Hostname != "" || !maps.Equal(was.Labels, is.Labels) {
			t.Errorf("%q became %q", body, out)
		}
	})
}

// FuzzRewriteInspect puts addresses into whatever the engine answers.
func FuzzRewriteInspect(f *testing.F) {
	f.Add([]byte(`{"Id":"c","NetworkSettings":{"IPAddress":"","Networks":{"weave":{"EndpointID":"e"}}},"New":[1.50]}`))
	f.Add([]byte(`{"NetworkSettings":{"Networks":{"weave":{"EndpointID":"e"}}},"networksettings":{"IPAddress":"x"}}`))
	all := []attach.Attachment{{ID: "e", Kind: attach.KindEndpoint, Addrs: []netip.Prefix{netip.MustParsePrefix("10.32.0.7/12")}}}
	f.Fuzz(func(t *testing.T, body []byte) {
		out, ok := rewriteInspect(body, all)
		if !ok {
			return
		}
		var is struct {
			NetworkSettings struct {
				IPAddress   string
				IPPrefixLen int
			}
		}
		if err := json.Unmarshal(out, &is); err != nil || is.NetworkSettings.IPAddress != "10.32.0.7" || is.NetworkSettings.IPPrefixLen != 12 {
			t.Errorf("%q became %q: %v", body, out, err)
		}
	})
}

// FuzzPaths finds no container in a path that names none.
func FuzzPaths(f *testing.F) {
	f.Add("/v1.41/containers/abc/start")
	f.Add("/containers//json")
	f.Add("/v/containers/abc/restart")
	f.Fuzz(func(t *testing.T, path string) {
		bare := unversioned(path)
		if !strings.HasSuffix(path, bare) || bare == "" && path != "" {
			t.Errorf("%q without its version is %q", path, bare)
		}
		for _, id := range []string{startedContainer(bare), inspectedContainer(bare)} {
			if strings.Contains(id, "/") || !strings.Contains(path, id) {
				t.Errorf("%q is of container %q", path, id)
			}
		}
	})
}

func FuzzParseAddress(f *testing.F) {
	f.Add("unix:///run/weave/weave.sock")
	f.Add("tcp://[::1]:12375")
	f.Fuzz(func(t *testing.T, s string) {
		url, err := ParseAddress(s)
		if err != nil {
			return
		}
		if again, err := ParseAddress(url); err != nil || again != url {
			t.Errorf("%q is %q, then %q, %v", s, url, again, err)
		}
	})
}
