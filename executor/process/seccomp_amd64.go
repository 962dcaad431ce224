package process

import "golang.org/x/sys/unix"

const (
	auditArch      = unix.AUDIT_ARCH_X86_64
	foreignCallBit = 0x40000000 // __X32_SYSCALL_BIT
)

var archDeniedCalls = []uint32{
	unix.SYS_CREATE_MODULE, unix.SYS_GET_KERNEL_SYMS, unix.SYS_IOPERM, unix.SYS_IOPL, unix.SYS_MODIFY_LDT, unix.SYS_QUERY_MODULE,
	unix.SYS_USELIB, unix.SYS__SYSCTL,
}
