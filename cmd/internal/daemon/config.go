// Package daemon puts the parts of the router together and runs them: it
// checks what it is asked for, sets up the host, serves until told to stop,
// and can put the host back as it was.
package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"weave.local/ipam"
	"weave.local/ipam/register"
	"weave.local/peer"
	"weave.local/proxy"
)

// Where things are unless told otherwise.
const (
	DefaultRunDir       = "/run/weave"
	DefaultDataDir      = "/var/lib/weave"
	DefaultPort         = 6783
	DefaultRange        = "10.32.0.0/12"
	DefaultStatusAddr   = "127.0.0.1:6782"
	DefaultDockerSocket = "unix:///var/run/docker.sock"
	DefaultPluginSocket = "/run/docker/plugins/weave.sock"
	// pluginSpec answers Docker while that socket is not there.
	pluginSpec = "/etc/docker/plugins/weave.spec"
	// StandInCommand is the command line's word for standin.Serve.
	StandInCommand = "stand-in"
)

// DefaultLease is how long a host may be without the others before it gives up
// its addresses; minLease is what there must be at least.
const (
	DefaultLease = 24 * time.Hour
	minLease     = time.Second
)

// Names of files in the run and data folders.
const (
	ControlSocket = "control.sock"
	proxySocket   = "weave.sock"
	lockFile      = "lock"
	pinDir        = "bpf"
	stateFile     = "weave.db"
	logFile       = "weave.log"
)

// Names of devices.
const (
	bridgeName = "weave"
	tapName    = "weave-sleeve"
)

// Config is all a daemon is told. Check says whether it makes sense.
type Config struct {
	Name        peer.Name // zero: the one of the last run, or a random one
	NickName    string    // empty: the host's name
	Host        netip.Addr
	Port        int
	Peers       []string
	Resume      bool
	NoDiscovery bool
	ConnLimit   int // 0: no limit

	// Password seals what goes between peers, all of which must have the
	// same; empty: all goes in clear. Trusted are subnets in which frames may
	// go in clear all the same.
	Password string
	// PasswordNext is good beside Password and preferred: the one that a change
	// leads to.
	PasswordNext string
	Trusted      []netip.Prefix

	MTU      int // of containers, bytes; 0: found by itself
	NoFastDP bool
	// NoShortcut lets all frames pass the bridge and the host's IP stack,
	// where rules of the host see them.
	NoShortcut bool

	Range         netip.Prefix // invalid: no allocation
	DefaultSubnet netip.Prefix // invalid: Range
	Init          string       // how the range is first shared; empty: by consensus
	// Lease is how long this host may be without the others before it gives up
	// its addresses; 0: for ever.
	Lease time.Duration

	RunDir, DataDir string
	StatusAddr      string // host:port; empty: none
	LogLevel        string
	LogToFile       bool // to DataDir, once the daemon is sure to start

	DockerSocket     string // empty: do without Docker
	Proxy, Plugin    bool
	ProxyListen      []string
	PluginSocket     string
	NoDefaultIPAlloc bool
	Hostnames        proxy.Hostnames
	RewriteInspect   bool
	ProxyTLS         *proxy.TLSFiles // of TCP addresses in ProxyListen; nil: none
	NoMulticastRoute bool

	// Ready is called once everything serves.
	Ready func(name peer.Name)
}

// Limits of an MTU: below, IPv6 has no room (RFC 8200 §5); above, no packet
// has a length field for it.
const (
	minMTU = 1280
	maxMTU = 65535
)

// Check returns an error that names the first value that makes no sense.
func (c *Config) Check() error {
	switch {
	case c.Port < 1 || c.Port > 65534:
		return fmt.Errorf("port %d: want 1 to 65534, since the next one is used as well", c.Port)
	case c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU):
		return fmt.Errorf("MTU %d: want %d to %d bytes", c.MTU, minMTU, maxMTU)
	case c.ConnLimit < 0:
		return fmt.Errorf("--conn-limit %d: want 0 (no limit) or more", c.ConnLimit)
	case c.Resume && len(c.Peers) > 0:
		return errors.New("--resume goes on with the peers of the last run: name no peers beside it")
	case len(c.Trusted) > 0 && c.Password == "":
		return errors.New("--trusted-subnets makes exceptions from encryption, and there is none: give --password, or leave it out")
	case c.PasswordNext != "" && c.Password == "":
		return errors.New("--password-next is the password to change to: give the one of now as --password beside it")
	case len(c.NickName) > 64:
		return fmt.Errorf("nickname %q: want at most 64 bytes", c.NickName)
	}
	if _, err := c.level(); err != nil {
		return err
	}
	if _, err := c.docker(); err != nil {
		return err
	}
	return c.checkIPAM()
}

