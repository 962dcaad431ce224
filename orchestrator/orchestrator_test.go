package orchestrator_test

import (
	"context"
	"fmt"
	"strings"
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

// rig is an orchestrator that runs on a real store, in a bubble with a fake clock.
type rig struct {
	t     *testing.T
	store *hooked
	token *api.Token

	counts orchestrator.Counts

	mu      sync.Mutex // guards live
	live    map[string]api.Liveness
	changed chan struct{}
}

// hooked is a store that lets a test act before a proposal, and counts the refused ones.
type hooked struct {
	*store.Store
	one      sync.Mutex // one call of before at a time
	mu       sync.Mutex // guards those below; not held across calls
	before   func(*api.Command)
	lose     func(*api.Command) error // where it answers an error, that is the proposal's
	proposed []time.Time
	refused  map[warden.Code]int
}

func (h *hooked) Propose(ctx context.Context, cmd *api.Command) (*api.Result, error) {
	h.mu.Lock()
	before, lose := h.before, h.lose
	h.proposed = append(h.proposed, time.Now())
	h.mu.Unlock()
	if before != nil {
		h.one.Lock()
		before(cmd)
		h.one.Unlock()
	}
	if lose != nil {
		if err := lose(cmd); err != nil {
			return nil, err
		}
	}
	r, err := h.Store.Propose(ctx, cmd)
	if err != nil {
		h.mu.Lock()
		h.refused[warden.CodeOf(err)]++
		h.mu.Unlock()
	}
	return r, err
}

func (h *hooked) hook(f func(*api.Command)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.before = f
}

func (h *hooked) proposals() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.proposed)
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, token: storetest.Token(api.Role_ROLE_WORKER), live: map[string]api.Liveness{}, changed: make(chan struct{}, 1)}
	s := storetest.New(t)
	r.store = &hooked{Store: s, refused: map[warden.Code]int{}}
	storetest.Propose(t, s, storetest.Genesis(warden.NewID(), warden.NewID())...)
	storetest.Propose(t, s, store.Put(storetest.Zone("pci"), 0), store.Put(r.token, 0))
	o := orchestrator.New(orchestrator.Config{
		Counts: &r.counts, Store: r.store, NodeID: warden.NewID(), LivenessChanged: func() <-chan struct{} { return r.changed },
		Liveness: func(id string) api.Liveness {
			r.mu.Lock()
			defer r.mu.Unlock()
			if l, ok := r.live[id]; ok {
				return l
			}
			return api.Liveness_LIVENESS_READY
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- o.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	return r
}

func (r *rig) alive(id string, l api.Liveness) {
	r.mu.Lock()
	r.live[id] = l
	r.mu.Unlock()
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

func (r *rig) propose(ops ...*api.Operation) {
	r.t.Helper()
	storetest.Propose(r.t, r.store.Store, ops...)
}

func (r *rig) node(name string, change ...func(*api.Node)) string {
	r.t.Helper()
	n := storetest.Node(name, r.token)
	for _, f := range change {
		f(n)
	}
	r.propose(storetest.Join(n)...)
	return n.Id
}

func (r *rig) service(name string, replicas uint64, change ...func(*api.Service)) string {
	r.t.Helper()
	s := storetest.Service(name, "default")
	s.Spec.Replicas = replicas
	for _, f := range change {
		f(s)
	}
	r.propose(store.Put(s, 0))
	return s.Id
}

func (r *rig) changeNode(id string, f func(*api.Node)) {
	r.t.Helper()
	n := api.Clone(r.store.View().Node(id))
	f(n)
	r.propose(store.Put(n, n.Meta.Version))
}

func (r *rig) scale(id string, replicas uint64) {
	r.t.Helper()
	s := api.Clone(r.store.View().Service(id))
	s.Spec.Replicas = replicas
	r.propose(store.Put(s, s.Meta.Version))
}

// quiet waits for what is to happen at once.
func (r *rig) quiet() {
	time.Sleep(200 * time.Millisecond)
	synctest.Wait()
}

// count waits a moment and counts the service's tasks as "state@host", with "!" where they are told to stop.
func (r *rig) count(service string) map[string]int {
	r.quiet()
	out := map[string]int{}
	v := r.store.View()
	for _, t := range v.TasksByService(service) {
		s := t.Status.State.Word()
		if t.DesiredState == api.TaskState_TASK_SHUTDOWN && !t.Status.State.Ended() {
			s += "!"
		}
		if n := v.Node(t.NodeId); n != nil {
			s += "@" + n.Hostname
		}
		out[s]++
	}
	return out
}

func (r *rig) want(service, counts string) {
	r.t.Helper()
	if got := fmt.Sprint(r.count(service)); got != "map["+counts+"]" {
		r.t.Fatalf("tasks: %s\nwant:  map[%s]", got, counts)
	}
}

func (r *rig) report(service string, from, to api.TaskState) {
	r.t.Helper()
	for _, t := range r.store.View().TasksByService(service) {
		if t.Status.State == from && t.NodeId != "" {
			r.propose(storetest.Report(t, to))
		}
	}
}

const (
	assigned, running, failed, stopped = api.TaskState_TASK_ASSIGNED, api.TaskState_TASK_RUNNING, api.TaskState_TASK_FAILED, api.TaskState_TASK_SHUTDOWN
)

func TestRunFollowsServicesAndNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		web := r.service("web", 4)
		r.want(web, "pending:4")
		na, nb := storetest.Node("a", r.token), storetest.Node("b", r.token)
		r.propose(append(storetest.Join(na), storetest.Join(nb)...)...)
		a, b := na.Id, nb.Id
		r.want(web, "assigned@a:2 assigned@b:2")
		if u := r.store.View().TasksByService(web)[0]; u.ServiceName != "web" || u.SpecVersion != 1 || u.Spec.Image != "host" {
			t.Errorf("task = %v", u)
		}
		r.report(web, assigned, running)
		r.scale(web, 6)
		r.want(web, "assigned@a:1 assigned@b:1 running@a:2 running@b:2")
		r.scale(web, 2)
		r.want(web, "assigned!@a:1 assigned!@b:1 running!@a:1 running!@b:1 running@a:1 running@b:1")
		for _, x := range r.store.View().TasksByService(web) {
			if x.DesiredState == stopped {
				r.propose(storetest.Report(x, stopped))
			}
		}
		r.want(web, "running@a:1 running@b:1")

		r.alive(a, api.Liveness_LIVENESS_UNKNOWN) // a new leader
		r.want(web, "running@a:1 running@b:1")
		r.alive(a, api.Liveness_LIVENESS_DOWN)
		r.want(web, "assigned@b:1 orphaned@a:1 running@b:1")
		r.alive(a, api.Liveness_LIVENESS_READY)
		r.report(web, assigned, running)
		r.changeNode(b, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_DRAIN })
		r.want(web, "assigned@a:2 orphaned@a:1 running!@b:2")
		r.report(web, running, stopped)
		r.report(web, assigned, running)
		r.changeNode(b, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_ACTIVE })
		r.want(web, "orphaned@a:1 running@a:2 shutdown@b:2") // nothing moves back by itself
		r.changeNode(a, func(n *api.Node) { n.Zone = "pci" })
		r.want(web, "assigned@b:2 orphaned@a:1 running!@a:2 shutdown@b:2")

		quiet := r.store.proposals()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if got := r.store.proposals(); got != quiet {
			t.Errorf("%d proposals while nothing happened", got-quiet)
		}
		r.propose(store.Delete(r.store.View().Service(web)))
		r.want(web, "assigned!@b:2 running!@a:2")
	})
}

func TestRunMovesTasksOfEvictedNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.node("a")
		web := r.service("web", 2)
		r.want(web, "assigned@a:2")
		r.report(web, assigned, running)
		r.node("b")
		n := r.store.View().Node(a)
		r.propose(store.Put(&api.Tombstone{Id: a, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone, KeyHashes: [][]byte{n.KeyHash}, RemovedNs: time.Now().UnixNano()}, 0),
			store.Delete(n))
		r.want(web, "assigned@b:2 orphaned:2")
	})
}

// A crash-looping service is restarted after 1, 2, 4 … seconds, to the instant, by timers alone.
func TestRunBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.node("a")
		web := r.service("web", 1)
		r.want(web, "assigned@a:1")
		for i, delay := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 120, 120} {
			delay *= time.Second
			r.report(web, assigned, running)
			r.report(web, running, failed)
			start := time.Now()
			time.Sleep(delay - time.Millisecond)
			synctest.Wait()
			for _, x := range r.store.View().TasksByService(web) {
				if x.Status.State == assigned {
					t.Fatalf("restart %d: placed before %v", i+1, delay)
				}
			}
			quiet := r.store.proposals()
			time.Sleep(2 * time.Millisecond) // the store's clock does not stand still between failure and command
			synctest.Wait()
			placed := 0
			for _, x := range r.store.View().TasksByService(web) {
				if x.Status.State == assigned {
					placed++
				}
			}
			if placed != 1 || r.store.proposals() != quiet+1 {
				t.Fatalf("restart %d: after %v %d tasks placed, %d proposals", i+1, time.Since(start), placed, r.store.proposals()-quiet)
			}
		}
	})
}

// Nodes where a service fails again and again come last, even with fewer tasks.
func TestRunAvoidsNodesWhereAServiceFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.node("a")
		web := r.service("web", 5)
		r.want(web, "assigned@a:5")
		r.report(web, assigned, failed)
		r.quiet()
		r.node("b")
		other := r.service("other", 3, func(s *api.Service) { s.Spec.Task.Constraints = []string{"node.hostname==b"} })
		r.want(other, "assigned@b:3")
		time.Sleep(time.Second)
		r.want(web, "assigned@b:5 failed@a:5")
	})
}

