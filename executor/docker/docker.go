// Package docker runs tasks as containers of a Docker Engine on this machine.
//
// A task is one container, made new, started once and never restarted. Its process 1 is this same binary, mounted read-only
// from the state directory: the gate. It connects to a socket that the daemon made for this one start and waits. The daemon
// asks the kernel who is at the other end, compares that with what the engine says, moves a tmpfs with the task's secrets
// into the container's mount namespace, and lets the gate start the program. From then on the gate is the task's init: it
// passes signals on, reaps, and ends as the program ended. A gate whose daemon dies before the task is on record ends, and all
// of the container with it; a container that somebody starts again finds no socket and does not run.
//
// It deliberately does not build images, log in to registries, publish ports or make networks, and keeps no container that the
// engine could restart. Whoever may use the engine's API is root on this machine: nothing here defends against that.
//
// Invariants: nothing of a secret reaches the engine, a file, an argument or an environment; no program runs before its secrets
// are in place, or as uid 0 of the host; no capability, no_new_privs, our filter of system calls on top of the engine's, a read-only root; no call waits for an engine without
// bound, and what the engine did not say is not reported: a task ends when its process has, which the kernel says.
//
// It needs Linux 5.12, an engine with API 1.41 (20.10) or later whose processes this one can see, and root. It trusts the kernel,
// the engine, root on this host, and the state directory. References: the Docker Engine API, unix(7), pidfd_open(2), setns(2).
package docker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"warden"
	"warden/executor"
	"warden/executor/confine"
	"warden/tmpfsmount"
)

// DefaultHost is where the engine listens unless told otherwise.
const DefaultHost = "unix:///var/run/docker.sock"

// Executor runs tasks of one state directory. It implements executor.Executor.
type Executor struct {
	dir, mark string // mark is the value of labelState on containers of this directory
	mounts    string
	engine    *engine
	foreign   []confine.Range
	logger    *slog.Logger

	mu         sync.Mutex // guards the fields below; held across nothing that blocks
	tasks      map[string]*task
	busy       map[string]bool // IDs that are being started or cleared away
	claimed    map[uint32]bool // uids of tasks that are being started
	sweeping   bool            // a goroutine sweeps
	sweepUntil time.Time
}

// New returns an executor that keeps its records under stateDir, which it creates, puts a copy of self, a path of this very
// binary, there for the gates, and talks to the engine at host ("unix:///var/run/docker.sock"). It does not wait for the engine,
// which may come and go. Call Adopt before Start. Errors: CodePermissions unless run by root; CodeInvalid for a host that is not a
// Unix socket; CodeUnsupported where the state directory forbids programs.
func New(stateDir, self, host string, logger *slog.Logger) (*Executor, error) {
	const op = "opening the docker executor"
	if os.Geteuid() != 0 {
		return nil, warden.Hint(warden.Errorf(warden.CodePermissions, op, "it needs root, to reach into containers"), "run the daemon as root")
	}
	en, err := newEngine(host)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	dir, err := filepath.Abs(stateDir)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm()&0o077 != 0 {
		return nil, warden.Hint(warden.Errorf(warden.CodePermissions, op, "%s is open to others", dir), "chmod 700 "+dir)
	}
	if err := installGate(self, dir); err != nil {
		return nil, warden.Wrap(op, err)
	}
	sum := sha256.Sum256([]byte(dir))
	return &Executor{dir: dir, mark: hex.EncodeToString(sum[:12]), mounts: tmpfsmount.Probe(), engine: en, foreign: confine.SubordinateIDs(),
		logger: logger, tasks: map[string]*task{}, busy: map[string]bool{}, claimed: map[uint32]bool{}}, nil
}

// Name returns "docker".
func (e *Executor) Name() string { return "docker" }

// SecretMounts returns tmpfsmount.Detached; tmpfsmount.Bind on kernels where tasks with secrets are refused.
func (e *Executor) SecretMounts() string { return e.mounts }

// Start starts a task as executor.Executor says, and pulls its image where the engine has none of that name. Errors: CodeInvalid
// for a bad ID, environment, limit or secret, an image that is not to be had or would run as uid 0, and a command that is not there or
// cannot run; CodeTooLarge for a secret; CodeExists for a task that is there; CodeUnsupported for what engine or kernel cannot enforce;
// CodeUnavailable and CodeTimeout where the engine does not answer.
func (e *Executor) Start(ctx context.Context, spec executor.Spec) (executor.Task, error) {
	op := "starting task " + spec.TaskID
	plan, err := check(spec)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if len(spec.Secrets) > 0 && e.mounts != tmpfsmount.Detached {
		return nil, warden.Wrap(op, warden.Errorf(warden.CodeUnsupported, "checking the task", "secrets of containers need Linux 5.12"))
	}
	if err := ctx.Err(); err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := e.claim(spec.TaskID); err != nil {
		return nil, warden.Wrap(op, err)
	}
	defer e.unclaim(spec.TaskID)
	facts, err := e.engine.facts(ctx)
	if err == nil {
		err = facts.check(spec)
	}
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	img, err := e.engine.image(ctx, spec.Image)
	if err != nil {
		return nil, warden.Wrap(op, err)
	}
	if err := e.makeDir(ctx, spec.TaskID); err != nil {
		return nil, warden.Wrap(op, err)
	}
	uid := uint32(0)
	if !facts.remapped && img.root() {
		uid = e.claimUID()
		defer e.unclaimUID(uid)
	}
	t, err := e.launch(ctx, spec, plan, img, uid)
	if err != nil {
		e.undo(spec.TaskID, err)
		return nil, warden.Wrap(op, err)
	}
	e.mu.Lock()
	e.tasks[t.id] = t
	e.mu.Unlock()
	t.watch()
	e.logger.Info("started task", "task_id", t.id, "service", spec.ServiceName, "container_id", t.record.Container, "image", spec.Image)
	return t, nil
}

