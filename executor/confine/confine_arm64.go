package confine

import "golang.org/x/sys/unix"

const (
	auditArch      = unix.AUDIT_ARCH_AARCH64
	foreignCallBit = 0 // compat calls have an architecture of their own
)

// foreignMachines are those of 32-bit programs that this kernel may run too (elf(5)): EM_ARM.
var foreignMachines = []uint16{40}

var archDeniedCalls []uint32
