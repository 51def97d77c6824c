package seal

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// testKey is a key without the cost of one.
func testKey(name string) *Key {
	k := new(Key)
	copy(k.b[:], name)
	return k
}

// bytesFrom is a source of "randomness" that gives first, first+1, ...
type bytesFrom byte

func (r *bytesFrom) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(*r)
		*r++
	}
	return len(b), nil
}

func both() Cipher { return ChaCha20Poly1305 | AES256GCM }

// shake does a handshake with fixed random numbers.
func shake(t testing.TB, offer Cipher) (dialler, listener *Keys) {
	t.Helper()
	r1, r2 := bytesFrom(1), bytesFrom(101)
	h, msg, err := initiate(testKey("k"), []byte("before"), []byte("ping"), both(), &r1)
	if err != nil {
		t.Fatal(err)
	}
	listener, answer, err := respond(testKey("k"), []byte("before"), []byte("pong"), offer, msg, &r2)
	if err != nil {
		t.Fatal(err)
	}
	if dialler, err = h.Finish(answer); err != nil {
		t.Fatal(err)
	}
	return dialler, listener
}

func TestHandshake(t *testing.T) {
	d, l := shake(t, both())
	if string(d.Payload) != "pong" || string(l.Payload) != "ping" {
		t.Errorf("payloads %q and %q", d.Payload, l.Payload)
	}
	if d.Cipher != AES256GCM || l.Cipher != AES256GCM {
		t.Errorf("ciphers %s and %s, want AES-256-GCM", d.Cipher, l.Cipher)
	}
	if d.secret != l.secret || d.secret == (Secret{}) {
		t.Error("the ends have not the same secret")
	}
	if d.out.UnsafeKey() != l.in.UnsafeKey() || d.in.UnsafeKey() != l.out.UnsafeKey() || d.in.UnsafeKey() == d.out.UnsafeKey() {
		t.Error("keys of the stream do not fit")
	}
	d, l = shake(t, ChaCha20Poly1305)
	if d.Cipher != ChaCha20Poly1305 || l.Cipher != ChaCha20Poly1305 {
		t.Errorf("ciphers %s and %s where one end has no AES", d.Cipher, l.Cipher)
	}
}

// The wire format does not change unnoticed.
func TestGolden(t *testing.T) {
	key, err := NewKey("correct horse", "")
	if err != nil {
		t.Fatal(err)
	}
	r1, r2 := bytesFrom(1), bytesFrom(101)
	h, first, err := initiate(key, []byte("before"), []byte("ping"), both(), &r1)
	if err != nil {
		t.Fatal(err)
	}
	l, second, err := respond(key, []byte("before"), []byte("pong"), both(), first, &r2)
	if err != nil {
		t.Fatal(err)
	}
	d, err := h.Finish(second)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{hex.EncodeToString(key.b[:]), hex.EncodeToString(first), hex.EncodeToString(second), hex.EncodeToString(d.secret.b[:])}
	for _, c := range []Cipher{AES256GCM, ChaCha20Poly1305} {
		s, err := newSession(&d.secret, c, true)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, hex.EncodeToString(seal(s, 0x123, "hello")))
	}
	var wire bytes.Buffer
	conn := NewConn(writeOnly{&wire}, l)
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got = append(got, hex.EncodeToString(wire.Bytes()))
	for i, want := range goldens() {
		if got[i] != want {
			t.Errorf("%d: got %s, want %s", i, got[i], want)
		}
	}
}

