package docker

import (
	"context"
	"net/http"
	"net/url"
	"strings"
)

// Container is one line of the list of containers.
type Container struct {
	ID     string `json:"Id"`
	Names  []string
	Labels map[string]string
	State  string // "running", "exited", ...
}

// Name is the container's name, without the slash that the API shows.
func (c Container) Name() string {
	for _, n := range c.Names {
		// Links add names of the form /other/alias.
		if n = strings.TrimPrefix(n, "/"); !strings.Contains(n, "/") {
			return n
		}
	}
	return ""
}

// ContainerInfo is what inspecting a container tells.
type ContainerInfo struct {
	ID    string `json:"Id"`
	Name  string // with a leading slash
	State struct {
		Running bool
		Pid     int    // 0 unless running; as the engine's host counts
		Error   string // why the last attempt to start it failed; empty if it did not
	}
	Config struct {
		Env    []string
		Labels map[string]string
	}
	HostConfig struct {
		NetworkMode   string
		RestartPolicy struct {
			Name string // "", "no", "always", "unless-stopped", "on-failure"
		}
	}
	NetworkSettings struct {
		SandboxKey string // path of the network namespace; empty unless running
		Networks   map[string]EndpointSettings
	}
}

// InspectContainer describes a container named by name, id or a prefix of its
// id. It blocks while the engine is starting that container: never call it
// where the engine waits for the caller.
func (c *Client) InspectContainer(ctx context.Context, ref string) (ContainerInfo, error) {
	var info ContainerInfo
	p, err := reference("container", ref)
	if err != nil {
		return info, err
	}
	err = c.call(ctx, http.MethodGet, "/containers/"+p+"/json", nil, nil, &info)
	return info, err
}

// ListContainers lists containers that pass all filters, such as
// {"network": {"weave"}}; with all set, stopped ones as well.
func (c *Client) ListContainers(ctx context.Context, all bool, f map[string][]string) ([]Container, error) {
	q, err := filters(f)
	if err != nil {
		return nil, err
	}
	if all {
		q.Set("all", "1")
	}
	var list []Container
	err = c.call(ctx, http.MethodGet, "/containers/json", q, nil, &list)
	return list, err
}

// RemoveContainer removes a container with its anonymous volumes, running or
// not. A container that is gone already is no error.
func (c *Client) RemoveContainer(ctx context.Context, ref string) error {
	p, err := reference("container", ref)
	if err != nil {
		return err
	}
	err = c.call(ctx, http.MethodDelete, "/containers/"+p, url.Values{"force": {"1"}, "v": {"1"}}, nil, nil)
	if IsNotFound(err) {
		return nil
	}
	return err
}

// KillContainer ends a running container's processes. One that is not running
// is no error.
func (c *Client) KillContainer(ctx context.Context, ref string) error {
	p, err := reference("container", ref)
	if err != nil {
		return err
	}
	err = c.call(ctx, http.MethodPost, "/containers/"+p+"/kill", nil, nil, nil)
	if IsNotFound(err) || IsConflict(err) {
		return nil
	}
	return err
}

// StartContainer starts a container; one that runs already is no error.
func (c *Client) StartContainer(ctx context.Context, ref string) error {
	p, err := reference("container", ref)
	if err != nil {
		return err
	}
	return c.call(ctx, http.MethodPost, "/containers/"+p+"/start", nil, nil, nil)
}
