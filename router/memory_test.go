package router

import (
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/peer/gossip"
)

func TestMemoryKeepsEndpointsOfAStoppedDaemon(t *testing.T) {
	m := make(memory)
	entry := gossip.Entry{Origin: b, Key: "mac"}
	reached := true
	reaches := func(peer.Name) bool { return reached }
	now := time.Unix(1000, 0)
	if got := m.recall([]gossip.Entry{entry}, reaches, now); len(got) != 1 {
		t.Fatalf("announced: %v", got)
	}
	reached = false
	if got := m.recall(nil, reaches, now); len(got) != 1 || got[0].Key != "mac" {
		t.Errorf("its daemon is gone: %v, want what it announced last", got)
	}
	if got := m.recall(nil, reaches, now); len(got) != 1 {
		t.Errorf("still gone: %v", got)
	}
	reached = true
	if got := m.recall(nil, reaches, now); len(got) != 1 {
		t.Errorf("just back: %v, want them kept until it had time to announce", got)
	}
	now = now.Add(2 * tellWait)
	if got := m.recall(nil, reaches, now); len(got) != 0 {
		t.Errorf("it is back and has no endpoints: %v", got)
	}
	reached = false
	if got := m.recall(nil, reaches, now); len(got) != 0 {
		t.Errorf("what was withdrawn came back: %v", got)
	}
}
