package orchestrator_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"warden"
	"warden/api"
	"warden/orchestrator"
	"warden/store"
	"warden/store/storetest"
)

// update changes the environment: something that counts.
func (b *bed) update(service string) {
	b.t.Helper()
	b.changeService(service, func(s *api.Service) { s.Spec.Task.Env = []string{fmt.Sprintf("A=%d", b.index)} })
}

// stopAll reports all tasks of the service stopped that were told to.
func (b *bed) stopAll(service string) {
	b.t.Helper()
	for _, t := range b.s.View().TasksByService(service) {
		if t.DesiredState == api.TaskState_TASK_SHUTDOWN && t.Holds() {
			b.report(t, api.TaskState_TASK_SHUTDOWN)
		}
	}
}

// rolled writes for each slot the state of its wanted task, "*" where it is the service's newest: "running* stopping>pending* running".
func (b *bed) rolled(service string) string {
	v, out := b.s.View(), ""
	s := v.Service(service)
	want := api.Resolve(s.Spec.Task, func(id string) uint64 { return v.Secret(id).GetCurrentVersion() })
	stopping := map[uint64]string{}
	for _, t := range v.TasksByService(service) {
		if t.DesiredState == api.TaskState_TASK_SHUTDOWN && t.Holds() {
			stopping[t.Slot] += "stopping>"
		}
	}
	for _, t := range b.wanted(service) {
		if out != "" {
			out += " "
		}
		out += stopping[t.Slot] + t.Status.State.Word()
		if !api.Changed(want, t.Spec) {
			out += "*"
		}
	}
	return out
}

func (b *bed) wantRolled(service, want string) {
	b.t.Helper()
	if got := b.rolled(service); got != want {
		b.t.Fatalf("slots: %s\nwant:  %s", got, want)
	}
}

func (b *bed) next() time.Duration {
	_, next := orchestrator.Reconcile(b.input())
	if next == 0 {
		return 0
	}
	return time.Duration(next - b.now.UnixNano())
}

// three returns a service whose three tasks run on three nodes.
func three(b *bed, change ...func(*api.Service)) string {
	for _, n := range []string{"a", "b", "c"} {
		b.node(n, b.token)
	}
	web := b.service("web", 3, change...)
	b.settle()
	b.runAll(web)
	b.now = b.now.Add(time.Minute)
	return web
}

func TestRollOneByOne(t *testing.T) {
	b := newBed(t)
	web := three(b)
	b.update(web)
	b.settle()
	b.wantRolled(web, "stopping>pending* running running")
	if got := b.wanted(web)[0].Status.Message; got != "waiting for the task before it to stop" {
		t.Errorf("message = %q", got)
	}
	b.settle() // nothing more before the old one has stopped
	b.wantRolled(web, "stopping>pending* running running")
	b.stopAll(web)
	b.settle()
	b.wantRolled(web, "assigned* running running")
	b.report(b.wanted(web)[0], api.TaskState_TASK_STARTING)
	b.settle()
	b.wantRolled(web, "starting* running running")
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* stopping>pending* running")
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* running* stopping>pending*")
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* running* running*")
	if rounds := b.reconcile(); rounds != 0 || b.next() != 0 {
		t.Error("there is something left to do")
	}
}

func TestRollParallelism(t *testing.T) {
	for _, test := range []struct {
		parallelism uint32
		want        string
	}{
		{1, "stopping>pending* running running"},
		{2, "stopping>pending* stopping>pending* running"},
		{3, "stopping>pending* stopping>pending* stopping>pending*"},
		{9, "stopping>pending* stopping>pending* stopping>pending*"},
		{0, "stopping>pending* stopping>pending* stopping>pending*"},
	} {
		b := newBed(t)
		web := three(b, func(s *api.Service) {
			s.Spec.Update = &api.UpdatePolicy{Parallelism: test.parallelism, DelayNs: int64(time.Second)}
		})
		b.update(web)
		b.settle()
		b.wantRolled(web, test.want)
	}
}

