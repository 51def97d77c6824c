package bpf

// The objects are committed, so that a build needs no clang. The same
// compiler makes the same bytes.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -cflags "-O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu" -type event -type counter -type hop_kind weave weave.bpf.c
