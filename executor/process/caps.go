package process

import (
	"errors"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// securebits (linux/securebits.h): uid 0 gains nothing by exec, nothing is kept over setuid or raised as ambient, all of it
// locked.
const securebits = 1<<0 | 1<<1 | 1<<5 | 1<<6 | 1<<7

func lockSecurebits() error { return unix.Prctl(unix.PR_SET_SECUREBITS, securebits, 0, 0, 0) }

// dropBounding empties the calling thread's bounding set, so that no exec on it gives a capability.
func dropBounding() error {
	for c := uintptr(0); c < 64; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); errors.Is(err, unix.EINVAL) {
			return nil // past the kernel's last one
		} else if err != nil {
			return err
		}
	}
	return nil
}

// dropCapabilities leaves the process without capabilities. In a binary with cgo, which is a test's and never a release's,
// only the calling thread loses them, and with it all that it starts.
func dropCapabilities() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	h, n := uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0]))
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, h, n, 0)
	if errno == syscall.ENOTSUP {
		_, _, errno = syscall.RawSyscall(unix.SYS_CAPSET, h, n, 0)
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// hide keeps other processes of the same uid, and core dumps, away from this process's memory.
func hide() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return err
	}
	return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
}

// dieWithParent has the kernel kill this process with the thread that started it. A change of uid undoes it.
func dieWithParent() error {
	return os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0))
}
