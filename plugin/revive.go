package plugin

import (
	"context"
	"strings"

	"golang.org/x/sync/errgroup"

	"weave.local/plugin/standin"
	"weave.local/proxy/docker"
)

// parallelStarts is how many containers are started at a time.
const parallelStarts = 4

// revive starts the containers that the engine gave up on because of us: those
// with a restart policy, on networks of the driver, whose last start failed
// since the driver was not there. The engine tries that once, when it starts
// itself.
func (p *Plugin) revive(ctx context.Context) error {
	networks, err := p.cfg.Docker.ListNetworks(ctx, map[string][]string{"driver": {docker.Driver}})
	if err != nil || len(networks) == 0 {
		return err
	}
	f := map[string][]string{"status": {"exited", "created"}}
	for _, n := range networks {
		f["network"] = append(f["network"], n.ID, n.Name)
	}
	list, err := p.cfg.Docker.ListContainers(ctx, true, f)
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(parallelStarts)
	for _, c := range list {
		g.Go(func() error {
			p.reviveOne(ctx, c)
			return nil
		})
	}
	return g.Wait()
}

func (p *Plugin) reviveOne(ctx context.Context, c docker.Container) {
	ctx, cancel := context.WithTimeout(ctx, dockerLimit)
	defer cancel()
	info, err := p.cfg.Docker.InspectContainer(ctx, c.ID)
	if err != nil || info.State.Running || !givenUp(info.HostConfig.RestartPolicy.Name, info.State.Error) {
		return
	}
	p.cfg.Log.Info("plugin: container is started, its network is back", "container", c.Name(), "failed", info.State.Error)
	if err := p.cfg.Docker.StartContainer(ctx, c.ID); err != nil {
		p.cfg.Log.Warn("plugin: start of a container whose network is back", "container", c.Name(), "err", err)
	}
}

// givenUp says whether the engine would have a container run, but for an
// error that says our driver was not there.
func givenUp(policy, failure string) bool {
	switch policy {
	case "always", "unless-stopped", "on-failure":
	default:
		return false
	}
	for _, s := range []string{
		"/plugins/" + docker.Driver + ".sock", // nobody answers
		standin.NotRunning,
		`plugin "` + docker.Driver + `" not found`,
		"plugin " + docker.Driver + " not found",
		"NetworkDriver.", "IpamDriver.", // an answer of ours
	} {
		if strings.Contains(failure, s) {
			return true
		}
	}
	return false
}
