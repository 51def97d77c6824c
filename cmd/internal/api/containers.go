package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"weave.local/proxy/docker"
	"weave.local/router/attach"
)

// driverName is the name of our network driver in Docker.
const driverName = "weave"

// target turns the name of a container or the path of a namespace into what
// can be attached.
func (s *Server) target(ctx context.Context, req AttachRequest) (attach.Target, error) {
	t := attach.Target{ID: req.NetNS, NetNS: req.NetNS, NoMulticastRoute: req.NoMulticastRoute, AnySource: req.AnySource}
	switch {
	case req.NetNS != "" && req.Container != "":
		return t, badRequest(errors.New("name a container or a network namespace, not both"))
	case req.NetNS != "":
		return t, nil
	case req.Container == "":
		return t, badRequest(errors.New("no container named"))
	case s.cfg.Docker == nil:
		return t, badRequest(errors.New("there is no Docker here (--docker-api): name a network namespace with --netns"))
	}
	info, err := s.cfg.Docker.InspectContainer(ctx, req.Container)
	if docker.IsNotFound(err) {
		return t, &statusError{http.StatusNotFound, fmt.Errorf("no container is named %q", req.Container)}
	}
	if err != nil {
		return t, fmt.Errorf("container %s: %w", req.Container, err)
	}
	if !info.State.Running || info.State.Pid == 0 {
		return t, badRequest(fmt.Errorf("container %s is not running", req.Container))
	}
	if info.HostConfig.NetworkMode == "host" {
		return t, badRequest(fmt.Errorf("container %s uses the host's network: give the host an address with 'weave expose'", req.Container))
	}
	t.ID = info.ID
	t.AnySource = t.AnySource || docker.AllowsAnySource(info.Config.Labels)
	t.NetNS = fmt.Sprintf("/proc/%d/ns/net", info.State.Pid)
	return t, nil
}

// containerID is the full id of a container, or "" when Docker knows none of
// that name.
func (s *Server) containerID(ctx context.Context, name string) string {
	if s.cfg.Docker == nil {
		return ""
	}
	info, err := s.cfg.Docker.InspectContainer(ctx, name)
	if err != nil {
		return ""
	}
	return info.ID
}

// attachments lists what is attached, container by container: several
// endpoints of one container make one line.
func (s *Server) attachments(ctx context.Context) []Attachment {
	owner := s.endpointOwners(ctx)
	var out []Attachment
	at := make(map[string]int)
	for _, a := range s.cfg.Attach.List() {
		id := a.ID
		if c, ok := owner[id]; ok && a.Kind == attach.KindEndpoint {
			id = c
		}
		i, seen := at[id]
		if !seen {
			i = len(out)
			at[id] = i
			out = append(out, Attachment{ID: id, MAC: a.MAC.String()})
		}
		for _, p := range a.Addrs {
			out[i].CIDRs = append(out[i].CIDRs, p.String())
		}
	}
	return out
}

// endpointOwners tells which container each endpoint of Docker belongs to.
// Without Docker, endpoints stand for themselves.
func (s *Server) endpointOwners(ctx context.Context) map[string]string {
	owner := make(map[string]string)
	if s.cfg.Docker == nil || !s.cfg.Plugin {
		return owner
	}
	endpoints := 0
	for _, a := range s.cfg.Attach.List() {
		if a.Kind == attach.KindEndpoint {
			endpoints++
		}
	}
	if endpoints == 0 {
		return owner
	}
	networks, err := s.cfg.Docker.ListNetworks(ctx, map[string][]string{"driver": {driverName}})
	if err != nil {
		s.cfg.Log.Warn("networks of Docker", "err", err)
		return owner
	}
	for _, n := range networks {
		full, err := s.cfg.Docker.InspectNetwork(ctx, n.ID)
		if err != nil {
			s.cfg.Log.Warn("network of Docker", "name", n.Name, "err", err)
			continue
		}
		for container, e := range full.Containers {
			owner[e.EndpointID] = container
		}
	}
	return owner
}