// The delay counts from when the last new task came to run, and the time to look again is known.
func TestRollDelay(t *testing.T) {
	b := newBed(t)
	web := three(b, func(s *api.Service) {
		s.Spec.Update = &api.UpdatePolicy{Parallelism: 1, DelayNs: int64(30 * time.Second)}
	})
	b.update(web)
	b.settle() // the first waits for nothing
	b.wantRolled(web, "stopping>pending* running running")
	b.stopAll(web)
	b.settle()
	b.now = b.now.Add(time.Second)
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* running running")
	if got := b.next(); got != 30*time.Second {
		t.Fatalf("next look after %v, want 30s", got)
	}
	b.now = b.now.Add(30*time.Second - 1)
	b.settle()
	b.wantRolled(web, "running* running running")
	b.now = b.now.Add(1)
	b.settle()
	b.wantRolled(web, "running* stopping>pending* running")
	b.update(web) // an update of the update: none of the new ones runs, so there is nothing to wait for but the slot that is down
	b.settle()
	b.wantRolled(web, "running stopping>pending* running")
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running running* running")
	b.now = b.now.Add(time.Minute)
	b.settle()
	b.wantRolled(web, "stopping>pending* running* running")
}

// Slots that are down take the new spec at once, and while they are down the others are left alone.
func TestRollCountsSlotsThatAreDown(t *testing.T) {
	b := newBed(t)
	web := three(b)
	b.report(b.wanted(web)[2], api.TaskState_TASK_FAILED)
	b.settle()
	b.wantRolled(web, "running* running* pending*") // backing off
	b.update(web)
	b.settle()
	b.wantRolled(web, "running running assigned*")
	if x := b.wanted(web)[2]; x.StartAfterNs != 0 || x.Restarts != 0 {
		t.Errorf("what is new waits as the old one would have: %v", x)
	}
	b.update(web) // and again, though it is on its way
	b.settle()
	b.wantRolled(web, "running running stopping>pending*")
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "stopping>pending* running running*")
}

// A version that can't start takes no more slots than the parallelism with it, and the next version gets through.
func TestRollStalls(t *testing.T) {
	for _, end := range []api.TaskState{api.TaskState_TASK_REJECTED, api.TaskState_TASK_FAILED} {
		b := newBed(t)
		web := three(b, func(s *api.Service) { s.Spec.Task.RestartAttemptsMax = 2 })
		b.update(web)
		b.settle()
		for range 4 {
			b.stopAll(web)
			b.settle()
			for _, x := range b.wanted(web) {
				if x.NodeId != "" && x.Status.State < api.TaskState_TASK_RUNNING {
					b.report(x, end)
				}
			}
			b.settle()
			b.now = b.now.Add(5 * time.Second)
		}
		b.wantRolled(web, "running running") // the first slot has given up
		b.update(web)
		b.settle()
		b.wantRolled(web, "assigned* running running")
		b.runAll(web)
		b.settle()
		b.wantRolled(web, "running* stopping>pending* running")
	}
}

// A version that starts and soon ends, again and again, is not taken for one that runs.
func TestRollWaitsForWhatCrashes(t *testing.T) {
	b := newBed(t)
	web := three(b)
	b.update(web)
	b.settle()
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.report(b.wanted(web)[0], api.TaskState_TASK_FAILED)
	b.settle()
	b.wantRolled(web, "pending* running running")
	b.now = b.now.Add(time.Second)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* running running")
	if got := b.next(); got != 2*time.Second {
		t.Fatalf("next look after %v, want twice the second that it waited", got)
	}
	b.now = b.now.Add(2 * time.Second)
	b.settle()
	b.wantRolled(web, "running* stopping>pending* running")
}

