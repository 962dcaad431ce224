package orchestrator_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"warden"
	"warden/api"
	"warden/orchestrator"
	"warden/store"
	"warden/store/storetest"
)

// flaky loses answers while it is bad: of commands that are applied, that never are, or that are before the next one.
type flaky struct {
	*store.Store
	mu     sync.Mutex
	random *rand.Rand
	bad    bool
	late   *api.Command
	before func()
}

var lost = warden.Errorf(warden.CodeTimeout, "proposing", "the outcome is unknown")

func (f *flaky) Propose(ctx context.Context, cmd *api.Command) (*api.Result, error) {
	f.mu.Lock()
	n := 9
	if f.bad {
		n = f.random.IntN(6)
	}
	before, late := f.before, f.late
	f.late = nil
	if n == 3 {
		f.late = cmd
	}
	f.mu.Unlock()
	if late != nil {
		f.Store.Propose(context.WithoutCancel(ctx), late)
	}
	switch n {
	case 0:
		return nil, lost
	case 1:
		f.Store.Propose(ctx, cmd)
		return nil, lost
	case 3:
		return nil, lost
	case 2:
		if before != nil {
			f.mu.Lock()
			before()
			f.mu.Unlock()
		}
	}
	return f.Store.Propose(ctx, cmd)
}

// Whatever happens, nodes that come, go and change zones, managers that lose answers or hand over in the middle, once it is quiet a look at
// everything finds nothing to do, every slot has one task, and each task is in its zone.
func TestRunInAStorm(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { storm(t, rand.New(rand.NewPCG(seed, 7))) })
		})
	}
}

