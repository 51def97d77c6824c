package peer

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func sample() Record {
	return Record{
		Info: Info{Name: 0x7a0b1c2d3e4f, UID: 0x0102030405060708, ShortID: 4094, NickName: "höst", Port: 6783},
		Seq:  9,
		Neighbours: []Adjacency{
			{Name: 1, Outbound: true, Addr: netip.MustParseAddrPort("192.0.2.1:6783")},
			{Name: 2, Addr: netip.MustParseAddrPort("[2001:db8::1]:40000")},
			{Name: 3, NoData: true},
		},
	}
}

// The layout is a promise to peers of other versions.
func TestRecordLayout(t *testing.T) {
	const golden = "00000055" + "01" +
		"7a0b1c2d3e4f" + "0102030405060708" + "0ffe" + "1a7f" + "05" + "68c3b67374" +
		"0000000000000009" + "0003" +
		"000000000001" + "01" + "04" + "c0000201" + "1a7f" +
		"000000000002" + "00" + "10" + "20010db8000000000000000000000001" + "9c40" +
		"000000000003" + "02" + "00" + "0000"
	if got := hex.EncodeToString(AppendRecord(nil, sample())); got != golden {
		t.Errorf("got  %s\nwant %s", got, golden)
	}
	r, rest, err := ParseRecord(append(AppendRecord(nil, sample()), "rest"...))
	if err != nil || string(rest) != "rest" || !reflect.DeepEqual(r, sample()) {
		t.Errorf("%+v, rest %q, %v", r, rest, err)
	}
}

// What a later version adds at the end of a record is handed on.
func TestRecordKeepsWhatItDoesNotKnow(t *testing.T) {
	later := sample()
	later.tail = []byte("more")
	later.Neighbours[0].spare = 0x84
	wire := AppendRecord(nil, later)
	r, _, err := ParseRecord(wire)
	if err != nil || !bytes.Equal(AppendRecord(nil, r), wire) {
		t.Errorf("%+v %v", r, err)
	}
}

func TestRecordOfUnknownVersionIsSkipped(t *testing.T) {
	wire := AppendRecord(nil, sample())
	wire[4] = 2
	_, rest, err := ParseRecord(append(wire, AppendRecord(nil, sample())...))
	if !errors.Is(err, ErrVersion) {
		t.Fatalf("error %v", err)
	}
	if r, _, err := ParseRecord(rest); err != nil || r.Seq != 9 {
		t.Errorf("the record after it: %+v %v", r, err)
	}
}

func TestRecordRefusals(t *testing.T) {
	for what, spoil := range map[string]func(*Record){
		"no name":           func(r *Record) { r.Name = 0 },
		"no UID":            func(r *Record) { r.UID = 0 },
		"short id 4095":     func(r *Record) { r.ShortID = 4095 },
		"escape sequence":   func(r *Record) { r.NickName = "\x1b[2J" },
		"long nickname":     func(r *Record) { r.NickName = strings.Repeat("x", 65) },
		"itself":            func(r *Record) { r.Neighbours[0].Name = r.Name },
		"out of order":      func(r *Record) { r.Neighbours[0].Name = 9 },
		"twice":             func(r *Record) { r.Neighbours[0].Name = 2 },
		"nameless neighour": func(r *Record) { r.Neighbours[0].Name = 0 },
	} {
		r := sample()
		spoil(&r)
		if got, _, err := ParseRecord(AppendRecord(nil, r)); err == nil {
			t.Errorf("%s: accepted as %+v", what, got)
		}
	}
	whole := AppendRecord(nil, sample())
	for n := range whole {
		if _, _, err := ParseRecord(whole[:n]); err == nil {
			t.Errorf("accepted although cut to %d bytes", n)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add(AppendRecord(nil, sample()))
	f.Add(AppendRecord(nil, Record{Info: Info{Name: 1, UID: 1}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, rest, err := ParseRecord(b)
		if err != nil {
			return
		}
		again, _, err := ParseRecord(AppendRecord(nil, r))
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("%+v is read back as %+v, %v", r, again, err)
		}
		if len(rest) >= len(b) {
			t.Error("nothing was consumed")
		}
	})
}

func TestCleanNickName(t *testing.T) {
	for in, want := range map[string]string{
		"host1": "host1", "a\nb": "a?b", "\xff": "?", strings.Repeat("ö", 40): strings.Repeat("ö", 32),
	} {
		if got := CleanNickName(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestParseName(t *testing.T) {
	for in, want := range map[string]string{
		"7a:0b:1c:2d:3e:4f": "7a:0b:1c:2d:3e:4f",
		"::1":               "00:00:00:00:00:01",
		"1::":               "01:00:00:00:00:00",
		"1::1":              "01:00:00:00:00:01",
		"1:2:3:4:5:6":       "01:02:03:04:05:06",
	} {
		n, err := ParseName(in)
		if err != nil || n.String() != want || NameFromMAC(n.MAC()) != n {
			t.Errorf("%s: %v %v", in, n, err)
		}
	}
	for _, in := range []string{"", "::", "1:2:3:4:5", "1:2:3:4:5:6:7", "1::2::3", "g::1", "100::1", "1:2:3:4:5::6", "00:00:00:00:00:00"} {
		if n, err := ParseName(in); err == nil {
			t.Errorf("%q: accepted as %v", in, n)
		}
	}
}

func FuzzParseName(f *testing.F) {
	f.Add("::1")
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseName(s); err == nil {
			if again, err := ParseName(n.String()); err != nil || again != n {
				t.Errorf("%q: %v, then %v %v", s, n, again, err)
			}
		}
	})
}
