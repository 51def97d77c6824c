package daemon

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"

	"weave.local/router/seal"
)

// Under which the settings are kept that allowed what the kernel forwards in
// clear.
const (
	clearBucket = "clear"
	trustedKey  = "trusted"
	keysKey     = "keys"
)

// deriveKeys makes the keys of those passwords that are not empty.
func deriveKeys(passwords ...string) ([]*seal.Key, error) {
	var keys []*seal.Key
	for i, p := range passwords {
		if p == "" || slices.Contains(passwords[:i], p) {
			continue
		}
		key, err := seal.NewKey(p, "")
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	debug.FreeOSMemory() // deriving a key takes as much as all else
	return keys, nil
}

// setPassword changes the password of the running daemon: next becomes good
// beside the one of now, or, when it is empty, the one that is becomes the only
// one.
func (d *daemon) setPassword(next string) error {
	d.keyMu.Lock()
	defer d.keyMu.Unlock()
	switch {
	case len(d.keys) == 0:
		return errors.New("this network has no password that could be changed: launch all hosts with one")
	case next == "" && len(d.keys) == 1:
		return errors.New("there is no new password yet: give it with --password-next, on all hosts, before the change is finished")
	}
	keys := d.keys[:1]
	if next != "" {
		fresh, err := deriveKeys(next)
		if err != nil {
			return err
		}
		now := d.keys[len(d.keys)-1]
		if *fresh[0] == *now {
			return errors.New("this is the password already")
		}
		keys = append(fresh, now)
	}
	if err := d.saveClear(keys); err != nil {
		return err
	}
	d.keys = keys
	d.mesh.SetKeys(keys)
	if next == "" {
		d.router.DropInherited()
	}
	d.log.Info("password changes", "good", len(keys))
	return nil
}

// changing says whether a new password is good beside the old one.
func (d *daemon) changing() bool {
	d.keyMu.Lock()
	defer d.keyMu.Unlock()
	return len(d.keys) > 1
}

// mayKeepClear says whether what an earlier run left forwarding in clear, to
// peers of its own password in subnets that it trusted, may go on until links
// tell: not after a change of what is trusted, nor when none of the passwords
// is one of then. For those without a link it may go on after that, if all
// passwords of then are good yet.
func (d *daemon) mayKeepClear() (until, after bool) {
	if len(d.keys) == 0 {
		return true, true
	}
	b := d.store.Bucket(clearBucket)
	trusted, ok := b.Get(trustedKey)
	if !ok || !bytes.Equal(trusted, trustedText(d.cfg.Trusted)) {
		return false, false
	}
	var good []string
	for _, k := range d.keys {
		good = append(good, fingerprint(k))
	}
	then, _ := b.Get(keysKey)
	after = true
	for f := range strings.FieldsSeq(string(then)) {
		known := slices.Contains(good, f)
		until, after = until || known, after && known
	}
	return until, after
}

// saveClear remembers what mayKeepClear goes by. Without a password that is
// nothing, so that one given later puts an end to what goes in clear.
func (d *daemon) saveClear(keys []*seal.Key) error {
	changes := map[string][]byte{trustedKey: nil, keysKey: nil}
	if len(keys) > 0 {
		var prints []string
		for _, k := range keys {
			prints = append(prints, fingerprint(k))
		}
		changes[trustedKey] = trustedText(d.cfg.Trusted)
		changes[keysKey] = []byte(strings.Join(prints, " "))
	}
	if err := d.store.Bucket(clearBucket).Update(changes); err != nil {
		return fmt.Errorf("remember what may go in clear: %w", err)
	}
	return nil
}

func fingerprint(k *seal.Key) string {
	f := k.Fingerprint()
	return hex.EncodeToString(f[:])
}

func trustedText(subnets []netip.Prefix) []byte {
	list := make([]string, 0, len(subnets)+1)
	for _, p := range subnets {
		list = append(list, p.String())
	}
	slices.Sort(list)
	return []byte("in " + strings.Join(slices.Compact(list), " "))
}
