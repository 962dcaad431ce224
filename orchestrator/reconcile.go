package orchestrator

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"warden"
	"warden/api"
	"warden/scheduler"
	"warden/store"
)

// Input is one view of the cluster. Messages are not changed.
type Input struct {
	Services []*api.Service // sorted by ID
	Tasks    []*api.Task    // sorted by ID; those of a service that is not in Services are a removed service's
	Nodes    []*api.Node    // without evicted ones
	Secrets  []*api.Secret
	Liveness func(nodeID string) api.Liveness
	Now      int64         // command time, Unix nanoseconds
	NewID    func() string // for new tasks
}

// Read takes an input from a view, at the given time or that of the last command, whichever is later.
func Read(v *store.View, liveness func(nodeID string) api.Liveness, now time.Time) Input {
	in := Input{
		Services: v.Services(), Tasks: v.Tasks(), Secrets: v.Secrets(), Liveness: liveness,
		Now: max(now.UnixNano(), v.Time()), NewID: warden.NewID,
	}
	for _, n := range v.Nodes() {
		if v.Tombstone(n.GetId()) == nil {
			in.Nodes = append(in.Nodes, n)
		}
	}
	return in
}

// Step is operations that belong into one command: none of them without the others.
type Step []*api.Operation

// Reconcile returns what to change so that each service has as many tasks as it wants, each what and where it should be; and when
// there is more to do if nothing changes before, in command time, 0 where there is not:
//
//   - A slot without a task gets one. Slots too many lose theirs: those that do not run first, then those whose task is older than
//     the service, then those on the nodes with most tasks of the service.
//   - A task that ended by itself is replaced as the service's restart condition of now says, after a back-off that doubles with each
//     end in a row, from the service's delay (RestartDelayMin where it has none) to RestartDelayMax; a task that lasted
//     longer than RestartDelayMax starts the row anew. After restart_attempts_max in a row the slot stays as it is.
//   - A task whose node is removed or down is orphaned; one whose node is drained, in another zone, without a constraint
//     or in a zone that one of its secrets may not enter is told to stop. Either is replaced at once, whatever the condition.
//   - A task that is not what the service wants (changed) is replaced: at once where it does not run, else slot after slot, see roll.
//   - Of ended tasks the newest TaskHistoryPerSlot stay, none of a slot or service that is gone.
//
// Steps that take something from a node come first. What it returns, applied, leaves nothing more to do now but to delete what was
// orphaned. Times are counted from command times in the records, and how far a roll-out is from the tasks, so a new leader continues
// where the old one was. Pure but for NewID.
func Reconcile(in Input) (steps []Step, next int64) {
	r := reconcile(in, newCluster(in))
	for _, at := range r.wakes {
		if next == 0 || at < next {
			next = at
		}
	}
	return r.steps(), next
}

// reconcile is Reconcile for the services of the input; of nodes and secrets it asks the cluster.
func reconcile(in Input, c *cluster) *reconciler {
	r := &reconciler{in: in, cluster: c, wakes: make(map[string]int64), rolling: make(map[string]bool)}
	tasks := make(map[string][]*api.Task, len(in.Services))
	for _, t := range in.Tasks {
		tasks[t.GetServiceId()] = append(tasks[t.GetServiceId()], t)
	}
	for _, s := range in.Services {
		r.service(s, tasks[s.GetId()])
		delete(tasks, s.GetId())
	}
	if len(tasks) > 0 {
		for _, t := range in.Tasks {
			if _, gone := tasks[t.GetServiceId()]; gone {
				r.drop(nil, t, "the service was removed")
			}
		}
	}
	return r
}

type reconciler struct {
	in      Input
	cluster *cluster
	ends    []Step // with their replacements
	starts  []Step
	deletes []Step
	wakes   map[string]int64 // by service ID: when there is more to do
	rolling map[string]bool  // service IDs: older tasks run still, so that each new one that comes to run matters
}

func (r *reconciler) steps() []Step { return slices.Concat(r.ends, r.starts, r.deletes) }