func storm(t *testing.T, random *rand.Rand) {
	s := storetest.New(t)
	tokens := []*api.Token{storetest.Token(api.Role_ROLE_WORKER), storetest.Token(api.Role_ROLE_WORKER)}
	tokens[1].Zone = "pci"
	for _, x := range tokens {
		x.ExpiresNs = time.Now().Add(24 * time.Hour).UnixNano()
	}
	storetest.Propose(t, s, storetest.Genesis(warden.NewID(), warden.NewID())...)
	storetest.Propose(t, s, store.Put(storetest.Zone("pci"), 0), store.Put(tokens[0], 0), store.Put(tokens[1], 0))
	var mu sync.Mutex
	live := map[string]api.Liveness{}
	liveness := func(id string) api.Liveness {
		mu.Lock()
		defer mu.Unlock()
		if l, ok := live[id]; ok {
			return l
		}
		return api.Liveness_LIVENESS_READY
	}
	changed := make(chan struct{}, 1)
	f := &flaky{Store: s, random: rand.New(rand.NewPCG(random.Uint64(), 3))}
	var stop func()
	start := func() {
		select {
		case <-changed:
		default:
		}
		o := orchestrator.New(orchestrator.Config{Store: f, NodeID: warden.NewID(), Liveness: liveness, LivenessChanged: func() <-chan struct{} { return changed }})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- o.Run(ctx) }()
		stop = func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run = %v", err)
			}
		}
	}
	start()
	defer func() { stop() }()
	propose := func(ops ...*api.Operation) {
		if len(ops) == 0 {
			return
		}
		if _, err := s.Propose(t.Context(), storetest.Command(ops...)); err != nil { // some of it breaks the rules
			t.Logf("test's own: %v", err)
		}
	}
	secret, tight := storetest.Secret("db"), storetest.Secret("card", "pci")
	propose(store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0), store.Put(tight, 0), store.Put(storetest.SecretVersion(tight, 1), 0))
	one := func(from []string) string { return from[random.IntN(len(from))] }
	nodeIDs := func() (out []string) {
		for _, n := range s.View().Nodes() {
			if n.Role == api.Role_ROLE_WORKER {
				out = append(out, n.Id)
			}
		}
		return
	}
	join := func(i int) {
		n := storetest.Node(fmt.Sprint("n", i), tokens[random.IntN(2)])
		n.Description.NanoCpus = 3e9
		mu.Lock()
		live[n.Id] = []api.Liveness{0, 1, 1, 2}[random.IntN(4)]
		mu.Unlock()
		propose(storetest.Join(n)...)
	}
	for i := range 4 {
		join(i)
	}
	reports := func() {
		var ops []*api.Operation
		for _, x := range s.View().Tasks() {
			if x.Holds() && random.IntN(2) == 0 {
				to := []api.TaskState{70, 70, 70, 80, 90, 100, 110}[random.IntN(7)]
				if x.DesiredState == stopped {
					to = stopped
				}
				ops = append(ops, storetest.Report(x, to))
			}
		}
		propose(ops...)
	}
	act := func(step int) {
		v := s.View()
		services := v.Services()
		what := random.IntN(18)
		switch {
		case what == 0 || len(services) == 0:
			x := storetest.Service(fmt.Sprint("s", step), []string{"default", "pci"}[random.IntN(2)])
			x.Spec.Replicas = random.Uint64N(4)
			for i, sec := range []*api.Secret{secret, tight} {
				if random.IntN(2) == 0 && (i == 0 || x.Spec.Task.Zone == "pci") {
					ref := storetest.Reference(sec)
					ref.Version = 0
					x.Spec.Task.Secrets = append(x.Spec.Task.Secrets, ref)
				}
			}
			x.Spec.Task.Resources.ReserveNanoCpus = random.Int64N(3) * 1e9
			x.Spec.Task.Restart = api.RestartCondition(1 + random.IntN(3))
			x.Spec.Task.RestartAttemptsMax = random.Uint32N(3)
			x.Spec.Update = &api.UpdatePolicy{Parallelism: random.Uint32N(3), DelayNs: random.Int64N(2) * int64(20*time.Second)}
			propose(store.Put(x, 0))
		case what <= 3:
			x := api.Clone(services[random.IntN(len(services))])
			switch random.IntN(6) {
			case 0:
				x.Spec.Replicas = random.Uint64N(5)
			case 1:
				x.Spec.Task.Force++
			case 2:
				x.Spec.Task.Constraints = [][]string{nil, {"node.labels.a!=b"}, {"node.labels.a!=c"}}[random.IntN(3)]
			case 3:
				x.Spec.Task.Zone = []string{"default", "pci"}[random.IntN(2)]
			case 4:
				x.Spec.Task.Restart = api.RestartCondition(1 + random.IntN(3))
				x.Spec.Task.RestartAttemptsMax = random.Uint32N(3)
				x.Spec.Task.RestartDelayNs = random.Int64N(3) * 1e9
			case 5:
				x.Spec.Update = &api.UpdatePolicy{Parallelism: random.Uint32N(3), DelayNs: random.Int64N(2) * int64(20*time.Second)}
			}
			propose(store.Put(x, x.Meta.Version))
		case what == 4:
			next := api.Clone(v.Secret([]string{secret.Id, tight.Id}[random.IntN(2)]))
			next.CurrentVersion++
			propose(store.Put(storetest.SecretVersion(next, next.CurrentVersion), 0), store.Put(next, next.Meta.Version))
		case what == 5:
			next := api.Clone(v.Secret(secret.Id))
			next.Zones = [][]string{nil, {"pci"}, {"default"}, {"default", "pci"}}[random.IntN(4)]
			propose(store.Put(next, next.Meta.Version))
		case what <= 7:
			if ids := nodeIDs(); len(ids) > 0 {
				n := api.Clone(v.Node(one(ids)))
				if n == nil {
					return
				}
				switch random.IntN(4) {
				case 0:
					n.Availability = []api.Availability{1, 1, 2, 3}[random.IntN(4)]
				case 1:
					n.Labels = map[string]string{"a": []string{"b", "c", "d"}[random.IntN(3)]}
				case 2:
					n.Zone = []string{"default", "pci"}[random.IntN(2)]
				case 3:
					n.Description.NanoCpus = random.Int64N(5) * 1e9
				}
				propose(store.Put(n, n.Meta.Version))
			}
		case what <= 9:
			if ids := nodeIDs(); len(ids) > 0 {
				mu.Lock()
				live[one(ids)] = []api.Liveness{0, 1, 1, 2}[random.IntN(4)]
				mu.Unlock()
				select {
				case changed <- struct{}{}:
				default:
				}
			}
		case what == 10 && random.IntN(3) == 0:
			propose(store.Delete(services[random.IntN(len(services))]))
		case what == 11:
			time.Sleep(time.Duration(random.IntN(30)) * time.Second)
		case what == 12:
			if ids := nodeIDs(); len(ids) > 2 && random.IntN(2) == 0 {
				n := v.Node(one(ids))
				tomb := &api.Tombstone{Id: n.Id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone, RemovedNs: time.Now().UnixNano()}
				if random.IntN(2) == 0 {
					propose(store.Put(tomb, 0), store.Delete(n))
				} else {
					propose(store.Put(tomb, 0))
				}
			} else {
				join(100 + step)
			}
		case what == 13 && random.IntN(2) == 0:
			stop()
			if err := s.Barrier(t.Context()); err != nil {
				t.Fatal(err)
			}
			start()
		case what == 14:
			f.mu.Lock()
			f.bad = !f.bad
			f.mu.Unlock()
		default:
			reports()
		}
	}
	f.before = func() { // between decision and commit
		v := s.View()
		if ids := nodeIDs(); len(ids) > 0 {
			n := api.Clone(v.Node(ids[f.random.IntN(len(ids))]))
			n.Availability = []api.Availability{1, 1, 2, 3}[f.random.IntN(4)]
			n.Zone = []string{"default", "pci"}[f.random.IntN(2)]
			propose(store.Put(n, n.Meta.Version))
		}
	}
	for step := range 80 {
		act(step)
		if random.IntN(2) == 0 {
			continue
		}
		f.mu.Lock()
		bad := f.bad
		f.bad = false
		f.mu.Unlock()
		time.Sleep(200 * time.Millisecond)
		if bad {
			time.Sleep(25 * time.Second)
		}
		synctest.Wait()
		in := orchestrator.Read(s.View(), liveness, time.Now())
		if steps, _ := orchestrator.Reconcile(in); len(steps) != 0 {
			t.Fatalf("step %d: there is still to do: %v", step, steps)
		}
		if steps, _ := orchestrator.Schedule(in, nil); len(steps) != 0 {
			t.Fatalf("step %d: there is still to place: %v", step, steps)
		}
		v := s.View()
		for _, sv := range v.Services() {
			slots := map[uint64]bool{}
			for _, x := range v.TasksByService(sv.Id) {
				if x.DesiredState == api.TaskState_TASK_RUNNING {
					if slots[x.Slot] {
						t.Fatalf("twice slot %d", x.Slot)
					}
					slots[x.Slot] = true
					if n := v.Node(x.NodeId); x.Holds() && (n == nil || n.Zone != x.Spec.Zone) {
						t.Fatalf("zone: %v on %v", x, n)
					}
				}
			}
			if len(slots) != int(sv.Spec.Replicas) {
				t.Fatalf("step %d: %d slots of %d", step, len(slots), sv.Spec.Replicas)
			}
		}
		f.mu.Lock()
		f.bad = bad
		f.mu.Unlock()
	}
}
