package docker

import (
	"context"
	"net/http"
)

// IPAMPool is one address pool of a network.
type IPAMPool struct {
	Subnet  string `json:",omitempty"`
	IPRange string `json:",omitempty"`
	Gateway string `json:",omitempty"`
}

// IPAM says how a network's addresses are managed.
type IPAM struct {
	Driver  string
	Config  []IPAMPool
	Options map[string]string `json:",omitempty"`
}

// NetworkSpec describes a network to be made.
type NetworkSpec struct {
	Name    string
	Driver  string
	IPAM    IPAM
	Options map[string]string `json:",omitempty"`
	Labels  map[string]string `json:",omitempty"`
	// CheckDuplicate makes engines before API 1.44 refuse a second network
	// of the same name, as newer ones always do.
	CheckDuplicate bool
}

// NetworkEndpoint is a running container on a network.
type NetworkEndpoint struct {
	Name        string // of the container
	EndpointID  string
	MacAddress  string
	IPv4Address string // with prefix length; empty if it has none
	IPv6Address string
}

// Network is a network as the engine describes it.
type Network struct {
	ID      string `json:"Id"`
	Name    string
	Driver  string
	IPAM    IPAM
	Options map[string]string
	Labels  map[string]string
	// Containers holds the running containers by id; only InspectNetwork
	// fills it.
	Containers map[string]NetworkEndpoint
}

// EndpointIPAM asks for given addresses.
type EndpointIPAM struct {
	IPv4Address string `json:",omitempty"`
	IPv6Address string `json:",omitempty"`
}

// EndpointSettings says how a container is, or shall be, on a network.
type EndpointSettings struct {
	IPAMConfig *EndpointIPAM     `json:",omitempty"`
	Aliases    []string          `json:",omitempty"`
	DriverOpts map[string]string `json:",omitempty"`
	NetworkID  string            `json:",omitempty"`
	EndpointID string            `json:",omitempty"`
	IPAddress  string            `json:",omitempty"`
	MacAddress string            `json:",omitempty"`
}

// CreateNetwork makes a network and returns its id. IsConflict tells of a
// name that is taken.
func (c *Client) CreateNetwork(ctx context.Context, spec NetworkSpec) (string, error) {
	spec.CheckDuplicate = true
	var answer struct {
		ID string `json:"Id"`
	}
	err := c.call(ctx, http.MethodPost, "/networks/create", nil, spec, &answer)
	return answer.ID, err
}

// ListNetworks lists networks that pass all filters, such as
// {"driver": {"weave"}}.
func (c *Client) ListNetworks(ctx context.Context, f map[string][]string) ([]Network, error) {
	q, err := filters(f)
	if err != nil {
		return nil, err
	}
	var list []Network
	err = c.call(ctx, http.MethodGet, "/networks", q, nil, &list)
	return list, err
}

// InspectNetwork describes a network by name or id. Unlike InspectContainer it
// does not wait for containers that are being started.
func (c *Client) InspectNetwork(ctx context.Context, ref string) (Network, error) {
	var n Network
	p, err := reference("network", ref)
	if err != nil {
		return n, err
	}
	err = c.call(ctx, http.MethodGet, "/networks/"+p, nil, nil, &n)
	return n, err
}

// RemoveNetwork removes a network that no running container is on. A network
// that is gone already is no error.
func (c *Client) RemoveNetwork(ctx context.Context, ref string) error {
	p, err := reference("network", ref)
	if err != nil {
		return err
	}
	err = c.call(ctx, http.MethodDelete, "/networks/"+p, nil, nil, nil)
	if IsNotFound(err) {
		return nil
	}
	return err
}

// ConnectNetwork adds a container to a network: now if it is running, else at
// its start. Nil settings leave all to the network.
func (c *Client) ConnectNetwork(ctx context.Context, network, container string, settings *EndpointSettings) error {
	p, err := reference("network", network)
	if err != nil {
		return err
	}
	body := struct {
		Container      string
		EndpointConfig *EndpointSettings `json:",omitempty"`
	}{container, settings}
	return c.call(ctx, http.MethodPost, "/networks/"+p+"/connect", nil, body, nil)
}

// DisconnectNetwork takes a container off a network; with force even one whose
// endpoint the engine has lost track of.
func (c *Client) DisconnectNetwork(ctx context.Context, network, container string, force bool) error {
	p, err := reference("network", network)
	if err != nil {
		return err
	}
	body := struct {
		Container string
		Force     bool
	}{container, force}
	return c.call(ctx, http.MethodPost, "/networks/"+p+"/disconnect", nil, body, nil)
}
