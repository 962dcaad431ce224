// Package orchestrator makes the tasks that services want and finds them nodes. It runs on the leader only.
//
// Two pure functions decide and one loop commits: Reconcile (services to tasks: scale, restarts with back-off, moves off nodes
// that are down, drained, removed or no longer suit, history) and Schedule (waiting tasks to nodes, by package scheduler).
// It does not talk to nodes (dispatcher does), does not judge whether a service is allowed (control and the apply do), and
// does not roll updates out: a task that runs keeps its specification.
//
// Invariants: a task is never started again, only replaced; a service never has more tasks that are to run than replicas,
// each in a slot of its own; whatever is decided on an old view is refused by the apply (versions, zone, availability,
// room) and decided again. All that must survive a change of leader is in the records: back-off is counted from command
// times. Only the failures that make a node less attractive are in memory.
//
// It trusts the store's view, and of liveness what the leader was told. Reference: SwarmKit's replicated orchestrator, restart
// supervisor, task reaper and constraint enforcer, which are one pass here.
package orchestrator

import (
	"context"
	"log/slog"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// Config is what the orchestrator works with.
type Config struct {
	Store interface {
		View() *store.View
		Watch(kinds ...api.Kind) *store.Watcher
		Propose(ctx context.Context, cmd *api.Command) (*api.Result, error)
	}
	// Liveness is what the leader knows of a node's session. UNKNOWN (a new leader has not heard of it yet): what runs there
	// stays, nothing new is placed. DOWN: its tasks are orphaned and replaced.
	Liveness func(nodeID string) api.Liveness
	// LivenessChanged returns a channel that gets a signal after any answer of Liveness may have changed; called once by Run.
	LivenessChanged func() <-chan struct{}
	NodeID          string // of this manager, for the author of commands
	Logger          *slog.Logger
	Now             func() time.Time // nil: time.Now
}

// Orchestrator is the loop. Make it with New.
type Orchestrator struct {
	cfg      Config
	failures failures
	refusals int // passes in a row of which something was refused; used by Run alone
}

// New returns an orchestrator that does nothing until Run.
func New(cfg Config) *Orchestrator {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Orchestrator{cfg: cfg, failures: make(failures)}
}

// Run works until ctx ends, which is how the caller says that this manager leads no more; then it returns nil. Each change of a
// service, task, node, secret or liveness is acted on at once; while a proposal is in flight changes gather. Not for
// concurrent use. Errors: CodeUnavailable when the store closes.
func (o *Orchestrator) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := o.cfg.Store.Watch(api.Kind_KIND_SERVICE, api.Kind_KIND_TASK, api.Kind_KIND_NODE, api.Kind_KIND_TOMBSTONE, api.Kind_KIND_SECRET)
	defer w.Close()
	changes, ended := make(chan store.Changes), make(chan error, 1)
	go func() { // ends with ctx or the watcher
		for {
			c, err := w.Next(ctx)
			if err != nil {
				ended <- err
				return
			}
			select {
			case changes <- c:
			case <-ctx.Done():
				ended <- ctx.Err()
				return
			}
		}
	}()
	liveness := o.cfg.LivenessChanged()
	for {
		var timer <-chan time.Time
		if wait := o.pass(ctx); wait > 0 {
			timer = time.After(wait)
		}
		for idle := true; idle; {
			select {
			case c := <-changes:
				idle = !o.concerns(c)
			case <-liveness:
				idle = false
			case <-timer:
				idle = false
			case err := <-ended:
				if ctx.Err() != nil {
					return nil
				}
				return warden.Wrap("orchestrating", err)
			}
		}
	}
}

// concerns reports whether the changes may leave something to do. A task that only came nearer to running does not.
func (o *Orchestrator) concerns(c store.Changes) bool {
	if c.Resync {
		return true
	}
	view := o.cfg.Store.View()
	for _, k := range c.Keys {
		if k.Kind != api.Kind_KIND_TASK {
			return true
		}
		if t := view.Task(k.ID); !t.Holds() || t.GetDesiredState() >= api.TaskState_TASK_SHUTDOWN {
			return true
		}
	}
	return false
}

// Bounds of the waits between passes.
const (
	waitMin  = 10 * time.Millisecond // also where the clock is behind the command times
	retryMin = 10 * time.Millisecond // after something was refused; doubles
	retryMax = 10 * time.Second
)

// pass does all that there is to do now, and returns after what time to look again if nothing changes before; 0: never.
func (o *Orchestrator) pass(ctx context.Context) time.Duration {
	in := o.input()
	for _, t := range in.Tasks {
		o.failures.note(t, in.Now)
	}
	done := o.commit(ctx, Reconcile(in))
	var next int64
	if ctx.Err() == nil {
		in = o.input()
		var steps []Step
		steps, next = Schedule(in, o.failures.count(in.Now))
		done = o.commit(ctx, steps) && done
	}
	var wait time.Duration
	if next != 0 {
		wait = max(waitMin, time.Duration(next-in.Now))
	}
	if done {
		o.refusals = 0
		return wait
	}
	retry := min(retryMax, retryMin<<min(o.refusals, 12))
	o.refusals++
	if wait == 0 || retry < wait {
		return retry
	}
	return wait
}

// input reads the newest view.
func (o *Orchestrator) input() Input { return Read(o.cfg.Store.View(), o.cfg.Liveness, o.cfg.Now()) }

// FailureWindow is how long a failed task counts against its node.
const FailureWindow = 5 * time.Minute

// failures holds the tasks that failed lately, by ID: their records may be deleted before the window ends.
type failures map[string]failure

type failure struct {
	node, service string
	at            int64
}

// note remembers t if it failed lately.
func (f failures) note(t *api.Task, now int64) {
	switch t.GetStatus().GetState() {
	case api.TaskState_TASK_FAILED, api.TaskState_TASK_REJECTED:
	default:
		return
	}
	if _, known := f[t.GetId()]; !known && t.GetNodeId() != "" && now-t.GetMeta().GetUpdatedNs() < int64(FailureWindow) {
		f[t.GetId()] = failure{t.GetNodeId(), t.GetServiceId(), t.GetMeta().GetUpdatedNs()}
	}
}

// count returns how many failed, by node and service, and forgets those outside the window.
func (f failures) count(now int64) map[string]map[string]int {
	out := make(map[string]map[string]int)
	for id, x := range f {
		if now-x.at >= int64(FailureWindow) {
			delete(f, id)
			continue
		}
		if out[x.node] == nil {
			out[x.node] = make(map[string]int)
		}
		out[x.node][x.service]++
	}
	return out
}
