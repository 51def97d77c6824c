package state

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Sizes and flags of bbolt's file format, version 2, in the byte order of the
// machine: pages that begin with id u64, flags u16, count u16, overflow u32 (how
// many pages more it takes), then a table of count elements, then what those
// point to. See bbolt's internal/common.
const (
	headerSize  = 16
	elementSize = 16

	branchFlag   = 0x01
	leafFlag     = 0x02
	freelistFlag = 0x10

	bucketFlag = 0x01 // of a leaf's element: its value is a bucket

	// In the first page, behind its header.
	pageSizeAt = headerSize + 8
	rootAt     = headerSize + 16
	freelistAt = headerSize + 32
	pagesAt    = headerSize + 40
	metaEnd    = headerSize + 64

	// noFreelist stands for the page of free pages where it is not kept.
	noFreelist = ^uint64(0)
	// manyFree is the count of a list too long for it: its first entry is the
	// count then.
	manyFree = 0xffff
)

// checker walks a snapshot of a file, as bbolt's own walks do, but bounded by
// what is there: bbolt follows what it reads, faults where that leads out of
// the file, and does so on a goroutine where nobody can recover it.
type checker struct {
	file     []byte
	pageSize uint64
	pages    uint64 // in use or free; the file may be longer
	seen     []bool // pages that something holds
}

// check returns the first thing that is wrong with a snapshot whose first page
// is sound: pages out of it, held twice or by nobody, keys out of order.
func check(file []byte) error {
	if len(file) < metaEnd {
		return fmt.Errorf("only %d bytes long", len(file))
	}
	c := &checker{
		file:     file,
		pageSize: uint64(binary.NativeEndian.Uint32(file[pageSizeAt:])),
		pages:    binary.NativeEndian.Uint64(file[pagesAt:]),
	}
	if c.pageSize < metaEnd || c.pages > uint64(len(file))/c.pageSize {
		return fmt.Errorf("%d pages of %d bytes in a file of %d", c.pages, c.pageSize, len(file))
	}
	c.seen = make([]bool, c.pages)
	if err := c.freelist(binary.NativeEndian.Uint64(file[freelistAt:])); err != nil {
		return err
	}
	if err := c.tree(binary.NativeEndian.Uint64(file[rootAt:]), nil, nil, c.bucket); err != nil {
		return err
	}
	if i := slices.Index(c.seen[min(2, c.pages):], false); i >= 0 {
		return fmt.Errorf("page %d: neither in use nor free", i+2)
	}
	return nil
}

// hold takes n pages from id on for one that holds them.
func (c *checker) hold(id, n uint64) error {
	if id < 2 || id >= c.pages || n > c.pages-id {
		return fmt.Errorf("page %d: %d pages from there in a file of %d", id, n, c.pages)
	}
	for i := range n {
		if c.seen[id+i] {
			return fmt.Errorf("page %d: in use twice", id+i)
		}
		c.seen[id+i] = true
	}
	return nil
}

// page takes the page with that id and returns all of it with the pages it runs
// over to.
func (c *checker) page(id uint64) ([]byte, error) {
	if id < 2 || id >= c.pages {
		return nil, fmt.Errorf("page %d in a file of %d", id, c.pages)
	}
	p := c.file[id*c.pageSize:]
	if self := binary.NativeEndian.Uint64(p); self != id {
		return nil, fmt.Errorf("page %d: says that it is %d", id, self)
	}
	n := 1 + uint64(binary.NativeEndian.Uint32(p[12:]))
	if err := c.hold(id, n); err != nil {
		return nil, err
	}
	return p[:n*c.pageSize], nil
}

