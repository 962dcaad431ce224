// Package agent is the node's side of the session: it dials a manager, is told what to run, runs it through the executor and
// says how it goes.
//
// It does no TLS and keeps no identity (Config.Dial, Renew and Install do), writes nothing to disk, and calls no manager: on
// the connection that it dialled it only serves (I5). It does not restart tasks: a task is started once.
//
// Invariants: nothing of an assignment set that breaks a rule is applied. A task runs only in this node's zone and only with
// secrets that this node was given for it (the node's share of I6). Secrets are held in memory while they are assigned, and
// passed to the executor; they are wiped after. The end of Run leaves tasks and their secrets as they are (I7); StopAll and
// Evict leave none. States of a task move forward only.
//
// It trusts the manager that Dial authenticated to say what to run, within the bounds that Assignment checks, and the
// executor to keep tasks apart. References: DESIGN.md §2 and §6, api/node.proto.
package agent

import (
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"warden"
	"warden/api"
	"warden/executor"
	"warden/internal/sensitive"
)

// Times and numbers that nothing else depends on.
const (
	dialBackoffMin = 100 * time.Millisecond
	dialBackoffMax = 5 * time.Second
	silenceMax     = 15 * time.Second // without a Describe for this long the session is closed
	evictGrace     = 2 * time.Second  // for tasks to end when all have to go
	evictTimeout   = time.Minute      // for all tasks to be gone before an evicted node forgets its identity anyway
	startsMax      = 8                // tasks being started at once
	textMax        = 1 << 10          // bytes of a report's message, and of its error
)

// Config is what an Agent needs of the rest. All fields are required; the functions may be called at once from several
// goroutines.
type Config struct {
	NodeID   string
	Zone     func() string // in the node's own leaf, at the time of the call
	Executor executor.Executor
	Describe func() *api.NodeDescription
	Dial     func(ctx context.Context) (net.Conn, string, error) // picks the next manager and returns its node ID; the agent backs off
	Renew    func() (csr []byte, err error)                      // makes a pending key
	Install  func(*api.InstallRequest) error                     // durable when it returns; the agent then redials

	SetManagers func(*api.ManagerList)  // the list has changed
	Evicted     func(*api.EvictRequest) // called once, after all tasks were stopped and wiped; Run returns after it
	Logger      *slog.Logger
}

// Agent holds the tasks of this node. Safe for concurrent use.
type Agent struct {
	cfg    Config
	starts chan struct{}  // semaphore of startsMax
	lives  sync.WaitGroup // goroutines of tasks

	mu       sync.Mutex // guards all below; never held across a call of executor or Config
	adopted  bool
	closed   bool            // StopAll was called: no new tasks
	life     context.Context // that tasks live under: Run's, or StopAll's; nil: nobody attends them
	runEnded chan struct{}   // closed when the Run that set life has ended
	changed  chan struct{}   // closed and replaced when a task is gone
	tasks    map[string]*task
	secrets  map[string]sensitive.Bytes // "<secret id>@<version>"
	watchers map[*watcher]struct{}
	session  *session // the present one: its sets count
	next     *session // a newer one that has not sent a set yet
}

// watcher is one Watch stream: what it has not been told yet. Guarded by Agent.mu.
type watcher struct {
	wake    chan struct{} // capacity 1
	pending map[string]*api.TaskStatus
}

// New returns an Agent without tasks.
func New(cfg Config) *Agent {
	return &Agent{cfg: cfg, starts: make(chan struct{}, startsMax), changed: make(chan struct{}),
		tasks: map[string]*task{}, secrets: map[string]sensitive.Bytes{}, watchers: map[*watcher]struct{}{}}
}

// Run adopts the tasks that a former daemon left, then keeps a session with one manager after the other until ctx ends or
// the node is evicted. Tasks stay as they are when ctx ends. Only one Run at a time. Errors: the cause of ctx; CodeEvicted;
// the executor's where it can't tell which tasks exist, since then any could be started twice; CodeConflict where it runs
// already or StopAll was called.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.adopt(ctx); err != nil {
		return err
	}
	life, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	a.mu.Lock()
	if a.closed || a.life != nil {
		a.mu.Unlock()
		return warden.Errorf(warden.CodeConflict, "running the agent", "it runs already, or has stopped all tasks")
	}
	a.life, a.runEnded = life, ended
	for _, t := range a.tasks {
		a.spawn(t)
	}
	a.mu.Unlock()

	err := a.dial(ctx)

	cancel()
	a.lives.Wait()
	a.mu.Lock()
	a.life = nil
	a.wipeSecrets(nil)
	a.mu.Unlock()
	close(ended)
	return err
}

