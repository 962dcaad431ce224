// Package process runs tasks as processes of this machine in namespaces of their own, with no engine.
//
// Each task has three kinds of processes. Its supervisor is a part of this same binary (Self), in a session of its own: it outlives
// the daemon, owns the task's output, exit status and cgroup, and writes how the task ended. Its init, again that part, is
// process 1 of the task: it builds the root, gives up every right, starts the program, passes signals on and reaps. The
// program is init's child. When the supervisor dies, init and all of the task die with it.
//
// A task has its own mount, pid, ipc, uts, cgroup and user namespaces. Uid 0 in it is one of 65536 uids of the host that no
// other task of this daemon has; without user namespaces the task has one such uid and sees it as it is. It has no
// capabilities, no_new_privs, a seccomp filter, and sees of the host only what enterRoot puts there. It shares the host's
// network on purpose, until networks exist: it can reach what listens on the host's loopback and abstract sockets, and
// cannot listen below net.ipv4.ip_unprivileged_port_start. It does not run images.
//
// Invariants: secrets go from the daemon to the supervisor by a pipe, from there to a tmpfs that has no path on the host, and
// are wiped; the task's directory holds neither a secret nor a command nor an environment; no process of a task has a right on
// the host that "nobody" lacks; Remove leaves no file, mount, cgroup or process.
//
// It needs Linux 5.12. It trusts the kernel, root on this host, and the state directory, which only root may open. References: namespaces(7),
// user_namespaces(7), pivot_root(2), seccomp(2), capabilities(7), cgroups(7).
package process

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"warden"
	"warden/executor"
	"warden/executor/confine"
	"warden/tmpfsmount"
)

// Image is the only image of this executor: the host's own files, read-only.
const Image = "host"

// The words that make this binary a supervisor or an init.
const (
	superviseVerb = "internal-supervise"
	initVerb      = "internal-init"
)

// A supervisor and an init stay on their first thread: rights are a thread's, and so is being somebody's parent for
// PR_SET_PDEATHSIG.
func init() {
	if len(os.Args) > 1 && (os.Args[1] == superviseVerb || os.Args[1] == initVerb) {
		runtime.LockOSThread()
	}
}

// Main does the job of a supervisor or an init if args, which are os.Args, say so, and does not return then. Else it reports
// false. It belongs first in main, and in TestMain of tests that start tasks.
func Main(args []string) (handled bool) {
	if len(args) < 2 {
		return false
	}
	switch args[1] {
	case superviseVerb:
		os.Exit(supervise())
	case initVerb:
		os.Exit(runInit())
	case checkVerb:
		os.Exit(0)
	}
	return false
}

// Executor runs tasks of one state directory. It implements executor.Executor.
type Executor struct {
	dir, self, parent string
	mounts            string
	userNS            bool
	cgroups           map[string]string
	foreign           []confine.Range
	logger            *slog.Logger

	starts sync.RWMutex // held for reading across a start and for writing across Adopt, which removes what is half made

	mu      sync.Mutex // guards the fields below; held across nothing that blocks
	tasks   map[string]*task
	claimed map[uint32]bool // slots of uids of tasks that are being started
}

// Option changes what New finds out by itself.
type Option func(*Executor)

// WithoutUserNamespaces gives each task a plain uid, as on kernels that cannot do more.
func WithoutUserNamespaces(e *Executor) { e.userNS = false }

// WithBindMounts mounts secrets as where detached mounts cannot be built. Then there are no user namespaces either.
func WithBindMounts(e *Executor) { e.mounts = tmpfsmount.Bind }

// WithoutCgroups leaves tasks without limits, as where no hierarchy is writable.
func WithoutCgroups(e *Executor) { e.cgroups = nil }

