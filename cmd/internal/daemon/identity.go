package daemon

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"weave.local/peer"
	"weave.local/peer/state"
)

// Buckets and keys of what the daemon itself remembers.
const (
	identityBucket = "identity"
	targetsBucket  = "targets"
	nameKey        = "name"
	shortIDKey     = "short-id"
	foldersKey     = "folders"
	listKey        = "list"
)

// identify says who this peer is: as told, as it was in the last run, or, the
// first time, by chance. A name is not derived from the machine, since cloned
// machines would then have the same.
func identify(cfg *Config, db *state.DB) (peer.Info, error) {
	b := db.Bucket(identityBucket)
	self := peer.Info{
		Name:     cfg.Name,
		UID:      peer.UID(rand.Uint64() | 1),
		NickName: cfg.NickName,
		Port:     uint16(cfg.Port),
	}
	if self.NickName == "" {
		self.NickName = hostName()
	}
	if v, ok := b.Get(shortIDKey); ok && len(v) == 2 {
		if id := peer.ShortID(binary.BigEndian.Uint16(v)); id <= peer.MaxShortID {
			self.ShortID = id
		}
	}
	stored, ok := b.Get(nameKey)
	switch {
	case self.Name != 0:
	case ok:
		name, err := peer.ParseName(string(stored))
		if err != nil {
			return self, fmt.Errorf("remembered identity: %w", err)
		}
		self.Name = name
	default:
		self.Name = randomName()
	}
	if err := b.Put(nameKey, []byte(self.Name.String())); err != nil {
		return self, fmt.Errorf("remember identity: %w", err)
	}
	return self, nil
}

// randomName is a locally administered unicast address (IEEE 802 §8.4).
func randomName() peer.Name {
	var mac [6]byte
	binary.BigEndian.PutUint32(mac[:], rand.Uint32())
	binary.BigEndian.PutUint16(mac[4:], uint16(rand.Uint32()))
	mac[0] = mac[0]&^1 | 2
	return peer.NameFromMAC(mac)
}

func saveShortID(db *state.DB, id peer.ShortID) error {
	v := binary.BigEndian.AppendUint16(nil, uint16(id))
	if err := db.Bucket(identityBucket).Put(shortIDKey, v); err != nil {
		return fmt.Errorf("remember short id: %w", err)
	}
	return nil
}

// targets are the peers to connect to: those named now, which replace earlier
// ones, or those remembered.
func targets(cfg *Config, db *state.DB) ([]string, error) {
	if len(cfg.Peers) > 0 {
		return cfg.Peers, saveTargets(db, cfg.Peers)
	}
	v, _ := db.Bucket(targetsBucket).Get(listKey)
	return strings.Fields(string(v)), nil
}

func saveTargets(db *state.DB, list []string) error {
	if err := db.Bucket(targetsBucket).Put(listKey, []byte(strings.Join(list, "\n"))); err != nil {
		return fmt.Errorf("remember targets: %w", err)
	}
	return nil
}

// folders are those that this or an earlier run made, parents last; reset
// removes them and no others.
func folders(db *state.DB) []string {
	v, _ := db.Bucket(identityBucket).Get(foldersKey)
	return strings.Split(string(v), "\n")
}

func saveFolders(db *state.DB, made []string) error {
	all := folders(db)
	for _, p := range made {
		if !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	v := strings.TrimSpace(strings.Join(all, "\n"))
	if err := db.Bucket(identityBucket).Put(foldersKey, []byte(v)); err != nil {
		return fmt.Errorf("remember folders: %w", err)
	}
	return nil
}