// adopt takes over what the executor still has. Once.
func (a *Agent) adopt(ctx context.Context) error {
	a.mu.Lock()
	done := a.adopted
	a.mu.Unlock()
	if done {
		return nil
	}
	found, err := a.cfg.Executor.Adopt(ctx)
	if err != nil {
		return warden.Wrap("adopting tasks", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.adopted {
		return nil
	}
	a.adopted = true
	for _, e := range found {
		t := newTask(e.ID(), nil)
		t.exec = e
		t.status = &api.TaskStatus{State: api.TaskState_TASK_RUNNING, Message: "adopted", TimeNs: time.Now().UnixNano()}
		a.tasks[t.id] = t
		a.cfg.Logger.Info("adopted task", "task_id", t.id)
	}
	return nil
}

// dial keeps a session until ctx ends or the node is evicted. A session over which the node was given a new leaf is served on
// until the next one, which shows that leaf, has taken over.
func (a *Agent) dial(parent context.Context) error {
	ctx, cancel := context.WithCancel(parent)
	defer cancel()
	var sessions sync.WaitGroup
	var order atomic.Pointer[api.EvictRequest]
	backoff := dialBackoffMin
	for ctx.Err() == nil {
		conn, manager, err := a.cfg.Dial(ctx)
		if err == nil {
			s := newSession(a, manager)
			sessions.Go(func() { // ends with conn or ctx
				defer close(s.done)
				if evict := a.serve(ctx, s, conn); evict != nil {
					order.Store(evict)
					cancel()
				}
			})
			select {
			case <-s.renewed:
			case <-s.done:
			}
			if s.endedWell() {
				backoff = dialBackoffMin
				continue
			}
		} else if ctx.Err() == nil {
			a.cfg.Logger.Warn("could not open session", "error", err, "retry_within", backoff)
		}
		sleep(ctx, backoff/2+rand.N(backoff/2))
		backoff = min(2*backoff, dialBackoffMax)
	}
	sessions.Wait()
	if evict := order.Load(); evict != nil {
		a.cfg.Evicted(evict)
		return warden.Errorf(warden.CodeEvicted, "keeping a session", "the cluster removed this node")
	}
	return context.Cause(parent)
}

// Redial closes the present session; the next manager is dialled.
func (a *Agent) Redial() {
	a.mu.Lock()
	s := a.session
	a.mu.Unlock()
	if s != nil {
		s.finish()
	}
}

// Tasks returns the IDs of the tasks that this node has, running or ended, sorted.
func (a *Agent) Tasks() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Sorted(maps.Keys(a.tasks))
}

// Session returns the manager of the present session and since when, or "" where there is none.
func (a *Agent) Session() (managerID string, since time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.session == nil {
		return "", time.Time{}
	}
	return a.session.manager, a.session.since
}

// StopAll stops and wipes every task and secret, with Run or after it, and returns when nothing is left; the agent takes no
// more tasks. Errors: CodeTimeout or CodeUnavailable where ctx ends first, with the number of tasks that are left.
func (a *Agent) StopAll(ctx context.Context) error {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	if err := a.adopt(ctx); err != nil {
		return err
	}
	a.mu.Lock()
	for _, t := range a.tasks {
		if t.stopping && t.exec != nil { // perhaps with a longer grace: told to hurry
			go t.exec.Stop(ctx, evictGrace) // ends with the task or ctx; live looks after the outcome
		}
		t.grace = evictGrace
		t.order(true)
	}
	for len(a.tasks) > 0 && ctx.Err() == nil {
		own := a.life == nil
		if own { // Run does not run: attend the tasks from here
			life, cancel := context.WithCancel(ctx)
			defer cancel()
			a.life, a.runEnded = life, nil
			defer a.release()
			for _, t := range a.tasks {
				a.spawn(t)
			}
		}
		changed, ended := a.changed, a.runEnded
		a.mu.Unlock()
		select {
		case <-changed:
		case <-ended:
		case <-ctx.Done():
		}
		a.mu.Lock()
	}
	left := len(a.tasks)
	a.wipeSecrets(nil)
	a.mu.Unlock()
	if left > 0 {
		return warden.Recode(warden.CodeOf(ctx.Err()), "stopping all tasks", warden.Errorf(warden.CodeTimeout, "", "%d tasks are left", left))
	}
	return nil
}

// release ends what StopAll took over: the tasks that are left live on unattended.
func (a *Agent) release() {
	a.lives.Wait()
	a.mu.Lock()
	a.life = nil
	a.mu.Unlock()
}

// spawn makes the task live. Called with mu held.
func (a *Agent) spawn(t *task) {
	if t.living || a.life == nil {
		return
	}
	t.living = true
	life := a.life
	a.lives.Go(func() { // ends with life, or with the task
		a.live(life, t)
		a.mu.Lock()
		t.living = false
		a.mu.Unlock()
	})
}

// forget is the last of a task.
func (a *Agent) forget(t *task) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.tasks, t.id)
	close(a.changed)
	a.changed = make(chan struct{})
	a.cfg.Logger.Info("removed task", "task_id", t.id)
}

// wipeSecrets drops the secrets that are not in keep. Called with mu held.
func (a *Agent) wipeSecrets(keep map[string]bool) {
	for id, value := range a.secrets {
		if !keep[id] {
			value.Wipe()
			delete(a.secrets, id)
		}
	}
}

func (a *Agent) ended(t *task) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return t.status.GetState().Ended()
}

func (a *Agent) grace(t *task) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return t.grace
}

// set moves the task forward to the state and tells all watchers; a state that is not forward is ignored.
func (a *Agent) set(t *task, state api.TaskState, message, problem string) {
	a.setExit(t, state, message, problem, executor.Exit{})
}

func (a *Agent) setExit(t *task, state api.TaskState, message, problem string, exit executor.Exit) {
	at := exit.At
	if at.IsZero() {
		at = time.Now()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if state <= t.status.GetState() {
		return
	}
	t.status = &api.TaskStatus{State: state, Message: clip(message), Error: clip(problem), ExitCode: int32(exit.Code), TimeNs: at.UnixNano()}
	a.tell(t)
	a.cfg.Logger.Info("moved task", "task_id", t.id, "state", state.Word(), "error", t.status.GetError())
}

// tell makes the task's status pending in all watchers. Called with mu held.
func (a *Agent) tell(t *task) {
	for w := range a.watchers {
		w.add(t)
	}
}

// add makes the task's status pending. Called with Agent.mu held.
func (w *watcher) add(t *task) {
	w.pending[t.id] = t.status
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// clip makes the text fit for a report: valid UTF-8, at most textMax bytes.
func clip(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), textMax)], "")
}
