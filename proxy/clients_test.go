package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// detach leaves a container by the keys for that; it runs on.
func detach(t *testing.T, h *lab.Host, host string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	master, tty := openTerminal(t)
	defer func() { _ = master.Close() }()
	cmd := exec.CommandContext(ctx, "docker", "-H", host, "run", "--name", "left", "-ti", "busybox", "sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err := h.Start(cmd)
	_ = tty.Close()
	if err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(master)
	if _, err := in.ReadString('#'); err != nil {
		t.Fatal(err)
	}
	_, _ = master.Write([]byte{16, 17}) // ctrl-p ctrl-q
	_, _ = io.Copy(io.Discard, in)
	if err := cmd.Wait(); err != nil {
		t.Errorf("detaching ended with %v", err)
	}
	if r := runDocker(t, h, host, "", list("inspect -f {{.State.Running}} left")); r.Stdout != "true\n" {
		t.Errorf("the container runs: %q %q", r.Stdout, r.Stderr)
	}
	_ = runDocker(t, h, host, "", list("rm -f left"))
}

// get asks on a connection of its own.
func get(ctx context.Context, socket, path string) (int, []byte, error) {
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// versions asks in each version of the API, and in some that are none.
func versions(t *testing.T, h *lab.Host, socket string) {
	ask := []string{"1.0", "1.99", "2", "x"}
	for v := 12; v <= 55; v++ {
		ask = append(ask, fmt.Sprintf("1.%d", v))
	}
	for _, v := range ask {
		for _, what := range []string{"images/busybox/json", "version", "nosuch"} {
			path := "/v" + v + "/" + what
			wantStatus, want, err := get(t.Context(), h.Path("/run/docker.sock"), path)
			status, body, proxied := get(t.Context(), socket, path)
			if err := errors.Join(err, proxied); err != nil {
				t.Fatal(err)
			}
			if status != wantStatus || !bytes.Equal(body, want) {
				t.Errorf("%s: %d %.200s\ndirect: %d %.200s", path, status, body, wantStatus, want)
			}
		}
	}
}

// large moves 100 MB in and out.
func large(t *testing.T, h *lab.Host, direct, proxied string) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	content := make([]byte, 100<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(content)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "archive.tar")
	if out, err := exec.CommandContext(t.Context(), "tar", "-C", dir, "-cf", archive, "file").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := runDocker(t, h, proxied, "", []string{"import", archive, "large"}).Err(); err != nil {
		t.Fatal(err)
	}
	save := func(host string) (list string, took time.Duration) {
		t.Helper()
		out := filepath.Join(dir, "saved.tar")
		began := time.Now()
		if err := runDocker(t, h, host, "", []string{"save", "-o", out, "large"}).Err(); err != nil {
			t.Fatal(err)
		}
		took = time.Since(began)
		f, err := os.Open(out)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		return entries(t, f), took
	}
	want, _ := save(direct) // warms the cache
	want2, tookDirect := save(direct)
	got, took := save(proxied)
	if want != want2 || got != want {
		t.Errorf("saved\n%sdirectly\n%sand\n%s", got, want, want2)
	}
	t.Logf("save of 100 MB: %v, directly %v", took, tookDirect)
	_ = runDocker(t, h, direct, "", list("rmi large"))
	if r := runDocker(t, h, proxied, "", []string{"load", "-i", filepath.Join(dir, "saved.tar")}); !strings.Contains(r.Stdout, "large") {
		t.Errorf("load: exit %d, %q %q", r.Code, r.Stdout, r.Stderr)
	}
	if again, _ := save(proxied); again != want {
		t.Errorf("loaded and saved:\n%swant\n%s", again, want)
	}
	_ = runDocker(t, h, direct, "", list("rmi large"))
}

// withConfig runs the docker command with a folder of settings of its own that
// knows the plugins of the machine.
func withConfig(t *testing.T, h *lab.Host, dir, host string, args ...string) lab.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+dir, "DOCKER_BUILDKIT=1", "BUILDX_NO_DEFAULT_ATTESTATIONS=1")
	if host != "" {
		cmd.Env = append(cmd.Env, "DOCKER_HOST="+host)
	}
	return h.RunCmd(cmd)
}

