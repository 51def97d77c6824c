// Package setup prepares a machine for the programs under tests: it installs
// the packages they need, by the list in the file packages beside it, and
// builds the binary under test.
package setup

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed packages
var list string

//go:embed unpack
var unpack string

type tool struct {
	command, pkg string
	users        []string
}

// tools parses the list.
func tools(text string) ([]tool, error) {
	var out []tool
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 3 {
			return nil, fmt.Errorf("packages: %q: want a command, a package and who needs it", strings.TrimSpace(line))
		}
		out = append(out, tool{f[0], f[1], f[2:]})
	}
	return out, nil
}

// Missing lists the packages that user (tests, bench or demo) needs and whose
// commands are not there.
func Missing(user string) ([]string, error) {
	ts, err := tools(list)
	if err != nil {
		return nil, err
	}
	return missing(ts, user, func(command string) bool {
		_, err := exec.LookPath(command)
		return err == nil
	}), nil
}

func missing(ts []tool, user string, there func(command string) bool) []string {
	var out []string
	for _, t := range ts {
		needed := slices.Contains(t.users, "*") || slices.Contains(t.users, user)
		if needed && !there(t.command) && !slices.Contains(out, t.pkg) {
			out = append(out, t.pkg)
		}
	}
	return out
}

// Install installs with apt-get what user needs and is not there yet, and
// tells on log what it does. It returns an error that names the packages where
// there is no apt-get, or no root.
func Install(ctx context.Context, user string, log io.Writer) error {
	pkgs, err := Missing(user)
	if err != nil || len(pkgs) == 0 {
		return err
	}
	names := strings.Join(pkgs, " ")
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s must be installed, which needs root", names)
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("there is no apt-get on this system: install %s by its own means", names)
	}
	if err := aptGet(ctx, log, "update", "-qq"); err != nil {
		return err
	}
	if slices.Contains(pkgs, "docker.io") && exec.CommandContext(ctx, "apt-cache", "show", "docker-cli").Run() == nil {
		pkgs = append(pkgs, "docker-cli") // newer distributions have the command apart
	}
	if err := aptGet(ctx, log, append([]string{"install", "-qq", "-y", "--no-install-recommends"}, pkgs...)...); err != nil {
		return err
	}
	if pkgs, err = Missing(user); err == nil && len(pkgs) > 0 {
		err = fmt.Errorf("apt-get installed %s, and still their commands are not found", strings.Join(pkgs, " "))
	}
	return err
}

func aptGet(ctx context.Context, log io.Writer, args ...string) error {
	fmt.Fprintln(log, "# apt-get", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Build builds the binary from the source this program was started in, as it
// is meant to be built, into dir, and returns its path.
func Build(ctx context.Context, dir string) (string, error) {
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return "", fmt.Errorf("find the source: %w", err)
	}
	path := filepath.Join(dir, "weave")
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", path, "./cmd/weave")
	cmd.Dir = strings.TrimSpace(string(root))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build ./cmd/weave: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return path, nil
}

// wireguard is the version of wireguard-go that paths are measured against: the
// newest when the bars were set.
const wireguard = "golang.zx2c4.com/wireguard@v0.0.0-20260522210424-ecfc5a8d5446"

// WireGuard returns the path of wireguard-go and what it is. It builds it with
// Go's module proxy, once, into the user's cache; where that fails, it takes the
// system's.
func WireGuard(ctx context.Context) (path, version string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", "", fmt.Errorf("cache: %w", err)
	}
	_, version, _ = strings.Cut(wireguard, "@")
	dir := filepath.Join(cache, "weave-tests", "wireguard-"+version)
	path = filepath.Join(dir, "wireguard")
	if _, err := os.Stat(path); err == nil {
		return path, wireguard, nil
	}
	cmd := exec.CommandContext(ctx, "go", "install", wireguard)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+dir, "GOFLAGS=")
	out, err := cmd.CombinedOutput()
	if err == nil {
		return path, wireguard, nil
	}
	err = fmt.Errorf("go install %s: %w: %s", wireguard, err, strings.TrimSpace(string(out)))
	path, errPath := exec.LookPath("wireguard-go")
	if errPath != nil {
		return "", "", err
	}
	said, errPath := exec.CommandContext(ctx, path, "--version").Output()
	if errPath != nil {
		return "", "", errors.Join(err, errPath)
	}
	first, _, _ := strings.Cut(string(said), "\n")
	return path, "the system's: " + first, nil
}

// Engine returns a folder with Docker of a release of Debian: engine, command,
// compose and buildx, but not runc, of which the machine's does. They are
// fetched and unpacked once, some 90 MB, into the user's cache.
func Engine(ctx context.Context, suite string) (string, error) {
	return unpacked(ctx, filepath.Join("engines", suite), suite,
		"docker.io", "docker-cli", "containerd", "docker-compose", "docker-buildx")
}

// Consul returns the path of Consul: the system's, or that of Debian 11, the
// last one that has it, fetched and unpacked once, some 15 MB, into the user's
// cache.
func Consul(ctx context.Context) (string, error) {
	if path, err := exec.LookPath("consul"); err == nil {
		return path, nil
	}
	dir, err := unpacked(ctx, "consul", "bullseye", "consul")
	return filepath.Join(dir, "usr/bin/consul"), err
}

// unpacked returns the folder of that name in the user's cache, in which packages
// of a release of Debian are unpacked.
func unpacked(ctx context.Context, name, suite string, packages ...string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cache: %w", err)
	}
	dir := filepath.Join(cache, "weave-tests", name)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	cmd := exec.CommandContext(ctx, "bash", append([]string{"-c", unpack, "unpack", suite, dir}, packages...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s of %s: %w: %s", packages[0], suite, err, strings.TrimSpace(string(out)))
	}
	return dir, nil
}
