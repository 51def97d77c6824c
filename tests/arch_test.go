package tests

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "weave.local"

// Sizes above which a part is to be taken apart. A file counts all its lines,
// a package those that hold code: comments are not what makes it large.
const (
	maxFileLines    = 500
	maxPackageLines = 2000
)

// floors lists the packages from the ground up. A package may import what
// stands on a lower floor, nothing beside it and nothing above. What helps
// only tests stands right above what it is about.
func floors() [][]string {
	return [][]string{
		{"ipam/uptime", "router/frame", "router/turns"},
		{"peer", "peer/state", "peer/target", "ipam/space", "router/seal", "router/netdev", "router/firewall", "router/bpf", "router/tap", "proxy/docker", "proxy/unixsock", "plugin/standin", "tests/lab", "tests/memnet", "tests/setup"},
		{"router/netdev/netdevtest", "peer/dialer", "peer/handshake", "peer/linkstate"},
		{"ipam/register", "peer/link", "router/overlay"},
		{"ipam/message", "router/overlay/overlaytest"},
		{"peer/gossip", "router/fastdp", "router/sleeve"},
		{"ipam", "router", "router/userdp"},
		{"router/attach"},
		{"proxy", "plugin", "cmd/internal/api"},
		{"cmd/internal/daemon"},
		{"cmd/internal/cli"},
		{"cmd/weave", "tests", "tests/demo", "tests/bench", "tests/sim"},
	}
}

// owners lists imports that one package wraps for all others.
func owners() map[string][]string {
	return map[string][]string{
		"go.etcd.io/bbolt":                     {"peer/state"},
		"github.com/hashicorp/memberlist":      {"peer/gossip"},
		"github.com/hashicorp/yamux":           {"peer/link"},
		"github.com/vishvananda/netlink":       {"router/netdev"},
		"github.com/vishvananda/netns":         {"router/netdev"},
		"github.com/cilium/ebpf":               {"router/bpf"},
		"github.com/flynn/noise":               {"router/seal"},
		"golang.org/x/crypto":                  {"router/seal"},
		"github.com/coreos/go-iptables":        {"router/firewall"},
		"github.com/docker/go-plugins-helpers": {"plugin"},
		"github.com/spf13/cobra":               {"cmd/internal/cli"},
		"github.com/prometheus/client_golang":  {"cmd/internal/api"},
		"net/http/pprof":                       {},
		"encoding/gob":                         {},
	}
}

// source is one parsed file of the repository.
type source struct {
	path string // from the root, with slashes
	pkg  string // its folder
	fset *token.FileSet
	file *ast.File
	text []byte
}

func (s *source) test() bool      { return strings.HasSuffix(s.path, "_test.go") }
func (s *source) generated() bool { return ast.IsGenerated(s.file) }