func contexts(t *testing.T, h *lab.Host, proxied string) {
	dir := t.TempDir()
	if err := withConfig(t, h, dir, "", "context", "create", "way", "--docker", "host="+proxied).Err(); err != nil {
		t.Fatal(err)
	}
	if r := withConfig(t, h, dir, "", "--context", "way", "ps", "--format", "{{.Names}}"); !strings.Contains(r.Stdout, "idle") {
		t.Errorf("exit %d, %q %q", r.Code, r.Stdout, r.Stderr)
	}
}

// pluginsEnv names the folder of the docker command's compose and buildx, which
// Debian 12 has no packages of; what needs them is tried where it is set, or
// where the engine is one that was unpacked with them.
const pluginsEnv = "DOCKER_TEST_PLUGINS"

func plugins(h *lab.Host) string {
	if dir := os.Getenv(pluginsEnv); dir != "" {
		return dir
	}
	return h.CLIPlugins()
}

// settings is a folder for the command that knows these plugins.
func settings(t *testing.T, h *lab.Host, plugin string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Symlink(plugins(h), filepath.Join(dir, "cli-plugins")); err != nil {
		t.Fatal(err)
	}
	if r := withConfig(t, h, dir, "", plugin, "version"); r.Code != 0 {
		t.Fatalf("docker %s is not in %s: %s", plugin, plugins(h), r.Stderr)
	}
	return dir
}

// compose compares what a project says in its life on both ways.
func compose(t *testing.T, h *lab.Host, direct, proxied string) {
	dir := settings(t, h, "compose")
	file := filepath.Join(t.TempDir(), "compose.yaml")
	text := "name: trial\nservices:\n  one:\n    image: busybox\n    command: sh -c 'echo said; sleep 600'\n  two:\n    image: busybox\n    command: sleep 600\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	life := func(host string) (said []string) {
		for _, args := range [][]string{
			list("up -d --quiet-pull"), list("ps --format {{.Service}}:{{.State}}"), list("exec -T one echo inside"),
			{"exec", "-T", "one", "sh", "-c", "echo err >&2; exit 3"}, list("logs --no-log-prefix one"), list("top two"), list("restart -t 0 two"),
			list("exec -T one ping -c 1 -W 5 two"), list("up -d --scale two=2"), list("ps -q"), list("down -t 0"), list("ps -a -q"),
		} {
			args = append([]string{"compose", "-f", file}, args...)
			r := withConfig(t, h, dir, host, args...)
			if wrong := strings.Contains(args[len(args)-1], "exit"); (r.Code != 0) != wrong {
				t.Errorf("%s: exit %d, %s %s", args, r.Code, r.Stdout, r.Stderr)
			}
			// Numbers are those of processes and addresses, and times.
			out := regexp.MustCompile(`[ \d]*\d[\d.:/]*| {2,}`).ReplaceAllString(same(r.Stdout), " ")
			said = append(said, fmt.Sprintf("%s: exit %d, %s", args[3], r.Code, out))
		}
		return said
	}
	want, got := life(direct), life(proxied)
	if !slices.Equal(got, want) || !strings.Contains(want[1], "two:running") || !strings.Contains(want[4], "said") {
		t.Errorf("proxied: %q\ndirect:  %q", got, want)
	}
	if r := runDocker(t, h, direct, "", list("ps -aq -f label=com.docker.compose.project=trial")); r.Stdout != "" {
		t.Errorf("left: %s", r.Stdout)
	}
}