// What has done its work and is not started again is no slot that is down.
func TestRollGoesOnAfterWorkIsDone(t *testing.T) {
	b := newBed(t)
	web := three(b, func(s *api.Service) { s.Spec.Task.Restart = api.RestartCondition_RESTART_ON_FAILURE })
	b.update(web)
	b.settle()
	b.stopAll(web)
	b.settle()
	b.report(b.wanted(web)[0], api.TaskState_TASK_COMPLETE)
	b.settle()
	b.wantRolled(web, "stopping>pending* running")
}

func TestRollWithNodesThatGo(t *testing.T) {
	b := newBed(t)
	web := three(b)
	b.update(web)
	b.settle()
	b.stopAll(web)
	b.settle()
	b.wantRolled(web, "assigned* running running")
	second := b.wanted(web)[1].NodeId
	b.live[second] = api.Liveness_LIVENESS_DOWN // what moves takes the new spec, and the roll-out waits for it
	b.settle()
	b.wantRolled(web, "assigned* assigned* running")
	b.report(b.wanted(web)[0], api.TaskState_TASK_RUNNING)
	b.settle()
	b.wantRolled(web, "running* assigned* running")
	third := b.wanted(web)[2].NodeId
	b.changeNode(third, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_DRAIN })
	b.settle()
	b.wantRolled(web, "running* assigned* stopping>pending*")
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* running* running*")
}

// Scaling down takes the older tasks first, and what is left is rolled.
func TestRollWhileScaling(t *testing.T) {
	b := newBed(t)
	web := three(b)
	b.update(web)
	b.settle()
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 2 })
	b.settle()
	b.wantRolled(web, "running* stopping>pending*")
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas, s.Spec.Task.Env = 4, []string{"A=new"} })
	b.settle() // slots that are new are down until they run
	b.wantRolled(web, "running running assigned* assigned*")
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "stopping>pending* running running* running*")
}

// Of tasks that run, those that are older than the service go first.
func TestScaleDownPrefersOlderTasks(t *testing.T) {
	b := newBed(t)
	web := three(b, func(s *api.Service) { s.Spec.Update = &api.UpdatePolicy{Parallelism: 1, DelayNs: int64(time.Hour)} })
	b.report(b.wanted(web)[2], api.TaskState_TASK_FAILED)
	b.update(web)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running running running*")
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 1 })
	b.settle()
	b.wantRolled(web, "running*")
	if w := b.wanted(web)[0]; w.Slot != 3 {
		t.Errorf("slot %d is left, want the one that has the new spec", w.Slot)
	}
}

// All at once means now, whatever the delay says.
func TestRollAllAtOnceHasNoDelay(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	b.node("b", b.token)
	web := b.service("web", 4, func(s *api.Service) { s.Spec.Update = &api.UpdatePolicy{DelayNs: int64(time.Hour)} })
	b.settle()
	b.runAll(web)
	b.changeNode(b.wanted(web)[0].NodeId, func(n *api.Node) { n.Labels = map[string]string{"disk": "slow"} })
	b.changeService(web, func(s *api.Service) { s.Spec.Task.Constraints = []string{"node.labels.disk!=slow"} })
	b.settle() // the others are as wanted, and came to run just now
	if got := strings.Count(b.rolled(web), "stopping>"); got != 2 || b.next() != 0 {
		t.Errorf("slots: %s", b.rolled(web))
	}
}

// What has ended for good is started again by what counts as a change, and by nothing else.
func TestConstraintsStartNothingAgain(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	web := b.service("web", 1, func(s *api.Service) { s.Spec.Task.Restart = api.RestartCondition_RESTART_NONE })
	b.settle()
	b.report(b.wanted(web)[0], api.TaskState_TASK_COMPLETE)
	b.changeService(web, func(s *api.Service) { s.Spec.Task.Constraints = []string{"node.labels.disk==fast"} })
	b.settle()
	b.want(web, "1:complete@a")
	b.now = b.now.Add(time.Second)
	b.update(web)
	b.settle()
	b.want(web, "1:pending 1:complete@a")
}

