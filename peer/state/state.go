// Package state keeps what a peer must remember over a restart in one file:
// its name, its targets, the register of address space, the addresses it
// handed out and what is attached. It is a map of named buckets, each a map
// from key to bytes; what the bytes mean is its owner's business.
//
// Every write is on disk when the call returns: a caller acts on what it has
// written only afterwards.
package state

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// ErrInUse says that another process holds the file.
var ErrInUse = errors.New("in use by another weave")

// lockWait is how long Open waits for a daemon that is on its way out.
const lockWait = 2 * time.Second

// DB is the open file. It is safe for concurrent use.
type DB struct {
	bolt *bbolt.DB
	log  *slog.Logger
}

// Bucket is one owner's part of the file. It is safe for concurrent use.
type Bucket struct {
	db   *DB
	name []byte
}

// Open opens the file at path and makes it, and its folder, when missing. A
// file that another process holds gives ErrInUse. A damaged file is moved
// aside as path.corrupt-N, which is logged, and a new one is begun: what was
// in it is rebuilt from the other peers and from what is attached.
func Open(path string, log *slog.Logger) (*DB, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("state folder: %w", err)
	}
	bolt, err := open(path)
	if damaged(err) {
		aside, moveErr := setAside(path)
		if moveErr != nil {
			return nil, fmt.Errorf("state file %s is damaged (%w) and cannot be moved aside: %w", path, err, moveErr)
		}
		log.Warn("state file was damaged; set aside, starting afresh", "file", path, "aside", aside, "damage", err)
		bolt, err = open(path)
	}
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("state file %s: %w", path, ErrInUse)
	case err != nil:
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	return &DB{bolt: bolt, log: log}, nil
}

// Close releases the file.
func (db *DB) Close() error { return db.bolt.Close() }

// errDamaged says what made the file unreadable.
type errDamaged struct{ what any }

func (e errDamaged) Error() string { return fmt.Sprintf("damaged: %v", e.what) }

// damaged tells a file that cannot be read from one that cannot be opened.
func damaged(err error) bool {
	var walk errDamaged
	return errors.As(err, &walk) || errors.Is(err, berrors.ErrInvalid) ||
		errors.Is(err, berrors.ErrVersionMismatch) || errors.Is(err, berrors.ErrChecksum)
}

// open checks the file and opens it: a damaged page shows up here and not when
// the daemon is in the midst of something.
func open(path string) (*bbolt.DB, error) {
	options := bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType}
	if info, err := os.Stat(path); err == nil && info.Size() > 0 {
		if err := checkFile(path, info.Size(), options); err != nil {
			return nil, err
		}
	}
	return bbolt.Open(path, 0o600, &options)
}

// checkFile reads the file under its lock. To be opened for reading takes no
// more of it than its first two pages; bbolt maps them, and one that is not
// there is a fault.
func checkFile(path string, size int64, options bbolt.Options) (err error) {
	if size < 2*int64(os.Getpagesize()) {
		return errDamaged{fmt.Sprintf("only %d bytes long", size)}
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = errDamaged{r}
		}
	}()
	options.ReadOnly = true
	db, err := bbolt.Open(path, 0o600, &options)
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	return db.View(func(tx *bbolt.Tx) error {
		var file bytes.Buffer
		if _, err := tx.WriteTo(&file); err != nil {
			return errDamaged{err}
		}
		if err := check(file.Bytes()); err != nil {
			return errDamaged{err}
		}
		return nil
	})
}

// setAside renames the file to the first free path.corrupt-N.
func setAside(path string) (string, error) {
	for n := 1; ; n++ {
		aside := path + ".corrupt-" + strconv.Itoa(n)
		_, err := os.Lstat(aside)
		if err == nil {
			continue
		}
		if !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		return aside, os.Rename(path, aside)
	}
}

// Bucket is the part of the file with this name; it comes into being with
// its first key.
func (db *DB) Bucket(name string) *Bucket { return &Bucket{db: db, name: []byte(name)} }

// Get returns a copy of the value of key, and whether there is one.
func (b *Bucket) Get(key string) ([]byte, bool) {
	var out []byte
	var ok bool
	err := b.db.bolt.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket(b.name)
		if bucket == nil {
			return nil
		}
		v := bucket.Get([]byte(key))
		if ok = v != nil; ok {
			out = append([]byte{}, v...)
		}
		return nil
	})
	if err != nil {
		b.db.log.Error("state file cannot be read", "bucket", string(b.name), "key", key, "err", err)
	}
	return out, ok
}

// All returns a copy of every key with its value.
func (b *Bucket) All() map[string][]byte {
	out := map[string][]byte{}
	err := b.db.bolt.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket(b.name)
		if bucket == nil {
			return nil
		}
		return bucket.ForEach(func(k, v []byte) error {
			out[string(k)] = append([]byte{}, v...)
			return nil
		})
	})
	if err != nil {
		b.db.log.Error("state file cannot be read", "bucket", string(b.name), "err", err)
	}
	return out
}

// Put sets the value of key. It is on disk when Put returns nil.
func (b *Bucket) Put(key string, value []byte) error {
	if value == nil {
		value = []byte{}
	}
	return b.Update(map[string][]byte{key: value})
}

// Delete removes key; a missing key is no error.
func (b *Bucket) Delete(key string) error { return b.Update(map[string][]byte{key: nil}) }

// Update sets every key to its value, or removes it where the value is nil:
// all of them or, on an error, none. The change is on disk when it returns
// nil.
func (b *Bucket) Update(changes map[string][]byte) error {
	if len(changes) == 0 {
		return nil
	}
	err := b.db.bolt.Update(func(tx *bbolt.Tx) error {
		bucket, err := tx.CreateBucketIfNotExists(b.name)
		if err != nil {
			return err
		}
		for key, value := range changes {
			if value == nil {
				err = bucket.Delete([]byte(key))
			} else {
				err = bucket.Put([]byte(key), value)
			}
			if err != nil {
				return fmt.Errorf("key %q: %w", key, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("state file, bucket %s: %w", b.name, err)
	}
	return nil
}
