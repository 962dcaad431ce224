package agent

import (
	"warden/api"
	"warden/internal/tally"
)

// Facts returns the states of this node's tasks, and of its session whether and since when there is one.
func (a *Agent) Facts(f *api.NodeFacts) {
	n := map[api.TaskState]uint64{}
	a.mu.Lock()
	for _, t := range a.tasks {
		n[t.status.GetState()]++
	}
	if a.session != nil {
		f.Session, f.SessionSinceNs = true, a.session.since.UnixNano()
	}
	a.mu.Unlock()
	f.Tasks = tally.Tasks(n)
}
