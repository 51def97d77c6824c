package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"

	"weave.local/router/bpf"
	"weave.local/tests/lab"
)

// fullPath is the path fastdp while the tables of its hosts hold a crowd.
const fullPath = "fastdp-full"

// pinDir is where a daemon with its usual run folder pins the tables.
const pinDir = "/run/weave/bpf"

const maxPeers = 4000

// crowd is what is put into a host's tables besides what its daemon put there:
// neighbours, each with its route and its place in a broadcast tree, and
// endpoints on them, each with an address.
type crowd struct {
	Endpoints int `json:"endpoints"`
	Peers     int `json:"peers"`
}

func (c crowd) String() string {
	return fmt.Sprintf("%d endpoints with an address each, on %d neighbours with route and broadcast tree", c.Endpoints, c.Peers)
}

// entries is how many entries of tables a crowd makes.
func (c crowd) entries() int { return 2*c.Endpoints + 3*c.Peers }

// crowdAgent fills and empties the tables of the host it runs on as it is told
// by lines on its standard input, and answers each by the number of entries
// that it put there or that it still found there.
func crowdAgent(c crowd, commands io.Reader, answers io.Writer) (err error) {
	objs, err := bpf.Open(pinDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, objs.Close()) }()
	if objs.Fresh() {
		return errors.New("the daemon here has tables of another layout than this program")
	}
	m, err := newMembers(objs, c)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(commands)
	for lines.Scan() {
		n := 0
		switch lines.Text() {
		case "fill":
			n, err = c.entries(), m.fill(objs)
		case "empty":
			n, err = m.empty(objs)
		default:
			err = fmt.Errorf("crowd: %q is no command", lines.Text())
		}
		if err != nil {
			return err
		}
		fmt.Fprintln(answers, n)
	}
	return lines.Err()
}

// members are the entries of a crowd.
type members struct {
	neighbours map[bpf.Addr]bpf.Neighbour
	hops       map[uint16]bpf.Hop
	trees      map[uint16]bpf.Tree
	endpoints  map[bpf.MAC]bpf.Endpoint
	addresses  map[bpf.Addr]bpf.MAC
}

// newMembers chooses short ids that the daemon does not use, underlay addresses
// of 198.18.0.0/15, which is for benchmarks (RFC 2544), and overlay addresses
// from the middle of the default range.
func newMembers(objs *bpf.Objects, c crowd) (members, error) {
	m := members{
		neighbours: map[bpf.Addr]bpf.Neighbour{}, hops: map[uint16]bpf.Hop{}, trees: map[uint16]bpf.Tree{},
		endpoints: map[bpf.MAC]bpf.Endpoint{}, addresses: map[bpf.Addr]bpf.MAC{},
	}
	used, err := objs.Trees.All() // the daemon's own short id is in it
	if err != nil {
		return m, err
	}
	var ids []uint16
	for id := uint16(1); len(ids) < c.Peers; id++ {
		if _, ok := used[id]; ok {
			continue
		}
		remote := address(198, 18, len(ids))
		ids = append(ids, id)
		m.neighbours[bpf.AddrOf(remote)] = bpf.Neighbour{N: 1, ID: [bpf.MaxSharing]uint16{id}}
		m.hops[id] = bpf.Hop{Kind: bpf.KindVXLAN, Via: id, Remote: remote}
		m.trees[id] = bpf.Tree{Parent: id}
	}
	for i := range c.Endpoints {
		mac := bpf.MAC{2, 0xbe}
		binary.BigEndian.PutUint32(mac[2:], uint32(i))
		at := address(10, 40, i)
		subnets, _ := bpf.SubnetsOf([]netip.Prefix{netip.PrefixFrom(at, 12)})
		m.endpoints[mac] = bpf.Endpoint{Peer: ids[i%len(ids)], Subnets: subnets}
		m.addresses[bpf.AddrOf(at)] = mac
	}
	return m, nil
}

func address(a, b byte, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{a, b, byte(i >> 8), byte(i)})
}

func (m members) fill(objs *bpf.Objects) error {
	return errors.Join(put(objs.Neighbours, m.neighbours), put(objs.Hops, m.hops), put(objs.Trees, m.trees),
		put(objs.Endpoints, m.endpoints), put(objs.Addresses, m.addresses))
}

func put[K, V comparable](t bpf.Table[K, V], all map[K]V) error {
	for k, v := range all {
		if err := t.Put(k, v); err != nil {
			return err
		}
	}
	return nil
}

// empty takes away what fill put there and returns how much was still there.
func (m members) empty(objs *bpf.Objects) (n int, err error) {
	return n, errors.Join(remove(objs.Neighbours, m.neighbours, &n), remove(objs.Hops, m.hops, &n), remove(objs.Trees, m.trees, &n),
		remove(objs.Endpoints, m.endpoints, &n), remove(objs.Addresses, m.addresses, &n))
}

func remove[K, V comparable](t bpf.Table[K, V], all map[K]V, n *int) error {
	have, err := t.All()
	if err != nil {
		return err
	}
	for k := range all {
		if _, ok := have[k]; !ok {
			continue
		}
		*n++
		if err := t.Delete(k); err != nil {
			return err
		}
	}
	return nil
}

// crowds are the agents that fill the tables of both ends' hosts.
type crowds struct {
	size   crowd
	agents []*crowdProcess
}

type crowdProcess struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Scanner
}

func startCrowds(ctx context.Context, size crowd, hosts ...*lab.Host) (c *crowds, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c = &crowds{size: size}
	for _, h := range hosts {
		p := &crowdProcess{cmd: exec.CommandContext(ctx, self, agentWord, "crowd", strconv.Itoa(size.Endpoints), strconv.Itoa(size.Peers))}
		p.cmd.Stderr = os.Stderr
		in, err1 := p.cmd.StdinPipe()
		out, err2 := p.cmd.StdoutPipe()
		if err := errors.Join(err1, err2); err != nil {
			return nil, errors.Join(err, c.stop())
		}
		if err := h.Start(p.cmd); err != nil {
			return nil, errors.Join(err, c.stop())
		}
		p.in, p.lines = in, bufio.NewScanner(out)
		c.agents = append(c.agents, p)
	}
	return c, nil
}

// do has all tables filled or emptied. An entry that the daemon took away
// meanwhile is an error: the measurement was not what it is said to be.
func (c *crowds) do(word string) error {
	for _, p := range c.agents {
		fmt.Fprintln(p.in, word)
		if !p.lines.Scan() {
			return fmt.Errorf("crowd: %s: no answer", word)
		}
		if n, err := strconv.Atoi(p.lines.Text()); err != nil || n != c.size.entries() {
			return fmt.Errorf("crowd: %s: %q entries, want %d", word, p.lines.Text(), c.size.entries())
		}
	}
	return nil
}

func (c *crowds) stop() error {
	var errs []error
	for _, p := range slices.Backward(c.agents) {
		_ = p.in.Close()
		errs = append(errs, p.cmd.Wait())
	}
	return errors.Join(errs...)
}
