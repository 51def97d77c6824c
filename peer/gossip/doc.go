// Package gossip tells each peer which others are alive and replicates small
// tables and whole-value states among them, over the links of package link.
//
// Membership is memberlist's, carried by a transport that addresses peers by
// name and relays through neighbours. A peer counts as dead when memberlist
// says so and there is no route to it either.
//
// # Tables
//
// A table maps keys to values; each entry belongs to the peer that set it, its
// origin. What an origin owns in all tables together has an epoch, which is
// new in each run of its daemon, and a sequence number, which grows by one with
// every change. A replica that is at sequence number n of an epoch knows the
// outcome of all changes up to n. Deletions are remembered for a while; who is
// too far behind to be told of them gets the complete set instead, and a new
// epoch always begins with one, which replaces the old epoch in one step.
//
// An origin broadcasts its changes at once. What gets lost is repaired by
// anti-entropy: peers compare an 8-byte root over all reachable origins and
// states, and who differs pulls from the other, over a stream, what it lacks
// by its vector of epochs and sequence numbers. Roots travel in the acks of
// memberlist's pings and in its push/pull exchanges.
//
// # Broadcasts
//
// Messages of kind BroadcastKind; integers are big endian, uvarint is that of
// encoding/binary:
//
//	1 byte   version (1)
//	1 byte   1: set, 2: state
//
// followed by either
//
//	a set (see below), whose origin is the sender
//
// or
//
//	1 byte   length of the name of the state, 1 to 32
//	n bytes  name
//	8 bytes  digest of the state
//	rest     the state
//
// A set is some or all of what one origin owns:
//
//	6 bytes  origin
//	8 bytes  epoch, from 1 to 2⁶³-1
//	uvarint  base: changes up to this one are not told again
//	uvarint  sequence number reached with this set, at least base
//	1 byte   flags; bit 0: complete: whatever it does not name does not exist
//	         (base is 0 then); bit 1: more parts of this set follow
//	uvarint  number of items
//
// and for each item
//
//	uvarint  sequence number of the set less that of the item
//	1 byte   flags; bit 0: deleted
//	1 byte   length of the name of the table, 1 to 32
//	n bytes  name
//	1 byte   length of the key, at most 128
//	n bytes  key
//	uvarint  length of the value, at most 4096; 0 when deleted
//	n bytes  value
//
// # Streams
//
// The first byte of a stream says what it carries: 1 memberlist, 2 a pull. A
// pull is a request and its answer, both in frames: 4 bytes length of what
// follows, 1 byte type, body. The puller sends one request (type 1):
//
//	1 byte   version (1)
//	1 byte   flags; bit 0: this pull answers another; do not answer it
//	8 bytes  root
//	uvarint  number of origins known, at most 16384
//	each     6 bytes origin, 8 bytes epoch, uvarint sequence number
//	uvarint  number of states, at most 64
//	each     1 byte length of the name, name, 8 bytes digest
//
// and gets any number of sets (type 2, the parts of one in a row), of states
// (type 3: 1 byte length of the name, name, the state), and last, without which
// the answer is not whole, an end (type 4: 8 bytes root). Unknown types are
// skipped, and so are bytes behind the end of what is described here.
package gossip
