package orchestrator_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"warden/api"
	"warden/orchestrator"
	"warden/store"
	"warden/store/storetest"
)

func (r *rig) liveness(id string) api.Liveness {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l, ok := r.live[id]; ok {
		return l
	}
	return api.Liveness_LIVENESS_READY
}

func (r *rig) changeService(id string, f func(*api.Service)) {
	r.t.Helper()
	s := api.Clone(r.store.View().Service(id))
	f(s)
	r.propose(store.Put(s, s.Meta.Version))
}

// Whatever happens, once it is quiet a look at everything finds nothing that the looks at what changed have missed.
func TestRunMissesNothing(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { missNothing(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func missNothing(t *testing.T, random *rand.Rand) {
	r := newRig(t)
	secret := storetest.Secret("db")
	r.propose(store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0))
	follow := storetest.Reference(secret)
	follow.Version = 0
	var nodes, services []string
	for i := range 4 {
		nodes = append(nodes, r.node(fmt.Sprint("n", i), func(n *api.Node) { n.Description.NanoCpus = 3e9 }))
	}
	one := func(from []string) string { return from[random.IntN(len(from))] }
	version := uint64(1)
	for step := range 60 {
		v := r.store.View()
		switch n := random.IntN(13); {
		case n == 0 || len(services) == 0:
			services = append(services, r.service(fmt.Sprint("s", step), random.Uint64N(4), func(s *api.Service) {
				s.Spec.Task.Secrets, s.Spec.Task.Resources.ReserveNanoCpus = []*api.SecretReference{follow}, random.Int64N(3)*1e9
				s.Spec.Update = &api.UpdatePolicy{Parallelism: random.Uint32N(3), DelayNs: random.Int64N(2) * int64(20*time.Second)}
			}))
		case n == 1:
			r.changeService(one(services), func(s *api.Service) { s.Spec.Replicas = random.Uint64N(5) })
		case n == 2:
			r.changeService(one(services), func(s *api.Service) { s.Spec.Task.Force++ })
		case n == 3:
			r.changeService(one(services), func(s *api.Service) {
				s.Spec.Task.Constraints = [][]string{nil, {"node.labels.a!=b"}, {"node.labels.a!=c"}}[random.IntN(3)]
			})
		case n == 4:
			version++
			next := api.Clone(v.Secret(secret.Id))
			next.CurrentVersion = version
			r.propose(store.Put(storetest.SecretVersion(secret, version), 0), store.Put(next, next.Meta.Version))
		case n == 5:
			r.changeNode(one(nodes), func(n *api.Node) {
				n.Availability = []api.Availability{1, 1, 2, 3}[random.IntN(4)]
				n.Labels = map[string]string{"a": []string{"b", "c", "d"}[random.IntN(3)]}
			})
		case n == 6:
			r.alive(one(nodes), []api.Liveness{0, 1, 1, 2}[random.IntN(4)])
		case n == 7 && random.IntN(4) == 0 && len(services) > 1:
			r.propose(store.Delete(v.Service(services[0])))
			services = services[1:]
		case n == 8:
			time.Sleep(time.Duration(random.IntN(30)) * time.Second)
		default:
			var ops []*api.Operation
			for _, x := range v.Tasks() {
				if x.Holds() && random.IntN(2) == 0 {
					to := []api.TaskState{70, 70, 70, 80, 90, 100, 110}[random.IntN(7)]
					if x.DesiredState == stopped {
						to = stopped
					}
					ops = append(ops, storetest.Report(x, to))
				}
			}
			r.propose(ops...)
		}
		if random.IntN(2) == 0 {
			continue
		}
		r.quiet()
		in := orchestrator.Read(r.store.View(), r.liveness, time.Now())
		if steps, _ := orchestrator.Reconcile(in); len(steps) != 0 {
			t.Fatalf("step %d: there is still to do: %v", step, steps)
		}
		if steps, _ := orchestrator.Schedule(in, nil); len(steps) != 0 {
			t.Fatalf("step %d: there is still to place: %v", step, steps)
		}
	}
	r.quiet()
}

// A roll-out goes on by itself when its delay is over, to the instant, though nothing else happens.
func TestRunRollsAfterDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.node("a")
		web := r.service("web", 2, func(s *api.Service) { s.Spec.Update = &api.UpdatePolicy{Parallelism: 1, DelayNs: int64(time.Minute)} })
		r.want(web, "assigned@a:2")
		r.report(web, assigned, running)
		r.changeService(web, func(s *api.Service) { s.Spec.Task.Force++ })
		r.want(web, "pending:1 running!@a:1 running@a:1")
		for _, x := range r.store.View().TasksByService(web) {
			if x.DesiredState == stopped {
				r.propose(storetest.Report(x, stopped))
			}
		}
		r.want(web, "assigned@a:1 running@a:1 shutdown@a:1")
		r.report(web, assigned, running)
		start := time.Now()
		quiet := r.store.proposals()
		time.Sleep(time.Minute - time.Millisecond)
		synctest.Wait()
		if n := r.store.proposals(); n != quiet {
			t.Fatalf("%d proposals before the delay was over", n-quiet)
		}
		time.Sleep(2 * time.Millisecond) // the command times are those of the store's clock
		r.want(web, "pending:1 running!@a:1 running@a:1 shutdown@a:1")
		if n := r.store.proposals(); n != quiet+1 {
			t.Errorf("%d proposals after %v, want 1", n-quiet, time.Since(start))
		}
	})
}

