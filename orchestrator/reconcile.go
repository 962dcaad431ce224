package orchestrator

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	"warden"
	"warden/api"
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

// Reconcile returns what to change so that each service has as many tasks as it wants, each where it may be:
//
//   - A slot without a task gets one. Slots too many lose theirs: those that do not run first, then those on the nodes with
//     most tasks of the service.
//   - A task that ended by itself is replaced as its restart condition says, after a back-off that doubles with each
//     end in a row, from the service's delay (RestartDelayMin where it has none) to RestartDelayMax; a task that lasted
//     longer than RestartDelayMax starts the row anew. After restart_attempts_max in a row the slot stays as it is.
//   - A task whose node is removed or down is orphaned; one whose node is drained, in another zone, without a constraint
//     or in a zone that one of its secrets may not enter is told to stop. Either is replaced at once, whatever the condition.
//   - Of ended tasks the newest TaskHistoryPerSlot stay, none of a slot or service that is gone.
//
// Steps that take something from a node come first. What it returns, applied, leaves nothing more to do but to delete what was
// orphaned. Restart times are counted from command times in the records, so a new leader continues where the old one was. Pure
// but for NewID.
func Reconcile(in Input) []Step {
	r := &reconciler{in: in, cluster: newCluster(in)}
	tasks := make(map[string][]*api.Task)
	for _, t := range in.Tasks {
		tasks[t.GetServiceId()] = append(tasks[t.GetServiceId()], t)
	}
	for _, s := range in.Services {
		r.service(s, tasks[s.GetId()])
		delete(tasks, s.GetId())
	}
	for _, t := range in.Tasks {
		if _, gone := tasks[t.GetServiceId()]; gone {
			r.drop(t, "the service was removed")
		}
	}
	return slices.Concat(r.ends, r.starts, r.deletes)
}

type reconciler struct {
	in      Input
	cluster *cluster
	ends    []Step // with their replacements
	starts  []Step
	deletes []Step
}

// slot is one place of a service.
type slot struct {
	number  uint64
	current *api.Task   // the one that is wanted, ended or not; nil: the slot is not in use
	moves   string      // why current can't stay where it is; empty: it can
	copies  int         // tasks of the service on current's node in lower slots
	past    []*api.Task // told to stop
}

func (r *reconciler) service(s *api.Service, tasks []*api.Task) {
	slots := r.slots(tasks)
	used := r.scaleDown(slots, int(s.GetSpec().GetReplicas()))
	for _, x := range used {
		r.keep(s, x)
	}
	next := uint64(1)
	for n := len(used); n < int(s.GetSpec().GetReplicas()); n++ {
		for slots[next] != nil && slots[next].current != nil {
			next++
		}
		t := r.task(s, next)
		r.starts = append(r.starts, Step{put(t)})
		if slots[next] == nil {
			slots[next] = &slot{number: next}
		}
		slots[next].current = t
	}
	for _, x := range sorted(slots) {
		r.tidy(x)
	}
}

// slots sorts the tasks of a service into their slots.
func (r *reconciler) slots(tasks []*api.Task) map[uint64]*slot {
	slots := make(map[uint64]*slot)
	for _, t := range tasks {
		x := slots[t.GetSlot()]
		if x == nil {
			x = &slot{number: t.GetSlot()}
			slots[t.GetSlot()] = x
		}
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
			r.drop(other, "the slot has another task")
		}
	}
	return slots
}

// scaleDown empties the slots that are too many and returns the others that are in use, by number.
func (r *reconciler) scaleDown(slots map[uint64]*slot, replicas int) []*slot {
	var used []*slot
	copies := make(map[string]int)
	for _, x := range sorted(slots) {
		if x.current == nil {
			continue
		}
		used = append(used, x)
		x.moves = r.cluster.moves(x.current)
		if x.current.Holds() && x.moves == "" {
			x.copies = copies[x.current.GetNodeId()]
			copies[x.current.GetNodeId()]++
		}
	}
	if len(used) <= replicas {
		return used
	}
	slices.SortStableFunc(used, func(a, b *slot) int {
		return cmp.Or(cmp.Compare(a.class(), b.class()), cmp.Compare(a.copies, b.copies))
	})
	for _, x := range used[replicas:] {
		r.drop(x.current, "the service was scaled down")
		x.current = nil
	}
	used = used[:replicas]
	slices.SortFunc(used, byNumber)
	return used
}

// class is 0 for a slot that runs, 1 for one that is on its way there, 2 for others.
func (x *slot) class() int {
	switch {
	case x.current.GetStatus().GetState().Ended() || x.moves != "":
		return 2
	case x.current.GetStatus().GetState() != api.TaskState_TASK_RUNNING:
		return 1
	}
	return 0
}

