package lab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// writeImage writes busybox:latest as an archive for `docker load`: one layer
// with the machine's static busybox. All times are zero, so that the image has
// the same id on every host.
func writeImage(path string) error {
	layer, err := imageLayer()
	if err != nil {
		return err
	}
	sum := sha256.Sum256(layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"created":      time.Unix(0, 0).UTC(),
		"config": map[string]any{
			"Env": []string{"PATH=/bin"},
			"Cmd": []string{"sh"},
			// As process 1 most programs ignore SIGTERM, and a stop would
			// take ten seconds.
			"StopSignal": "SIGKILL",
		},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(sum[:])}},
		"history": []map[string]any{{"created": time.Unix(0, 0).UTC()}},
	})
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	id := sha256.Sum256(config)
	name := hex.EncodeToString(id[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": name, "RepoTags": []string{"busybox:latest"}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range []struct {
		name string
		data []byte
	}{{"manifest.json", manifest}, {name, config}, {"layer.tar", layer}} {
		if err := addFile(w, f.name, 0o644, f.data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return os.WriteFile(path, out.Bytes(), 0o600)
}

func imageLayer() ([]byte, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	if err := mustBeStatic(path); err != nil {
		return nil, err
	}
	binary, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	var errs []error
	for _, dir := range []string{"bin", "dev", "etc", "proc", "root", "sys", "usr", "var"} {
		errs = append(errs, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}))
	}
	errs = append(errs,
		w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}),
		addFile(w, "bin/busybox", 0o755, binary),
		addFile(w, "etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\n")),
		addFile(w, "etc/group", 0o644, []byte("root:x:0:\n")),
	)
	links := map[string]string{"sbin": "bin", "usr/bin": "../bin", "usr/sbin": "../bin"}
	for _, name := range []string{"sbin", "usr/bin", "usr/sbin"} {
		errs = append(errs, addLink(w, name, links[name]))
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet != "busybox" {
			errs = append(errs, addLink(w, "bin/"+applet, "busybox"))
		}
	}
	errs = append(errs, w.Close())
	return out.Bytes(), errors.Join(errs...)
}

func addFile(w *tar.Writer, name string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return nil
}

func addLink(w *tar.Writer, name, to string) error {
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777})
}

// mustBeStatic refuses a program that needs libraries: the image has none.
func mustBeStatic(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer func() { _ = f.Close() }()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is not static: install busybox-static", path)
		}
	}
	return nil
}