// freelist takes the page that lists the free ones, and those.
func (c *checker) freelist(id uint64) error {
	if id == noFreelist {
		return errors.New("no list of free pages")
	}
	p, err := c.page(id)
	if err != nil {
		return fmt.Errorf("list of free pages: %w", err)
	}
	count, ids := uint64(binary.NativeEndian.Uint16(p[10:])), p[headerSize:]
	if count == manyFree {
		count, ids = binary.NativeEndian.Uint64(ids), ids[8:]
	}
	if binary.NativeEndian.Uint16(p[8:]) != freelistFlag || count > uint64(len(ids)/8) {
		return fmt.Errorf("page %d: no list of %d free pages", id, count)
	}
	for i := range count {
		if err := c.hold(binary.NativeEndian.Uint64(ids[8*i:]), 1); err != nil {
			return fmt.Errorf("free: %w", err)
		}
	}
	return nil
}

// entry is an element of a page of a tree: a child, or flags and a value.
type entry struct {
	key   []byte
	child uint64
	flags uint32
	value []byte
}

// entries reads the elements of a page; their keys ascend from low on and end
// before high, which may be nil for no bound.
func entries(p []byte, branch bool, low, high []byte) ([]entry, error) {
	count := uint64(binary.NativeEndian.Uint16(p[10:]))
	if headerSize+count*elementSize > uint64(len(p)) {
		return nil, fmt.Errorf("%d elements in %d bytes", count, len(p))
	}
	out := make([]entry, count)
	for i := range out {
		p := p[headerSize+elementSize*i:] // what is in it is counted from here
		word := func(n int) uint64 { return uint64(binary.NativeEndian.Uint32(p[4*n:])) }
		e := &out[i]
		var pos, keySize, size uint64
		if branch {
			pos, keySize, e.child = word(0), word(1), binary.NativeEndian.Uint64(p[8:])
		} else {
			e.flags, pos, keySize, size = uint32(word(0)), word(1), word(2), word(3)
		}
		if pos+keySize+size > uint64(len(p)) {
			return nil, fmt.Errorf("element %d of %d bytes at %d of %d", i, keySize+size, pos, len(p))
		}
		e.key, e.value = p[pos:pos+keySize], p[pos+keySize:pos+keySize+size]
		if bytes.Compare(e.key, low) < 0 || i > 0 && bytes.Equal(e.key, low) || high != nil && bytes.Compare(e.key, high) >= 0 {
			return nil, fmt.Errorf("element %d is out of order", i)
		}
		low = e.key
	}
	return out, nil
}

// tree walks the tree below a page, whose keys are from low on and before high,
// and calls leaf for each element of its leaves.
func (c *checker) tree(id uint64, low, high []byte, leaf func(entry) error) error {
	p, err := c.page(id)
	if err != nil {
		return err
	}
	flags := binary.NativeEndian.Uint16(p[8:])
	if flags != branchFlag && flags != leafFlag {
		return fmt.Errorf("page %d: flags %#x", id, flags)
	}
	all, err := entries(p, flags == branchFlag, low, high)
	if err == nil && flags == branchFlag && len(all) == 0 {
		err = errors.New("no children")
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	for i, e := range all {
		if flags == leafFlag {
			err = leaf(e)
		} else if i+1 < len(all) {
			err = c.tree(e.child, e.key, all[i+1].key, leaf)
		} else {
			err = c.tree(e.child, e.key, high, leaf)
		}
		if err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
	}
	return nil
}

// bucket checks what an element of the root holds: a tree of its own, or a page
// within the value.
func (c *checker) bucket(e entry) error {
	if e.flags != bucketFlag || len(e.value) < 16 {
		return fmt.Errorf("%q: no bucket: flags %#x, %d bytes", e.key, e.flags, len(e.value))
	}
	if root := binary.NativeEndian.Uint64(e.value); root != 0 {
		return c.tree(root, nil, nil, plain)
	}
	inline := e.value[16:]
	if len(inline) < headerSize || binary.NativeEndian.Uint16(inline[8:]) != leafFlag {
		return fmt.Errorf("%q: no page in a small bucket", e.key)
	}
	all, err := entries(inline, false, nil, nil)
	for _, e := range all {
		err = cmp.Or(err, plain(e))
	}
	return err
}

// plain refuses what is no value: no bucket of ours has others in it.
func plain(e entry) error {
	if e.flags != 0 {
		return fmt.Errorf("%q: flags %#x of a value", e.key, e.flags)
	}
	return nil
}