// wake has the service looked at again at the time.
func (r *reconciler) wake(s *api.Service, at int64) {
	if old := r.wakes[s.GetId()]; old == 0 || at < old {
		r.wakes[s.GetId()] = at
	}
}

// want is what a service wants of its tasks now.
type want struct {
	service     *api.Service
	spec        *api.TaskSpec // references to secrets resolved
	constraints []scheduler.Constraint
	broken      bool // a constraint does not parse: no node will do

	last    *api.TaskSpec // the spec that was compared last: tasks share them
	changes bool          // and what came of it
}

func (r *reconciler) want(s *api.Service) *want {
	w := &want{service: s, spec: api.Resolve(s.GetSpec().GetTask(), func(id string) uint64 { return r.cluster.secret(id).GetCurrentVersion() })}
	for _, text := range w.spec.GetConstraints() {
		c, err := scheduler.ParseConstraint(text)
		w.broken = w.broken || err != nil
		w.constraints = append(w.constraints, c)
	}
	return w
}

// changed reports whether the task must be replaced to become what the service wants: its spec says something else (api.Changed),
// or its node does not meet the service's constraints. A task without a node takes any other constraints; one that has ended none.
func (w *want) changed(t *api.Task, n *host) bool {
	if w.last != t.GetSpec() || w.last == nil {
		w.last, w.changes = t.GetSpec(), api.Changed(w.spec, t.GetSpec())
	}
	switch {
	case w.changes:
		return true
	case t.GetStatus().GetState().Ended() || slices.Equal(w.spec.GetConstraints(), t.GetSpec().GetConstraints()):
		return false
	}
	return t.GetNodeId() == "" || n != nil && !w.meets(n)
}

// meets reports whether the node meets the service's constraints.
func (w *want) meets(n *host) bool {
	return !w.broken && !slices.ContainsFunc(w.constraints, func(c scheduler.Constraint) bool { return !c.Matches(n.Node) })
}

// slot is one place of a service.
type slot struct {
	number  uint64
	current *api.Task   // the one that is wanted, ended or not; nil: the slot is not in use
	moves   string      // why current can't stay where it is; empty: it can
	changed bool        // current is not what the service wants
	up      bool        // current is, and runs or has done its work
	copies  int         // tasks of the service on current's node in lower slots
	past    []*api.Task // told to stop
}

func (r *reconciler) service(s *api.Service, tasks []*api.Task) {
	w, replicas := r.want(s), int(s.GetSpec().GetReplicas())
	slots := r.slots(w, tasks)
	used := r.scaleDown(w, slots, replicas)
	for _, x := range used {
		r.keep(w, x)
	}
	r.roll(w, used, replicas)
	free, number := slots, uint64(1) // the free slots with the lowest numbers
	for n := len(used); n < replicas; n++ {
		for len(free) > 0 && (free[0].number < number || free[0].number == number && free[0].current != nil) {
			number = free[0].number + 1
			free = free[1:]
		}
		t := r.task(w, number)
		r.starts = append(r.starts, Step{put(t)})
		if len(free) > 0 && free[0].number == number {
			free[0].current = t
		}
		number++
	}
	for i := range slots {
		r.tidy(w, &slots[i])
	}
}

// slots sorts the tasks of a service into their slots, by number.
func (r *reconciler) slots(w *want, tasks []*api.Task) []slot {
	tasks = slices.Clone(tasks)
	slices.SortFunc(tasks, func(a, b *api.Task) int {
		if a.GetSlot() != b.GetSlot() {
			return cmp.Compare(a.GetSlot(), b.GetSlot())
		}
		return cmp.Compare(a.GetId(), b.GetId())
	})
	slots := make([]slot, 0, len(tasks)) // never grows: pointers into it stay good
	for _, t := range tasks {
		if len(slots) == 0 || slots[len(slots)-1].number != t.GetSlot() {
			slots = append(slots, slot{number: t.GetSlot()})
		}
		x := &slots[len(slots)-1]
		switch {
		case t.GetDesiredState() >= api.TaskState_TASK_SHUTDOWN:
			x.past = append(x.past, t)
		case x.current == nil:
			x.current = t
		default: // no command of ours leaves two; one of them goes
			keep, other := x.current, t
			if keep.GetStatus().GetState().Ended() && !other.GetStatus().GetState().Ended() {
				keep, other = other, keep
			}
			x.current = keep
			r.drop(w, other, "the slot has another task")
		}
	}
	return slots
}

