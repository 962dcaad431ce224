package process

import "golang.org/x/sys/unix"

const (
	auditArch      = unix.AUDIT_ARCH_AARCH64
	foreignCallBit = 0 // compat calls have an architecture of their own
)

var archDeniedCalls []uint32
