package tap

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// instruction is struct bpf_insn (linux/bpf.h).
type instruction struct {
	op    uint8
	regs  uint8 // target in the low half, source in the high one
	off   int16
	value int32
}

// steering is a program of the type of socket filters that returns the destination
// of a tagged frame, its peer's short id: the kernel takes it modulo the number of
// queues. It lies in the inner tag; the outer one may be beside the frame yet.
func steering() []instruction {
	const vlanPresent, before, behind = 20, 14, 18 // in struct __sk_buff; of the inner tag's value in the frame
	return []instruction{
		{op: 0xbf, regs: 0x16},                   // r6 = r1, the context, which the loads below want there
		{op: 0x61, regs: 0x60, off: vlanPresent}, // r0 = skb->vlan_present
		{op: 0x55, off: 2},                       // if r0 != 0 go past two
		{op: 0x28, value: behind},                // r0 = 16 bits there
		{op: 0x05, off: 1},                       // go past one
		{op: 0x28, value: before},                // r0 = 16 bits there
		{op: 0x57, value: 0xfff},                 // r0 &= 0xfff
		{op: 0x95},                               // return r0
	}
}

// loadSteering puts that program into the kernel and returns its descriptor.
func loadSteering() (int, error) {
	program, license := steering(), []byte("MIT\x00")
	attr := struct { // the beginning of union bpf_attr
		kind, length   uint32
		insns, license uint64
		log, logLen    uint32
		logBuf         uint64
		version, flags uint32
	}{
		kind: unix.BPF_PROG_TYPE_SOCKET_FILTER, length: uint32(len(program)),
		insns:   uint64(uintptr(unsafe.Pointer(&program[0]))),
		license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	if errno != 0 {
		return -1, os.NewSyscallError("bpf", errno)
	}
	return int(fd), nil
}