// buildx compares builds by BuildKit on both ways: they upload a folder, secrets
// and what they are asked for over a session (/session, /grpc) on HTTP/2.
func buildx(t *testing.T, h *lab.Host, direct, proxied string) {
	dir := settings(t, h, "buildx")
	source := t.TempDir()
	for name, text := range map[string]string{
		"Dockerfile": "FROM busybox AS made\nCOPY big /big\nRUN --mount=type=secret,id=word cp /run/secrets/word /word && wc -c < /big > /lines\n" +
			"FROM scratch AS out\nCOPY --from=made /word /lines /big /\n",
		"bad":  "FROM busybox\nRUN exit 9\n",
		"word": "hidden", "big": strings.Repeat("0123456789abcdef", 1<<18),
	} {
		if err := os.WriteFile(filepath.Join(source, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	secret := "--secret=id=word,src=" + filepath.Join(source, "word")
	for _, args := range [][]string{
		{"buildx", "build", "--no-cache", "-q", "--target", "made", "-t", "bx", secret, source},
		{"run", "--rm", "bx", "cat", "/lines", "/word"},
		{"buildx", "build", "--no-cache", "-q", "--output", "type=tar,dest=-", secret, source},
		{"buildx", "build", "--no-cache", "-q", "-f", filepath.Join(source, "bad"), source},
		{"buildx", "build", "-q", "nowhere"},
		{"buildx", "du", "--filter", "type=nosuch"},
		{"buildx", "ls", "--format", "{{.Name}} {{.Status}}"},
	} {
		want, got := withConfig(t, h, dir, direct, args...), withConfig(t, h, dir, proxied, args...)
		if slices.Contains(args, "type=tar,dest=-") {
			for _, r := range []*lab.Result{&want, &got} {
				r.Stdout = entries(t, strings.NewReader(r.Stdout))
			}
		}
		if same(got.Stdout) != same(want.Stdout) || got.Code != want.Code {
			t.Errorf("%q proxied: exit %d, %.500q %.2000q\ndirect:  exit %d, %.500q %.2000q", args,
				got.Code, got.Stdout, got.Stderr, want.Code, want.Stdout, want.Stderr)
		}
	}
}

// overhead compares how long a small answer takes. What one request leaves to be
// done after it, such as another connection that is made ready, is over when the
// next begins.
func overhead(t *testing.T, direct, proxied string) {
	times := map[string][]time.Duration{}
	tick := time.NewTicker(4 * time.Millisecond)
	defer tick.Stop()
	for range 300 {
		for _, socket := range []string{direct, proxied} {
			<-tick.C
			began := time.Now()
			if _, _, err := get(t.Context(), socket, "/containers/json?all=1"); err != nil {
				t.Fatal(err)
			}
			times[socket] = append(times[socket], time.Since(began))
		}
	}
	slices.Sort(times[direct])
	slices.Sort(times[proxied])
	ratio := float64(times[proxied][150]) / float64(times[direct][150])
	t.Logf("GET /containers/json on a connection of its own, median of 300: %v, directly %v: %.2f", times[proxied][150], times[direct][150], ratio)
	// Client and proxy are one program here, and others use the machine.
	if ratio > 2 {
		t.Errorf("through the proxy a small answer takes %.2f times as long", ratio)
	}
}

// crowd has 200 clients ask at a time, and 100 go away in the middle of a
// stream; nothing of them is left.
func crowd(t *testing.T, socket string) {
	before := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			status, body, err := get(t.Context(), socket, "/containers/json?all=1")
			if err != nil || status != http.StatusOK || !bytes.Contains(body, []byte("idle")) {
				t.Errorf("%d %v", status, err)
			}
		})
	}
	wg.Wait()
	for i := range 100 {
		wg.Go(func() {
			conn, err := new(net.Dialer).DialContext(t.Context(), "unix", socket)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = conn.Close() }()
			request := "GET /events HTTP/1.1\r\nHost: docker\r\n\r\n"
			if i%2 == 0 {
				request = "POST /containers/idle/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
			}
			_, _ = io.WriteString(conn, request)
			if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	err := lab.Wait(t.Context(), 20*time.Second, func() error {
		if n := runtime.NumGoroutine(); n > before+2 {
			return fmt.Errorf("%d goroutines, %d before", n, before)
		}
		return nil
	})
	if err != nil {
		all := make([]byte, 1<<20)
		t.Errorf("%v:\n%.6000s", err, all[:runtime.Stack(all, true)])
	}
}
