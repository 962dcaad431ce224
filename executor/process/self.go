package process

import (
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"warden"
)

// payload holds the helper where the build has put it there.
//
//go:embed payload
var payload embed.FS

// checkVerb makes the helper answer that it runs.
const checkVerb = "internal-check"

// Self returns the path of what supervisors and inits of tasks are to run, for New. That is the helper that the build has put into this
// binary, in memory, sealed, under a path that is good for as long as this process lives; without one, or where this machine runs
// nothing from memory, it is this binary, in which the libraries of the daemon take some 5 ms to begin, twice for each task. Errors: CodeInternal.
func Self(logger *slog.Logger) (string, error) {
	helper, err := payload.ReadFile("payload/helper")
	if err == nil {
		path, merr := inMemory("warden-task", helper)
		if merr == nil {
			return path, nil
		}
		logger.Warn("could not run the helper from memory", "error", merr)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", warden.Recode(warden.CodeInternal, "reading the helper", err)
	}
	self, err := os.Executable()
	if err != nil {
		return "", warden.Recode(warden.CodeInternal, "finding this program", err)
	}
	return self, nil
}

// inMemory makes an executable file that nobody can change and that has no name, and tries it.
func inMemory(name string, content []byte) (string, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return "", os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close() // a file that is open for writing can't be run
	if _, err := f.Write(content); err != nil {
		return "", err
	}
	if err := f.Chmod(0o555); err != nil { // tasks run it too, as the uid that they have
		return "", err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return "", os.NewSyscallError("fcntl", err)
	}
	kept, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.O_RDONLY|unix.O_CLOEXEC, 0) // until the process ends
	if err != nil {
		return "", os.NewSyscallError("open", err)
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	path := fmt.Sprintf("/proc/self/fd/%d", kept)
	if err := (&exec.Cmd{Path: path, Args: []string{"warden", checkVerb}, Dir: "/", Env: []string{}}).Run(); err != nil {
		unix.Close(kept)
		return "", err
	}
	return path, nil
}
