package attach

import (
	"net/netip"
	"testing"

	"weave.local/router/overlay"
)

func TestMACFollowsTheAddress(t *testing.T) {
	seen := make(map[overlay.MAC]string)
	for _, s := range []string{"10.32.0.1/12", "10.32.0.2/12", "10.33.0.1/12", "fd00::1/64", "fd00::2/64"} {
		p := netip.MustParsePrefix(s)
		mac := macOf([]netip.Prefix{p})
		if mac != macOf([]netip.Prefix{p}) {
			t.Errorf("%s: another address each time", s)
		}
		if mac[0]&1 != 0 || mac[0]&2 == 0 {
			t.Errorf("%s: %s is not a locally administered unicast address", s, mac)
		}
		if other, ok := seen[mac]; ok {
			t.Errorf("%s and %s share %s", s, other, mac)
		}
		seen[mac] = s
	}
	if mac := macOf([]netip.Prefix{netip.MustParsePrefix("10.32.0.1/12")}); mac != (overlay.MAC{0x76, 0x65, 10, 32, 0, 1}) {
		t.Errorf("10.32.0.1 gives %s", mac)
	}
	if one, other := macOf(nil), macOf(nil); one == other {
		t.Error("without an address two endpoints get the same")
	}
}
