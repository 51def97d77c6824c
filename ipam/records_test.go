package ipam

import (
	"bytes"
	"testing"
)

func FuzzParseRecords(f *testing.F) {
	f.Add("own/10.32.0.1", []byte{1, 24, 'c'})
	f.Add("give/10.32.0.0-10.32.0.15", []byte{1, 0, 0, 0, 0, 0, 2})
	f.Fuzz(func(t *testing.T, key string, b []byte) {
		if r, err := parseRecord(key, b); err == nil {
			if !r.prefix.IsValid() || !bytes.Equal(r.encode(), b) {
				t.Fatalf("%q is %+v, written %q", b, r, r.encode())
			}
		}
		if r, _, err := parseGive(key, b); err == nil && !r.Valid() {
			t.Fatalf("range %v", r)
		}
	})
}
