package orchestrator

import (
	"cmp"
	"iter"
	"math"
	"slices"

	"warden/api"
	"warden/scheduler"
)

// Schedule returns a step for each waiting task that finds a node now, and one for each whose reason why it finds none has
// changed; and when the next task's back-off is over, in command time, 0 where none waits for that. failures counts tasks
// that failed lately, by node and service; it may be nil. A task that stands in for another that it differs from waits until that
// one has stopped. The placements that it returns fit together, but others may have
// been committed since: each is re-checked in the apply. Pure.
func Schedule(in Input, failures map[string]map[string]int) (steps []Step, next int64) {
	ids := func(yield func(string) bool) {
		for _, n := range in.Nodes {
			if !yield(n.GetId()) {
				return
			}
		}
	}
	changed, next := schedule(newCluster(in), in.Tasks, ids, in.Now, failures)
	for _, t := range changed {
		steps = append(steps, Step{put(t)})
	}
	return steps, next
}

// schedule is Schedule for the tasks and the nodes with the IDs, on a cluster whose nodes were not loaded before. It returns the tasks
// as they should be.
func schedule(c *cluster, tasks []*api.Task, nodes iter.Seq[string], now int64, failures map[string]map[string]int) (changed []*api.Task, next int64) {
	var waits []*api.Task
	stopping := make(map[place][]*api.Task)
	for _, t := range tasks {
		if t.Holds() && t.GetDesiredState() >= api.TaskState_TASK_SHUTDOWN {
			at := place{t.GetServiceId(), t.GetSlot()}
			stopping[at] = append(stopping[at], t)
		}
	}
	for _, t := range tasks {
		if !waiting(t) {
			continue
		}
		if at := t.GetStartAfterNs(); at > now {
			if next == 0 || at < next {
				next = at
			}
			continue
		}
		if len(stopping) > 0 && slices.ContainsFunc(stopping[place{t.GetServiceId(), t.GetSlot()}], func(old *api.Task) bool { return waitsFor(t, old) }) {
			continue
		}
		waits = append(waits, t)
	}
	if len(waits) == 0 {
		return nil, next
	}
	slices.SortFunc(waits, func(a, b *api.Task) int { // who waits longest comes first, and the tasks of a service together
		return cmp.Or(cmp.Compare(made(a), made(b)), cmp.Compare(a.GetServiceId(), b.GetServiceId()),
			cmp.Compare(a.GetSlot(), b.GetSlot()), cmp.Compare(a.GetId(), b.GetId()))
	})
	var groups []*group
	byID := make(map[string]*api.Task, len(waits))
	for _, t := range waits {
		g := c.group(t)
		if g.broken != "" {
			changed = appendWaits(changed, t, "no suitable node ("+g.broken+")")
			continue
		}
		if len(g.TaskIDs) == 0 {
			groups = append(groups, g)
		}
		g.TaskIDs = append(g.TaskIDs, t.GetId())
		byID[t.GetId()] = t
	}
	placed, unplaced := scheduler.Place(c.list(nodes, tasks, failures), flat(groups))
	for _, p := range placed {
		t := edit(byID[p.TaskID])
		t.NodeId = p.NodeID
		t.Status = &api.TaskStatus{State: api.TaskState_TASK_ASSIGNED, TimeNs: now}
		changed = append(changed, t)
	}
	for _, u := range unplaced {
		changed = appendWaits(changed, byID[u.TaskID], u.Reason)
	}
	return changed, next
}

// made returns when the task was made; one that no command has made yet comes last.
func made(t *api.Task) int64 {
	if t.GetMeta() == nil {
		return math.MaxInt64
	}
	return t.GetMeta().GetCreatedNs()
}

// place is one slot of one service.
type place struct {
	service string
	slot    uint64
}

// appendWaits adds t as it is to say why it waits, where its record does not say so already.
func appendWaits(changed []*api.Task, t *api.Task, reason string) []*api.Task {
	if t.GetStatus().GetMessage() == reason {
		return changed
	}
	t = edit(t)
	t.Status.State, t.Status.Message = api.TaskState_TASK_PENDING, reason
	return append(changed, t)
}

// list returns the nodes as the scheduler wants them, with what they hold, in any order: it sorts them.
func (c *cluster) list(ids iter.Seq[string], tasks []*api.Task, failures map[string]map[string]int) []scheduler.Node {
	var nodes []scheduler.Node
	at := make(map[string]int)
	for id := range ids {
		if h := c.host(id); h != nil {
			n := h.Node
			n.RecentFailures, n.ServiceTasks = failures[id], make(map[string]int)
			at[id] = len(nodes)
			nodes = append(nodes, n)
		}
	}
	for _, t := range tasks {
		i, ok := at[t.GetNodeId()]
		if !ok || !t.Holds() {
			continue
		}
		n, r := &nodes[i], t.GetSpec().GetResources()
		n.UsedNanoCPUs += r.GetReserveNanoCpus()
		n.UsedMemoryBytes += r.GetReserveMemoryBytes()
		n.Tasks++
		n.ServiceTasks[t.GetServiceId()]++
	}
	return nodes
}

func flat(groups []*group) []scheduler.Group {
	out := make([]scheduler.Group, len(groups))
	for i, g := range groups {
		out[i] = g.Group
	}
	return out
}
