// Package orchestrator makes the tasks that services want and finds them nodes. It runs on the leader only.
//
// Two pure functions decide and one loop commits: Reconcile (services to tasks: scale, restarts with back-off, moves off nodes
// that are down, drained, removed or no longer suit, roll-outs, history) and Schedule (waiting tasks to nodes, by package
// scheduler). It does not talk to nodes (dispatcher does) and does not judge whether a service is allowed (control and the apply do).
//
// Invariants: a task is never started again, only replaced; a service never has more tasks that are to run than replicas,
// each in a slot of its own; whatever is decided on an old view is refused by the apply (versions, zone, availability,
// room) and decided again. All that must survive a change of leader is in the records: back-off and the pauses of a roll-out are
// counted from command times. Only the failures that make a node less attractive are in memory.
//
// It trusts the store's view, and of liveness what the leader was told. Reference: SwarmKit's replicated orchestrator, restart
// supervisor, task reaper and constraint enforcer, which are one pass here.
package orchestrator

import (
	"context"
	"log/slog"
	"maps"
	"slices"
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
	Counts          *Counts          // nil: not counted
}

// Orchestrator is the loop. Make it with New. All but cfg is used by Run alone.
type Orchestrator struct {
	cfg      Config
	failures failures
	nodes    map[string]*api.Node    // without evicted ones
	live     map[string]api.Liveness // of the nodes, as of looked
	looked   time.Time               // when all of live was asked for last
	waiting  map[string]uint64       // IDs of the tasks that wait for a node, and the versions that were seen
	rolling  map[string]bool         // IDs of services whose older tasks are being replaced
	wakes    map[string]int64        // by service ID: when to look at it again, in command time
	starts   int64                   // when the next back-off is over, in command time; 0: none waits for that
	refusals int                     // passes in a row of which something was refused
	unsure   bool                    // a command of this loop may yet be applied: raft lost its answer
}

// New returns an orchestrator that does nothing until Run.
func New(cfg Config) *Orchestrator {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Orchestrator{cfg: cfg, failures: make(failures), nodes: make(map[string]*api.Node), live: make(map[string]api.Liveness),
		waiting: make(map[string]uint64), rolling: make(map[string]bool), wakes: make(map[string]int64)}
}

// Run works until ctx ends, which is how the caller says that this manager leads no more; then it returns nil. Each change of a
// service, task, node, secret or liveness is acted on at once, and looks only at the services that it concerns; while proposals are in
// flight changes gather. Not for concurrent use. Errors: CodeUnavailable when the store closes.
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
	todo := work{all: true}
	for {
		var timer <-chan time.Time
		wait, done := o.pass(ctx, todo)
		if wait > 0 {
			timer = time.After(wait)
		}
		for todo = (work{all: !done}); !todo.now; {
			select {
			case c := <-changes:
				o.note(c, &todo)
			case <-liveness:
				o.look(&todo)
			case <-timer:
				todo.now = true
			case err := <-ended:
				if ctx.Err() != nil {
					return nil
				}
				return warden.Wrap("orchestrating", err)
			}
		}
	}
}

// work is what a pass has to look at.
type work struct {
	now      bool // there is something to do; else it can wait for more
	all      bool
	services map[string]bool // IDs
}

// service has the service looked at.
func (w *work) service(id string) {
	if w.services == nil {
		w.services = make(map[string]bool)
	}
	w.now, w.services[id] = true, true
}

// note takes the changes in, and adds what they may have left to do.
func (o *Orchestrator) note(c store.Changes, todo *work) {
	if c.Resync {
		todo.now, todo.all = true, true
		return
	}
	v := o.cfg.Store.View()
	for _, k := range c.Keys {
		switch k.Kind {
		case api.Kind_KIND_TASK:
			o.noteTask(k.ID, v.Task(k.ID), todo)
		case api.Kind_KIND_SERVICE:
			todo.service(k.ID)
		case api.Kind_KIND_NODE, api.Kind_KIND_TOMBSTONE:
			o.noteNode(v, k.ID, todo)
		default: // a new secret, or one that is gone, has no users
			if v.Secret(k.ID).GetMeta().GetVersion() > 1 {
				todo.now, todo.all = true, true
			}
		}
	}
}