// A secret that is followed is rolled by its new version alone; one that is pinned is not.
func TestRollSecret(t *testing.T) {
	b := newBed(t)
	secret := storetest.Secret("db")
	b.apply(store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0))
	follow, pin := storetest.Reference(secret), storetest.Reference(secret)
	follow.Version = 0
	web := three(b, func(s *api.Service) { s.Spec.Task.Secrets = []*api.SecretReference{follow} })
	pinned := b.service("pinned", 1, func(s *api.Service) { s.Spec.Task.Secrets = []*api.SecretReference{pin} })
	b.settle()
	b.runAll(pinned)
	if v := b.wanted(web)[0].Spec.Secrets[0].Version; v != 1 {
		t.Fatalf("version %d in a task, want 1", v)
	}
	next := api.Clone(b.s.View().Secret(secret.Id))
	next.CurrentVersion = 2
	b.apply(store.Put(storetest.SecretVersion(secret, 2), 0), store.Put(next, next.Meta.Version))
	b.settle()
	b.wantRolled(web, "stopping>pending* running running")
	b.wantRolled(pinned, "running*")
	b.stopAll(web)
	b.settle()
	if x := b.wanted(web)[0]; x.Spec.Secrets[0].Version != 2 || x.SpecVersion != 1 {
		t.Fatalf("task = %v", x)
	}
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* stopping>pending* running")
}

// Constraints replace the tasks alone whose nodes do not meet them; and a node need not meet what nobody asks any more.
func TestRollConstraints(t *testing.T) {
	b := newBed(t)
	web := three(b)
	b.changeNode(b.wanted(web)[1].NodeId, func(n *api.Node) { n.Labels = map[string]string{"disk": "slow"} })
	b.changeService(web, func(s *api.Service) { s.Spec.Task.Constraints = []string{"node.labels.disk!=slow"} })
	first := b.wanted(web)
	b.settle()
	b.wantRolled(web, "running* stopping>pending* running*")
	b.stopAll(web)
	b.settle()
	b.runAll(web)
	b.settle()
	b.wantRolled(web, "running* running* running*")
	if w := b.wanted(web); w[0].Id != first[0].Id || w[1].Id == first[1].Id || w[2].Id != first[2].Id {
		t.Errorf("not the second task alone was replaced: %s", b.picture(web))
	}
	b.changeService(web, func(s *api.Service) { s.Spec.Task.Constraints = nil })
	b.settle()
	b.changeNode(b.wanted(web)[1].NodeId, func(n *api.Node) { n.Labels = map[string]string{"disk": "slow"} })
	b.settle()
	b.wantRolled(web, "running* running* running*")
	b.changeService(web, func(s *api.Service) { s.Spec.Task.Constraints = []string{"node.labels.disk!=fast"} })
	b.settle()
	b.wantRolled(web, "running* running* running*")
	b.changeNode(b.wanted(web)[0].NodeId, func(n *api.Node) { n.Labels = map[string]string{"disk": "fast"} })
	b.settle() // it was placed without that constraint, so that this is a roll-out and not a move
	b.wantRolled(web, "stopping>pending* running* running*")
}

// What does not count as a change replaces nothing, and what concerns the end of a task counts for those that run.
func TestPoliciesCountForTasksThatRun(t *testing.T) {
	b := newBed(t)
	web := three(b)
	first := b.wanted(web)
	b.changeService(web, func(s *api.Service) {
		s.Spec.Labels, s.Spec.Update = map[string]string{"a": "b"}, &api.UpdatePolicy{Parallelism: 2}
		s.Spec.Task.Restart, s.Spec.Task.StopGraceNs = api.RestartCondition_RESTART_NONE, int64(7*time.Second)
	})
	if rounds := b.reconcile(); rounds != 0 {
		t.Fatalf("something was replaced: %s", b.picture(web))
	}
	b.report(first[0], api.TaskState_TASK_FAILED)
	b.settle()
	b.wantRolled(web, "running* running*")
	b.changeService(web, func(s *api.Service) {
		s.Spec.Task.Restart, s.Spec.Task.RestartDelayNs = api.RestartCondition_RESTART_ANY, int64(5*time.Second)
	})
	b.settle()
	if x := b.wanted(web)[0]; x.Slot != 1 || x.StartAfterNs != b.now.Add(5*time.Second).UnixNano() {
		t.Fatalf("the new delay does not count: %v", x)
	}
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 1 })
	b.settle()
	for _, x := range b.s.View().TasksByService(web) {
		if x.DesiredState == api.TaskState_TASK_SHUTDOWN && x.Holds() && x.Spec.StopGraceNs != int64(7*time.Second) {
			t.Errorf("told to stop in %v", time.Duration(x.Spec.StopGraceNs))
		}
	}
	b.apply(store.Delete(b.s.View().Service(web)))
	b.settle()
}

