package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"weave.local/cmd/internal/daemon"
	"weave.local/peer"
)

// readyFD is the file descriptor on which a daemon started in the background
// tells its parent that it is ready, or why it gave up: one line, "ready NAME"
// or "CODE TEXT" with the exit code.
const readyFD = 3

// readyEnv marks a process as such a daemon.
const readyEnv = "WEAVE_READY_FD"

// passwordEnv and nextEnv hold the passwords for those who do not give --password
// and --password-next.
const (
	passwordEnv = "WEAVE_PASSWORD"
	nextEnv     = "WEAVE_PASSWORD_NEXT"
)

type launchFlags struct {
	cfg        daemon.Config
	name       string
	host       string
	rng        string
	subnet     string
	init       string
	trusted    string
	foreground bool
	noDNS      bool
	tls        tlsFlags
}

const launchHelp = `Start the router on this host and return when it is ready, printing its peer
name. Peers are names or addresses, with :port where it is not the usual one;
one that is up is enough to find all others. Without any, those of the last
run are taken up again.

Exit status: 0 ready, 1 not started, 3 already running.

Ports: TCP 6783 (control), UDP 6783 (sleeve), UDP 6784 (VXLAN) must pass between
hosts; --port N moves them to N, N and N+1.`

func launchCommand(e *env) *cobra.Command {
	f := &launchFlags{}
	c := &cobra.Command{
		Use:   "launch [flags] [peer...]",
		Short: "Start the router on this host",
		Long:  launchHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := f.config(e, args)
			if err != nil {
				return err
			}
			_ = os.Unsetenv(passwordEnv) // nobody we start needs them
			_ = os.Unsetenv(nextEnv)
			if os.Getenv(readyEnv) != "" {
				return serveBackground(cmd.Context(), cfg)
			}
			if err := needRoot(); err != nil {
				return err
			}
			if hello, err := e.client().Hello(cmd.Context()); err == nil {
				return &exitError{exitAlreadyRunning, fmt.Errorf("already running (pid %d, peer %s)", hello.PID, hello.Name)}
			}
			if f.foreground {
				cfg.Ready = func(name peer.Name) { fmt.Fprintln(e.out, name); daemon.NotifySystemd() }
				return alreadyRunning(daemon.Run(cmd.Context(), cfg, nil))
			}
			return startBackground(cmd.Context(), e, cfg.Password, cfg.PasswordNext)
		},
	}
	f.register(c)
	return c
}

