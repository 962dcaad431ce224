package process

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor"
)

// killSlack is how long after its grace a supervisor has to end a task before it is killed itself.
const killSlack = 15 * time.Second

// task is a handle. Everything but exit is set before others see it.
type task struct {
	e       *Executor
	id, dir string
	idBase  uint32
	pid     int         // of the supervisor
	process *os.Process // the supervisor, by pidfd; nil if it had ended before it was found
	done    chan struct{}
	exit    executor.Exit // once done is closed
}

// ID returns the task's ID.
func (t *task) ID() string { return t.id }

// find looks for the supervisor of a task that another daemon started, and watches it.
func (t *task) find() error {
	process, err := os.FindProcess(t.pid) // a pidfd
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(t.pid, unix.PIDFD_NONBLOCK)
	switch { // with the lock held now, both were the supervisor
	case !locked(t.dir):
		if err == nil {
			unix.Close(fd)
		}
		t.end()
		return nil
	case err != nil:
		return os.NewSyscallError("pidfd_open", err)
	}
	t.process = process
	file := os.NewFile(uintptr(fd), "pidfd") // waited for by the runtime's poller, without a thread
	conn, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return err
	}
	go func() { // ends with the supervisor
		defer file.Close()
		_ = conn.Read(func(fd uintptr) bool {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(p, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
		t.end()
	}()
	return nil
}

// end notes how the task ended. The supervisor is gone.
func (t *task) end() {
	if err := readJSON(t.dir, exitFile, &t.exit); err != nil {
		_ = t.cgroup().remove() // kills what the supervisor's death has not yet
		t.exit = executor.Exit{Code: 128 + int(unix.SIGKILL), Signal: unix.SignalName(unix.SIGKILL), Error: "supervisor died", At: time.Now().UTC()}
		_ = writeJSON(t.dir, exitFile, t.exit) // so that the time stays; fails where the directory is gone
	}
	close(t.done)
}

func (t *task) cgroup() cgroup { return cgroup{dirs: t.e.cgroups, parent: t.e.parent, task: t.id} }

// Wait returns how the task ended, when it has.
func (t *task) Wait(ctx context.Context) (executor.Exit, error) {
	select {
	case <-t.done:
		return t.exit, nil
	default:
	}
	select {
	case <-t.done:
		return t.exit, nil
	case <-ctx.Done():
		return executor.Exit{}, ctx.Err()
	}
}

// Stop ends the task: SIGTERM to the program, SIGKILL to all after grace. The supervisor keeps the time, so that the order
// stands even if this daemon dies.
func (t *task) Stop(ctx context.Context, grace time.Duration) error {
	select {
	case <-t.done:
		return nil
	default:
	}
	grace = min(max(grace, 0), warden.StopGraceMax)
	op, slack := "stopping task "+t.id, killSlack
	if err := writeJSON(t.dir, stopFile, stopOrder{Grace: grace}); err != nil && !errors.Is(err, fs.ErrNotExist) {
		// A full disk must not keep a task and its secrets alive: the supervisor takes its default grace, this daemon the order's.
		t.e.logger.Warn("could not write an order to stop", "task_id", t.id, "error", err)
		slack = 0
	}
	if err := t.process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	late := time.NewTimer(grace + slack)
	defer late.Stop()
	for {
		select {
		case <-t.done:
			return nil
		case <-late.C:
			t.e.logger.Error("killed a supervisor that did not stop its task", "task_id", t.id)
			_ = t.process.Kill()
		case <-ctx.Done():
			return warden.Wrap(op, ctx.Err())
		}
	}
}

// Logs calls f with lines of output. After Remove there are none.
func (t *task) Logs(ctx context.Context, o executor.LogOptions, f func(executor.Line) error) error {
	return readLogs(ctx, t.dir, o, t.done, f)
}

// Remove ends the task at once and wipes it. Removing a removed task is no error.
func (t *task) Remove(ctx context.Context) error {
	if err := t.Stop(ctx, 0); err != nil {
		return err
	}
	if err := t.wipe(); err != nil {
		return warden.Wrap("removing task "+t.id, err)
	}
	t.e.mu.Lock()
	defer t.e.mu.Unlock()
	if t.e.tasks[t.id] == t {
		delete(t.e.tasks, t.id)
	}
	return nil
}

// wipe removes the cgroup and the directory, in one step for whoever adopts later.
func (t *task) wipe() error {
	if err := t.cgroup().remove(); err != nil {
		return err
	}
	gone := filepath.Join(filepath.Dir(t.dir), removing+t.id)
	if err := os.Rename(t.dir, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return warden.Recode(warden.CodeInternal, "wiping the task's directory", err)
	}
	if err := os.RemoveAll(gone); err != nil {
		return warden.Recode(warden.CodeInternal, "wiping the task's directory", err)
	}
	return nil
}
