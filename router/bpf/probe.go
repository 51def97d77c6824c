package bpf

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/ringbuf"
)

// Probe is a probe that arrived from a neighbour.
type Probe struct {
	Token uint64
	Size  int    // of the IP packet that the probe stands for, in bytes
	From  uint16 // short id of the neighbour
}

// Places of the fields of struct event.
const (
	eventSize    = 16
	eventToken   = 0
	eventIPSize  = 8
	eventFrom    = 12
	eventFromEnd = 14
)

// ReadProbes hands each probe that arrives to f, until ctx ends.
func (o *Objects) ReadProbes(ctx context.Context, f func(Probe)) error {
	r, err := ringbuf.NewReader(o.objs.Events)
	if err != nil {
		return fmt.Errorf("ring buffer of probes: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = r.Close() }) // wakes Read
	defer func() {
		if stop() {
			_ = r.Close()
		}
	}()
	var rec ringbuf.Record
	for {
		if err := r.ReadInto(&rec); err != nil {
			if ctx.Err() != nil || errors.Is(err, ringbuf.ErrClosed) {
				return nil
			}
			return fmt.Errorf("ring buffer of probes: %w", err)
		}
		if b := rec.RawSample; len(b) >= eventSize {
			f(Probe{
				Token: binary.NativeEndian.Uint64(b[eventToken:]),
				Size:  int(binary.NativeEndian.Uint32(b[eventIPSize:])),
				From:  binary.NativeEndian.Uint16(b[eventFrom:eventFromEnd]),
			})
		}
	}
}