// claim makes the ID the caller's until unclaim.
func (e *Executor) claim(id string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.tasks[id] != nil || e.busy[id] {
		return warden.Errorf(warden.CodeExists, "claiming the task's ID", "it is in use")
	}
	e.busy[id] = true
	return nil
}

func (e *Executor) unclaim(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.busy, id)
}

// makeDir makes the directory of a task, and clears away first what a dead daemon left of the same start.
func (e *Executor) makeDir(ctx context.Context, id string) error {
	const op = "making the task's directory"
	dir := e.taskDir(id)
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if _, recorded := os.Stat(filepath.Join(dir, recordFile)); recorded == nil {
			return warden.Errorf(warden.CodeExists, op, "it exists")
		}
		if err := e.discard(ctx, id); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o700)
	}
	return warden.Recode(warden.CodeInternal, op, err)
}

func (e *Executor) taskDir(id string) string { return filepath.Join(e.dir, id) }

// undo clears away a start that failed with why. What it cannot do now, since the engine does not answer or may still be at work, is
// done in the background.
func (e *Executor) undo(id string, why error) {
	ctx, cancel := context.WithTimeout(context.Background(), undoTime)
	defer cancel()
	err := e.discard(ctx, id)
	if err != nil {
		e.logger.Warn("left a container for later", "task_id", id, "error", err)
	}
	if code := warden.CodeOf(why); err != nil || code == warden.CodeTimeout || code == warden.CodeUnavailable {
		e.sweepLater()
	}
}

// launch makes the container, lets its gate in, gives it the secrets and lets it go. uid is as for config.
func (e *Executor) launch(ctx context.Context, spec executor.Spec, plan plan, img image, uid uint32) (*task, error) {
	l, err := listen(e.taskDir(spec.TaskID))
	if err != nil {
		return nil, err
	}
	defer l.Close()
	cfg, err := e.config(spec, img, uid)
	if err != nil {
		return nil, err
	}
	id, err := e.engine.create(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := e.engine.start(ctx, id); err != nil {
		return nil, err
	}
	g, err := l.accept(ctx, func() error { return e.early(ctx, id) })
	if err != nil {
		return nil, err
	}
	defer g.Close()
	t := &task{e: e, id: spec.TaskID, pidfd: g.pidfd, done: make(chan struct{})}
	if err := e.release(ctx, g, t, id, img, plan); err != nil {
		return nil, err
	}
	g.pidfd = nil // the task's now
	return t, nil
}

// release checks that the gate is the container's process 1, gives it the secrets, and returns when the program runs and the
// task is on record.
func (e *Executor) release(ctx context.Context, g *gateConn, t *task, id string, img image, plan plan) error {
	const op = "releasing the task"
	c, err := e.engine.inspect(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case c.Image != img.ID:
		return warden.Errorf(warden.CodeConflict, op, "the image's name was given to another image meanwhile")
	case !c.State.Running || c.State.Pid != g.pid:
		return warden.Hint(warden.Errorf(warden.CodeInternal, op, "process %d asked to be let in, the engine says that the container's is %d", g.pid, c.State.Pid),
			"daemon and engine must run on one machine and in one pid namespace")
	case g.uid == 0:
		return warden.Hint(warden.Errorf(warden.CodeInvalid, op, "the image's user %.100q is uid 0 of the host", img.user),
			"give the image a user of its own, or none: then the task gets a uid that nobody has")
	}
	t.record = record{Container: id, PID: g.pid, Boot: bootID(), StartedAt: c.State.StartedAt, UID: g.uid, StopSignal: c.Config.StopSignal}
	if t.record.Ticks, err = startTicks(g.pid); err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	if err := g.alive(); err != nil {
		return warden.Recode(warden.CodeInternal, op, err)
	}
	if err := plan.inject(g); err != nil {
		return err
	}
	if err := g.run(ctx); err != nil {
		return err
	}
	t.protectInit()
	if err := t.save(); err != nil {
		return warden.Wrap(op, err)
	}
	g.keep()
	return nil
}

// early returns why the container has ended before its gate came, if it has.
func (e *Executor) early(ctx context.Context, id string) error {
	c, err := e.engine.inspect(ctx, id)
	if err != nil || c.State.Running {
		return err
	}
	return warden.Errorf(warden.CodeInternal, "running the gate", "it ended with code %d: %.300q", c.State.ExitCode, e.engine.lastWords(ctx, id)+c.State.Error)
}

// Times that calls may take. None is met by an engine that is well.
const (
	callTime = 10 * time.Second // questions
	workTime = time.Minute      // making, starting and removing a container
	pullTime = 10 * time.Minute // an image
	undoTime = 20 * time.Second // clearing away after a failed start
	gateTime = time.Minute      // from the start of the gate to its release
)

// claimUID draws a uid that no other task of this executor has, and no user of this host by /etc/subuid: whoever has a task's
// uid reads its secrets. It is the middle one of its slot, which no task of the process executor runs as.
func (e *Executor) claimUID() uint32 {
	const middle = confine.IDsPerTask / 2
	e.mu.Lock()
	defer e.mu.Unlock()
	used := maps.Clone(e.claimed)
	for _, t := range e.tasks {
		used[t.record.UID] = true
	}
	uid := confine.DrawIDs(e.foreign, func(base uint32) bool { return used[base+middle] }) + middle
	e.claimed[uid] = true
	return uid
}

func (e *Executor) unclaimUID(uid uint32) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.claimed, uid)
}
