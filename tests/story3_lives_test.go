package tests

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"weave.local/tests/lab"
)

// livesEnv is how many containers TestLives has; 20 unless set.
const livesEnv = "TEST_LIVES"

// Containers come and go, ten at a time, in turn by the plugin and by the proxy.
// The first instruction of each sees its address, and nothing of them stays.
func TestLives(t *testing.T) {
	lives := 20
	if s := os.Getenv(livesEnv); s != "" {
		var err error
		if lives, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	l := build(t, lab.Config{Docker: true, Hosts: []string{"u1"}})
	h := l.Host("u1")
	launch(t, h, "--no-dns")
	life := func(i int) error {
		way := []string{"docker", "run", "--net=weave"}
		if i%2 == 1 {
			way = []string{"docker", "-H", proxySocket, "run"}
		}
		said, err := h.Output(t.Context(), append(way, "--rm", "busybox", "ip", "-4", "-o", "addr")...)
		if err == nil && !strings.Contains(said, "ethwe") {
			err = fmt.Errorf("life %d sees\n%s", i, said)
		}
		return err
	}
	// What is made once is there, then.
	for i := range 2 {
		if err := life(i); err != nil {
			t.Fatal(err)
		}
	}
	goroutines := func() int {
		m := regexp.MustCompile(`(?m)^go_goroutines (\d+)$`).FindStringSubmatch(must(t, h, "curl", "-s", "http://127.0.0.1:6782/metrics"))
		if m == nil {
			t.Fatal("no go_goroutines in the metrics")
		}
		n, _ := strconv.Atoi(m[1])
		return n
	}
	left := func() string {
		return must(t, h, "sh", "-c", `ip -o link | grep -c vethw; ls /sys/class/net/weave/brif | wc -l; docker network ls -q | wc -l; weave ps; weave status ipam | grep -o '([0-9]* active)'`)
	}
	before, served := left(), goroutines()
	began := time.Now()
	var g errgroup.Group
	for worker := range 10 {
		g.Go(func() error {
			for i := worker; i < lives; i += 10 {
				if err := life(i/10 + worker); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	within(t, patience, "all is as before", func() error {
		if after := left(); after != before {
			return fmt.Errorf("left:\n%s\nbefore:\n%s", after, before)
		}
		if n := goroutines(); n > served+10 { // connections that are kept for a while
			return fmt.Errorf("%d goroutines, %d before", n, served)
		}
		return nil
	})
	t.Logf("%d lives, 10 in parallel: %v; goroutines %d, before %d", lives, took.Round(time.Millisecond), goroutines(), served)
}
