package fastdp

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"weave.local/peer"
	"weave.local/router/netdev"
	"weave.local/router/overlay"
)

// maxExams bounds the exams that go on at a time.
const maxExams = 16

// offload is what is known of the devices on the way to a neighbour.
type offload struct {
	name   peer.Name
	hop    netdev.NextHop // the way out of this host
	active bool           // frames go to the neighbour by it
	exam   *exam          // under way, nil when none is
	next   time.Time      // when the next one begins
	known  bool           // one has told something
	fault  string         // what it told, "" when all was well
}

// examine notes which neighbours frames go to by the fast path. Those to which
// they do anew are examined soon.
func (d *DataPath) examine(f overlay.Forwarding) {
	d.examMu.Lock()
	defer d.examMu.Unlock()
	old := d.offloads
	d.offloads = make(map[peer.ShortID]*offload, len(f.Neighbours))
	if f.Partial {
		maps.Copy(d.offloads, old)
	}
	for _, n := range f.Neighbours {
		o := old[n.ShortID]
		if o == nil || o.name != n.Name {
			o = &offload{name: n.Name}
		}
		hop, ok := f.Hops[n.ShortID]
		active := ok && hop.Via == n.ShortID && hop.Path == overlay.FastDP
		if active && !o.active {
			o.next = time.Time{}
		}
		o.active = active
		d.offloads[n.ShortID] = o
	}
}

// leaves notes the way to a neighbour out of this host. A new one is examined
// soon.
func (d *DataPath) leaves(to peer.ShortID, hop netdev.NextHop) {
	d.examMu.Lock()
	defer d.examMu.Unlock()
	o := d.offloads[to]
	if o == nil || o.hop.Dev == hop.Dev && o.hop.Gateway == hop.Gateway {
		return
	}
	o.hop, o.exam, o.next = hop, nil, time.Time{}
}

// Answered tells of an answer to a probe that Probe did not send.
func (d *DataPath) Answered(from peer.ShortID, token uint64) {
	d.examMu.Lock()
	defer d.examMu.Unlock()
	if o := d.offloads[from]; o != nil && o.exam != nil {
		o.exam.answered(token)
	}
}

// Remark says what is done here because devices on the way to a neighbour do not
// do it, "" when nothing is.
func (d *DataPath) Remark(to peer.ShortID) string {
	d.examMu.Lock()
	defer d.examMu.Unlock()
	if o := d.offloads[to]; o != nil && o.fault != "" {
		return o.remark()
	}
	return ""
}

func (o *offload) remark() string {
	return fmt.Sprintf("%s by device %s: the kernel does it instead, which is slower", o.fault, o.hop.Name)
}

// doubted says whether nothing may be left to devices on the way to a neighbour.
// A neighbour of which nothing is known yet is doubted where an earlier daemon
// had reason to.
func (d *DataPath) doubted(id peer.ShortID) bool {
	d.examMu.Lock()
	defer d.examMu.Unlock()
	return d.doubtedLocked(d.offloads[id])
}

func (d *DataPath) doubtedLocked(o *offload) bool {
	return o != nil && (o.fault != "" || !o.known && d.software)
}

// watchOffloads examines the ways to neighbours until ctx ends.
func (d *DataPath) watchOffloads(ctx context.Context) error {
	tick := time.NewTicker(examEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			d.stepExams(now)
		}
	}
}

// stepExams sends what is due and acts on what came out.
func (d *DataPath) stepExams(now time.Time) {
	due, changed := d.dueExams(now)
	if len(due) > 0 {
		d.sendExams(due)
	}
	if changed {
		d.followExams()
	}
}

// dueExams begins and ends exams. changed says that what may be left to devices
// may be another thing by now.
func (d *DataPath) dueExams(now time.Time) (due map[peer.ShortID][]segments, changed bool) {
	d.examMu.Lock()
	defer d.examMu.Unlock()
	due = make(map[peer.ShortID][]segments)
	running := 0
	for _, o := range d.offloads {
		if o.exam != nil {
			running++
		}
	}
	for _, id := range slices.Sorted(maps.Keys(d.offloads)) {
		o := d.offloads[id]
		if !o.active {
			o.exam = nil
			continue
		}
		if o.exam == nil && !now.Before(o.next) && running < maxExams {
			o.exam = newExam(rand.Uint64())
			running++
		}
		if o.exam == nil {
			continue
		}
		if probes := o.exam.due(now); probes != nil {
			due[id] = probes
		}
		if o.exam.over(now) {
			changed = d.concludeLocked(o, now) || changed
		}
	}
	return due, changed
}

func (d *DataPath) concludeLocked(o *offload, now time.Time) (changed bool) {
	fault, told := o.exam.verdict()
	o.exam, o.next = nil, now.Add(examSoon)
	if !told {
		return false
	}
	o.next = now.Add(examAgain)
	was := o.fault
	changed = !o.known || was != fault
	o.known, o.fault = true, fault
	switch {
	case fault != "" && was != fault && !d.saidLocked(o, fault):
		d.log.Warn("network devices are relieved of what they do wrong", "peer", o.name, "reason", o.remark())
	case fault == "" && was != "" && !d.saidLocked(o, was):
		d.log.Info("network devices do their part again", "device", o.hop.Name, "peer", o.name)
	}
	return changed
}

// saidLocked says whether the same fault is known of the way to another neighbour:
// one line about a device is enough for a log.
func (d *DataPath) saidLocked(o *offload, fault string) bool {
	return slices.ContainsFunc(slices.Collect(maps.Values(d.offloads)), func(x *offload) bool {
		return x != o && x.fault == fault && x.hop.Name == o.hop.Name
	})
}

// sendExams sends probes. Where the kernel does by itself what devices do wrong
// it leaves that to them for this moment.
func (d *DataPath) sendExams(due map[peer.ShortID][]segments) {
	if d.inSoftware() {
		if err := d.setSoftware(false); err != nil {
			d.log.Debug("no exam of devices", "error", err)
			return
		}
		defer func() {
			if err := d.setSoftware(true); err != nil {
				d.log.Warn("network devices are not relieved any more", "reason", err)
			}
		}()
	}
	for id, probes := range due {
		if err := sendSegments(d.vxlan, id, probes...); err != nil {
			d.log.Debug("no exam of devices", "to", id, "error", err)
		}
	}
}

// followExams has the kernel do what the devices on the way to a neighbour do
// not: the VXLAN device takes from the frames to all of them what is left to do,
// and those to this neighbour do not go past it.
func (d *DataPath) followExams() {
	d.examMu.Lock()
	all := slices.Collect(maps.Values(d.offloads))
	wanted := slices.ContainsFunc(all, func(o *offload) bool { return o.active && d.doubtedLocked(o) })
	same := wanted == d.software
	d.examMu.Unlock()
	d.lookAgain()
	if same {
		return
	}
	if err := d.setSoftware(wanted); err != nil {
		d.log.Warn("network devices cannot be relieved of what they do wrong", "reason", err)
		return
	}
	d.examMu.Lock()
	d.software = wanted
	d.examMu.Unlock()
}

func (d *DataPath) inSoftware() bool {
	d.examMu.Lock()
	defer d.examMu.Unlock()
	return d.software
}

// setSoftware has the VXLAN device take frames complete and cut only, or as they
// come.
func (d *DataPath) setSoftware(on bool) error {
	return netdev.SetTxOffload(vxlanName(d.cfg.Port), !on)
}
