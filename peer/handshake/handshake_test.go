package handshake

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"weave.local/peer"
	"weave.local/router/seal"
)

func key(t testing.TB, password string) *seal.Key {
	t.Helper()
	if password == "" {
		return nil
	}
	k, err := seal.NewKey(password, "")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// keys are those that there are.
func keys(ks ...*seal.Key) []*seal.Key {
	return slices.DeleteFunc(ks, func(k *seal.Key) bool { return k == nil })
}

// recorder keeps what is written to a connection.
type recorder struct {
	net.Conn
	sent bytes.Buffer
}

func (r *recorder) Write(b []byte) (int, error) {
	r.sent.Write(b)
	return r.Conn.Write(b)
}

type end struct {
	other *Other
	err   error
	sent  []byte // on the wire
}

// meet lets two ends greet each other over TCP; the first dials.
func meet(t *testing.T, dialler, listener Self) (d, l end) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	one := func(e *end, c net.Conn, s Self, outbound bool) {
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		rec := &recorder{Conn: c}
		if e.other, e.err = Greet(rec, s, outbound); e.err != nil {
			_ = c.Close()
		}
		e.sent = rec.sent.Bytes()
	}
	var tasks sync.WaitGroup
	tasks.Go(func() { one(&d, a, dialler, true) })
	tasks.Go(func() { one(&l, b, listener, false) })
	tasks.Wait()
	return d, l
}

func selves(kd, kl *seal.Key) (d, l Self) {
	d = Self{Info: peer.Info{Name: 1, UID: 11, NickName: "dialler", Port: 6783}, Nonce: 0xf0, Keys: keys(kd)}
	l = Self{Info: peer.Info{Name: 2, UID: 22, NickName: "listener", Port: 6783}, Nonce: 0x0f, Keys: keys(kl)}
	return d, l
}

func TestMeet(t *testing.T) {
	k := key(t, "x")
	for _, k := range []*seal.Key{nil, k} {
		sd, sl := selves(k, k)
		d, l := meet(t, sd, sl)
		if d.err != nil || l.err != nil {
			t.Fatal(d.err, l.err)
		}
		if d.other.Info != sl.Info || l.other.Info != sd.Info || d.other.Session != 0xff || l.other.Session != 0xff {
			t.Errorf("they know %+v and %+v", d.other, l.other)
		}
		if !d.other.Chair || l.other.Chair || !d.other.Outbound || l.other.Outbound {
			t.Error("the end with the lower UID has the chair, and the dialling end dialled")
		}
		if sealed := k != nil; (d.other.Keys != nil) != sealed || (l.other.Keys != nil) != sealed || d.other.Trusted {
			t.Errorf("keys %v and %v", d.other.Keys, l.other.Keys)
		}
		shows := bytes.Contains(d.sent, []byte("dialler")) || bytes.Contains(l.sent, []byte("listener"))
		if shows == (k != nil) {
			t.Errorf("with password %v names show on the wire: %v", k != nil, shows)
		}
		if _, err := io.WriteString(d.other.Conn, "secret words"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 12)
		if _, err := io.ReadFull(l.other.Conn, got); err != nil || string(got) != "secret words" {
			t.Errorf("after the handshake: %q, %v", got, err)
		}
		if k == nil {
			continue
		}
		b := d.other.Keys.Seal(append(make([]byte, seal.HeaderLen, 64), "hi"...), 1)
		if _, err := l.other.Keys.Open(b); err != nil {
			t.Errorf("keys of the data path do not fit: %v", err)
		}
	}
}

// Without a password the bytes are those of peers that know of none.
func TestClearLayout(t *testing.T) {
	sd, sl := selves(nil, nil)
	d, _ := meet(t, sd, sl)
	want := append([]byte("weave/\x02\x02"), frame(msgIntro, peer.AppendInfo([]byte{0, 0, 0, 0, 0, 0, 0, 0xf0}, sd.Info))...)
	if !bytes.Equal(d.sent, want) {
		t.Errorf("sent %x, want %x", d.sent, want)
	}
	got := hex.EncodeToString(frame(msgRefusal, []byte{RefuseLimit, 'x'}))
	if got != "0003"+"03"+"0478" {
		t.Errorf("refusal %s", got)
	}
}

func TestPasswordsMustMatch(t *testing.T) {
	x, y := key(t, "x"), key(t, "y")
	const (
		lacks = "peer has no password, and we have one"
		has   = "peer has a password, and we have none"
	)
	for name, c := range map[string]struct {
		kd, kl   *seal.Key
		atD, atL string
	}{
		"dialler only":  {x, nil, lacks, has},
		"listener only": {nil, x, has, lacks},
		"other":         {x, y, "passwords differ", "passwords differ"},
	} {
		sd, sl := selves(c.kd, c.kl)
		d, l := meet(t, sd, sl)
		for _, e := range []struct {
			err  error
			want string
		}{{d.err, c.atD}, {l.err, c.atL}} {
			r := (*Refusal)(nil)
			if !errors.As(e.err, &r) || r.Code != RefusePassword || r.Error() != e.want {
				t.Errorf("%s: %v, want %q", name, e.err, e.want)
			}
		}
		if c.kd != nil && bytes.Contains(d.sent, []byte("dialler")) || c.kl != nil && bytes.Contains(l.sent, []byte("listener")) {
			t.Errorf("%s: an end with a password gives its name away", name)
		}
	}
}

