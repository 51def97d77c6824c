package dialer

import (
	"time"

	"weave.local/peer"
)

// State is what Connections says of a link or target.
type State string

// States of a Connection.
const (
	Connecting State = "connecting" // first attempt
	Retrying   State = "retrying"   // a later attempt
	Failed     State = "failed"     // waits for the next attempt, if there is one
	Connected  State = "connected"  // there is a live link
)

// Connection is a live link or something to be dialled.
type Connection struct {
	Addr     string // of the other end: ip:port, or the target as given while it does not resolve
	Outbound bool
	State    State
	Peer     peer.Info // who is at the other end; only the name, or nothing, while not connected
	Err      string    // why the last attempt or link ended
	Retry    time.Time // of the next attempt when Failed; zero: none is planned
	Session  uint64    // when Connected
	Sealed   bool      // when Connected: the data path is sealed
}
