package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// janitor is a process that outlives this one, should that be killed, and
// removes what it leaves.
type janitor struct {
	cmd   *exec.Cmd
	broom *os.File // the janitor starts when it is closed, by whatever end of this program
	words strings.Builder
}

// janitorScript waits until all is over and removes a folder and the control
// groups named after it. Control groups can go only once the last process has
// been buried.
const janitorScript = `
read -r _ || true
dir=$1 id=$2
rmgroups() {
	for g in /sys/fs/cgroup/"$id"-* /sys/fs/cgroup/*/"$id"-*; do
		[ -d "$g" ] && find "$g" -depth -type d -exec rmdir {} + 2>/dev/null
	done
	for g in /sys/fs/cgroup/"$id"-* /sys/fs/cgroup/*/"$id"-*; do
		[ -d "$g" ] && return 1
	done
	return 0
}
n=0
until rmgroups && rm -rf "$dir"; do
	n=$((n + 1))
	if [ $n -gt 100 ]; then echo "control groups or files of $id stay"; exit 1; fi
	sleep 0.1
done
`

func startJanitor(dir string) (*janitor, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer func() { _ = r.Close() }()
	j := &janitor{broom: w}
	j.cmd = &exec.Cmd{
		Path: "/bin/sh", Args: []string{"sh", "-c", janitorScript, "janitor", dir, filepath.Base(dir)},
		Stdin: r, Stdout: &j.words, Stderr: &j.words, Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := j.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("janitor: %w", err), w.Close())
	}
	return j, nil
}

// sweep lets the janitor do its work and waits for it.
func (j *janitor) sweep() error {
	_ = j.broom.Close()
	if err := j.cmd.Wait(); err != nil {
		return fmt.Errorf("lab: what is left could not be removed: %w: %s", err, &j.words)
	}
	return nil
}

// Scratch makes a folder that others may read. It goes when remove is called
// or this program ends, in whatever way.
func Scratch(pattern string) (dir string, remove func() error, err error) {
	if dir, err = os.MkdirTemp("", pattern); err != nil {
		return "", nil, fmt.Errorf("lab: folder: %w", err)
	}
	j, err := startJanitor(dir)
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("lab: %w", err), os.Remove(dir))
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", nil, errors.Join(fmt.Errorf("lab: folder: %w", err), j.sweep())
	}
	return dir, j.sweep, nil
}
