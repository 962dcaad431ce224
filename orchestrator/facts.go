package orchestrator

import (
	"slices"
	"sync/atomic"
	"time"

	"warden/api"
	"warden/internal/tally"
)

// Counts is what orchestrators count for the facts of a manager, which makes one each time it begins to lead: it outlives
// them. The zero value is ready.
type Counts struct {
	rounds          tally.Histogram
	placed, refused atomic.Uint64
}

// Facts adds what was counted.
func (c *Counts) Facts(f *api.ManagerFacts) {
	f.Rounds, f.TasksPlaced, f.PlacementsRefused = c.rounds.Read(), c.placed.Load(), c.refused.Load()
}

// round counts a pass that began at start.
func (c *Counts) round(start time.Time) {
	if c != nil {
		c.rounds.Observe(time.Since(start))
	}
}

// committed counts the placements among operations that were applied.
func (c *Counts) committed(ops []*api.Operation) {
	if c == nil {
		return
	}
	for _, op := range ops {
		if placement(op) {
			c.placed.Add(1)
		}
	}
}

// rejected counts a step that was refused, where it is a placement.
func (c *Counts) rejected(s Step) {
	if c != nil && slices.ContainsFunc(s, placement) {
		c.refused.Add(1)
	}
}

func placement(op *api.Operation) bool {
	t := op.GetPut().GetObject().GetTask()
	return t.GetStatus().GetState() == api.TaskState_TASK_ASSIGNED && t.GetDesiredState() == api.TaskState_TASK_RUNNING
}