// While a password is changed, ends meet that have the old one, both or the new
// one; they take the preferred one of those they share.
func TestTwoPasswords(t *testing.T) {
	was, now := key(t, "old"), key(t, "new")
	ends := map[string][]*seal.Key{"old": {was}, "both": {now, was}, "new": {now}}
	for dials, kd := range ends {
		for listens, kl := range ends {
			sd, sl := selves(nil, nil)
			sd.Keys, sl.Keys = kd, kl
			d, l := meet(t, sd, sl)
			want := now
			switch {
			case dials == "old" && listens == "new", dials == "new" && listens == "old":
				for _, err := range []error{d.err, l.err} {
					if err == nil || err.Error() != "passwords differ" {
						t.Errorf("%s dials %s: %v", dials, listens, err)
					}
				}
				continue
			case dials == "old" || listens == "old":
				want = was
			}
			if d.err != nil || l.err != nil {
				t.Errorf("%s dials %s: %v, %v", dials, listens, d.err, l.err)
				continue
			}
			if d.other.Key != want || l.other.Key != want {
				t.Errorf("%s dials %s: they do not use the password that both prefer", dials, listens)
			}
			b := d.other.Keys.Seal(append(make([]byte, seal.HeaderLen, 64), "hi"...), 1)
			if _, err := l.other.Keys.Open(b); err != nil {
				t.Errorf("%s dials %s: keys of the data path: %v", dials, listens, err)
			}
		}
	}
}

func TestTrustNeedsBoth(t *testing.T) {
	k := key(t, "x")
	for _, trust := range [][2]bool{{false, false}, {true, false}, {false, true}, {true, true}} {
		sd, sl := selves(k, k)
		sd.Trusted, sl.Trusted = trust[0], trust[1]
		d, l := meet(t, sd, sl)
		if d.err != nil || l.err != nil {
			t.Fatal(d.err, l.err)
		}
		both := trust[0] && trust[1]
		for _, o := range []*Other{d.other, l.other} {
			if o.Trusted != both || (o.Keys == nil) != both {
				t.Errorf("trust %v: %+v", trust, o)
			}
		}
		if bytes.Contains(d.sent, []byte("dialler")) {
			t.Error("the link itself is in clear")
		}
	}
}

// Somebody on the path who changes what is sent in clear gets no link.
func TestGreetingIsBound(t *testing.T) {
	k := key(t, "x")
	sd, sl := selves(k, k)
	a, b := net.Pipe()
	c, e := net.Pipe()
	defer func() { _, _, _, _ = a.Close(), b.Close(), c.Close(), e.Close() }()
	change := func(dst io.Writer, src io.Reader, at int) {
		buf := make([]byte, 4096)
		for off := 0; ; {
			n, err := src.Read(buf)
			if at >= off && at < off+n {
				buf[at-off]++
			}
			off += n
			if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	var tasks sync.WaitGroup
	defer tasks.Wait()
	tasks.Go(func() { change(c, b, -1) })
	tasks.Go(func() { change(b, c, greetingSize-1) }) // the listener's highest version
	var err1, err2 error
	var greeted sync.WaitGroup
	greeted.Go(func() {
		_ = a.SetDeadline(time.Now().Add(2 * time.Second))
		_, err1 = Greet(a, sd, true)
		_ = a.Close()
	})
	greeted.Go(func() {
		_ = e.SetDeadline(time.Now().Add(2 * time.Second))
		_, err2 = Greet(e, sl, false)
		_ = e.Close()
	})
	greeted.Wait()
	if err1 == nil || err2 == nil {
		t.Errorf("%v, %v: a changed greeting makes a link", err1, err2)
	}
	_, _ = b.Close(), c.Close()
}

// FuzzGreet throws bytes at both sides of the handshake, with and without a
// password.
func FuzzGreet(f *testing.F) {
	intro := peer.AppendInfo(make([]byte, 8), peer.Info{Name: 2, UID: 2})
	f.Add(append([]byte("weave/\x02\x02"), frame(msgIntro, intro)...), false, true)
	f.Add([]byte("weave/\x03\x04"), false, false)
	f.Add(append([]byte("weave/\x02\x02"), frame(msgSealed, make([]byte, 49))...), true, false)
	f.Add(append([]byte("weave/\x02\x02"), frame(msgRefusal, []byte("\x05\x1b"))...), true, true)
	f.Add(append([]byte("weave/\x02\x02"), frame(msgSealed, make([]byte, 98))...), true, false)
	k, next := key(f, "x"), key(f, "y")
	f.Fuzz(func(t *testing.T, b []byte, sealed, outbound bool) {
		here, there := net.Pipe()
		var tasks sync.WaitGroup
		tasks.Go(func() { _, _ = io.Copy(io.Discard, there) })
		tasks.Go(func() {
			_, _ = there.Write(b)
			_ = there.Close()
		})
		self := Self{Info: peer.Info{Name: 1, UID: 1}, Nonce: 1}
		if sealed {
			self.Keys = keys(next, k)
		}
		o, err := Greet(here, self, outbound)
		if err == nil && sealed {
			t.Error("somebody without the password is greeted")
		}
		if err == nil {
			err = o.Conclude(func() *Refusal { return nil })
		}
		_ = here.Close()
		tasks.Wait()
		if r := (*Refusal)(nil); errors.As(err, &r) && strings.ContainsAny(r.Reason, "\x1b\n\x00") {
			t.Errorf("reason %q goes to terminals", r.Reason)
		}
	})
}
