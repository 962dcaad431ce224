package orchestrator_test

import (
	"sync"
	"testing"
	"testing/synctest"

	"warden/api"
)

// Rounds and placements are counted.
func TestFacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.node("a")
		r.service("web", 3)
		r.quiet()
		var f api.ManagerFacts
		r.counts.Facts(&f)
		if f.TasksPlaced != 3 || f.PlacementsRefused != 0 || f.Rounds.Count == 0 {
			t.Errorf("Facts = %v, want 3 tasks placed in some rounds", &f)
		}
	})
}

// A placement that the apply refuses is counted, and the one that is made instead.
func TestFactsOfRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.node("a")
		r.node("b")
		var once sync.Once
		r.store.hook(func(cmd *api.Command) {
			for _, op := range cmd.Operations {
				if op.GetPut().GetObject().GetTask().GetNodeId() == a {
					once.Do(func() { r.changeNode(a, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_PAUSE }) })
				}
			}
		})
		r.service("web", 4)
		r.quiet()
		var f api.ManagerFacts
		r.counts.Facts(&f)
		if f.TasksPlaced != 4 || f.PlacementsRefused == 0 {
			t.Errorf("Facts = %v, want 4 tasks placed and some refused", &f)
		}
	})
}
