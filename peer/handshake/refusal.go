package handshake

// Codes of refusals.
const (
	RefuseOther     = 0
	RefuseDuplicate = 1 // there is a link already
	RefuseSelf      = 2 // both ends are one and the same
	RefuseCollision = 3 // the name belongs to another live peer
	RefuseLimit     = 4
	RefusePassword  = 5 // one has another password than the other, or none
	RefuseStranger  = 6 // it belongs to another cluster
)

// Refusal is the reason why one end does not want a link.
type Refusal struct {
	Code   byte
	Reason string
	Remote bool // said by the other end
}

// Error is the reason, and who gave it.
func (r *Refusal) Error() string {
	if r.Remote {
		return "refused by the other end: " + r.Reason
	}
	return r.Reason
}

// Lasts says whether the same would be refused again unless something changes at
// one of the ends: worth telling people, and no reason to try again soon.
func (r *Refusal) Lasts() bool {
	switch r.Code {
	case RefuseCollision, RefuseLimit, RefusePassword, RefuseStranger:
		return true
	}
	return false
}

// About passwords each end speaks for itself, in its own words.

func lacksPassword() *Refusal {
	return &Refusal{Code: RefusePassword, Reason: "peer has no password, and we have one"}
}

func hasPassword() *Refusal {
	return &Refusal{Code: RefusePassword, Reason: "peer has a password, and we have none"}
}

func differ() *Refusal {
	return &Refusal{Code: RefusePassword, Reason: "passwords differ"}
}

func parseRefusal(body []byte) *Refusal {
	r := &Refusal{Remote: true, Reason: "no reason given"}
	if len(body) > 0 {
		r.Code = body[0]
	}
	if len(body) > 1 {
		r.Reason = Printable(body[1:])
	}
	return r
}

// Printable makes text of another peer fit for a terminal, and no longer than
// 500 bytes of it.
func Printable(b []byte) string {
	out := make([]rune, 0, len(b))
	for _, r := range string(b[:min(len(b), maxReason)]) {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			r = '?'
		}
		out = append(out, r)
	}
	return string(out)
}
