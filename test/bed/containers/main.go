// Command containers is process 1 of a host that is a container (containers.sh): it gives the container writable cgroups of its own,
// which the engine does not, starts the daemon of its arguments, reaps, and passes signals on.
//
// The cgroups are the container's part of the machine's and end with it, given a cgroup namespace of its own.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const cgroups = "/sys/fs/cgroup"

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "host:", err)
	}
	os.Exit(code)
}

func run(argv []string) (int, error) {
	if len(argv) == 0 {
		return 2, errors.New("usage: host PROGRAM [ARGUMENT...]")
	}
	if err := ownCgroups(); err != nil {
		return 1, fmt.Errorf("mounting cgroups: %w", err)
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals)
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return 1, err
	}
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		return 1, fmt.Errorf("starting %s: %w", path, err)
	}
	for s := range signals {
		if s != unix.SIGCHLD {
			if s != unix.SIGURG { // Go's own
				_ = unix.Kill(pid, s.(syscall.Signal))
			}
			continue
		}
		for {
			var status unix.WaitStatus
			ended, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if err != nil || ended <= 0 {
				break
			}
			if ended == pid {
				return status.ExitStatus(), nil
			}
		}
	}
	return 0, nil
}

// ownCgroups mounts the controllers that tasks are limited by, as this machine has them: those of version 1, or version 2.
func ownCgroups() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroups, &fs); err != nil {
		return err
	}
	if fs.Type == unix.CGROUP2_SUPER_MAGIC {
		return unix.Mount("cgroup", cgroups, "cgroup2", flags, "")
	}
	if err := unix.Mount("cgroups", cgroups, "tmpfs", flags, "mode=0755"); err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) { // ID:CONTROLLERS:PATH, where some are mounted together
		fields := strings.SplitN(line, ":", 3)
		if len(fields) < 3 || !slices.ContainsFunc(strings.Split(fields[1], ","), func(c string) bool { return c == "cpu" || c == "memory" || c == "pids" }) {
			continue
		}
		dir := filepath.Join(cgroups, fields[1])
		err := os.Mkdir(dir, 0o755)
		if err == nil {
			err = unix.Mount("cgroup", dir, "cgroup", flags, fields[1])
		}
		if err != nil {
			return fmt.Errorf("%s: %w", fields[1], err)
		}
	}
	return nil
}
