package confine

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reap waits, in a task's process 1, for all children until program ends, and returns how it did. Errors: the kernel's.
func Reap(program int) (syscall.WaitStatus, error) {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case pid == program:
			return status, nil
		}
	}
}