// New returns an executor that keeps tasks under stateDir, which it creates, and executes self, a path that everybody may execute
// of a binary whose main is Main: see Self, or of this very binary ("/proc/self/exe"). It starts one task for a moment to see what this machine can do. Call
// Adopt before Start. Errors: CodePermissions unless run by root; CodeUnsupported if no task can be started here.
func New(stateDir, self string, logger *slog.Logger, options ...Option) (*Executor, error) {
	const op = "opening the process executor"
	if os.Geteuid() != 0 {
		return nil, warden.Hint(warden.Errorf(warden.CodePermissions, op, "it needs root, to make namespaces and uids"), "run the daemon as root")
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
	sum := sha256.Sum256([]byte(dir))
	e := &Executor{dir: dir, self: self, parent: "warden-" + hex.EncodeToString(sum[:6]), mounts: tmpfsmount.Probe(), userNS: true,
		cgroups: hierarchies(), foreign: confine.SubordinateIDs(), logger: logger, tasks: map[string]*task{}, claimed: map[uint32]bool{}}
	for _, option := range options {
		option(e)
	}
	if e.mounts == tmpfsmount.Bind {
		e.userNS = false // uid 0 of one may not open the directory that is bound
	}
	if e.userNS {
		if err := e.probe(); err != nil {
			e.userNS = false
			logger.Warn("found no user namespaces", "error", err)
		}
	}
	if !e.userNS {
		if err := e.probe(); err != nil {
			return nil, warden.Recode(warden.CodeUnsupported, op, err)
		}
	}
	for _, controller := range []string{"cpu", "memory", "pids"} {
		if e.cgroups[controller] == "" {
			logger.Warn("found no writable cgroup", "controller", controller)
		}
	}
	return e, nil
}

// Name returns "process".
func (e *Executor) Name() string { return "process" }

// SecretMounts returns tmpfsmount.Detached or tmpfsmount.Bind.
func (e *Executor) SecretMounts() string { return e.mounts }

// probe starts a task that has no command.
func (e *Executor) probe() error {
	id := warden.NewID()
	j := job{TaskID: id, IDBase: confine.IDFirst, UserNS: e.userNS, Mounts: e.mounts, ProbeOnly: true}
	t, err := e.launch(context.Background(), j, nil)
	if err != nil {
		return err
	}
	return t.Remove(context.Background())
}

// Start starts a task as executor.Executor says. Errors: CodeInvalid for another image than host, no command, a bad ID,
// environment or secret, and a command that is not there or cannot run; CodeExists for a task that is there; CodeUnsupported
// for a limit that cannot be enforced. It takes about 10 ms.
func (e *Executor) Start(ctx context.Context, spec executor.Spec) (executor.Task, error) {
	j, err := e.job(spec)
	if err != nil {
		return nil, warden.Wrap("starting task "+spec.TaskID, err)
	}
	j.IDBase = e.claimIDs()
	defer e.unclaimIDs(j.IDBase)
	t, err := e.launch(ctx, j, spec.Secrets)
	if err != nil {
		return nil, warden.Wrap("starting task "+spec.TaskID, err)
	}
	e.logger.Info("started task", "task_id", spec.TaskID, "service", spec.ServiceName, "supervisor_pid", t.pid)
	return t, nil
}

// job checks a spec.
func (e *Executor) job(spec executor.Spec) (job, error) {
	const op = "checking the task"
	switch {
	case !warden.ValidID(spec.TaskID):
		return job{}, warden.Errorf(warden.CodeInvalid, op, "its ID is malformed")
	case spec.Image != Image:
		return job{}, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "the process executor has no image %.200q", spec.Image),
			`use the image "host" and a command, or nodes with the docker executor`)
	case len(spec.Command) == 0 || spec.Command[0] == "":
		return job{}, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "it has no command, and image host has none of its own"),
			"name a command after the image")
	case spec.LimitMemoryBytes < 0 || spec.LimitNanoCPUs < 0:
		return job{}, warden.Errorf(warden.CodeInvalid, op, "a limit is negative")
	}
	for _, word := range append(slices.Clone(spec.Command), spec.Env...) {
		if strings.ContainsRune(word, 0) {
			return job{}, warden.Errorf(warden.CodeInvalid, op, "its command or environment has a NUL byte")
		}
	}
	for _, v := range spec.Env {
		if strings.IndexByte(v, '=') < 1 {
			return job{}, warden.Errorf(warden.CodeInvalid, op, "an environment variable is not KEY=value")
		}
	}
	j := job{TaskID: spec.TaskID, Command: spec.Command, Env: spec.Env, Limits: limits{spec.LimitNanoCPUs, spec.LimitMemoryBytes},
		Dirs: e.cgroups, Parent: e.parent, UserNS: e.userNS, Mounts: e.mounts}
	files := make([]tmpfsmount.File, 0, len(spec.Secrets))
	for _, s := range spec.Secrets {
		j.Secrets = append(j.Secrets, secretHeader{Target: s.Target, UID: s.UID, GID: s.GID, Mode: s.Mode, Size: s.Data.Len()})
		files = append(files, tmpfsmount.File{Name: s.Target, Mode: s.Mode, Data: s.Data})
		for _, id := range []uint32{s.UID, s.GID} {
			if _, err := j.hostID(id); err != nil {
				return job{}, err
			}
		}
	}
	_, err := tmpfsmount.NewPlan(files)
	return j, err
}

