package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moby/moby/api/types/container"

	"warden"
	"warden/executor"
	"warden/internal/durable"
)

// Times of a task's end.
const (
	settleTime = 30 * time.Second // after the end of its processes, for the engine to say how it ended
	settleMin  = 5 * time.Millisecond
	settleMax  = time.Second
	killRetry  = 2 * time.Second
)

// recordFile is what makes a task one that was started. It holds neither a secret nor a command nor an environment.
const recordFile = "task.json"

// record is what a later daemon needs to find the task, with or without the engine.
type record struct {
	Container  string
	PID        int    // of the container's process 1, on this host
	Ticks      uint64 // when that started, since the boot: with Boot, who it is
	Boot       string
	StartedAt  string // as the engine says: another run of the container is another task
	UID        uint32 // as the host sees it
	StopSignal string // the image's, or ""
	StopBy     time.Time
	Exit       *executor.Exit `json:",omitempty"`
}

// task is a handle. e and id are set before others see it, as are the fields of record but StopBy and Exit.
type task struct {
	e     *Executor
	id    string
	pidfd *os.File // of the container's process 1; nil if that had ended before it was found
	done  chan struct{}
	exit  executor.Exit // once done is closed

	mu      sync.Mutex // guards record.StopBy, record.Exit, and the fields below; held across writes of the record
	record  record
	killer  *time.Timer // set by the first order to stop
	removed bool
}

// ID returns the task's ID.
func (t *task) ID() string { return t.id }

// save writes the record. Called with mu held, or before others see the task.
func (t *task) save() error {
	b, err := json.Marshal(t.record)
	if err != nil {
		return warden.Recode(warden.CodeInternal, "writing the task's record", err)
	}
	return durable.WriteFile(filepath.Join(t.e.taskDir(t.id), recordFile), b, 0o600)
}

// loadRecord reads the record of a task's directory. Errors: fs.ErrNotExist for a start that was never done.
func loadRecord(dir string) (r record, err error) {
	b, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil || r.Container == "" {
		return r, warden.Errorf(warden.CodeCorrupt, "reading the task's record", "%s does not parse", filepath.Join(dir, recordFile))
	}
	return r, nil
}

// bootID names this boot of the machine: process IDs of another one mean nothing.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// startTicks returns when a process started, in clock ticks since the boot: field 22 of proc_pid_stat(5), the 20th after the name,
// which may have spaces and parentheses in it.
func startTicks(pid int) (ticks uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has too few fields", pid)
	}
	_, err = fmt.Sscan(fields[19], &ticks)
	return ticks, err
}

// findProcess returns a pidfd of the container's process 1, or nil where it has ended.
func (r record) findProcess() (*os.File, error) {
	if r.Boot != bootID() {
		return nil, nil
	}
	fd, err := unix.PidfdOpen(r.PID, unix.PIDFD_NONBLOCK)
	switch {
	case errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL):
		return nil, nil
	case err != nil:
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	file := os.NewFile(uintptr(fd), "pidfd")
	ticks, err := startTicks(r.PID)
	if err != nil || ticks != r.Ticks || hasEnded(file) { // asked with the pidfd open: what it names is what was asked for
		file.Close()
		return nil, nil
	}
	return file, nil
}

// hasEnded reports whether the process has ended.
func hasEnded(pidfd *os.File) (ended bool) {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return true
	}
	err = conn.Control(func(fd uintptr) { ended = readable(fd) })
	return ended || err != nil
}

func readable(fd uintptr) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0 || err != nil
		}
	}
}

// watch notices the task's end. Called once.
func (t *task) watch() {
	go func() { // ends with the task
		if t.pidfd != nil {
			if conn, err := t.pidfd.SyscallConn(); err == nil {
				_ = conn.Read(readable) // waits in the runtime's poller, without a thread
			}
		}
		t.end(t.settle())
		if t.pidfd != nil {
			_ = t.pidfd.Close() // whoever signals from now on reaches nobody
		}
	}()
}

// end notes how the task ended.
func (t *task) end(exit executor.Exit) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.exit = exit
	t.record.Exit = &exit
	if !t.removed {
		if err := t.save(); err != nil { // it is known as long as the engine has the container
			t.e.logger.Warn("could not write how a task ended", "task_id", t.id, "error", err)
		}
	}
	if t.killer != nil {
		t.killer.Stop()
	}
	close(t.done)
}

// settle asks the engine how a task ended whose processes have. An engine that does not know within settleTime is not waited for:
// that nothing runs any more is certain.
func (t *task) settle() executor.Exit {
	if t.record.Exit != nil {
		return *t.record.Exit
	}
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	gone := func(why string) executor.Exit {
		return executor.Exit{Code: 128 + int(unix.SIGKILL), Signal: unix.SignalName(unix.SIGKILL), Error: why, At: time.Now().UTC()}
	}
	for backoff := settleMin; ; backoff = min(2*backoff, settleMax) {
		c, err := t.e.engine.inspect(ctx, t.record.Container)
		switch {
		case warden.CodeOf(err) == warden.CodeNotFound:
			return gone("its container was removed by somebody else")
		case err == nil && c.State.StartedAt != t.record.StartedAt:
			if err := t.e.engine.kill(ctx, t.record.Container); err != nil && c.State.Running {
				t.e.logger.Error("a container was started again by somebody else and could not be killed", "task_id", t.id, "error", err)
			}
			return gone("its container was started again by somebody else")
		case err == nil && !c.State.Running:
			return exitOf(c.State)
		}
		if !pause(ctx, backoff) {
			t.e.logger.Warn("a task's processes have ended and the engine does not say how", "task_id", t.id, "error", err)
			return gone("its processes have ended, and the engine does not say how")
		}
	}
}

