package plugin

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
)

// Limits of a request, which comes from the engine alone.
const (
	maxRequest  = 1 << 20
	contentType = "application/vnd.docker.plugins.v1.1+json"
)

// The requests and answers of the remote driver protocol, with the fields used
// here.

type capabilities struct{ Scope string }

type ipamCapabilities struct {
	RequiresMACAddress    bool
	RequiresRequestReplay bool
}

type addressSpaces struct {
	LocalDefaultAddressSpace  string
	GlobalDefaultAddressSpace string
}

type poolRequest struct {
	AddressSpace string
	Pool         string
	SubPool      string
	Options      map[string]string
	V6           bool
}

type poolAnswer struct {
	PoolID string
	Pool   string
	Data   map[string]string
}

type addressRequest struct {
	PoolID  string
	Address string
	Options map[string]string
}

type addressAnswer struct {
	Address string
	Data    map[string]string
}

type networkRequest struct {
	NetworkID string
	Options   map[string]any
	IPv4Data  []struct{ AddressSpace, Pool string }
}

type endpointInterface struct {
	Address     string `json:",omitempty"`
	AddressIPv6 string `json:",omitempty"`
	MacAddress  string `json:",omitempty"`
}

type endpointRequest struct {
	NetworkID  string
	EndpointID string
	Interface  *endpointInterface
	Options    map[string]any
}

type endpointAnswer struct{ Interface endpointInterface }

type infoAnswer struct{ Value map[string]string }

type joinRequest struct {
	NetworkID  string
	EndpointID string
	SandboxKey string
	Options    map[string]any
}

type interfaceName struct{ SrcName, DstPrefix string }

// connected is the type of a route without a next hop.
const connected = 1

type staticRoute struct {
	Destination string
	RouteType   int
}

type joinAnswer struct {
	InterfaceName         interfaceName
	StaticRoutes          []staticRoute `json:",omitempty"`
	DisableGatewayService bool          `json:",omitempty"`
}

type empty struct{}

// handle serves one method of the protocol: the request is decoded into a
// fresh Q; an error of f is answered as the protocol has it.
func handle[Q, A any](p *Plugin, mux *http.ServeMux, method string, f func(context.Context, Q) (A, error)) {
	mux.HandleFunc("POST /"+method, func(w http.ResponseWriter, r *http.Request) {
		var q Q
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
		if err == nil && len(body) > 0 {
			err = json.Unmarshal(body, &q)
		}
		if err != nil {
			p.answer(w, method, http.StatusBadRequest, map[string]string{"Err": err.Error()})
			return
		}
		a, err := f(r.Context(), q)
		if err != nil {
			p.cfg.Log.Warn("plugin: refused", "method", method, "err", err)
			p.answer(w, method, http.StatusInternalServerError, map[string]string{"Err": err.Error()})
			return
		}
		p.cfg.Log.Debug("plugin", "method", method, "request", string(body))
		p.answer(w, method, http.StatusOK, a)
	})
}

func (p *Plugin) answer(w http.ResponseWriter, method string, status int, v any) {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		p.cfg.Log.Warn("plugin: answer", "method", method, "err", err)
	}
}

// routes is the whole protocol.
func (p *Plugin) routes() http.Handler {
	mux := http.NewServeMux()
	handle(p, mux, "Plugin.Activate", func(context.Context, empty) (map[string][]string, error) {
		return map[string][]string{"Implements": {"NetworkDriver", "IpamDriver"}}, nil
	})
	handle(p, mux, "NetworkDriver.GetCapabilities", func(context.Context, empty) (capabilities, error) {
		return capabilities{Scope: "local"}, nil
	})
	handle(p, mux, "NetworkDriver.CreateNetwork", p.createNetwork)
	handle(p, mux, "NetworkDriver.DeleteNetwork", p.deleteNetwork)
	handle(p, mux, "NetworkDriver.CreateEndpoint", p.createEndpoint)
	handle(p, mux, "NetworkDriver.DeleteEndpoint", p.deleteEndpoint)
	handle(p, mux, "NetworkDriver.EndpointOperInfo", func(context.Context, empty) (infoAnswer, error) {
		return infoAnswer{Value: map[string]string{}}, nil
	})
	handle(p, mux, "NetworkDriver.Join", p.join)
	handle(p, mux, "NetworkDriver.Leave", p.leave)
	for _, unused := range []string{"DiscoverNew", "DiscoverDelete", "ProgramExternalConnectivity", "RevokeExternalConnectivity"} {
		handle(p, mux, "NetworkDriver."+unused, func(context.Context, empty) (empty, error) { return empty{}, nil })
	}
	handle(p, mux, "IpamDriver.GetCapabilities", func(context.Context, empty) (ipamCapabilities, error) {
		return ipamCapabilities{}, nil
	})
	handle(p, mux, "IpamDriver.GetDefaultAddressSpaces", func(context.Context, empty) (addressSpaces, error) {
		return addressSpaces{LocalDefaultAddressSpace: localSpace, GlobalDefaultAddressSpace: globalSpace}, nil
	})
	handle(p, mux, "IpamDriver.RequestPool", p.requestPool)
	handle(p, mux, "IpamDriver.ReleasePool", p.releasePool)
	handle(p, mux, "IpamDriver.RequestAddress", p.requestAddress)
	handle(p, mux, "IpamDriver.ReleaseAddress", p.releaseAddress)
	return mux
}