// A node is drained between the decision and its commit: the placement is refused, the others are not held up, and the task
// finds another node at once.
func TestRunRetriesStalePlacements(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.node("a")
		for i := range 7 {
			r.node(fmt.Sprint("b", i))
		}
		var once sync.Once
		r.store.hook(func(cmd *api.Command) {
			for _, op := range cmd.Operations {
				if op.GetPut().GetObject().GetTask().GetNodeId() == a {
					once.Do(func() { r.changeNode(a, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_PAUSE }) })
				}
			}
		})
		web := r.service("web", 16)
		got := r.count(web)
		if got["assigned@a"] != 0 || len(got) != 7 || r.store.View().Node(a).Availability != api.Availability_AVAILABILITY_PAUSE {
			t.Fatalf("tasks: %v", got)
		}
		if r.store.refused[warden.CodeNoFit] == 0 {
			t.Fatalf("nothing was refused: %v", r.store.refused)
		}
	})
}

// A task changes between the decision and its commit.
func TestRunRetriesConflicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.node("a")
		web := r.service("web", 8)
		r.want(web, "assigned@a:8")
		var once sync.Once
		r.store.hook(func(cmd *api.Command) {
			if id := cmd.Operations[0].GetPut().GetObject().GetTask().GetId(); r.store.View().Task(id) != nil {
				once.Do(func() { r.propose(storetest.Report(r.store.View().Task(id), running)) })
			}
		})
		r.alive(a, api.Liveness_LIVENESS_DOWN)
		r.want(web, "orphaned@a:8 pending:8")
		if r.store.refused[warden.CodeConflict] == 0 {
			t.Fatalf("nothing was refused: %v", r.store.refused)
		}
	})
}

// Where the apply goes on refusing what the scheduler goes on deciding, the task says so, and the tries become rare.
func TestRunSaysThatPlacementsAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.node("a")
		r.store.hook(func(cmd *api.Command) {
			for _, op := range cmd.Operations {
				if x := op.GetPut().GetObject().GetTask(); x.GetNodeId() != "" {
					x.NodeId = strings.Repeat("z", warden.IDLength)
				}
			}
		})
		web := r.service("web", 1)
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := r.store.View().TasksByService(web)[0].Status.Message; !strings.HasPrefix(got, "placement refused: ") {
			t.Errorf("message = %q", got)
		}
		if n := r.store.proposals(); n > 30 {
			t.Errorf("%d proposals in a minute", n)
		}
		r.store.hook(nil)
		time.Sleep(10 * time.Second)
		r.want(web, "assigned@a:1")
		calm := r.store.proposals() // the next trouble is tried again as fast as the first
		var tries int
		r.store.hook(func(cmd *api.Command) {
			if x := cmd.Operations[0].GetPut().GetObject().GetTask(); x.GetNodeId() != "" && tries < 3 {
				tries++
				x.NodeId = strings.Repeat("z", warden.IDLength)
			}
		})
		r.scale(web, 2)
		r.want(web, "assigned@a:2")
		if got := r.store.proposals() - calm; tries != 3 || got < 4 {
			t.Errorf("%d tries, %d proposals", tries, got)
		}
	})
}

// Steps that reports have overtaken while an earlier command was in flight are left out of the next, or refused and left out then; and
// decided again.
func TestRunLeavesOutOvertakenSteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.node("a")
		web := r.service("web", 600)
		r.want(web, "assigned@a:600")
		var once sync.Once
		r.store.hook(func(cmd *api.Command) {
			once.Do(func() {
				in, reports := map[string]bool{}, []*api.Operation(nil)
				for _, op := range cmd.Operations {
					in[op.GetPut().GetObject().GetTask().GetId()] = true
				}
				for _, x := range r.store.View().TasksByService(web) {
					if !in[x.Id] {
						reports = append(reports, storetest.Report(x, running))
					}
				}
				r.propose(reports...)
			})
		})
		r.alive(a, api.Liveness_LIVENESS_DOWN)
		r.want(web, "orphaned@a:600 pending:600")
		if n := len(r.store.refused); n > 1 || r.store.refused[warden.CodeConflict] > 3 {
			t.Errorf("refused: %v", r.store.refused)
		}
	})
}

// 1,500 tasks need several commands.
func TestRunSplitsLargeChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for i := range 2 {
			r.node(fmt.Sprint("n", i))
		}
		most := 0
		r.store.hook(func(cmd *api.Command) { most = max(most, len(cmd.Operations)) })
		web := r.service("web", 1500, func(s *api.Service) { s.Spec.Task.Env = []string{"A=" + strings.Repeat("x", 2000)} })
		r.want(web, "assigned@n0:750 assigned@n1:750")
		if most > warden.CommandOpsMax/2 || most < 400 || len(r.store.refused) != 0 {
			t.Errorf("commands of up to %d operations, refused: %v", most, r.store.refused)
		}
	})
}

func TestRunEndsWithTheStore(t *testing.T) {
	s := storetest.New(t)
	o := orchestrator.New(orchestrator.Config{Store: s, Liveness: func(string) api.Liveness { return 0 }, LivenessChanged: func() <-chan struct{} { return nil }})
	done := make(chan error, 1)
	go func() { done <- o.Run(t.Context()) }()
	s.Close(t.Context())
	if err := <-done; warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("Run = %v, want CodeUnavailable", err)
	}
}
