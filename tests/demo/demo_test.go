package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"weave.local/tests/lab"
	"weave.local/tests/setup"
)

// build returns the demo and the binary it is about.
func build(t *testing.T, docker bool) (demo, weave string) {
	t.Helper()
	if why := lab.Missing(docker); why != "" {
		if os.Getenv("TEST_STRICT") == "1" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	dir := t.TempDir()
	weave, err := setup.Build(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	demo = filepath.Join(dir, "demo")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", demo, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return demo, weave
}

// labs lists the folders of labs that a demo's output names.
func labs(out string) []string {
	return regexp.MustCompile(`/\S*weave-lab-\d+`).FindAllString(out, -1)
}

func TestStory(t *testing.T) {
	demo, weave := build(t, true)
	out, err := exec.CommandContext(t.Context(), demo, "--weave", weave).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		"u1# weave launch", "established fastdp", "established sleeve", "reason=",
		"docker run -d --net=weave", "WEAVE_CIDR=net:10.32.1.0/24", "100% packet loss", "u3# weave reset", "All as it should be",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q does not show in\n%s", want, out)
		}
	}
}

func TestKeep(t *testing.T) {
	demo, weave := build(t, false)
	out, err := exec.CommandContext(t.Context(), demo, "--keep", "--no-docker", "--weave", weave).CombinedOutput()
	down := exec.CommandContext(context.WithoutCancel(t.Context()), demo, "--down")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	defer func() {
		if down.Process == nil {
			_ = down.Run()
		}
	}()
	dirs := labs(string(out))
	if len(dirs) == 0 {
		t.Fatalf("no way in is told:\n%s", out)
	}
	said, err := exec.CommandContext(t.Context(), filepath.Join(dirs[0], "bin/enter"), "u2", "weave", "status", "connections").CombinedOutput()
	if err != nil || strings.Count(string(said), "established fastdp") != 2 {
		t.Errorf("%v: %s", err, said)
	}
	if said, err := exec.CommandContext(t.Context(), demo, "--keep", "--no-docker").CombinedOutput(); err == nil || !strings.Contains(string(said), "stand already") {
		t.Errorf("a second one: %v: %s", err, said)
	}
	if said, err := down.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, said)
	}
	if _, err := os.Stat(dirs[0]); err == nil {
		t.Errorf("%s stays", dirs[0])
	}
	if said, err := exec.CommandContext(t.Context(), demo, "--down").CombinedOutput(); err == nil {
		t.Errorf("there is something left to remove: %s", said)
	}
}

// TestInterrupt ends the demo in the middle of its story.
func TestInterrupt(t *testing.T) {
	demo, weave := build(t, false)
	for _, mode := range [][]string{nil, {"--keep"}} {
		cmd := exec.CommandContext(t.Context(), demo, append([]string{"--no-docker", "--weave", weave}, mode...)...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		text, buf, sent := "", make([]byte, 4096), false
		for {
			n, err := out.Read(buf)
			text += string(buf[:n])
			if !sent && strings.Contains(text, "u2# weave launch") {
				sent = true
				if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
					t.Fatal(err)
				}
			}
			if err != nil {
				break
			}
		}
		if err := cmd.Wait(); err == nil || !strings.Contains(said.String(), "nothing is left behind") {
			t.Errorf("%v: %v: %s", mode, err, said.String())
		}
		if strings.Contains(text, "weave reset") {
			t.Errorf("%v: it went on to the end", mode)
		}
	}
}

func TestFlags(t *testing.T) {
	if o, err := parse([]string{"--keep"}); err != nil || !o.keep || o.down {
		t.Errorf("%+v, %v", o, err)
	}
	if _, err := parse([]string{"keep"}); err == nil {
		t.Error("a word without dashes is taken")
	}
}
