package register

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// edit is a change of one file, by text that must be there exactly once.
type edit struct{ file, from, to string }

type mutant struct {
	name  string
	test  string // that fails; empty: the model
	edits []edit
}

// mutants are the protocol with one guard left out each.
func mutants() []mutant {
	return []mutant{
		{"the lease lasts from when the answer comes", "", []edit{
			{"lease.go", "\tnext     time.Duration // of the next renewal\n", "\tnext, heard time.Duration\n"},
			{"lease.go", "until := sent + length", "until := l.heard + max(0, sent-sent) + length"},
			{"model_host_test.go", "\t\th.lease.Answered(a,", "\t\th.lease.heard = h.uptime()\n\t\th.lease.Answered(a,"},
		}},
		{"one keeper is enough for a lease", "", []edit{{"lease.go", "if !majority(len(t.acks), len(s.Keepers)) {", "if len(t.acks) == 0 {"}}},
		{"one keeper is enough to take back", "", []edit{{"watch.go", "if majority(len(by), len(committee)) {", "if len(by) > 0 {"}}},
		// For those with a test of their own the model takes too many runs.
		{"a keeper acknowledges after it froze", "TestSilenceOverRestart", []edit{{"watch.go", "if s.frozen {\n\t\tn.send", "if s == nil {\n\t\tn.send"}}},
		{"a keeper forgets that it froze", "TestSilenceOverRestart", []edit{{"watch.go", "s.lasts, s.frozen = s.kept, r.Byte() == 1", "s.lasts, s.frozen = 0, r.Byte() == 2"}}},
		{"acknowledgements of any committee count", "TestStaleCommittee", []edit{
			{"watch.go", "member.Epoch != m.Renewal.Epoch ||\n\t\tm.Renewal.Committee != n.state.Committee:", "member.Epoch != m.Renewal.Epoch:"},
			{"watch.go", "r := Renewal{m.Renewal.Nonce, member.Epoch, n.state.Committee}", "r := m.Renewal"},
			{"lease.go", "a.Committee != s.Committee || ", ""},
			{"watch.go", "case n.acc.version == n.next() && n.acc.state != nil && n.acc.state.Committee != n.state.Committee:", "case m == nil:"},
		}},
		{"a keeper acknowledges though it accepted the next committee", "TestStaleCommittee", []edit{
			{"watch.go", "case n.acc.version == n.next() && n.acc.state != nil && n.acc.state.Committee != n.state.Committee:", "case m == nil:"},
		}},
		{"a new keeper counts the silence of before", "TestNewKeeper", []edit{
			{"watch.go", "if s == nil || w.committee != s.Committee {", "if s == nil {"},
			{"watch.go", "if !n.keeps() {\n\t\treturn\n\t}\n\tpassed", "if n.state == nil {\n\t\treturn\n\t}\n\tpassed"},
		}},
		{"no margin for clocks", "TestMargin", []edit{{"watch.go", "return lease + lease/20", "return lease"}}},
	}
}

// TestMutants has the model, or a test, find out each guard that is left out.
func TestMutants(t *testing.T) {
	for _, m := range mutants() {
		t.Run(m.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "go", "test", "-vet=off", "-overlay", m.overlay(t), "-run", "^"+cmp.Or(m.test, "TestModel")+"$", ".")
			cmd.Env = append(os.Environ(), "WEAVE_MODEL_RUNS="+fmt.Sprint(modelRuns))
			out, err := cmd.CombinedOutput()
			text := string(out)
			switch {
			case err == nil:
				t.Error("nobody noticed")
			case m.test != "" && strings.Contains(text, "--- FAIL: "+m.test):
			case !strings.Contains(text, "WEAVE_MODEL_SEED="):
				t.Errorf("not the model: %v\n%s", err, text)
			default:
				_, text, _ = strings.Cut(text, "WEAVE_MODEL_SEED=")
				text, _, _ = strings.Cut(text, "\n")
				t.Log("seed", text)
			}
		})
	}
}

// overlay writes the edited files and what go build needs to take them.
func (m *mutant) overlay(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, e := range m.edits {
		text, ok := texts[e.file]
		if !ok {
			b, err := os.ReadFile(e.file)
			if err != nil {
				t.Fatal(err)
			}
			text = string(b)
		}
		if n := strings.Count(text, e.from); n != 1 {
			t.Fatalf("%s: %q is there %d times, want once", e.file, e.from, n)
		}
		texts[e.file] = strings.Replace(text, e.from, e.to, 1)
	}
	replace := map[string]string{}
	for file, text := range texts {
		to := filepath.Join(dir, file+".mutant")
		if err := os.WriteFile(to, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(here, file)] = to
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