// scaleDown empties the slots that are too many and returns the others that are in use, by number.
func (r *reconciler) scaleDown(w *want, slots []slot, replicas int) []*slot {
	used := make([]*slot, 0, len(slots))
	for i := range slots {
		x := &slots[i]
		if x.current == nil {
			continue
		}
		used = append(used, x)
		x.moves = r.cluster.moves(w, x.current)
		x.changed = w.changed(x.current, r.cluster.host(x.current.GetNodeId()))
	}
	if len(used) <= replicas {
		return used
	}
	copies := make(map[string]int)
	for _, x := range used {
		if x.current.Holds() && x.moves == "" {
			x.copies = copies[x.current.GetNodeId()]
			copies[x.current.GetNodeId()]++
		}
	}
	slices.SortStableFunc(used, func(a, b *slot) int {
		return cmp.Or(cmp.Compare(a.class(), b.class()), cmp.Compare(a.copies, b.copies))
	})
	for _, x := range used[replicas:] {
		r.drop(w, x.current, "the service was scaled down")
		x.current = nil
	}
	used = used[:replicas]
	slices.SortFunc(used, byNumber)
	return used
}

// class is 0 for a slot that runs what the service wants, 1 for one that runs something older, 2 for one that is on its way, 3 for others.
func (x *slot) class() int {
	switch {
	case x.current.GetStatus().GetState().Ended() || x.moves != "":
		return 3
	case x.current.GetStatus().GetState() != api.TaskState_TASK_RUNNING:
		return 2
	case x.changed:
		return 1
	}
	return 0
}

// keep replaces the slot's task where it ended, can't stay, or does not run and is not what the service wants.
func (r *reconciler) keep(w *want, x *slot) {
	old := x.current
	switch state := old.GetStatus().GetState(); {
	case state.Ended() && !x.changed:
		after, restarts, ok := restart(w.spec, old)
		if !ok {
			x.up = api.Finished(w.spec, old)
			return
		}
		fresh := r.replace(w, x, "")
		fresh.StartAfterNs, fresh.Restarts = after, restarts
		fresh.Status.Message = fmt.Sprintf("waiting %v after %d in a row ended", time.Duration(after-old.GetMeta().GetUpdatedNs()), restarts)
	case state.Ended(): // what comes now has not ended yet
		r.replace(w, x, "")
	case x.moves != "":
		r.replace(w, x, x.moves).Restarts = old.GetRestarts()
	case x.changed && state != api.TaskState_TASK_RUNNING:
		r.replace(w, x, updated)
	default:
		x.up = !x.changed && state == api.TaskState_TASK_RUNNING && r.in.Now >= steadyAt(w.spec, old)
	}
}

// Why a task was told to stop, and why the next one waits, where the service was updated.
const (
	updated     = "the service was updated"
	waitForStop = "waiting for the task before it to stop"
)

// roll replaces running tasks that are not what the service wants, the lowest slots first, each told to stop before the new one is
// placed (Schedule waits for it). It does so only while fewer slots than the update's parallelism are down, for whatever reason, so that a
// version that does not come to run takes no more with it; and not before the update's delay after the last wanted task came to
// run. With parallelism 0 all are replaced now.
func (r *reconciler) roll(w *want, used []*slot, replicas int) {
	down, last, steady := replicas-len(used), int64(0), int64(0)
	var older []*slot
	for _, x := range used {
		switch running := x.current.GetStatus().GetState() == api.TaskState_TASK_RUNNING; {
		case x.changed && running:
			older = append(older, x)
		case x.up:
			last = max(last, x.current.GetMeta().GetUpdatedNs())
		default:
			down++
			if at := steadyAt(w.spec, x.current); running && (steady == 0 || at < steady) {
				steady = at
			}
		}
	}
	if len(older) == 0 {
		return
	}
	room, policy := 1, w.service.GetSpec().GetUpdate()
	if policy != nil {
		room = int(policy.GetParallelism())
	}
	if room == 0 {
		room, last = len(older), 0
	} else {
		room = max(0, room-down)
	}
	if at := last + policy.GetDelayNs(); last > 0 && at > r.in.Now {
		r.wake(w.service, at)
		room = 0
	} else if room == 0 && steady > r.in.Now {
		r.wake(w.service, steady)
	}
	for _, x := range older[:min(room, len(older))] {
		r.replace(w, x, updated)
	}
	r.rolling[w.service.GetId()] = room < len(older)
}

