package tests

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"weave.local/tests/lab"
)

// TestPassword: with a password frames are sealed, in clear only where both
// ends trust the network, and who has another password or none stays outside.
func TestPassword(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2", "u3"}})
	u1, u2, u3 := l.Host("u1"), l.Host("u2"), l.Host("u3")
	secret := []string{"--docker-api", "", "--password", "correct horse"}
	launch(t, u1, secret...)
	launch(t, u2, append(secret, "u1")...)
	for _, h := range []*lab.Host{u1, u2} {
		within(t, patience, "sealed", func() error { return on(t.Context(), h, 1, "encrypted   sleeve") })
	}
	to := weave(t, u2, "expose")
	weave(t, u1, "expose")
	if seenInClear(t, host(u1), u2, to) {
		t.Error("what was sent with a password is on the wire in clear")
	}

	launch(t, u3, "--docker-api", "", "--password", "wrong donkey", "u1")
	refusedBy(t, u3, "passwords differ")
	weave(t, u3, "reset")
	launch(t, u3, "--docker-api", "", "u1")
	refusedBy(t, u3, "password")
	if err := on(t.Context(), u1, 1, "encrypted   sleeve"); err != nil {
		t.Errorf("the others were disturbed: %v", err)
	}

	// Trusted by one end only changes nothing; by both, frames go in clear.
	trusting := append(secret, "--trusted-subnets", "0.0.0.0/0")
	weave(t, u1, "stop")
	launch(t, u1, append(trusting, "u2")...)
	within(t, patience, "trusted by one", func() error { return on(t.Context(), u1, 1, "encrypted   sleeve") })
	weave(t, u2, "stop")
	launch(t, u2, append(trusting, "u1")...)
	within(t, patience, "trusted by both", func() error { return on(t.Context(), u1, 1, "unencrypted fastdp") })
	if !seenInClear(t, host(u1), u2, to) {
		t.Error("where both ends trust, nothing is seen in clear: the capture sees nothing at all")
	}
}

// TestSealedRestart: a stream that sends all that it can outlives the daemon at
// its end. The other takes the new keys by itself.
func TestSealedRestart(t *testing.T) {
	l := build(t, lab.Config{Hosts: []string{"u1", "u2"}})
	u1, u2 := l.Host("u1"), l.Host("u2")
	secret := []string{"--docker-api", "", "--no-dns", "--password", "correct horse"}
	launch(t, u1, secret...)
	launch(t, u2, append(secret, "u1")...)
	within(t, patience, "sealed", func() error { return on(t.Context(), u2, 1, "encrypted   sleeve") })
	s := startStream(t, runBare(t, u1, "c1"), runBare(t, u2, "c2"))
	begin := time.Now()
	pid := daemonPID(t, u2)
	must(t, u2, "kill", "-9", pid)
	within(t, patience, "end of the daemon", func() error {
		if u2.Run(t.Context(), "kill", "-0", pid).Err() == nil {
			return errors.New("it is still there")
		}
		return nil
	})
	launch(t, u2, append(secret, "u1")...)
	within(t, patience, "stream", func() error {
		if err := on(t.Context(), u2, 1, "encrypted   sleeve"); err != nil {
			return err
		}
		return s.movedIn(streamStep * 10)
	})
	t.Logf("nothing arrived for %s", s.gap(begin).Round(time.Millisecond))
}

// host is the host itself in the place of a container.
func host(h *lab.Host) *container { return &container{Host: h, netns: "/proc/1/ns/net", bare: true} }

// seenInClear pings an address of the overlay with a payload of its own kind and
// says whether it passes the underlay of a host as it is.
func seenInClear(t *testing.T, from *container, at *lab.Host, to string) bool {
	t.Helper()
	tap, err := at.Tap("", "eth0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Close() }()
	within(t, patience, "ping", func() error {
		return from.exec(t.Context(), "ping", "-c", "3", "-i", "0.1", "-p", "a7", to).Err()
	})
	payload := bytes.Repeat([]byte{0xa7}, 40)
	_, err = tap.Receive(time.Second, func(f []byte) bool { return bytes.Contains(f, payload) })
	return err == nil
}

// refusedBy waits until a host shows that its link was refused for a reason.
func refusedBy(t *testing.T, h *lab.Host, reason string) {
	t.Helper()
	within(t, patience, reason, func() error {
		cs, err := connections(t.Context(), h)
		if err != nil {
			return err
		}
		for _, c := range cs {
			if (c.state == "failed" || c.state == "retrying") && strings.Contains(c.line, reason) {
				return nil
			}
		}
		return errNotShown(cs)
	})
}

type errNotShown []connection

func (e errNotShown) Error() string {
	var b strings.Builder
	for _, c := range e {
		b.WriteString(c.line + "\n")
	}
	return "not shown in\n" + b.String()
}
