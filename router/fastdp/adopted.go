package fastdp

// Adopted says whether the kernel already forwarded when New came: a daemon
// before this one left it so. It speaks of that until the first Apply.
func (d *DataPath) Adopted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.deferred || d.config.Self != 0
}