func (f *launchFlags) register(c *cobra.Command) {
	fs := c.Flags()
	fs.StringVar(&f.name, "name", "", "peer name, six octets such as 7a:0b:1c:2d:3e:4f (default: the one of the last run, or a random one)")
	fs.StringVar(&f.cfg.NickName, "nickname", "", "name shown to people (default: the host name)")
	fs.StringVar(&f.host, "host", "", "address to listen on (default: all)")
	fs.IntVar(&f.cfg.Port, "port", envInt("WEAVE_PORT", daemon.DefaultPort), "control port; VXLAN uses the next one")
	fs.BoolVar(&f.cfg.NoDiscovery, "no-discovery", false, "connect only to the peers named, not to those they know")
	fs.BoolVar(&f.cfg.Resume, "resume", false, "connect to the peers of the last run")
	fs.IntVar(&f.cfg.ConnLimit, "conn-limit", 200, "links at most; 0 for no limit")
	fs.IntVar(&f.cfg.MTU, "mtu", envInt("WEAVE_MTU", 0), "MTU of containers in bytes (default: what the underlay leaves room for)")
	fs.BoolVar(&f.cfg.NoFastDP, "no-fastdp", os.Getenv("WEAVE_NO_FASTDP") != "", "use only the userspace data path")
	fs.BoolVar(&f.cfg.NoShortcut, "no-shortcut", os.Getenv("WEAVE_NO_SHORTCUT") != "", "let all frames pass the bridge and the host's IP stack, for rules that must see each")
	fs.StringVar(&f.rng, "ipalloc-range", daemon.DefaultRange, `range to allocate addresses from; "" for none`)
	fs.StringVar(&f.subnet, "ipalloc-default-subnet", "", "subnet of those who name none (default: the range)")
	fs.DurationVar(&f.cfg.Lease, "ipalloc-lease", daemon.DefaultLease, "how long a host may be without a majority before its containers are cut off and others take over its addresses; 0: for ever, until weave rmpeer")
	fs.StringVar(&f.init, "ipalloc-init", "", "how the range is first shared: consensus[=peers], seed=name,..., observer (default: consensus of the peers named and this one)")
	fs.BoolVar(&f.noDNS, "no-dns", false, "no name service (there is none yet: accepted for scripts that say so)")
	fs.StringVar(&f.cfg.Password, "password", os.Getenv(passwordEnv), "encrypt all that goes between peers; all need the same (better given as "+passwordEnv+": others on this host can read command lines)")
	fs.StringVar(&f.cfg.PasswordNext, nextFlag, os.Getenv(nextEnv), "with --password: the password to change to, good beside it (better given as "+nextEnv+"); see 'weave help rotate-password'")
	fs.Lookup("password").DefValue = "" // not for help texts
	fs.Lookup(nextFlag).DefValue = ""
	fs.StringVar(&f.trusted, "trusted-subnets", "", "subnets in which frames may go in clear in spite of a password, such as 10.0.0.0/8,192.0.2.0/24; both ends must say so")
	fs.StringVar(&f.cfg.DataDir, "data-dir", daemon.DefaultDataDir, "folder of what must survive a restart")
	fs.StringVar(&f.cfg.StatusAddr, "status-addr", envString("WEAVE_STATUS_ADDR", daemon.DefaultStatusAddr), `address of read-only status and metrics; "" for none`)
	fs.StringVar(&f.cfg.DockerSocket, "docker-api", daemon.DefaultDockerSocket, `Docker's unix socket; "" to do without Docker`)
	fs.BoolVar(&f.cfg.Proxy, "proxy", true, "serve the Docker API proxy")
	fs.StringArrayVarP(&f.cfg.ProxyListen, "docker-host", "H", nil, "where the proxy listens besides its own socket: unix path or tcp address (repeatable)")
	fs.BoolVar(&f.cfg.Plugin, "plugin", true, "serve the Docker network driver")
	fs.StringVar(&f.cfg.PluginSocket, "plugin-socket", daemon.DefaultPluginSocket, "socket of the network driver")
	fs.BoolVar(&f.cfg.NoDefaultIPAlloc, "no-default-ipalloc", false, "the proxy leaves containers without WEAVE_CIDR alone")
	fs.StringVar(&f.cfg.Hostnames.FromLabel, "hostname-from-label", "", "the proxy takes containers' host names from this label, where it is set, else from their names")
	fs.StringVar(&f.cfg.Hostnames.Match, "hostname-match", "", "regular expression to replace in a container's name to get its host name")
	fs.StringVar(&f.cfg.Hostnames.Replacement, "hostname-replacement", "", "what --hostname-match is replaced by; $1 for a group")
	fs.BoolVar(&f.cfg.RewriteInspect, "rewrite-inspect", false, "the proxy shows the weave address as the container's own")
	f.tls.register(c)
	fs.BoolVar(&f.cfg.NoMulticastRoute, "no-multicast-route", false, "do not route multicast over the network in containers")
	fs.StringVar(&f.cfg.LogLevel, "log-level", "info", "debug, info, warn or error")
	fs.BoolVar(&f.foreground, "foreground", false, "stay in the foreground, for service managers and containers")
}

func envString(key, def string) string {
	if v, ok := os.LookupEnv(key); ok {
		return v
	}
	return def
}

// envInt reads a number from the environment; what is no number is kept as a
// value that the check of the flag then names.
func envInt(key string, def int) int {
	v := os.Getenv(key)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		return -1
	}
	return n
}

