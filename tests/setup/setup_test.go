package setup

import (
	"slices"
	"testing"
)

func TestMissing(t *testing.T) {
	ts, err := tools("# head\nip iproute2 *\nbridge iproute2 bench\niperf3 iperf3 bench demo # tail\n\ndockerd docker.io demo\n")
	if err != nil {
		t.Fatal(err)
	}
	nothing := func(string) bool { return false }
	for user, want := range map[string][]string{
		"bench": {"iproute2", "iperf3"},
		"demo":  {"iproute2", "iperf3", "docker.io"},
		"tests": {"iproute2"},
	} {
		if got := missing(ts, user, nothing); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", user, got, want)
		}
	}
	if got := missing(ts, "demo", func(c string) bool { return c != "iperf3" }); !slices.Equal(got, []string{"iperf3"}) {
		t.Errorf("only iperf3 is not there, told %v", got)
	}
	if _, err := tools("ip iproute2\n"); err == nil {
		t.Error("a line that says not who needs it is taken")
	}
}

func TestListParses(t *testing.T) {
	if ts, err := tools(list); err != nil || len(ts) == 0 {
		t.Errorf("%d tools, %v", len(ts), err)
	}
}
