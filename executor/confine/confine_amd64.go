package confine

import "golang.org/x/sys/unix"

const (
	auditArch      = unix.AUDIT_ARCH_X86_64
	foreignCallBit = 0x40000000 // __X32_SYSCALL_BIT
)

// foreignMachines are those of 32-bit programs that this kernel may run too (elf(5)): EM_386 and, for x32, EM_X86_64.
var foreignMachines = []uint16{3, 62}

var archDeniedCalls = []uint32{
	unix.SYS_CREATE_MODULE, unix.SYS_GET_KERNEL_SYMS, unix.SYS_IOPERM, unix.SYS_IOPL, unix.SYS_MODIFY_LDT, unix.SYS_QUERY_MODULE,
	unix.SYS_USELIB, unix.SYS__SYSCTL,
}
