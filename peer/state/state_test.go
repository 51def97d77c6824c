package state

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
)

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

func open2(t *testing.T, path string) *DB {
	t.Helper()
	db, err := Open(path, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func TestKeepsWhatWasWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deep", "weave.db")
	db := open2(t, path)
	b := db.Bucket("ipam")
	if _, ok := b.Get("a"); ok || len(b.All()) != 0 {
		t.Fatal("a new file is not empty")
	}
	if err := b.Update(map[string][]byte{"a": []byte("1"), "b": {}, "c": []byte("3")}); err != nil {
		t.Fatal(err)
	}
	if err := b.Update(map[string][]byte{"a": []byte("2"), "c": nil, "never": nil}); err != nil {
		t.Fatal(err)
	}
	if err := db.Bucket("other").Put("a", nil); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	b = open2(t, path).Bucket("ipam")
	all := b.All()
	if len(all) != 2 || string(all["a"]) != "2" || len(all["b"]) != 0 {
		t.Fatalf("after reopening: %q", all)
	}
	if v, ok := b.Get("b"); !ok || len(v) != 0 {
		t.Fatalf("empty value: %q %v", v, ok)
	}
	if err := b.Delete("a"); err != nil {
		t.Fatal(err)
	}
	if _, ok := b.Get("a"); ok {
		t.Fatal("deleted key is still there")
	}
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	b := open2(t, filepath.Join(t.TempDir(), "weave.db")).Bucket("x")
	if err := b.Update(map[string][]byte{"good": []byte("1"), "": []byte("no such key")}); err == nil {
		t.Fatal("an empty key was taken")
	}
	if len(b.All()) != 0 {
		t.Fatalf("half an update is there: %q", b.All())
	}
}

func TestSecondOpenSaysInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "weave.db")
	synctest.Test(t, func(t *testing.T) { // waits for the lock in simulated time
		db, err := Open(path, logger(t))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = db.Close() }()
		if _, err := Open(path, logger(t)); !errors.Is(err, ErrInUse) {
			t.Fatalf("second Open: %v, want ErrInUse", err)
		}
	})
}

// TestDamageIsSetAside damages a file with 200 keys in every way that a disk
// or a crash does, and wants either all of the content or a fresh file, and
// the damaged one kept.
func TestDamageIsSetAside(t *testing.T) {
	page := os.Getpagesize()
	for name, damage := range map[string]func([]byte) []byte{
		"cut to nothing much": func(b []byte) []byte { return b[:100] },
		"cut to the metas":    func(b []byte) []byte { return b[:2*page] },
		"cut in half":         func(b []byte) []byte { return b[:len(b)/2] },
		"zeroes":              func(b []byte) []byte { return make([]byte, len(b)) },
		"text":                func([]byte) []byte { return bytes.Repeat([]byte("not a database\n"), 1000) },
		"both metas": func(b []byte) []byte {
			clear(b[:2*page])
			return b
		},
		"behind the metas": func(b []byte) []byte {
			clear(b[2*page:])
			return b
		},
		"noise behind the metas": func(b []byte) []byte {
			for i := 2 * page; i < len(b); i++ {
				b[i] = byte(i*7 + i/251)
			}
			return b
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "weave.db")
			db := open2(t, path)
			for i := range 20 {
				all := map[string][]byte{}
				for j := range 10 {
					all[string(rune('a'+i))+string(rune('a'+j))] = bytes.Repeat([]byte{byte(j)}, 300)
				}
				if err := db.Bucket("x").Update(all); err != nil {
					t.Fatal(err)
				}
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			bad := damage(whole)
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			db = open2(t, path)
			if n := len(db.Bucket("x").All()); n != 0 {
				t.Errorf("%d keys read from a damaged file", n)
			}
			if err := db.Bucket("x").Put("new", []byte("1")); err != nil {
				t.Errorf("the fresh file: %v", err)
			}
			kept, err := os.ReadFile(path + ".corrupt-1")
			if err != nil || !bytes.Equal(kept, bad) {
				t.Errorf("the damaged file was not kept as it was: %v", err)
			}
		})
	}
}

// FuzzOpen damages a file at one place, with whatever bytes: it opens all the
// same, with all of its keys, or none and the damaged file set aside, or, when
// what is damaged are keys and values themselves, with other ones.
func FuzzOpen(f *testing.F) {
	base := filepath.Join(f.TempDir(), "base.db")
	db, err := Open(base, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	for i := range 8 {
		all := map[string][]byte{}
		for j := range 5 {
			all[string(rune('a'+i))+string(rune('a'+j))] = bytes.Repeat([]byte{byte(j)}, 300)
		}
		if err := errors.Join(db.Bucket("x").Update(all), db.Bucket("y").Put("k", all["aa"])); err != nil {
			f.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(base)
	if err != nil {
		f.Fatal(err)
	}
	page := os.Getpagesize()
	for _, p := range []int{0, 2, len(whole)/page - 1} {
		f.Add(uint32(p*page+8), bytes.Repeat([]byte{0xff}, 7), uint32(0))                     // what it is, and how large
		f.Add(uint32(p*page+16), []byte{1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f, 0xff}, uint32(0)) // what is in it
	}
	f.Add(uint32(0), []byte{}, uint32(len(whole)-1))
	f.Fuzz(func(t *testing.T, at uint32, with []byte, length uint32) {
		file := filepath.Join(t.TempDir(), "weave.db")
		b := bytes.Clone(whole)
		copy(b[at%uint32(len(b)):], with)
		if length > 0 {
			b = b[:length%uint32(len(b))]
		}
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := Open(file, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = db.Close() }()
		_, err = os.Stat(file + ".corrupt-1")
		if n := len(db.Bucket("x").All()); err == nil && n > 0 {
			t.Errorf("%d keys of a damaged file", n)
		}
		if err := db.Bucket("x").Put("new", []byte("1")); err != nil {
			t.Error(err)
		}
	})
}