func (c *Config) checkIPAM() error {
	if !c.Range.IsValid() {
		if c.DefaultSubnet.IsValid() || c.Init != "" {
			return errors.New("--ipalloc-default-subnet and --ipalloc-init need a range: give --ipalloc-range")
		}
		return nil
	}
	if err := usableNet("--ipalloc-range", c.Range); err != nil {
		return err
	}
	if c.DefaultSubnet.IsValid() {
		if err := usableNet("--ipalloc-default-subnet", c.DefaultSubnet); err != nil {
			return err
		}
		if !c.DefaultSubnet.Overlaps(c.Range) {
			return fmt.Errorf("--ipalloc-default-subnet %s lies outside --ipalloc-range %s", c.DefaultSubnet, c.Range)
		}
	}
	if c.Lease != 0 && (c.Lease < minLease || c.Lease > register.MaxLease) {
		return fmt.Errorf("--ipalloc-lease %v: want 0, for no lease, or %v to %v", c.Lease, minLease, register.MaxLease)
	}
	_, err := c.bootstrap()
	return err
}

func usableNet(flag string, p netip.Prefix) error {
	if !p.Addr().Is4() {
		return fmt.Errorf("%s %s: want an IPv4 range", flag, p)
	}
	if p.Bits() > 30 {
		return fmt.Errorf("%s %s: too small, want at least four addresses (/30)", flag, p)
	}
	if p.Bits() < 4 {
		return fmt.Errorf("%s %s: too large, want /4 or longer", flag, p)
	}
	return nil
}

// bootstrap reads --ipalloc-init. Without it everybody named, and this peer,
// take part in the first agreement.
func (c *Config) bootstrap() (ipam.Bootstrap, error) {
	mode, arg, hasArg := strings.Cut(c.Init, "=")
	bad := fmt.Errorf("--ipalloc-init %q: want consensus, consensus=N, seed=NAME,... or observer", c.Init)
	switch mode {
	case "", "consensus":
		if !hasArg {
			return ipam.Bootstrap{Mode: ipam.Consensus, N: len(c.Peers) + 1}, nil
		}
		n, err := strconv.Atoi(arg)
		if err != nil || n < 1 {
			return ipam.Bootstrap{}, bad
		}
		return ipam.Bootstrap{Mode: ipam.Consensus, N: n}, nil
	case "observer":
		if hasArg {
			return ipam.Bootstrap{}, bad
		}
		return ipam.Bootstrap{Mode: ipam.Observer}, nil
	case "seed":
		var names []peer.Name
		for s := range strings.SplitSeq(arg, ",") {
			n, err := peer.ParseName(s)
			if err != nil {
				return ipam.Bootstrap{}, fmt.Errorf("--ipalloc-init: %w", err)
			}
			names = append(names, n)
		}
		return ipam.Bootstrap{Mode: ipam.Seed, Seeds: names}, nil
	}
	return ipam.Bootstrap{}, bad
}

func (c *Config) level() (slog.Level, error) {
	var l slog.Level
	if c.LogLevel == "" {
		return l, nil
	}
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return l, fmt.Errorf("--log-level %q: want debug, info, warn or error", c.LogLevel)
	}
	return l, nil
}

// docker is the path of Docker's socket; empty without Docker.
func (c *Config) docker() (string, error) {
	path := strings.TrimPrefix(c.DockerSocket, "unix://")
	if path != "" && !filepath.IsAbs(path) {
		return "", fmt.Errorf("--docker-api %q: want a unix socket such as unix:///var/run/docker.sock", c.DockerSocket)
	}
	return path, nil
}

func (c *Config) run(name string) string  { return filepath.Join(c.RunDir, name) }
func (c *Config) data(name string) string { return filepath.Join(c.DataDir, name) }

// Version is the version of this program, as its build recorded it.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" || info.Main.Version == "(devel)" {
		return release
	}
	return strings.TrimPrefix(info.Main.Version, "v")
}

// release is the version of the sources.
const release = "3.0.0-dev"
