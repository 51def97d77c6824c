package cli

import (
	"bytes"
	"strings"
	"testing"
)

// run runs a command line against a run folder in which no daemon is.
func run(t *testing.T, args ...string) (out, errOut string, code int) {
	t.Helper()
	t.Setenv("WEAVE_RUN_DIR", t.TempDir())
	var o, e bytes.Buffer
	code = Main(args, &o, &e)
	return o.String(), e.String(), code
}

// TestBadInputIsOneClearLine checks that bad input is refused with exit code 1
// and one line that names the bad thing.
func TestBadInputIsOneClearLine(t *testing.T) {
	for _, c := range []struct{ args, names string }{
		{"frobnicate", "frobnicate"},
		{"launch --frobnicate", "--frobnicate"},
		{"launch --port 0", "port 0"},
		{"launch --port 99999", "port 99999"},
		{"launch --mtu 100", "MTU 100"},
		{"launch --name 1:2", "1:2"},
		{"launch --host nonsense", "nonsense"},
		{"launch --ipalloc-range 10.32.0.1/12", "did you mean 10.32.0.0/12"},
		{"launch --ipalloc-range ten", "ten"},
		{"launch --ipalloc-range 10.32.0.0/31", "too small"},
		{"launch --ipalloc-default-subnet 10.99.0.0/24", "outside"},
		{"launch --ipalloc-init whatever", "whatever"},
		{"launch --ipalloc-init consensus=0", "consensus=0"},
		{"launch --password secret --trusted-subnets 10.1", "10.1"},
		{"launch --trusted-subnets 10.0.0.0/8", "--password"},
		{"launch --password-next new", "--password"},
		{"rotate-password", "--password-next"},
		{"rotate-password --finish --password-next new", "not both"},
		{"launch --log-level loud", "loud"},
		{"launch --resume host2", "--resume"},
		{"status nonsense", "nonsense"},
		{"connect", "no peer"},
		{"forget", "forget"},
		{"attach", "no container"},
		{"attach 10.32.0.1 c", "10.32.0.1"},
		{"attach --netns /x y", "\"y\""},
		{"expose 10.32.0.1", "10.32.0.1"},
		{"env --restore", "ORIG_DOCKER_HOST"},
		{"prime extra", "prime"},
	} {
		t.Run(c.args, func(t *testing.T) {
			out, errOut, code := run(t, strings.Fields(c.args)...)
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if out != "" {
				t.Errorf("output %q, want none", out)
			}
			if !strings.Contains(errOut, c.names) {
				t.Errorf("error %q does not name %q", errOut, c.names)
			}
			if strings.Count(errOut, "\n") != 1 || !strings.HasPrefix(errOut, "weave: ") {
				t.Errorf("error %q, want one line that begins with weave:", errOut)
			}
		})
	}
}

func TestWithoutDaemon(t *testing.T) {
	for _, args := range []string{"status", "status connections", "report", "ps", "connect a", "expose", "hide", "rmpeer x", "prime", "config"} {
		_, errOut, code := run(t, strings.Fields(args)...)
		if code != 1 || !strings.Contains(errOut, "not running") {
			t.Errorf("%s: exit code %d, error %q; want 1 and the hint that weave is not running", args, code, errOut)
		}
	}
	for _, args := range []string{"stop", "env"} {
		out, errOut, code := run(t, args)
		if code != 0 || out != "" || !strings.Contains(errOut, "not running") {
			t.Errorf("%s: exit code %d, output %q, error %q; want 0 and a hint on standard error", args, code, out, errOut)
		}
	}
}

func TestVersionWithoutDaemon(t *testing.T) {
	out, _, code := run(t, "version")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != 0 || len(lines) != 2 || !strings.HasPrefix(lines[0], "weave script ") || !strings.HasPrefix(lines[1], "weave ") {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

// TestEveryCommandHasHelp checks that each command explains itself.
func TestEveryCommandHasHelp(t *testing.T) {
	root := newRoot(&env{})
	for _, c := range root.Commands() {
		out, errOut, code := run(t, "help", c.Name())
		if code != 0 || errOut != "" || len(strings.Split(out, "\n")) < 4 {
			t.Errorf("help %s: exit code %d, error %q, output %q", c.Name(), code, errOut, out)
		}
		if c.Short == "" {
			t.Errorf("%s has no summary", c.Name())
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		out, errOut, code := run(t, "completion", shell)
		if code != 0 || errOut != "" || !strings.Contains(out, "weave") {
			t.Errorf("completion %s: exit code %d, error %q, %d bytes", shell, code, errOut, len(out))
		}
	}
}

// The password of a daemon shows neither in its command line nor in help.
func TestPasswordStaysHidden(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"weave launch --password x host2", "weave launch host2"},
		{"weave launch --password=x host2", "weave launch host2"},
		{"weave launch host2 --password", "weave launch host2"},
		{"weave launch --password=x --password-next y --password-next=z host2", "weave launch host2"},
		{"weave launch --port 7000 --password-like", "weave launch --port 7000 --password-like"},
	} {
		if got := strings.Join(withoutPassword(strings.Fields(c.args)), " "); got != c.want {
			t.Errorf("%s becomes %s, want %s", c.args, got, c.want)
		}
	}
	t.Setenv(passwordEnv, "hush-hush")
	t.Setenv(nextEnv, "hush-hush")
	if out, _, _ := run(t, "help", "rotate-password"); strings.Contains(out, "hush") {
		t.Errorf("help shows %s", out)
	}
	if out, _, _ := run(t, "help", "launch"); strings.Contains(out, "hush") || !strings.Contains(out, "--trusted-subnets") {
		t.Errorf("help shows %s", out)
	}
}