// exitOf returns how a container ended. The engine has one number for an exit code over 128 and a signal: as in a shell, the
// latter is taken for granted.
func exitOf(s *container.State) executor.Exit {
	exit := executor.Exit{Code: s.ExitCode, Error: s.Error, OutOfMemory: s.OOMKilled, At: time.Now().UTC()}
	if s.ExitCode > 128 {
		exit.Signal = unix.SignalName(unix.Signal(s.ExitCode - 128))
	}
	if at, err := time.Parse(time.RFC3339Nano, s.FinishedAt); err == nil && at.Year() > 1 {
		exit.At = at.UTC()
	}
	return exit
}

// protectInit makes the kernel choose the program, not its init, when the task's memory limit is hit: both start with oomAdjust, and
// the program, which exists by now, keeps it.
func (t *task) protectInit() {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/oom_score_adj", t.record.PID), os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if !hasEnded(t.pidfd) { // asked with the file open: it is init's
		_, _ = f.WriteString("0")
	}
}

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

// Stop ends the task: its image's stop signal to the program, SIGKILL to all after grace. Both go straight to the container's
// process 1, so that they do not depend on the engine. The order is on record: the next daemon goes on with it.
func (t *task) Stop(ctx context.Context, grace time.Duration) error {
	select {
	case <-t.done:
		return nil
	default:
	}
	grace = min(max(grace, 0), warden.StopGraceMax)
	t.order(time.Now().UTC().Add(grace), grace > 0)
	select {
	case <-t.done:
		return nil
	case <-ctx.Done():
		return warden.Wrap("stopping task "+t.id, ctx.Err())
	}
}

// order has the task killed at a time, unless an earlier order has it killed before. The first order asks the program to end if
// ask is set.
func (t *task) order(by time.Time, ask bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.killer != nil && !by.Before(t.record.StopBy) {
		return
	}
	first := t.killer == nil
	t.record.StopBy = by
	if first && ask {
		t.signal(stopSignal(t.record.StopSignal))
	}
	if err := t.save(); err != nil && !errors.Is(err, fs.ErrNotExist) { // stands in this daemon alone then
		t.e.logger.Warn("could not write an order to stop", "task_id", t.id, "error", err)
	}
	if first {
		t.killer = time.AfterFunc(time.Until(by), t.kill)
	} else {
		t.killer.Reset(time.Until(by))
	}
}

// kill ends the task for certain, if need be by way of the engine: processes of a container that somebody paused do not die before
// it is thawed. It comes again until the task has ended.
func (t *task) kill() {
	t.signal(unix.SIGKILL)
	timer := time.NewTimer(killRetry)
	defer timer.Stop()
	for {
		select {
		case <-t.done:
			return
		case <-timer.C:
		}
		if t.pidfd != nil && !hasEnded(t.pidfd) {
			t.e.logger.Error("a task did not end when it was killed", "task_id", t.id)
			ctx, cancel := context.WithTimeout(context.Background(), callTime)
			if err := t.e.engine.kill(ctx, t.record.Container); err != nil {
				t.e.logger.Error("the engine could not kill it either", "task_id", t.id, "error", err)
			}
			cancel()
			t.signal(unix.SIGKILL)
		}
		timer.Reset(killRetry)
	}
}

// signal sends a signal to the container's process 1, which passes it on. One that has ended gets none.
func (t *task) signal(s unix.Signal) {
	if t.pidfd == nil {
		return
	}
	if conn, err := t.pidfd.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), s, nil, 0) })
	}
}

// stopSignal returns the signal of an image's STOPSIGNAL, a name or a number; SIGTERM where it is none that a gate passes on.
func stopSignal(text string) unix.Signal {
	var n int
	if _, err := fmt.Sscanf(text, "%d", &n); err == nil && n > 0 && n < 65 {
		return unix.Signal(n)
	}
	name := strings.ToUpper(text)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if s, offset, ok := strings.Cut(name, "RTMIN+"); ok && s == "SIG" {
		if _, err := fmt.Sscanf(offset, "%d", &n); err == nil && n >= 0 && 34+n < 65 {
			return unix.Signal(34 + n) // SIGRTMIN of libc
		}
	}
	if s := unix.SignalNum(name); s != 0 && s != unix.SIGCHLD && s != unix.SIGURG {
		return s
	}
	return unix.SIGTERM
}

// Remove ends the task at once and wipes it: container, anonymous volumes, log and record. Removing a removed task is no error.
func (t *task) Remove(ctx context.Context) error {
	if err := t.Stop(ctx, 0); err != nil {
		return err
	}
	op := "removing task " + t.id
	if err := t.e.engine.remove(ctx, t.record.Container); err != nil {
		return warden.Wrap(op, err)
	}
	t.mu.Lock()
	t.removed = true
	t.mu.Unlock()
	if err := t.e.wipeDir(t.id); err != nil {
		return warden.Wrap(op, err)
	}
	t.e.mu.Lock()
	defer t.e.mu.Unlock()
	if t.e.tasks[t.id] == t {
		delete(t.e.tasks, t.id)
	}
	return nil
}
