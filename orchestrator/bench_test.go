package orchestrator_test

import (
	"context"
	"fmt"
	"testing"

	"warden"
	"warden/api"
	"warden/orchestrator"
	"warden/store"
	"warden/store/storetest"
)

// One pass over 10,000 tasks of 100 services on 1,000 nodes: every task to make, every task to place, nothing to do, and every task to
// be replaced for a new version of its secret.
func BenchmarkPass(b *testing.B) {
	token := storetest.Token(api.Role_ROLE_WORKER)
	in := orchestrator.Input{Liveness: func(string) api.Liveness { return api.Liveness_LIVENESS_READY }, Now: 1}
	id := 0
	in.NewID = func() string { id++; return fmt.Sprintf("%025d", id) }
	for i := range 1000 {
		in.Nodes = append(in.Nodes, storetest.Node(fmt.Sprint("n", i), token))
		in.Nodes[i].Zone = "default"
	}
	secret := storetest.Secret("db")
	in.Secrets = []*api.Secret{secret}
	follow := storetest.Reference(secret)
	follow.Version = 0
	for i := range 100 {
		s := storetest.Service(fmt.Sprint("s", i), "default", follow)
		s.Spec.Replicas, s.SpecVersion, s.Spec.Task.Constraints = 100, 1, []string{"node.role==worker", "node.labels.disk!=slow"}
		s.Spec.Update = &api.UpdatePolicy{}
		in.Services = append(in.Services, s)
	}
	reconcile := func(want int) func(*testing.B) {
		return func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if steps, _ := orchestrator.Reconcile(in); len(steps) != want {
					b.Fatal(len(steps))
				}
			}
		}
	}
	b.Run("create", reconcile(10_000))
	created, _ := orchestrator.Reconcile(in)
	for _, s := range created {
		in.Tasks = append(in.Tasks, s[0].GetPut().GetObject().GetTask())
	}
	b.Run("place", func(b *testing.B) {
		b.ReportAllocs()
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
	b.Run("idle", reconcile(0))
	secret.CurrentVersion = 2
	b.Run("replace", reconcile(10_000))
}

// crowd stands in for agents: what is placed runs, and what is to stop has stopped, as soon as it is committed. It counts the tasks of
// one service that run.
type crowd struct {
	b *testing.B
	s *store.Store
	w *store.Watcher
}

// until reports for the nodes until the tasks of the service are as wanted: so many run that ok accepts, and no others hold a node.
func (c *crowd) until(service string, want int, ok func(*api.Task) bool) {
	good, told := map[string]bool{}, map[string]api.TaskState{}
	holds := map[string]bool{}
	take := func(ids []string) {
		v := c.s.View()
		var ops []*api.Operation
		for _, id := range ids {
			t := v.Task(id)
			delete(good, id)
			delete(holds, id)
			if t == nil || t.GetServiceId() != service {
				continue
			}
			state, to := t.GetStatus().GetState(), api.TaskState_TASK_RUNNING
			if t.GetDesiredState() == api.TaskState_TASK_SHUTDOWN {
				to = api.TaskState_TASK_SHUTDOWN
			}
			if t.Holds() {
				holds[id] = true
				if state < to && told[id] < to {
					told[id] = to
					ops = append(ops, storetest.Report(t, to))
				}
			}
			if state == api.TaskState_TASK_RUNNING && to == state && ok(t) {
				good[id] = true
			}
		}
		for len(ops) > 0 {
			n := min(500, len(ops))
			storetest.Propose(c.b, c.s, ops[:n]...)
			ops = ops[n:]
		}
	}
	all := func() []string {
		clear(good)
		clear(holds)
		var ids []string
		for _, t := range c.s.View().TasksByService(service) {
			ids = append(ids, t.GetId())
		}
		return ids
	}
	for take(all()); len(good) != want || len(holds) != want; {
		changes, err := c.w.Next(c.b.Context())
		if err != nil {
			c.b.Fatal(err)
		}
		var ids []string
		for _, k := range changes.Keys {
			ids = append(ids, k.ID)
		}
		if changes.Resync {
			ids = all()
		}
		take(ids)
	}
}

// 10,000 tasks on 1,000 nodes by a running orchestrator and a store of one manager that keeps its log in memory: what the two cost without
// disks, sessions and nodes. create: from the service's commit until all tasks run, which are two commits each; rotate: a new
// version of a secret until all tasks were replaced by such that have it, five commits each; down and remove: to a tenth, and to
// none. Everything is reported for the nodes in commands of 500.
func BenchmarkCreateToPlaced(b *testing.B) {
	for _, size := range []struct{ tasks, nodes int }{{1_000, 1_000}, {10_000, 100}, {10_000, 1_000}} {
		b.Run(fmt.Sprintf("%dx%d", size.tasks, size.nodes), func(b *testing.B) { createToPlaced(b, size.tasks, size.nodes) })
	}
}

func createToPlaced(b *testing.B, tasks, nodes int) {
	token, secret := storetest.Token(api.Role_ROLE_WORKER), storetest.Secret("db")
	s := storetest.New(b)
	storetest.Propose(b, s, storetest.Genesis(warden.NewID(), warden.NewID())...)
	storetest.Propose(b, s, store.Put(token, 0), store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0))
	for i := 0; i < nodes; {
		var ops []*api.Operation
		for ; i < nodes && len(ops) < 1000; i++ {
			ops = append(ops, storetest.Join(storetest.Node(fmt.Sprint("n", i), token))...)
		}
		storetest.Propose(b, s, ops...)
	}
	o := orchestrator.New(orchestrator.Config{Store: s, NodeID: warden.NewID(), LivenessChanged: func() <-chan struct{} { return nil },
		Liveness: func(string) api.Liveness { return api.Liveness_LIVENESS_READY }})
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- o.Run(ctx) }()
	defer func() { cancel(); <-done }()
	c := &crowd{b, s, s.Watch(api.Kind_KIND_TASK)}
	defer c.w.Close()
	follow := storetest.Reference(secret)
	follow.Version = 0
	any := func(*api.Task) bool { return true }
	phases, ids, version := []string{"create", "rotate", "down", "remove"}, 0, uint64(1)
	total := map[string]float64{}
	for b.Loop() {
		for _, phase := range phases {
			start := b.Elapsed()
			service := s.View().ServiceByName(fmt.Sprint("s", ids))
			switch phase {
			case "create":
				ids++
				service = storetest.Service(fmt.Sprint("s", ids), "default", follow)
				service.Spec.Replicas, service.Spec.Update = uint64(tasks), &api.UpdatePolicy{}
				storetest.Propose(b, s, store.Put(service, 0))
				c.until(service.Id, tasks, any)
			case "rotate":
				version++
				next := api.Clone(s.View().Secret(secret.Id))
				next.CurrentVersion = version
				ops := []*api.Operation{store.Put(storetest.SecretVersion(secret, version), 0), store.Put(next, next.Meta.Version)}
				if version > 2 {
					ops = append(ops, store.Delete(s.View().SecretVersion(secret.Id, version-2)))
				}
				storetest.Propose(b, s, ops...)
				c.until(service.Id, tasks, func(t *api.Task) bool { return t.Spec.Secrets[0].Version == version })
			case "down":
				next := api.Clone(service)
				next.Spec.Replicas /= 10
				storetest.Propose(b, s, store.Put(next, next.Meta.Version))
				c.until(service.Id, tasks/10, any)
			case "remove":
				storetest.Propose(b, s, store.Delete(service))
				c.until(service.Id, 0, any)
			}
			total[phase] += (b.Elapsed() - start).Seconds() * 1e3
		}
	}
	for _, phase := range phases {
		b.ReportMetric(total[phase]/float64(b.N), "ms-"+phase)
	}
}