// keep replaces the slot's task where it ended, can't stay, or waits for its node with an old specification.
func (r *reconciler) keep(s *api.Service, x *slot) {
	old := x.current
	fresh := r.task(s, x.number)
	why := x.moves
	switch {
	case old.GetStatus().GetState().Ended():
		if old.GetSpecVersion() == s.GetSpecVersion() {
			after, restarts, ok := restart(old)
			if !ok {
				return
			}
			fresh.StartAfterNs, fresh.Restarts = after, restarts
			fresh.Status.Message = fmt.Sprintf("waiting %v after %d in a row ended", time.Duration(after-old.GetMeta().GetUpdatedNs()), restarts)
		}
	case why != "":
		fresh.Restarts = old.GetRestarts()
	case old.GetNodeId() == "" && old.GetSpecVersion() != s.GetSpecVersion():
		why = "the service was updated"
	default:
		return
	}
	r.ends = append(r.ends, Step{r.end(old, why), put(fresh)})
	if old.GetNodeId() != "" {
		x.past = append(x.past, old)
	}
	x.current = fresh
}

// tidy sees to the tasks of a slot that were told to stop.
func (r *reconciler) tidy(x *slot) {
	var ended []*api.Task
	for _, t := range x.past {
		switch {
		case t.GetStatus().GetState().Ended():
			ended = append(ended, t)
		case t.GetDesiredState() >= api.TaskState_TASK_SHUTDOWN: // else this round tells it to stop
			r.drop(t, "")
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
func (r *reconciler) drop(t *api.Task, why string) {
	switch {
	case t.GetStatus().GetState().Ended():
		r.deletes = append(r.deletes, Step{store.Delete(t)})
	case t.GetDesiredState() < api.TaskState_TASK_SHUTDOWN || t.GetNodeId() == "" || r.cluster.lost(t) != "":
		r.ends = append(r.ends, Step{r.end(t, why)})
	}
}

// end returns the operation that ends t: never placed, it is deleted; else told to stop, and where nobody is left to do that, orphaned.
func (r *reconciler) end(t *api.Task, why string) *api.Operation {
	if t.GetNodeId() == "" {
		return store.Delete(t)
	}
	t = edit(t)
	t.DesiredState = api.TaskState_TASK_SHUTDOWN
	if t.GetStatus().GetState().Ended() {
		return put(t)
	}
	t.Status.Message = why
	if lost := r.cluster.lost(t); lost != "" {
		t.Status.State, t.Status.Message, t.Status.TimeNs = api.TaskState_TASK_ORPHANED, lost, r.in.Now
	}
	return put(t)
}

// task returns a new task of the service.
func (r *reconciler) task(s *api.Service, slot uint64) *api.Task {
	return &api.Task{
		Id: r.in.NewID(), ServiceId: s.GetId(), ServiceName: s.GetSpec().GetName(), Slot: slot,
		DesiredState: api.TaskState_TASK_RUNNING, Status: &api.TaskStatus{State: api.TaskState_TASK_PENDING, TimeNs: r.in.Now},
		Spec: s.GetSpec().GetTask(), SpecVersion: s.GetSpecVersion(),
	}
}

// restart says whether the ended task is replaced, not before when, and the how manieth in a row the new one is.
func restart(t *api.Task) (after int64, restarts uint32, ok bool) {
	switch t.GetSpec().GetRestart() {
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
	if most := t.GetSpec().GetRestartAttemptsMax(); most > 0 && row >= most {
		return 0, 0, false
	}
	return ended + int64(backOff(time.Duration(t.GetSpec().GetRestartDelayNs()), row)), row + 1, true
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

// edit returns a copy of t with a status of its own; the specification is shared.
func edit(t *api.Task) *api.Task {
	next := new(api.Task)
	m := next.ProtoReflect()
	t.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		m.Set(f, v)
		return true
	})
	next.Status = api.Clone(t.GetStatus())
	return next
}

func put(t *api.Task) *api.Operation { return store.Put(t, t.GetMeta().GetVersion()) }

func sorted(slots map[uint64]*slot) []*slot {
	out := make([]*slot, 0, len(slots))
	for _, x := range slots {
		out = append(out, x)
	}
	slices.SortFunc(out, byNumber)
	return out
}

func byNumber(a, b *slot) int { return cmp.Compare(a.number, b.number) }

func newest(a, b *api.Task) int {
	return cmp.Or(cmp.Compare(b.GetMeta().GetCreatedNs(), a.GetMeta().GetCreatedNs()), cmp.Compare(b.GetRestarts(), a.GetRestarts()), cmp.Compare(a.GetId(), b.GetId()))
}
