package process

import (
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor/confine"
)

// Descriptors of an init, after the standard ones.
const (
	initJobFD    = 3 // initJob, from the supervisor; closes with it
	initReportFD = 4 // reports, to the supervisor
	initMountFD  = 5 // the detached mount, where there is one
)

// defaultPath is where a command is looked for when the task's environment names no PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// runInit is the life of a task's process 1: it makes the root, gives up all rights, starts the program, passes signals on,
// reaps, and ends with the program. With it ends all of the pid namespace.
func runInit() int {
	reports := os.NewFile(initReportFD, "report")
	refuse := func(err error) int {
		_ = writeFrame(reports, reportOf(err))
		return 1
	}
	err := hide()
	if err == nil {
		err = dieWithParent()
	}
	if err != nil {
		return refuse(warden.Recode(warden.CodeInternal, "hiding the task's init", err))
	}
	lifeline := os.NewFile(initJobFD, "job")
	var j initJob
	if err := readFrame(lifeline, &j); err != nil {
		return 1 // the supervisor died
	}
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, lifeline)
		os.Exit(1)
	}()
	if err := j.enter(); err != nil {
		return refuse(err)
	}
	if j.ProbeOnly {
		return refuse(nil)
	}
	signals := make(chan os.Signal, 32)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	defaultSignals()
	pid, err := j.run()
	if err != nil {
		return refuse(err)
	}
	go func() { // ends with the process
		for s := range signals {
			if n, ok := s.(syscall.Signal); ok {
				_ = unix.Kill(pid, n)
			}
		}
	}()
	if err := writeFrame(reports, report{Running: true}); err != nil {
		return 1
	}
	return reap(pid, reports)
}

// defaultSignals gives the real-time signals, which Go's runtime leaves as it found them, their default action: a program
// must not ignore what some ancestor of the daemon ignored. The others Notify has taken over, and the exec resets.
func defaultSignals() {
	const realTimeMin, realTimeMax, setBytes = 32, 64, 8
	var action [32]byte // of the kernel: handler (SIG_DFL is 0), flags, restorer, mask
	for n := uintptr(realTimeMin); n <= realTimeMax; n++ {
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, n, uintptr(unsafe.Pointer(&action)), 0, setBytes, 0, 0)
	}
}

// enter makes the root, changes to it and gives up all rights.
func (j initJob) enter() error {
	if err := unix.Sethostname([]byte(j.Hostname)); err != nil {
		return warden.Recode(warden.CodeInternal, "naming the task's host", err)
	}
	var secrets *os.File
	if j.SecretsFD {
		secrets = os.NewFile(initMountFD, "secrets")
		defer secrets.Close()
	}
	_ = unix.Umask(0)
	if err := enterRoot(j.ID, j.ID, secrets, j.SecretsDir); err != nil {
		return err
	}
	_ = unix.Umask(0o022)
	_ = unix.Unshare(unix.CLONE_NEWCGROUP) // only hides the path; kernels before 4.6 show it
	if err := j.giveUp(); err != nil {
		return warden.Recode(warden.CodeInternal, "giving up the rights of the task's init", err)
	}
	return nil
}

func (j initJob) giveUp() error {
	steps := []func() error{dropBounding, lockSecurebits, j.changeID, dropCapabilities, hide, dieWithParent, confine.Apply, closeOnExec}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// changeID takes the uid and gid of the task. In a user namespace init has them, as 0, and no groups.
func (j initJob) changeID() error {
	if j.ID == 0 {
		return nil
	}
	return errors.Join(syscall.Setgroups(nil), syscall.Setresgid(j.ID, j.ID, j.ID), syscall.Setresuid(j.ID, j.ID, j.ID))
}

func closeOnExec() error { return unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) }

// run starts the program. Errors: CodeInvalid where it can never run.
func (j initJob) run() (pid int, err error) {
	op := "starting the command"
	null, err := os.Open("/dev/null")
	if err != nil {
		return 0, warden.Recode(warden.CodeInternal, op, err)
	}
	defer null.Close()
	path, err := lookPath(j.Command[0], j.Env)
	if err == nil && confine.Foreign(path) {
		err = unix.ENOEXEC
	}
	if err == nil {
		pid, err = syscall.ForkExec(path, j.Command, &syscall.ProcAttr{Env: withDefaults(j.Env), Files: []uintptr{null.Fd(), 1, 2},
			Sys: &syscall.SysProcAttr{Setsid: true}})
	}
	switch {
	case err == nil:
		return pid, nil
	case errors.Is(err, fs.ErrNotExist):
		return 0, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "%.200q: not found in the image", j.Command[0]),
			"image host shows the node's /usr, /bin, /sbin, /lib* and /etc; install the program on the nodes or constrain the service to nodes that have it")
	case errors.Is(err, fs.ErrPermission):
		return 0, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "%.200q: not executable for everybody", j.Command[0]),
			"a task runs under a uid of its own: the file and its directories need the x bit for others")
	case errors.Is(err, unix.ENOEXEC):
		return 0, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "%.200q: not a program of this machine", j.Command[0]), "tasks run programs of "+runtime.GOARCH+" alone")
	case errors.Is(err, unix.E2BIG):
		return 0, warden.Errorf(warden.CodeInvalid, op, "arguments and environment are too long together")
	}
	return 0, warden.Recode(warden.CodeInternal, op, err)
}

// lookPath finds the program as a shell would, in the environment of the task.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := defaultPath
	for _, v := range env {
		if value, ok := strings.CutPrefix(v, "PATH="); ok {
			path = value
		}
	}
	err := error(unix.ENOENT)
	for _, dir := range filepath.SplitList(path) {
		candidate := filepath.Join(dir, name)
		info, statErr := os.Stat(candidate)
		if statErr != nil || info.IsDir() {
			continue
		}
		if unix.Access(candidate, unix.X_OK) == nil {
			return candidate, nil
		}
		err = unix.EACCES
	}
	return "", err
}

// withDefaults adds PATH and HOME where env has none.
func withDefaults(env []string) []string {
	out := append([]string(nil), env...)
	for _, v := range []string{"PATH=" + defaultPath, "HOME=/tmp"} {
		key, _, _ := strings.Cut(v, "=")
		has := false
		for _, e := range env {
			has = has || strings.HasPrefix(e, key+"=")
		}
		if !has {
			out = append(out, v)
		}
	}
	return out
}

// reap waits for all children until the program ends, and reports how.
func reap(program int, reports io.Writer) int {
	status, err := confine.Reap(program)
	if err != nil {
		return 1
	}
	e := ended{Code: status.ExitStatus()}
	if status.Signaled() {
		e = ended{Signal: int(status.Signal())}
	}
	_ = writeFrame(reports, report{Exit: &e})
	return 0
}