// A task is made with its placement in one command, and what nodes report on the way to running has nobody look at anything.
func TestRunCommitsLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for i := range 4 {
			r.node(fmt.Sprint("n", i))
		}
		r.quiet()
		calm := r.store.proposals()
		web := r.service("web", 400)
		r.want(web, "assigned@n0:100 assigned@n1:100 assigned@n2:100 assigned@n3:100")
		if n := r.store.proposals() - calm; n != 1 {
			t.Errorf("400 tasks were made and placed with %d commands, want 1", n)
		}
		rounds := func() uint64 {
			var f api.ManagerFacts
			r.counts.Facts(&f)
			return f.Rounds.Count
		}
		before := rounds()
		for _, to := range []api.TaskState{40, 50, 60, 70} {
			for _, x := range r.store.View().TasksByService(web) {
				if x.Slot%10 == 0 {
					r.propose(storetest.Report(x, to))
				}
			}
		}
		a := r.store.View().Nodes()[0]
		r.changeNode(a.Id, func(n *api.Node) { n.LeafNotBeforeNs++ }) // a renewal
		r.quiet()
		if n := rounds(); n != before {
			t.Errorf("%d passes where there is nothing to do", n-before)
		}
		r.service("huge", 10, func(s *api.Service) { s.Spec.Task.Resources.ReserveNanoCpus = 1e12 })
		r.quiet()
		if n := rounds(); n != before+1 {
			t.Errorf("%d passes for tasks that find no node, want 1", n-before)
		}
	})
}

// A leader that lost its office and got it back at once may find what it proposed before in the log, and applied, after it has decided the
// same again. Each slot then has two tasks, of which one goes, though nothing else happens.
func TestRunFindsWhatAnAnswerWasLostOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.node("a")
		r.quiet()
		var first *api.Command
		calls := 0
		r.store.mu.Lock()
		r.store.lose = func(cmd *api.Command) error {
			switch calls++; calls {
			case 1:
				first = cmd
				return lost
			case 2:
				if _, err := r.store.Store.Propose(t.Context(), first); err != nil {
					t.Error(err)
				}
			}
			return nil
		}
		r.store.mu.Unlock()
		web := r.service("web", 3)
		r.want(web, "assigned!@a:3 assigned@a:3")
	})
}