// Whatever comes between, a roll-out stops running tasks only while fewer slots than its parallelism are down, waits its delay, does the
// same on the same view, and comes to its end if tasks start.
func TestRolloutLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBed(t)
		for i := range 4 {
			b.node(fmt.Sprint("n", i), b.token)
		}
		secret := storetest.Secret("db")
		b.apply(store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0))
		follow := storetest.Reference(secret)
		follow.Version = 0
		version := uint64(1)
		web := b.service("web", rapid.Uint64Range(1, 6).Draw(t, "replicas"), func(s *api.Service) {
			s.Spec.Task.Secrets = []*api.SecretReference{follow}
			s.Spec.Task.Restart = rapid.SampledFrom([]api.RestartCondition{1, 2, 3}).Draw(t, "condition")
			if rapid.Bool().Draw(t, "policy") {
				s.Spec.Update = &api.UpdatePolicy{Parallelism: rapid.Uint32Range(0, 3).Draw(t, "parallelism"),
					DelayNs: int64(rapid.SampledFrom([]time.Duration{0, 10 * time.Second}).Draw(t, "delay"))}
			}
		})
		b.settle()
		if rapid.Bool().Draw(t, "started") {
			b.runAll(web)
		}
		for range rapid.IntRange(5, 40).Draw(t, "steps") {
			b.now = b.now.Add(rapid.SampledFrom([]time.Duration{0, time.Second, 10 * time.Second}).Draw(t, "pause"))
			v := b.s.View()
			switch rapid.IntRange(0, 11).Draw(t, "what") {
			case 0, 1:
				b.update(web)
			case 2:
				version++
				next := api.Clone(v.Secret(secret.Id))
				next.CurrentVersion = version
				b.apply(store.Put(storetest.SecretVersion(secret, version), 0), store.Put(next, next.Meta.Version))
			case 3:
				b.changeService(web, func(s *api.Service) { s.Spec.Replicas = rapid.Uint64Range(0, 6).Draw(t, "replicas") })
			case 4:
				b.changeService(web, func(s *api.Service) {
					s.Spec.Task.Constraints = rapid.SampledFrom([][]string{nil, {"node.labels.a!=b"}, {"node.labels.a!=c"}}).Draw(t, "constraints")
				})
			case 5:
				b.changeNode(pick(t, workers(v)).Id, func(n *api.Node) {
					n.Availability = rapid.SampledFrom([]api.Availability{1, 1, 2, 3}).Draw(t, "availability")
					n.Labels = map[string]string{"a": rapid.SampledFrom([]string{"b", "c", "d"}).Draw(t, "label")}
				})
			case 6:
				b.live[pick(t, workers(v)).Id] = rapid.SampledFrom([]api.Liveness{0, 1, 1, 2}).Draw(t, "liveness")
			case 7:
				b.runAll(web)
			case 8:
				b.stopAll(web)
			default:
				if x := pick(t, v.TasksByService(web)); x.Holds() {
					b.report(x, rapid.SampledFrom([]api.TaskState{60, 70, 80, 90, 100, 110}).Draw(t, "state"))
				}
			}
			lawfulRound(t, b, web)
			b.settle()
			slots := map[uint64]bool{}
			for _, x := range b.s.View().TasksByService(web) {
				if x.DesiredState == api.TaskState_TASK_RUNNING {
					if slots[x.Slot] {
						t.Fatalf("two tasks in slot %d", x.Slot)
					}
					slots[x.Slot] = true
				}
			}
			if got, want := len(slots), int(b.s.View().Service(web).Spec.Replicas); got != want {
				t.Fatalf("%d slots in use, want %d", got, want)
			}
		}
		for _, n := range workers(b.s.View()) {
			b.live[n.Id] = api.Liveness_LIVENESS_READY
			b.changeNode(n.Id, func(n *api.Node) { n.Availability, n.Labels = api.Availability_AVAILABILITY_ACTIVE, nil })
		}
		b.changeService(web, func(s *api.Service) { s.Spec.Task.Restart = api.RestartCondition_RESTART_ANY })
		for range 40 {
			b.settle()
			b.stopAll(web)
			b.settle()
			b.runAll(web)
			b.now = b.now.Add(2 * warden.RestartDelayMax)
			lawfulRound(t, b, web)
		}
		b.settle()
		v := b.s.View()
		r := api.RolloutOf(v.Service(web), v.TasksByService(web), func(id string) uint64 { return v.Secret(id).GetCurrentVersion() }, nil)
		if !r.Complete() || r.Updated != r.Total {
			t.Fatalf("the roll-out does not end: %+v: %s", r, b.rolled(web))
		}
	})
}