// steadyAt returns from when on a running task counts as up: one that stands in for tasks that ended only once it has run twice as
// long as it had to wait, so that what crashes again and again holds a roll-out up.
func steadyAt(spec *api.TaskSpec, t *api.Task) int64 {
	if t.GetRestarts() == 0 {
		return t.GetMeta().GetUpdatedNs()
	}
	return t.GetMeta().GetUpdatedNs() + int64(backOff(time.Duration(spec.GetRestartDelayNs()), t.GetRestarts()))
}

// replace ends the slot's task and puts a new one in its place, which it returns.
func (r *reconciler) replace(w *want, x *slot, why string) *api.Task {
	old, fresh := x.current, r.task(w, x.number)
	if old.Holds() && r.cluster.lost(old) == "" && waitsFor(fresh, old) {
		fresh.Status.Message = waitForStop
	}
	r.ends = append(r.ends, Step{r.end(w, old, why), put(fresh)})
	if old.GetNodeId() != "" {
		x.past = append(x.past, old)
	}
	x.current, x.up, x.changed = fresh, false, false
	return fresh
}

// waitsFor reports whether the new task of a slot starts only once the old one has stopped: where they are not the same. One that only
// moves starts at once.
func waitsFor(fresh, old *api.Task) bool {
	return api.Changed(fresh.GetSpec(), old.GetSpec()) || !slices.Equal(fresh.GetSpec().GetConstraints(), old.GetSpec().GetConstraints())
}

// tidy sees to the tasks of a slot that were told to stop.
func (r *reconciler) tidy(w *want, x *slot) {
	if len(x.past) == 0 {
		return
	}
	var ended []*api.Task
	for _, t := range x.past {
		switch {
		case t.GetStatus().GetState().Ended():
			ended = append(ended, t)
		case t.GetDesiredState() >= api.TaskState_TASK_SHUTDOWN: // else this round tells it to stop
			r.drop(w, t, "")
		}
	}
	keep := warden.TaskHistoryPerSlot
	switch {
	case x.current == nil:
		keep = 0
	case x.current.GetStatus().GetState().Ended():
		keep--
	}
	slices.SortFunc(ended, newest)
	for _, t := range ended[min(keep, len(ended)):] {
		if t.GetDesiredState() >= api.TaskState_TASK_SHUTDOWN { // else this round changes it
			r.deletes = append(r.deletes, Step{store.Delete(t)})
		}
	}
}

// drop ends a task that gets no replacement, where it does not end by itself.
func (r *reconciler) drop(w *want, t *api.Task, why string) {
	switch {
	case t.GetStatus().GetState().Ended():
		r.deletes = append(r.deletes, Step{store.Delete(t)})
	case t.GetDesiredState() < api.TaskState_TASK_SHUTDOWN || t.GetNodeId() == "" || r.cluster.lost(t) != "":
		r.ends = append(r.ends, Step{r.end(w, t, why)})
	}
}

