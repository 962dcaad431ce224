package confine_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"warden/executor/confine"
	"warden/internal/leaktest"
)

// applyVerb makes the test binary a process that applies the filter and says what it can't do any more.
const applyVerb = "test-apply"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == applyVerb {
		if err := applied(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	leaktest.Main(m)
}

// applied applies the filter, tries calls on a thread that was there before and one that was not, and starts a program.
func applied() error {
	old, run := make(chan func() error), make(chan error)
	go func() { // ends with the process
		runtime.LockOSThread()
		for f := range old {
			run <- f()
		}
	}()
	old <- func() error { return nil } // the thread is there
	<-run
	if err := confine.Apply(); err != nil {
		return err
	}
	old <- refuses
	if err := <-run; err != nil {
		return err
	}
	return errors.Join(refuses(), exec.Command("/bin/true").Run(), confine.Apply())
}

// refuses wants calls to be refused that are open to everybody without a filter, or would fail otherwise.
func refuses() error {
	for _, c := range []struct {
		name    string
		want    unix.Errno
		nr      uintptr
		a, b, c uintptr
	}{
		{"ptrace", unix.EPERM, unix.SYS_PTRACE, ^uintptr(0), 0, 0},
		{"unshare", unix.EPERM, unix.SYS_UNSHARE, 0, 0, 0},
		{"clone of a namespace", unix.EPERM, unix.SYS_CLONE, unix.CLONE_NEWUSER | unix.CLONE_THREAD, 0, 0}, // EINVAL
		{"clone3", unix.ENOSYS, unix.SYS_CLONE3, 0, 0, 0},
		{"socket AF_ALG", unix.EPERM, unix.SYS_SOCKET, unix.AF_ALG, ^uintptr(0), 0},
		{"socket AF_VSOCK", unix.EPERM, unix.SYS_SOCKET, unix.AF_VSOCK, ^uintptr(0), 0},
		{"socket AF_UNIX", unix.EINVAL, unix.SYS_SOCKET, unix.AF_UNIX, ^uintptr(0), 0}, // the kernel's own answer
		{"TIOCSTI", unix.EPERM, unix.SYS_IOCTL, ^uintptr(0), unix.TIOCSTI, 0},
		{"TIOCLINUX", unix.EPERM, unix.SYS_IOCTL, ^uintptr(0), unix.TIOCLINUX, 0},
		{"another ioctl", unix.EBADF, unix.SYS_IOCTL, ^uintptr(0), unix.TCGETS, 0},
		{"a call of the future", unix.ENOSYS, 900, 0, 0, 0},
		{"getpid", 0, unix.SYS_GETPID, 0, 0, 0},
	} {
		if _, _, errno := unix.Syscall(c.nr, c.a, c.b, c.c); errno != c.want {
			return fmt.Errorf("%s = %d, want %d", c.name, errno, c.want)
		}
	}
	return nil
}

// TestApply: the filter holds on all threads, needs no privilege, lets an init work, and may be applied once more.
func TestApply(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(self, applyVerb).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestForeign(t *testing.T) {
	machines := map[string][2]uint16{"amd64": {62, 3}, "arm64": {183, 40}}[runtime.GOARCH] // elf(5): of 64 bits, of 32
	header := func(class byte, machine uint16) []byte {
		b := make([]byte, 64)
		copy(b, "\x7fELF")
		b[4] = class
		binary.LittleEndian.PutUint16(b[18:], machine)
		return b
	}
	for name, c := range map[string]struct {
		data []byte
		want bool
	}{
		"64 bits":           {header(2, machines[0]), false},
		"32 bits":           {header(1, machines[1]), true},
		"32 bits, emulated": {header(1, 8), false}, // MIPS: what runs is its emulator
		"cut short":         {header(1, machines[1])[:19], false},
		"script":            {[]byte("#!/bin/sh\nexit 0 # and some more\n"), false},
		"empty":             {nil, false},
	} {
		path := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(path, c.data, 0o755); err != nil {
			t.Fatal(err)
		}
		if got := confine.Foreign(path); got != c.want {
			t.Errorf("Foreign(%s) = %v", name, got)
		}
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, "/", "/proc/self/exe", "/warden-no-such-file"} {
		if confine.Foreign(path) {
			t.Errorf("Foreign(%s)", path)
		}
	}
}

// TestDrawIDs: slots that are used are not drawn, nor any that has an id of a user of the host.
func TestDrawIDs(t *testing.T) {
	const all = int64(confine.IDSlots) * confine.IDsPerTask
	foreign := []confine.Range{{First: 0, Count: confine.IDFirst + 1}, {First: confine.IDFirst + 4*confine.IDsPerTask - 1, Count: all}}
	seen := map[uint32]bool{} // of the slots 0 to 3 only 1 and 2 are nobody's
	for range 2 {
		seen[confine.DrawIDs(foreign, func(base uint32) bool { return seen[base] })] = true
	}
	if !seen[confine.IDFirst+confine.IDsPerTask] || !seen[confine.IDFirst+2*confine.IDsPerTask] {
		t.Errorf("DrawIDs() = %v", seen)
	}
}