// noteTask: a task that came nearer to running leaves something to do only where a roll-out waits for it, and where it may be one of which
// this loop does not know: then its slot may have another by now.
func (o *Orchestrator) noteTask(id string, t *api.Task, todo *work) {
	if !waiting(t) {
		delete(o.waiting, id)
	}
	switch state := t.GetStatus().GetState(); {
	case t == nil: // only this loop removes tasks
	case waiting(t):
		if o.waiting[id] != t.GetMeta().GetVersion() {
			o.waiting[id] = t.GetMeta().GetVersion()
			todo.service(t.GetServiceId())
		}
	case state.Ended():
		o.failures.note(t, max(o.cfg.Now().UnixNano(), t.GetMeta().GetUpdatedNs()))
		todo.service(t.GetServiceId())
	case state == api.TaskState_TASK_RUNNING && o.rolling[t.GetServiceId()], o.unsure:
		todo.service(t.GetServiceId())
	}
}

// waiting reports whether the task waits for a node.
func waiting(t *api.Task) bool {
	return t != nil && t.GetNodeId() == "" && t.GetDesiredState() < api.TaskState_TASK_SHUTDOWN && !t.GetStatus().GetState().Ended()
}

// noteNode: where what placement sees of a node is as before, nothing is to do.
func (o *Orchestrator) noteNode(v *store.View, id string, todo *work) {
	old, next := o.nodes[id], v.Node(id)
	if next == nil || v.Tombstone(id) != nil {
		next = nil
		delete(o.nodes, id)
		delete(o.live, id)
	} else {
		o.nodes[id] = next
	}
	if sameNode(old, next) {
		return
	}
	if old == nil {
		o.live[id] = o.cfg.Liveness(id)
	}
	o.concern(v, id, todo)
}

// concern has the services looked at that have tasks on the node, and the tasks that may find room there.
func (o *Orchestrator) concern(v *store.View, nodeID string, todo *work) {
	todo.now = todo.now || len(o.waiting) > 0
	for _, t := range v.TasksByNode(nodeID) {
		todo.service(t.GetServiceId())
	}
}

// look asks which nodes have a session.
func (o *Orchestrator) look(todo *work) {
	o.looked = o.cfg.Now()
	v := o.cfg.Store.View()
	for id := range o.nodes {
		if l := o.cfg.Liveness(id); l != o.live[id] {
			o.live[id] = l
			o.concern(v, id, todo)
		}
	}
}

// Bounds of the waits between passes.
const (
	waitMin    = 10 * time.Millisecond // also where the clock is behind the command times
	retryMin   = 10 * time.Millisecond // after something was refused; doubles
	retryMax   = 10 * time.Second
	lookPeriod = time.Second // at most so old are the answers of Liveness that a pass goes by
)

// pass does what there is to do now; it returns after what time to look again if nothing changes before (0: never), and whether all
// was committed.
func (o *Orchestrator) pass(ctx context.Context, todo work) (time.Duration, bool) {
	defer o.cfg.Counts.round(time.Now())
	v, now := o.cfg.Store.View(), o.cfg.Now()
	if todo.all {
		o.reread(v)
	} else if now.Sub(o.looked) > lookPeriod {
		o.look(&todo)
	}
	steps := o.decide(v, max(now.UnixNano(), v.Time()), todo)
	done, lost := o.commit(ctx, steps)
	if done {
		o.remember(steps)
	}
	switch {
	case lost:
		o.unsure = true
	case o.unsure && done && len(steps) > 0: // what was lost came before this in the log, or never comes: look at what it did
		o.unsure, o.refusals = false, 0
		return retryMin, false
	}
	next := o.starts
	for _, at := range o.wakes {
		if next == 0 || at < next {
			next = at
		}
	}
	var wait time.Duration
	if next != 0 {
		wait = max(waitMin, time.Duration(next-max(o.cfg.Now().UnixNano(), v.Time())))
	}
	if done {
		o.refusals = 0
		return wait, true
	}
	retry := min(retryMax, retryMin<<min(o.refusals, 12))
	o.refusals++
	if wait == 0 || retry < wait {
		return retry, false
	}
	return wait, false
}