// end returns the operation that ends t: never placed, it is deleted; else told to stop, in the time that the service gives now, and where
// nobody is left to do that, orphaned. w is nil where the service is gone.
func (r *reconciler) end(w *want, t *api.Task, why string) *api.Operation {
	if t.GetNodeId() == "" {
		return store.Delete(t)
	}
	t = edit(t)
	t.DesiredState = api.TaskState_TASK_SHUTDOWN
	if t.GetStatus().GetState().Ended() {
		return put(t)
	}
	if w != nil && t.GetSpec().GetStopGraceNs() != w.spec.GetStopGraceNs() {
		t.Spec = api.Clone(t.GetSpec())
		t.Spec.StopGraceNs = w.spec.GetStopGraceNs()
	}
	t.Status.Message = why
	if lost := r.cluster.lost(t); lost != "" {
		t.Status.State, t.Status.Message, t.Status.TimeNs = api.TaskState_TASK_ORPHANED, lost, r.in.Now
	}
	return put(t)
}

// task returns a new task of the service. The tasks of a service share their spec.
func (r *reconciler) task(w *want, slot uint64) *api.Task {
	return &api.Task{
		Id: r.in.NewID(), ServiceId: w.service.GetId(), ServiceName: w.service.GetSpec().GetName(), Slot: slot,
		DesiredState: api.TaskState_TASK_RUNNING, Status: &api.TaskStatus{State: api.TaskState_TASK_PENDING, TimeNs: r.in.Now},
		Spec: w.spec, SpecVersion: w.service.GetSpecVersion(),
	}
}

// restart says whether the ended task is replaced, not before when, and the how manieth in a row the new one is. spec is the service's.
func restart(spec *api.TaskSpec, t *api.Task) (after int64, restarts uint32, ok bool) {
	switch spec.GetRestart() {
	case api.RestartCondition_RESTART_NONE:
		return 0, 0, false
	case api.RestartCondition_RESTART_ON_FAILURE:
		if t.GetStatus().GetState() == api.TaskState_TASK_COMPLETE && t.GetStatus().GetExitCode() == 0 {
			return 0, 0, false
		}
	}
	ended, row := t.GetMeta().GetUpdatedNs(), t.GetRestarts()
	if time.Duration(ended-max(t.GetMeta().GetCreatedNs(), t.GetStartAfterNs())) > warden.RestartDelayMax {
		row = 0
	}
	if most := spec.GetRestartAttemptsMax(); most > 0 && row >= most {
		return 0, 0, false
	}
	return ended + int64(backOff(time.Duration(spec.GetRestartDelayNs()), row)), row + 1, true
}

// backOff returns the delay after row ends before this one.
func backOff(base time.Duration, row uint32) time.Duration {
	if base <= 0 {
		base = warden.RestartDelayMin
	}
	for range row {
		if base >= warden.RestartDelayMax {
			break
		}
		base *= 2
	}
	return min(base, warden.RestartDelayMax)
}

// edit returns a copy of t with a status of its own; the specification and the meta are shared. Fields of a newer version are kept: the
// apply refuses a task that has lost them.
func edit(t *api.Task) *api.Task {
	s := t.GetStatus()
	out := &api.Task{
		Id: t.GetId(), Meta: t.GetMeta(), ServiceId: t.GetServiceId(), ServiceName: t.GetServiceName(), Slot: t.GetSlot(), NodeId: t.GetNodeId(),
		DesiredState: t.GetDesiredState(), Spec: t.GetSpec(), SpecVersion: t.GetSpecVersion(), StartAfterNs: t.GetStartAfterNs(), Restarts: t.GetRestarts(),
		Status: &api.TaskStatus{State: s.GetState(), Message: s.GetMessage(), Error: s.GetError(), ExitCode: s.GetExitCode(), TimeNs: s.GetTimeNs()},
	}
	out.ProtoReflect().SetUnknown(t.ProtoReflect().GetUnknown())
	out.Status.ProtoReflect().SetUnknown(s.ProtoReflect().GetUnknown())
	return out
}

func put(t *api.Task) *api.Operation { return store.Put(t, t.GetMeta().GetVersion()) }

func byNumber(a, b *slot) int { return cmp.Compare(a.number, b.number) }

func newest(a, b *api.Task) int {
	return cmp.Or(cmp.Compare(b.GetMeta().GetCreatedNs(), a.GetMeta().GetCreatedNs()), cmp.Compare(b.GetRestarts(), a.GetRestarts()), cmp.Compare(a.GetId(), b.GetId()))
}