func (f *launchFlags) config(e *env, peers []string) (daemon.Config, error) {
	cfg := f.cfg
	cfg.RunDir, cfg.Peers = e.runDir, peers
	if f.name != "" {
		name, err := peer.ParseName(f.name)
		if err != nil {
			return cfg, fmt.Errorf("--name: %w", err)
		}
		cfg.Name = name
	}
	if f.host != "" {
		a, err := netip.ParseAddr(f.host)
		if err != nil {
			return cfg, fmt.Errorf("--host %q: want an address of this host, such as 192.0.2.1", f.host)
		}
		cfg.Host = a
	}
	for s := range strings.SplitSeq(f.trusted, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		p, err := flagPrefix("--trusted-subnets", s)
		if err != nil {
			return cfg, err
		}
		cfg.Trusted = append(cfg.Trusted, p)
	}
	var err error
	if cfg.Range, err = flagPrefix("--ipalloc-range", f.rng); err != nil {
		return cfg, err
	}
	if cfg.DefaultSubnet, err = flagPrefix("--ipalloc-default-subnet", f.subnet); err != nil {
		return cfg, err
	}
	cfg.ProxyTLS = f.tls.files()
	cfg.Init = f.init
	return cfg, cfg.Check()
}

func flagPrefix(flag, s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("%s %q: want a range such as 10.32.0.0/12", flag, s)
	}
	if p != p.Masked() {
		return p, fmt.Errorf("%s %s: has host bits set; did you mean %s?", flag, s, p.Masked())
	}
	return p, nil
}

func alreadyRunning(err error) error {
	if errors.Is(err, daemon.ErrAlreadyRunning) {
		return &exitError{exitAlreadyRunning, err}
	}
	return err
}

// withoutPassword is a command line without passwords, which the kernel would
// show to everybody for as long as the daemon runs.
func withoutPassword(args []string) []string {
	var out []string
	for i := 0; i < len(args); i++ {
		switch flag, _, whole := strings.Cut(args[i], "="); {
		case flag != "--password" && flag != "--"+nextFlag:
			out = append(out, args[i])
		case !whole:
			i++
		}
	}
	return out
}

// startBackground runs this very command again, detached, and waits for its
// word.
func startBackground(ctx context.Context, e *env, password, next string) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer func() { _ = r.Close() }()
	// Not CommandContext: the daemon must outlive this command.
	child := &exec.Cmd{
		Path:        exe,
		Args:        withoutPassword(os.Args),
		Env:         append(os.Environ(), fmt.Sprintf("%s=%d", readyEnv, readyFD), passwordEnv+"="+password, nextEnv+"="+next),
		ExtraFiles:  []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
		Dir:         "/",
	}
	if err := child.Start(); err != nil {
		return fmt.Errorf("start the daemon: %w", err)
	}
	_ = w.Close()
	stop := context.AfterFunc(ctx, func() { _ = child.Process.Signal(syscall.SIGTERM) })
	defer stop()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		_ = child.Wait()
		return fmt.Errorf("the daemon ended before it was ready (%s)", child.ProcessState)
	}
	word, text, _ := strings.Cut(strings.TrimSpace(line), " ")
	if word == "ready" {
		fmt.Fprintln(e.out, text)
		return child.Process.Release()
	}
	_ = child.Wait()
	code, err := strconv.Atoi(word)
	if err != nil {
		return fmt.Errorf("the daemon said %q", line)
	}
	return &exitError{code, errors.New(text)}
}

// serveBackground is the other end of startBackground.
func serveBackground(ctx context.Context, cfg daemon.Config) error {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	if err != nil {
		return fmt.Errorf("%s: %w", readyEnv, err)
	}
	syscall.CloseOnExec(fd)
	parent := os.NewFile(uintptr(fd), "ready")
	_ = os.Unsetenv(readyEnv)
	told := false
	cfg.Ready = func(name peer.Name) {
		told = true
		fmt.Fprintln(parent, "ready", name)
		_ = parent.Close()
	}
	cfg.LogToFile = true
	err = alreadyRunning(daemon.Run(ctx, cfg, nil))
	if err != nil && !told {
		code := exitFailure
		if exit := (*exitError)(nil); errors.As(err, &exit) {
			code = exit.code
		}
		fmt.Fprintln(parent, code, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return err
}
