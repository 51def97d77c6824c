// Package link keeps TCP control links between peers and carries over them
// the link state, messages and streams addressed to a peer by name, hop by hop
// where there is no direct link.
//
// # Handshake
//
// A new connection begins with the handshake of package handshake, and is
// sealed from there on when there is a password. An established link gives way
// to a new one only where that is made with a password that the chair likes
// better; otherwise it ends when it is dead.
//
// # Link
//
// After a welcome from the chair the connection is a yamux session whose client
// is the dialling end. The first stream, opened by the client, carries control
// frames: 4 bytes length of what follows (at most MaxPayload and a header), 1
// byte type, body:
//
//	1  hello      8 bytes digest of the sender's link-state database, or
//	              nothing when it is that of the hello before
//	2, 6, 7, 8    link state, see package linkstate
//	3  datagram   1 byte hops left, 6 bytes destination, 6 bytes source,
//	              1 byte kind, payload
//	4  broadcast  1 byte hops left, 6 bytes source, 8 bytes sequence number,
//	              1 byte kind, payload
//	5  bye        reason as text; the sender closes the link
//
// Unknown types are ignored. A hello is sent every second; a link over which
// nothing arrived for 2.5 s is dead. When digests differ in the first hello
// over a link that joins two parts, as they were before it, or in two hellos in
// a row, the end with the lower name sends a summary.
//
// Every other stream of the session is one hop of a stream between two peers.
// Its opener sends
//
//	1 byte   version (1)
//	1 byte   hops left
//	6 bytes  destination
//	6 bytes  source
//
// and gets 1 byte back, once the destination has it: 6 for accepted, or a
// reason why not: 1 no route, 2 too many hops, 3 the destination is busy. Each
// direction ends by itself. A link that breaks ends the stream; through a relay
// this looks like an ordinary end, so what is sent over a stream must tell by
// itself where it is complete.
package link