// lawfulRound applies one round of Reconcile and checks what it stops.
func lawfulRound(t *rapid.T, b *bed, service string) {
	in := b.input()
	ids := func() func() string {
		n := 0
		return func() string { n++; return fmt.Sprintf("%025d", n) }
	}
	in.NewID = ids()
	once, next := orchestrator.Reconcile(in)
	in.NewID = ids()
	if again, at := orchestrator.Reconcile(in); !reflect.DeepEqual(once, again) || at != next {
		t.Fatalf("the same view gives other steps:\n%v\n%v", once, again)
	}
	if next != 0 && next <= in.Now {
		t.Fatalf("to be looked at again %v ago", time.Duration(in.Now-next))
	}
	s := b.s.View().Service(service)
	stopped := 0
	steps, _ := orchestrator.Reconcile(b.input())
	before := b.s.View()
	for _, step := range steps {
		x := step[0].GetPut().GetObject().GetTask()
		if x.GetDesiredState() == api.TaskState_TASK_SHUTDOWN && x.GetStatus().GetMessage() == "the service was updated" &&
			before.Task(x.GetId()).GetStatus().GetState() == api.TaskState_TASK_RUNNING {
			stopped++
		}
		b.apply(step...)
	}
	parallelism, policy := 1, s.Spec.Update
	if policy != nil {
		parallelism = int(policy.Parallelism)
	}
	if stopped == 0 || parallelism == 0 {
		return
	}
	v := b.s.View()
	want := api.Resolve(s.Spec.Task, func(id string) uint64 { return v.Secret(id).GetCurrentVersion() })
	down := int(s.Spec.Replicas)
	for _, x := range v.TasksByService(service) {
		if x.DesiredState != api.TaskState_TASK_RUNNING {
			continue
		}
		if x.Status.State == api.TaskState_TASK_RUNNING || api.Finished(want, x) {
			down--
			if !api.Changed(want, x.Spec) && x.Meta.UpdatedNs+policy.GetDelayNs() > in.Now {
				t.Fatalf("the roll-out goes on %v after a new task came to run, the delay is %v", time.Duration(in.Now-x.Meta.UpdatedNs), time.Duration(policy.GetDelayNs()))
			}
		}
	}
	if down > parallelism {
		t.Fatalf("%d tasks were stopped for the update, and now %d slots are down: %s", stopped, down, b.rolled(service))
	}
}
