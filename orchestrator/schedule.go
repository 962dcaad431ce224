package orchestrator

import (
	"cmp"
	"slices"

	"warden/api"
	"warden/scheduler"
)

// Schedule returns a step for each waiting task that finds a node now, and one for each whose reason why it finds none has
// changed; and when the next task's back-off is over, in command time, 0 where none waits for that. failures counts tasks
// that failed lately, by node and service; it may be nil. The placements that it returns fit together, but others may have
// been committed since: each is re-checked in the apply. Pure.
func Schedule(in Input, failures map[string]map[string]int) (steps []Step, next int64) {
	var waiting []*api.Task
	for _, t := range in.Tasks {
		if t.GetNodeId() != "" || t.GetStatus().GetState().Ended() || t.GetDesiredState() >= api.TaskState_TASK_SHUTDOWN {
			continue
		}
		if at := t.GetStartAfterNs(); at > in.Now {
			if next == 0 || at < next {
				next = at
			}
			continue
		}
		waiting = append(waiting, t)
	}
	if len(waiting) == 0 {
		return nil, next
	}
	c := newCluster(in)
	c.load(in.Tasks)
	slices.SortFunc(waiting, func(a, b *api.Task) int { // who waits longest comes first, and the tasks of a service together
		return cmp.Or(cmp.Compare(a.GetMeta().GetCreatedNs(), b.GetMeta().GetCreatedNs()), cmp.Compare(a.GetServiceId(), b.GetServiceId()),
			cmp.Compare(a.GetSlot(), b.GetSlot()), cmp.Compare(a.GetId(), b.GetId()))
	})
	var groups []*group
	byID := make(map[string]*api.Task, len(waiting))
	for _, t := range waiting {
		g := c.group(t)
		if g.broken != "" {
			steps = appendWaits(steps, t, "no suitable node ("+g.broken+")")
			continue
		}
		if len(g.TaskIDs) == 0 {
			groups = append(groups, g)
		}
		g.TaskIDs = append(g.TaskIDs, t.GetId())
		byID[t.GetId()] = t
	}
	placed, unplaced := scheduler.Place(c.list(failures), flat(groups))
	for _, p := range placed {
		t := edit(byID[p.TaskID])
		t.NodeId = p.NodeID
		t.Status = &api.TaskStatus{State: api.TaskState_TASK_ASSIGNED, TimeNs: in.Now}
		steps = append(steps, Step{put(t)})
	}
	for _, u := range unplaced {
		steps = appendWaits(steps, byID[u.TaskID], u.Reason)
	}
	return steps, next
}

// appendWaits adds a step that says why t waits, where its record does not say so already.
func appendWaits(steps []Step, t *api.Task, reason string) []Step {
	if t.GetStatus().GetMessage() == reason {
		return steps
	}
	t = edit(t)
	t.Status.State, t.Status.Message = api.TaskState_TASK_PENDING, reason
	return append(steps, Step{put(t)})
}

// load counts what the nodes hold.
func (c *cluster) load(tasks []*api.Task) {
	for _, t := range tasks {
		n := c.nodes[t.GetNodeId()]
		if n == nil || !t.Holds() {
			continue
		}
		n.UsedNanoCPUs += t.GetSpec().GetResources().GetReserveNanoCpus()
		n.UsedMemoryBytes += t.GetSpec().GetResources().GetReserveMemoryBytes()
		n.Tasks++
		if n.ServiceTasks == nil {
			n.ServiceTasks = make(map[string]int)
		}
		n.ServiceTasks[t.GetServiceId()]++
	}
}

// list returns the nodes as the scheduler wants them, in any order: it sorts them.
func (c *cluster) list(failures map[string]map[string]int) []scheduler.Node {
	nodes := make([]scheduler.Node, 0, len(c.nodes))
	for id, n := range c.nodes {
		n.RecentFailures = failures[id]
		nodes = append(nodes, n.Node)
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