// sources parses the files themselves: a go command would answer from a cache.
func sources(t *testing.T) []*source {
	t.Helper()
	var out []*source
	err := filepath.WalkDir("..", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && p != ".." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		s := &source{text: text, fset: token.NewFileSet()}
		if s.path, err = filepath.Rel("..", p); err != nil {
			return err
		}
		s.path = filepath.ToSlash(s.path)
		s.pkg = path.Dir(s.path)
		if s.file, err = parser.ParseFile(s.fset, s.path, text, parser.ParseComments); err != nil {
			return err
		}
		out = append(out, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 50 {
		t.Fatalf("only %d files found: this is not the repository", len(out))
	}
	return out
}

func (s *source) imports(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, i := range s.file.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func TestFloors(t *testing.T) {
	floor := map[string]int{}
	for i, pkgs := range floors() {
		for _, p := range pkgs {
			floor[p] = i
		}
	}
	seen := map[string]bool{}
	for _, s := range sources(t) {
		own, known := floor[s.pkg]
		if !known {
			t.Errorf("%s: package %s has no floor: give it one in this test", s.path, s.pkg)
			continue
		}
		seen[s.pkg] = true
		for _, imported := range s.imports(t) {
			p, ours := strings.CutPrefix(imported, module+"/")
			if !ours || p == s.pkg {
				continue
			}
			f, known := floor[p]
			switch {
			case !known:
				t.Errorf("%s imports %s, which has no floor", s.path, p)
			case f < own:
			case s.test() && strings.HasSuffix(p, "test"):
				// Helpers for tests may stand above whom they help.
			default:
				t.Errorf("%s (floor %d) imports %s (floor %d): imports go down only", s.path, own, p, f)
			}
		}
	}
	for p := range floor {
		if !seen[p] && p != "tests" {
			t.Errorf("floor of %s: there is no such package", p)
		}
	}
}

func TestOwnersOfImports(t *testing.T) {
	for _, s := range sources(t) {
		if s.test() {
			continue
		}
		for _, imported := range s.imports(t) {
			for heavy, owner := range owners() {
				if (imported == heavy || strings.HasPrefix(imported, heavy+"/")) && !slices.Contains(owner, s.pkg) {
					t.Errorf("%s imports %s, which is for %s only", s.path, imported, strings.Join(owner, " "))
				}
			}
		}
	}
}

func TestPackageComments(t *testing.T) {
	has := map[string]bool{}
	for _, s := range sources(t) {
		if s.test() {
			continue
		}
		want := "Package " + s.file.Name.Name + " "
		if s.file.Name.Name == "main" {
			want = "Command " + path.Base(s.pkg) + " "
		}
		has[s.pkg] = has[s.pkg] || s.file.Doc != nil && strings.HasPrefix(s.file.Doc.Text(), want)
	}
	for pkg, ok := range has {
		if !ok {
			t.Errorf("%s: no package comment that begins with \"Package NAME ...\" (\"Command NAME ...\" for a program)", pkg)
		}
	}
}

func TestSizes(t *testing.T) {
	sizes := map[string]int{}
	for _, s := range sources(t) {
		if s.generated() {
			continue
		}
		if n := strings.Count(string(s.text), "\n"); n > maxFileLines {
			t.Errorf("%s has %d lines, want at most %d", s.path, n, maxFileLines)
		}
		if !s.test() {
			sizes[s.pkg] += s.codeLines()
		}
	}
	for pkg, n := range sizes {
		if n > maxPackageLines {
			t.Errorf("package %s has %d lines of code, want at most %d", pkg, n, maxPackageLines)
		}
	}
}

// codeLines counts the lines on which there is something besides comments.
func (s *source) codeLines() int {
	var sc scanner.Scanner
	fset := token.NewFileSet()
	file := fset.AddFile(s.path, fset.Base(), len(s.text))
	sc.Init(file, s.text, nil, 0)
	lines := map[int]bool{}
	for {
		pos, tok, lit := sc.Scan()
		if tok == token.EOF {
			return len(lines)
		}
		first := file.Line(pos)
		for l := range 1 + strings.Count(strings.TrimSuffix(lit, "\n"), "\n") {
			lines[first+l] = true
		}
	}
}

// TestSkipsAreStrict looks for tests that skip: where nothing may be skipped,
// the function that skips must fail instead. Benchmarks are no checks.
func TestSkipsAreStrict(t *testing.T) {
	for _, s := range sources(t) {
		for _, decl := range s.file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || f.Body == nil || strings.HasPrefix(f.Name.Name, "Benchmark") {
				continue
			}
			body := string(s.text[s.fset.Position(f.Pos()).Offset:s.fset.Position(f.End()).Offset])
			if strings.Contains(body, "TEST_STRICT") {
				continue
			}
			ast.Inspect(f.Body, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				sel, ok := call.Fun.(*ast.SelectorExpr)
				if ok && slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) {
					t.Errorf("%s: %s skips without a look at TEST_STRICT", s.fset.Position(n.Pos()), f.Name.Name)
				}
				return true
			})
		}
	}
}

// TestTheTestsOfTheHouse makes sure that the walk above finds faults at all.
func TestTheTestsOfTheHouse(t *testing.T) {
	text := "// Package x is.\npackage x\n\n/* two\nlines */\nvar a = `1\n2` // b\n\n\nvar b int\n"
	s := &source{path: "x.go", text: []byte(text)}
	if n := s.codeLines(); n != 4 {
		t.Errorf("%d lines of code, want 4 in\n%s", n, text)
	}
	count := 0
	for i, pkgs := range floors() {
		for _, p := range pkgs {
			if _, err := os.Stat(filepath.Join("..", filepath.FromSlash(p))); err != nil {
				t.Error(fmt.Errorf("floor %d: %w", i, err))
			}
			count++
		}
	}
	if count < 25 {
		t.Errorf("only %d packages have a floor", count)
	}
}
