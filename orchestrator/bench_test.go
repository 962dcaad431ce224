package orchestrator_test

import (
	"fmt"
	"testing"

	"warden/api"
	"warden/orchestrator"
	"warden/store/storetest"
)

// One pass over 10,000 tasks of 100 services on 1,000 nodes: nothing to do, and every task to make and place.
func BenchmarkPass(b *testing.B) {
	token := storetest.Token(api.Role_ROLE_WORKER)
	in := orchestrator.Input{Liveness: func(string) api.Liveness { return api.Liveness_LIVENESS_READY }}
	id := 0
	in.NewID = func() string { id++; return fmt.Sprintf("%025d", id) }
	for i := range 1000 {
		in.Nodes = append(in.Nodes, storetest.Node(fmt.Sprint("n", i), token))
		in.Nodes[i].Zone = "default"
	}
	for i := range 100 {
		s := storetest.Service(fmt.Sprint("s", i), "default")
		s.Spec.Replicas, s.SpecVersion, s.Spec.Task.Constraints = 100, 1, []string{"node.role==worker", "node.labels.disk!=slow"}
		in.Services = append(in.Services, s)
	}
	b.Run("create", func(b *testing.B) {
		for b.Loop() {
			if steps := orchestrator.Reconcile(in); len(steps) != 10_000 {
				b.Fatal(len(steps))
			}
		}
	})
	for _, s := range orchestrator.Reconcile(in) {
		in.Tasks = append(in.Tasks, s[0].GetPut().GetObject().GetTask())
	}
	b.Run("place", func(b *testing.B) {
		for b.Loop() {
			if steps, _ := orchestrator.Schedule(in, nil); len(steps) != 10_000 {
				b.Fatal(len(steps))
			}
		}
	})
	steps, _ := orchestrator.Schedule(in, nil)
	in.Tasks = in.Tasks[:0]
	for _, s := range steps {
		t := s[0].GetPut().GetObject().GetTask()
		t.Status.State = api.TaskState_TASK_RUNNING
		in.Tasks = append(in.Tasks, t)
	}
	b.Run("idle", func(b *testing.B) {
		for b.Loop() {
			if steps := orchestrator.Reconcile(in); len(steps) != 0 {
				b.Fatal(len(steps))
			}
			orchestrator.Schedule(in, nil)
		}
	})
}