// reread forgets what the loop knows and takes it from the view.
func (o *Orchestrator) reread(v *store.View) {
	clear(o.nodes)
	for _, n := range v.Nodes() {
		if v.Tombstone(n.GetId()) == nil {
			o.nodes[n.GetId()] = n
		}
	}
	clear(o.live)
	for id := range o.nodes {
		o.live[id] = o.cfg.Liveness(id)
	}
	o.looked = o.cfg.Now()
	clear(o.rolling)
	clear(o.wakes)
	clear(o.waiting)
	for _, t := range v.Tasks() {
		if waiting(t) {
			o.waiting[t.GetId()] = t.GetMeta().GetVersion()
		}
		o.failures.note(t, max(o.looked.UnixNano(), v.Time()))
	}
}

// record returns the node; nil where there is none. The view may have one that note has not told of yet: its tasks are not lost.
func (o *Orchestrator) record(v *store.View, id string) *api.Node {
	if n := o.nodes[id]; n != nil || v.Tombstone(id) != nil {
		return n
	}
	return v.Node(id)
}

// decide returns the steps for the services in todo and for the tasks that wait, new ones among them: a task is made with its
// placement.
func (o *Orchestrator) decide(v *store.View, now int64, todo work) []Step {
	c := &cluster{record: func(id string) *api.Node { return o.record(v, id) }, live: func(id string) api.Liveness { return o.live[id] }, secret: v.Secret}
	in := Input{Now: now, NewID: warden.NewID}
	if todo.all {
		in.Services, in.Tasks = v.Services(), v.Tasks()
	} else {
		for id, at := range o.wakes {
			if at <= now {
				todo.service(id)
			}
		}
		for _, id := range slices.Sorted(maps.Keys(todo.services)) {
			if s := v.Service(id); s != nil {
				in.Services = append(in.Services, s)
			}
			in.Tasks = append(in.Tasks, v.TasksByService(id)...)
			delete(o.wakes, id)
			delete(o.rolling, id)
		}
	}
	r := reconcile(in, c)
	maps.Copy(o.wakes, r.wakes)
	maps.Copy(o.rolling, r.rolling)
	steps := r.steps()
	o.starts = 0
	if len(o.waiting) == 0 && len(r.starts) == 0 && len(r.ends) == 0 {
		return steps
	}
	tasks := in.Tasks
	if !todo.all {
		tasks = v.Tasks()
	}
	tasks, made := after(tasks, steps)
	placed, next := schedule(c, tasks, maps.Keys(o.nodes), now, o.failures.count(now))
	o.starts = next
	for _, t := range placed {
		if op := made[t.GetId()]; op != nil {
			op.GetPut().Object = store.Wrap(t)
			continue
		}
		steps = append(steps, Step{put(t)})
	}
	return steps
}

// after returns the tasks as they are once the steps are applied, and the operations that make new ones.
func after(tasks []*api.Task, steps []Step) ([]*api.Task, map[string]*api.Operation) {
	changed, made := make(map[string]*api.Task), make(map[string]*api.Operation)
	out := make([]*api.Task, 0, len(tasks)+len(steps))
	for _, step := range steps {
		for _, op := range step {
			t := op.GetPut().GetObject().GetTask()
			switch {
			case t == nil:
				changed[op.GetDelete().GetId()] = nil
			case op.GetPut().GetExpect() == 0:
				made[t.GetId()] = op
				out = append(out, t)
			default:
				changed[t.GetId()] = t
			}
		}
	}
	for _, t := range tasks {
		if next, ok := changed[t.GetId()]; ok {
			t = next
		}
		if t != nil {
			out = append(out, t)
		}
	}
	return out, made
}

// remember takes in what the loop itself has committed, so that it has nothing to do when that comes back as a change.
func (o *Orchestrator) remember(steps []Step) {
	for _, step := range steps {
		for _, op := range step {
			t := op.GetPut().GetObject().GetTask()
			switch {
			case t == nil:
				delete(o.waiting, op.GetDelete().GetId())
			case waiting(t):
				o.waiting[t.GetId()] = op.GetPut().GetExpect() + 1
			default:
				delete(o.waiting, t.GetId())
			}
		}
	}
}

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