func TestWrongPassword(t *testing.T) {
	h, msg, err := Initiate(testKey("a"), nil, nil, both())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := Respond(testKey("b"), nil, nil, both(), msg); !errors.Is(err, ErrPassword) {
		t.Errorf("other key: %v", err)
	}
	if _, _, err := Respond(testKey("a"), []byte("other"), nil, both(), msg); !errors.Is(err, ErrPassword) {
		t.Errorf("other prologue: %v", err)
	}
	_, other, err := Initiate(testKey("b"), nil, nil, both())
	if err != nil {
		t.Fatal(err)
	}
	_, answer, err := Respond(testKey("b"), nil, nil, both(), other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Finish(answer); !errors.Is(err, ErrPassword) {
		t.Errorf("answer made with another key: %v", err)
	}
	// A failed answer spoils nothing: the right one is taken still.
	_, answer, err = Respond(testKey("a"), nil, nil, both(), msg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Finish(answer); err != nil {
		t.Errorf("right answer after a wrong one: %v", err)
	}
}

func TestNoCipherInCommon(t *testing.T) {
	h, msg, err := Initiate(testKey("a"), nil, nil, ChaCha20Poly1305)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := Respond(testKey("a"), nil, nil, AES256GCM, msg); err == nil {
		t.Error("listener takes a dialler without a common cipher")
	}
	if _, err := h.Finish(nil); err == nil {
		t.Error("an empty answer finishes")
	}
}

func TestEveryChangedByteIsNoticed(t *testing.T) {
	h, msg, err := Initiate(testKey("a"), nil, []byte("x"), both())
	if err != nil {
		t.Fatal(err)
	}
	for i := range msg {
		bad := bytes.Clone(msg)
		bad[i] ^= 0x20
		if _, _, err := Respond(testKey("a"), nil, nil, both(), bad); err == nil {
			t.Errorf("first message with byte %d changed is taken", i)
		}
	}
	_, answer, err := Respond(testKey("a"), nil, nil, both(), msg)
	if err != nil {
		t.Fatal(err)
	}
	for i := range answer {
		bad := bytes.Clone(answer)
		bad[i] ^= 0x20
		if _, err := h.Finish(bad); err == nil {
			t.Errorf("answer with byte %d changed is taken", i)
		}
	}
}

// What a recorded first message gets, sent again, is of no use without the key
// that made it.
func TestReplayedHandshakeGivesOtherKeys(t *testing.T) {
	_, msg, err := Initiate(testKey("a"), nil, nil, both())
	if err != nil {
		t.Fatal(err)
	}
	one, _, err := Respond(testKey("a"), nil, nil, both(), msg)
	if err != nil {
		t.Fatal(err)
	}
	two, _, err := Respond(testKey("a"), nil, nil, both(), msg)
	if err != nil {
		t.Fatal(err)
	}
	if one.secret == two.secret {
		t.Error("two handshakes have the same secret")
	}
}

func TestSessionIsMadeOnce(t *testing.T) {
	d, _ := shake(t, both())
	if _, err := d.Session(); err != nil {
		t.Fatal(err)
	}
	if d.secret != (Secret{}) {
		t.Error("the secret is kept")
	}
	if _, err := d.Session(); err == nil {
		t.Error("a second session of the same secret")
	}
}

func TestKeyOfPassword(t *testing.T) {
	if _, err := NewKey("", ""); err == nil {
		t.Error("an empty password is taken")
	}
	a, err := NewKey("p", "")
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewKey("p", "cluster")
	if err != nil {
		t.Fatal(err)
	}
	if a.b == b.b {
		t.Error("the cluster makes no difference")
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", a, "secret", &Secret{b: a.b})
	for _, text := range []string{fmt.Sprint(a), fmt.Sprintf("%#v", a), fmt.Sprintf("%v", &Secret{b: a.b}), log.String()} {
		if strings.Contains(text, fmt.Sprint(a.b[0])) && strings.Contains(text, fmt.Sprint(a.b[31])) {
			t.Errorf("the key shows in %q", text)
		}
	}
}

func FuzzRespond(f *testing.F) {
	r := bytesFrom(1) // the same in every process that fuzzes
	_, msg, err := initiate(testKey("a"), nil, []byte("x"), both(), &r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(msg)
	f.Add([]byte{})
	f.Add(make([]byte, 48))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, _, err := Respond(testKey("a"), nil, nil, both(), b)
		if err == nil && !bytes.Equal(b, msg) {
			t.Fatalf("%x is taken: %+v", b, keys)
		}
	})
}

func FuzzFinish(f *testing.F) {
	h, msg, err := Initiate(testKey("a"), nil, nil, both())
	if err != nil {
		f.Fatal(err)
	}
	_, answer, err := Respond(testKey("b"), nil, nil, both(), msg)
	if err == nil {
		f.Fatal("wrong key taken")
	}
	f.Add(answer)
	f.Add(make([]byte, 49))
	f.Add(bytes.Repeat([]byte{9}, 49))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := h.Finish(b); err == nil {
			t.Fatalf("%x is taken", b)
		}
	})
}

// goldens are, in order: the key of "correct horse", both messages of a
// handshake, the secret, the dialler's first datagram with AES-256-GCM and with
// ChaCha20-Poly1305, and the listener's first record.
func goldens() []string {
	return []string{
		"382e18f48e94b22e5f56d77d02869893b8eb50cb77d50105a33ab0162803b26d",
		"07a37cbc142093c8b755dc1b10e86cb426374ad16aa853ed0bdfc0b2b86d1c7cfe69dc74a45bd75806a5371ab820153d5a59f0c458",
		"5714769d116bf76436ae74bc793d2c30ad1903c59ac5273805c7e2698b410c366fe0e04f308ae82134b969a0682ce98060a017f67b",
		"26bf0ff9829959536b4a3c897108df8aa050c3c9a4b166b43f3802138b3dd4f2",
		"02000123000000000000000064625e776da597c93fa478c1a7654c0d20f8cb54f492",
		"02000123000000000000000091ba41218c78137e3be0eb3f35b7ae3e3aa5e912b743",
		"0015571cceb84b0036de160973d89b814437e15a5cb9dd",
	}
}
