package plugin

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/tests/lab"
)

// livesEnv is how many containers TestLives has; 200 unless set.
const livesEnv = "TEST_LIVES"

// Containers come and go, ten at a time. Nothing of them stays.
func TestLives(t *testing.T) {
	t.Parallel()
	h, run := engineHost(t)
	p := startHelper(t, h, filepath.Join(t.TempDir(), "weave.db"))
	count := func() string {
		out, err := h.Output(t.Context(), "sh", "-c", "ip -o link | grep -c vethw; ls /sys/class/net/weave/brif | wc -l; docker network ls -q | wc -l")
		if err != nil && out == "" {
			t.Fatal(err)
		}
		return strings.Join(strings.Fields(out), " ")
	}
	goroutines := func() int {
		n, err := strconv.Atoi(p.ask(t, "goroutines"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	run("run", "--rm", "--net=weave", "busybox", "true") // what is made once is there
	lives := 200
	if s := os.Getenv(livesEnv); s != "" {
		var err error
		if lives, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	before, served := count(), goroutines()
	began := time.Now()
	var g errgroup.Group
	for worker := range 10 {
		g.Go(func() error {
			for i := range lives / 10 {
				name := fmt.Sprintf("life-%d-%d", worker, i)
				body := `{"Image":"busybox","Cmd":["ip","-4","-o","addr"],"HostConfig":{"NetworkMode":"weave"}}`
				if err := call(t.Context(), h, "POST", "/containers/create?name="+name, body); err != nil {
					return err
				}
				for _, c := range []string{"POST /start", "POST /wait", "DELETE "} {
					method, what, _ := strings.Cut(c, " ")
					if err := call(t.Context(), h, method, "/containers/"+name+what, ""); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d lives, 10 in parallel: %v", lives, time.Since(began).Round(time.Millisecond))
	err := lab.Wait(t.Context(), 10*time.Second, func() error {
		if after := count(); after != before {
			return fmt.Errorf("devices, ports, networks: %s, before %s", after, before)
		}
		if n := goroutines(); n > served+10 { // the engine keeps some connections
			return fmt.Errorf("%d goroutines, %d before", n, served)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if owned := p.ask(t, "owned"); owned != "map[]" {
		t.Errorf("addresses that are still owned: %s", owned)
	}
}