// claimIDs draws a slot of uids that no task of this executor has, and no user of this host by /etc/subuid: whoever has a
// task's uid reads its secrets. The claim holds until unclaimIDs; by then the task is known, or gone.
func (e *Executor) claimIDs() uint32 {
	e.mu.Lock()
	defer e.mu.Unlock()
	used := maps.Clone(e.claimed)
	for _, t := range e.tasks {
		used[t.idBase] = true
	}
	base := confine.DrawIDs(e.foreign, func(base uint32) bool { return used[base] })
	e.claimed[base] = true
	return base
}

func (e *Executor) unclaimIDs(base uint32) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.claimed, base)
}

// launch makes the task's directory and starts its supervisor.
func (e *Executor) launch(ctx context.Context, j job, secrets []executor.SecretFile) (_ *task, err error) {
	e.starts.RLock()
	defer e.starts.RUnlock()
	j.Dir = filepath.Join(e.dir, j.TaskID)
	if err := os.Mkdir(j.Dir, 0o700); errors.Is(err, fs.ErrExist) {
		return nil, warden.Errorf(warden.CodeExists, "making the task's directory", "it exists")
	} else if err != nil {
		return nil, warden.Recode(warden.CodeInternal, "making the task's directory", err)
	}
	t := &task{e: e, id: j.TaskID, dir: j.Dir, idBase: j.IDBase, done: make(chan struct{})}
	defer func() {
		if err == nil {
			return
		}
		if wipeErr := t.wipe(); wipeErr != nil {
			e.logger.Warn("left a task's directory behind", "task_id", t.id, "error", wipeErr)
		}
	}()
	const op = "starting the task's supervisor"
	lock, err := lockDir(j.Dir)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	defer lock.Close()
	stderr, err := os.OpenFile(filepath.Join(j.Dir, panicFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	defer stderr.Close()
	jobR, jobW, err := os.Pipe()
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	reportR, reportW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(warden.Recode(warden.CodeInternal, op, err), jobR.Close(), jobW.Close())
	}
	defer reportR.Close()
	cmd := &exec.Cmd{Path: e.self, Args: []string{"warden", superviseVerb, j.TaskID}, Dir: "/", Env: []string{"GOMAXPROCS=1"}, Stderr: stderr,
		ExtraFiles: []*os.File{jobR, reportW, lock}, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	err = cmd.Start()
	jobR.Close()
	reportW.Close()
	if err != nil {
		return nil, errors.Join(warden.Recode(warden.CodeInternal, op, err), jobW.Close())
	}
	t.pid, t.process = cmd.Process.Pid, cmd.Process
	go func() { // ends with the supervisor
		_ = cmd.Wait() // how the task ended is in its file
		t.end()
	}()
	started := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	sendErr := j.send(jobW, secrets)
	jobW.Close()
	var r report
	err = readFrame(reportR, &r)
	if !started() {
		<-t.done
		return nil, ctx.Err()
	}
	switch {
	case sendErr != nil && r.Code == "":
		err = warden.Recode(warden.CodeInternal, op, sendErr)
	case err != nil:
		err = warden.Recode(warden.CodeInternal, op, err)
	default:
		err = r.err()
	}
	if err != nil {
		_ = cmd.Process.Kill()
		<-t.done
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tasks[t.id] = t
	return t, nil
}

// lockDir makes and takes the lock of a task's directory. The open file carries it from the daemon to the supervisor.
func lockDir(dir string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, err
	}
	return lock, nil
}

// locked reports whether a supervisor, or a daemon about to start one, holds the lock of dir.
func locked(dir string) bool {
	lock, err := os.Open(filepath.Join(dir, lockFile))
	if err != nil {
		return false
	}
	defer lock.Close()
	return errors.Is(unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

const (
	removing  = ".removing-"     // prefix of a directory on its way out
	startTime = 10 * time.Second // for a supervisor to write its record
)

// Adopt returns the tasks of the state directory, as executor.Executor says. It also removes what was left half made or half
// removed, and cgroups without a task.
func (e *Executor) Adopt(ctx context.Context) ([]executor.Task, error) {
	const op = "adopting tasks"
	e.starts.Lock()
	defer e.starts.Unlock()
	entries, err := os.ReadDir(e.dir)
	if err != nil {
		return nil, warden.Recode(warden.CodeInternal, op, err)
	}
	var tasks []executor.Task
	keep := map[string]bool{}
	for _, entry := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		name := entry.Name()
		switch {
		case strings.HasPrefix(name, removing):
			if err := os.RemoveAll(filepath.Join(e.dir, name)); err != nil {
				return nil, warden.Recode(warden.CodeInternal, op, err)
			}
		case entry.IsDir() && warden.ValidID(name):
			keep[name] = true
			t, err := e.adopt(ctx, name)
			if err != nil {
				return nil, warden.Wrap(op, err)
			}
			if t != nil {
				tasks = append(tasks, t)
			} else {
				delete(keep, name)
			}
		}
	}
	if err := (cgroup{dirs: e.cgroups, parent: e.parent}).sweep(keep); err != nil {
		e.logger.Warn("left a cgroup behind", "error", err)
	}
	return tasks, nil
}

// adopt returns the task of one directory; nil for one that was never started, which it removes.
func (e *Executor) adopt(ctx context.Context, id string) (*task, error) {
	e.mu.Lock()
	known := e.tasks[id]
	e.mu.Unlock()
	if known != nil {
		return known, nil
	}
	t := &task{e: e, id: id, dir: filepath.Join(e.dir, id), done: make(chan struct{})}
	var r record
	err := readJSON(t.dir, recordFile, &r)
	for deadline := time.Now().Add(startTime); err != nil && locked(t.dir) && time.Now().Before(deadline); {
		select { // a supervisor whose daemon died just now
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
		err = readJSON(t.dir, recordFile, &r)
	}
	if err != nil {
		if locked(t.dir) {
			return nil, warden.Errorf(warden.CodeInternal, "adopting task "+id, "its supervisor is there but has no record: %w", err)
		}
		return nil, t.wipe()
	}
	t.idBase, t.pid = r.IDBase, r.PID
	if err := t.find(); err != nil {
		return nil, warden.Recode(warden.CodeInternal, "adopting task "+id, err)
	}
	if r.Probe {
		return nil, t.Remove(ctx)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if known := e.tasks[id]; known != nil {
		return known, nil
	}
	e.tasks[id] = t
	e.logger.Info("adopted task", "task_id", id, "supervisor_pid", t.pid)
	return t, nil
}
