package orchestrator_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/orchestrator"
	"warden/store"
	"warden/store/storetest"
)

type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// bed is a state under the real rules of the apply, with a clock of its own.
type bed struct {
	t     fataler
	s     *store.State
	index uint64
	now   time.Time
	live  map[string]api.Liveness // absent: ready
	token *api.Token
	pci   *api.Token
}

func newBed(t fataler) *bed {
	b := &bed{t: t, s: store.NewState(), now: time.Now(), live: map[string]api.Liveness{},
		token: storetest.Token(api.Role_ROLE_WORKER), pci: storetest.Token(api.Role_ROLE_WORKER)}
	b.pci.Zone = "pci"
	b.token.ExpiresNs, b.pci.ExpiresNs = b.now.Add(20*24*time.Hour).UnixNano(), b.now.Add(20*24*time.Hour).UnixNano()
	b.apply(storetest.Genesis(warden.NewID(), warden.NewID())...)
	b.apply(store.Put(storetest.Zone("pci"), 0), store.Put(b.token, 0), store.Put(b.pci, 0))
	return b
}

// apply applies the operations as one command, which must pass.
func (b *bed) apply(ops ...*api.Operation) {
	b.t.Helper()
	c := storetest.Command(ops...)
	c.TimeNs = b.now.UnixNano()
	data, err := proto.Marshal(c)
	if err != nil {
		b.t.Fatalf("%v", err)
	}
	b.index++
	if r, _ := b.s.Apply(b.index, data); r.GetCode() != "" {
		b.t.Fatalf("apply: %s [%s]", r.GetText(), r.GetCode())
	}
}

func (b *bed) node(name string, token *api.Token, change ...func(*api.Node)) *api.Node {
	b.t.Helper()
	n := storetest.Node(name, token)
	for _, f := range change {
		f(n)
	}
	b.apply(storetest.Join(n)...)
	return n
}

func (b *bed) service(name string, replicas uint64, change ...func(*api.Service)) string {
	b.t.Helper()
	s := storetest.Service(name, "default")
	s.Spec.Replicas = replicas
	for _, f := range change {
		f(s)
	}
	b.apply(store.Put(s, 0))
	return s.Id
}

// changeNode and changeService put a changed copy.
func (b *bed) changeNode(id string, f func(*api.Node)) {
	b.t.Helper()
	n := api.Clone(b.s.View().Node(id))
	f(n)
	b.apply(store.Put(n, n.Meta.Version))
}

func (b *bed) changeService(id string, f func(*api.Service)) {
	b.t.Helper()
	s := api.Clone(b.s.View().Service(id))
	f(s)
	b.apply(store.Put(s, s.Meta.Version))
}

// evict removes the node for good.
func (b *bed) evict(id string) {
	b.t.Helper()
	n := b.s.View().Node(id)
	b.apply(store.Put(&api.Tombstone{Id: id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone, KeyHashes: [][]byte{n.KeyHash}, RemovedNs: b.now.UnixNano()}, 0), store.Delete(n))
}

func (b *bed) input() orchestrator.Input {
	return orchestrator.Read(b.s.View(), func(id string) api.Liveness {
		if l, ok := b.live[id]; ok {
			return l
		}
		return api.Liveness_LIVENESS_READY
	}, b.now)
}

// reconcile applies what Reconcile wants until it wants nothing more, each step as a command of its own, and returns how many
// rounds that took.
func (b *bed) reconcile() int {
	b.t.Helper()
	for round := 0; ; round++ {
		steps, _ := orchestrator.Reconcile(b.input())
		if len(steps) == 0 {
			return round
		}
		if round == 3 {
			b.t.Fatalf("after %d rounds there is still to do: %v", round, steps)
		}
		for _, s := range steps {
			b.apply(s...)
		}
	}
}

// schedule applies what Schedule wants and returns when to look again.
func (b *bed) schedule() int64 {
	b.t.Helper()
	steps, next := orchestrator.Schedule(b.input(), nil)
	for _, s := range steps {
		b.apply(s...)
	}
	return next
}

func (b *bed) settle() {
	b.t.Helper()
	b.reconcile()
	b.schedule()
}

// report moves a task on.
func (b *bed) report(t *api.Task, state api.TaskState) {
	b.t.Helper()
	b.apply(storetest.Report(t, state))
}

// wanted returns the tasks of the service that are to run and have not ended, by slot.
func (b *bed) wanted(service string) []*api.Task {
	var out []*api.Task
	for _, t := range b.s.View().TasksByService(service) {
		if t.DesiredState == api.TaskState_TASK_RUNNING && !t.Status.State.Ended() {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b *api.Task) int { return int(a.Slot) - int(b.Slot) })
	return out
}

// runAll reports all placed tasks of the service running.
func (b *bed) runAll(service string) {
	b.t.Helper()
	for _, t := range b.wanted(service) {
		if t.NodeId != "" && t.Status.State < api.TaskState_TASK_RUNNING {
			b.report(t, api.TaskState_TASK_RUNNING)
		}
	}
}

// picture writes the tasks of a service by slot, newest first: "1:running@a 1:failed@b".
func (b *bed) picture(service string) string {
	tasks := b.s.View().TasksByService(service)
	slices.SortFunc(tasks, func(a, b *api.Task) int {
		if a.Slot != b.Slot {
			return int(a.Slot) - int(b.Slot)
		}
		return int(b.Meta.CreatedNs - a.Meta.CreatedNs)
	})
	var out []string
	for _, t := range tasks {
		s := fmt.Sprintf("%d:%s", t.Slot, t.Status.State.Word())
		if t.DesiredState == api.TaskState_TASK_SHUTDOWN && !t.Status.State.Ended() {
			s += "!"
		}
		if n := b.s.View().Node(t.NodeId); n != nil {
			s += "@" + n.Hostname
		} else if t.NodeId != "" {
			s += "@gone"
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func (b *bed) want(service, picture string) {
	b.t.Helper()
	if got := b.picture(service); got != picture {
		b.t.Fatalf("tasks: %s\nwant:  %s", got, picture)
	}
}

func TestScale(t *testing.T) {
	b := newBed(t)
	a := b.node("a", b.token)
	web := b.service("web", 2)
	b.settle()
	b.want(web, "1:assigned@a 2:assigned@a")
	b.node("b", b.token)
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 3 })
	b.settle()
	b.want(web, "1:assigned@a 2:assigned@a 3:assigned@b")
	b.runAll(web)

	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 2 }) // from the node with most of them
	b.settle()
	b.want(web, "1:running@a 2:running!@a 3:running@b")
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 3 }) // the slot is free again
	b.now = b.now.Add(time.Second)
	b.settle()
	b.want(web, "1:running@a 2:assigned@b 2:running!@a 3:running@b")
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 2 }) // what does not run yet goes first
	b.settle()
	b.want(web, "1:running@a 2:assigned!@b 2:running!@a 3:running@b")
	for _, x := range b.s.View().TasksByService(web) {
		if x.DesiredState == api.TaskState_TASK_SHUTDOWN {
			b.report(x, api.TaskState_TASK_SHUTDOWN)
		}
	}
	b.settle()
	b.want(web, "1:running@a 3:running@b") // no history of a slot that is gone

	b.changeNode(a.Id, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_PAUSE })
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 5 })
	b.settle()
	b.want(web, "1:running@a 2:assigned@b 3:running@b 4:assigned@b 5:assigned@b")
	b.apply(store.Delete(b.s.View().Service(web)))
	b.settle()
	b.want(web, "1:running!@a 2:assigned!@b 3:running!@b 4:assigned!@b 5:assigned!@b")
	for _, x := range b.s.View().TasksByService(web) {
		b.report(x, api.TaskState_TASK_SHUTDOWN)
	}
	b.settle()
	b.want(web, "")
}

func TestScaleDownPrefersWaitingAndEnded(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token, func(n *api.Node) { n.Description.NanoCpus = 2e9 })
	web := b.service("web", 4, func(s *api.Service) {
		s.Spec.Task.Resources.ReserveNanoCpus = 1e9
		s.Spec.Task.Restart = api.RestartCondition_RESTART_NONE
	})
	b.settle()
	b.runAll(web)
	b.report(b.wanted(web)[0], api.TaskState_TASK_COMPLETE)
	b.settle()
	b.want(web, "1:complete@a 2:running@a 3:assigned@a 4:pending")
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 3 })
	b.settle()
	b.want(web, "2:running@a 3:assigned@a 4:pending")
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 1 })
	b.settle()
	b.want(web, "2:running@a 3:assigned!@a") // what was never placed is just deleted
}

func TestTasksLeaveNodes(t *testing.T) {
	secret := storetest.Secret("card")
	for _, test := range []struct {
		name    string
		do      func(b *bed, node *api.Node)
		want    string
		message string
	}{
		{"down", func(b *bed, n *api.Node) { b.live[n.Id] = api.Liveness_LIVENESS_DOWN }, "1:assigned@b 1:orphaned@a", "its node is down"},
		{"unknown", func(b *bed, n *api.Node) { b.live[n.Id] = api.Liveness_LIVENESS_UNKNOWN }, "1:running@a", ""},
		{"evicted", func(b *bed, n *api.Node) { b.evict(n.Id) }, "1:assigned@b 1:orphaned@gone", "its node was removed"},
		{"drained", func(b *bed, n *api.Node) {
			b.changeNode(n.Id, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_DRAIN })
		}, "1:assigned@b 1:running!@a", "its node is drained"},
		{"paused", func(b *bed, n *api.Node) {
			b.changeNode(n.Id, func(n *api.Node) { n.Availability = api.Availability_AVAILABILITY_PAUSE })
		}, "1:running@a", ""},
		{"other zone", func(b *bed, n *api.Node) { b.changeNode(n.Id, func(n *api.Node) { n.Zone = "pci" }) },
			"1:assigned@b 1:running!@a", `its node is in zone "pci", not "default"`},
		{"label gone", func(b *bed, n *api.Node) {
			b.changeNode(n.Id, func(n *api.Node) { n.Labels = map[string]string{"disk": "slow"} })
		},
			"1:assigned@b 1:running!@a", "its node is without node.labels.disk!=slow"},
		{"secret shut out", func(b *bed, n *api.Node) {
			s := api.Clone(b.s.View().Secret(secret.Id))
			s.Zones = []string{"pci"}
			b.apply(store.Put(s, s.Meta.Version))
		}, "1:pending 1:running!@a", `its node is in zone "default", which a secret of the service may not enter`},
		{"tombstone first", func(b *bed, n *api.Node) { // an eviction in two commands
			b.apply(store.Put(&api.Tombstone{Id: n.Id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone, KeyHashes: [][]byte{n.KeyHash}, RemovedNs: b.now.UnixNano()}, 0))
		}, "1:assigned@b 1:orphaned@a", "its node was removed"},
		{"other label", func(b *bed, n *api.Node) {
			b.changeNode(n.Id, func(n *api.Node) { n.Labels = map[string]string{"disk": "fast"} })
		},
			"1:running@a", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBed(t)
			n := b.node("a", b.token)
			b.apply(store.Put(secret, 0), store.Put(storetest.SecretVersion(secret, 1), 0))
			web := b.service("web", 1, func(s *api.Service) {
				s.Spec.Task.Constraints = []string{"node.labels.disk!=slow"}
				s.Spec.Task.Restart = api.RestartCondition_RESTART_NONE // a move is no restart
				s.Spec.Task.Secrets = []*api.SecretReference{storetest.Reference(secret)}
			})
			b.settle()
			b.runAll(web)
			old := b.wanted(web)[0]
			b.node("b", b.token)
			b.now = b.now.Add(time.Second)
			test.do(b, n)
			b.settle()
			b.want(web, test.want)
			if got := b.s.View().Task(old.Id).Status.Message; got != test.message {
				t.Errorf("message = %q, want %q", got, test.message)
			}
			if l := b.wanted(web)[0]; l.StartAfterNs != 0 {
				t.Error("a move waits for nothing")
			}
		})
	}
}

// What was told to stop and whose node is lost then is orphaned, so that it holds nothing any more.
func TestStoppingTaskOfLostNode(t *testing.T) {
	b := newBed(t)
	n := b.node("a", b.token)
	web := b.service("web", 2)
	b.settle()
	b.runAll(web)
	b.changeService(web, func(s *api.Service) { s.Spec.Replicas = 1 })
	b.settle()
	b.want(web, "1:running@a 2:running!@a")
	b.live[n.Id] = api.Liveness_LIVENESS_DOWN
	b.now = b.now.Add(time.Second)
	b.settle()
	b.want(web, "1:pending 1:orphaned@a")
	b.live[n.Id] = api.Liveness_LIVENESS_READY // back: the orphan stays one, the new task may go there
	b.settle()
	b.want(web, "1:assigned@a 1:orphaned@a")

	b.apply(store.Delete(b.s.View().Service(web)))
	b.evict(n.Id)
	b.settle()
	b.want(web, "")
}

func TestRestartConditions(t *testing.T) {
	const (
		complete, failed, rejected, shutdown = api.TaskState_TASK_COMPLETE, api.TaskState_TASK_FAILED, api.TaskState_TASK_REJECTED, api.TaskState_TASK_SHUTDOWN
		always, onFailure, none              = api.RestartCondition_RESTART_ANY, api.RestartCondition_RESTART_ON_FAILURE, api.RestartCondition_RESTART_NONE
	)
	for _, test := range []struct {
		condition api.RestartCondition
		end       api.TaskState
		replaced  bool
	}{
		{always, complete, true}, {always, failed, true}, {always, rejected, true}, {always, shutdown, true},
		{onFailure, complete, false}, {onFailure, failed, true}, {onFailure, rejected, true}, {onFailure, shutdown, true},
		{none, complete, false}, {none, failed, false}, {none, rejected, false}, {none, shutdown, false},
	} {
		b := newBed(t)
		b.node("a", b.token)
		web := b.service("web", 1, func(s *api.Service) { s.Spec.Task.Restart = test.condition })
		b.settle()
		b.report(b.wanted(web)[0], test.end)
		b.settle()
		if got := len(b.wanted(web)) == 1; got != test.replaced {
			t.Errorf("%v, %v: replaced = %v, want %v", test.condition, test.end, got, test.replaced)
		}
		b.changeService(web, func(s *api.Service) { s.Spec.Task.Env = []string{"A=B"} }) // a new specification starts anew
		b.settle()
		if w := b.wanted(web); len(w) != 1 || w[0].SpecVersion != 2 || w[0].StartAfterNs != 0 || w[0].NodeId == "" {
			t.Errorf("%v, %v: after an update %v", test.condition, test.end, w)
		}
	}
}

func TestBackOffDoublesAndResets(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	web := b.service("web", 1)
	b.settle()
	fail := func() time.Duration {
		b.t.Helper()
		b.report(b.wanted(web)[0], api.TaskState_TASK_FAILED)
		b.reconcile()
		x := b.wanted(web)[0]
		delay := time.Duration(x.StartAfterNs - b.now.UnixNano())
		if next := b.schedule(); next != x.StartAfterNs || b.wanted(web)[0].NodeId != "" {
			t.Fatalf("placed before its time, or no time to look again: %d, want %d", next, x.StartAfterNs)
		}
		if want := fmt.Sprintf("waiting %v after %d in a row ended", delay, x.Restarts); x.Status.Message != want {
			t.Errorf("message = %q, want %q", x.Status.Message, want)
		}
		b.now = time.Unix(0, x.StartAfterNs)
		if next := b.schedule(); next != 0 || b.wanted(web)[0].NodeId == "" {
			t.Fatal("not placed at its time")
		}
		return delay
	}
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 120, 120} {
		if got := fail(); got != want*time.Second {
			t.Fatalf("delay %d = %v, want %v", i+1, got, want*time.Second)
		}
	}
	b.now = b.now.Add(warden.RestartDelayMax) // not longer
	if got := fail(); got != warden.RestartDelayMax {
		t.Fatalf("delay = %v, want the longest", got)
	}
	b.now = b.now.Add(warden.RestartDelayMax + 1)
	if got := fail(); got != warden.RestartDelayMin {
		t.Fatalf("delay after a long run = %v, want the first", got)
	}
	if got := strings.Count(b.picture(web), "failed"); got != warden.TaskHistoryPerSlot {
		t.Errorf("%d ended tasks are kept, want %d", got, warden.TaskHistoryPerSlot)
	}
}

func TestRestartAttempts(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	web := b.service("web", 1, func(s *api.Service) {
		s.Spec.Task.RestartAttemptsMax, s.Spec.Task.RestartDelayNs = 3, int64(5*time.Second)
	})
	b.settle()
	for i := range 3 {
		b.report(b.wanted(web)[0], api.TaskState_TASK_FAILED)
		b.reconcile()
		if x := b.wanted(web)[0]; x.Restarts != uint32(i+1) || x.StartAfterNs != b.now.Add(5*time.Second<<i).UnixNano() {
			t.Fatalf("replacement %d: %v", i+1, x)
		}
		b.now = b.now.Add(time.Minute)
		b.schedule()
	}
	b.report(b.wanted(web)[0], api.TaskState_TASK_FAILED)
	b.settle()
	b.want(web, "1:failed@a 1:failed@a 1:failed@a") // the last of them counts for the history
}

// A move neither waits nor forgets how often the slot's tasks ended.
func TestMoveKeepsTheRow(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	web := b.service("web", 1)
	b.settle()
	b.report(b.wanted(web)[0], api.TaskState_TASK_FAILED)
	b.reconcile()
	b.now = b.now.Add(time.Minute)
	b.schedule()
	x := b.wanted(web)[0]
	b.live[x.NodeId] = api.Liveness_LIVENESS_DOWN
	b.settle()
	if w := b.wanted(web); len(w) != 1 || w[0].Id == x.Id || w[0].Restarts != 1 || w[0].StartAfterNs != 0 {
		t.Fatalf("%v", w)
	}
}

// No command lets such a task in; if one is there, it stops (I11).
func TestUnreadableConstraintFitsNowhere(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	web := b.service("web", 1)
	b.settle()
	in := b.input()
	in.Tasks[0].Spec.Constraints = []string{"node.labels.a=b"}
	steps, _ := orchestrator.Reconcile(in)
	if len(steps) != 1 || len(steps[0]) != 2 || steps[0][0].GetPut().GetObject().GetTask().GetDesiredState() != api.TaskState_TASK_SHUTDOWN {
		t.Fatalf("%s: %v", b.picture(web), steps)
	}
}

// A task that waits takes a new specification at once; one that runs keeps its own while another slot is down.
func TestUpdateReachesWaitingTasks(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token, func(n *api.Node) { n.Description.NanoCpus = 1e9 })
	web := b.service("web", 2, func(s *api.Service) { s.Spec.Task.Resources.ReserveNanoCpus = 1e9 })
	b.settle()
	b.runAll(web)
	b.want(web, "1:running@a 2:pending")
	b.changeService(web, func(s *api.Service) { s.Spec.Task.Resources.ReserveNanoCpus = 0 })
	b.settle()
	b.want(web, "1:running@a 2:assigned@a")
	if w := b.wanted(web); w[0].SpecVersion != 1 || w[1].SpecVersion != 2 {
		t.Errorf("spec versions %d, %d", w[0].SpecVersion, w[1].SpecVersion)
	}
}

func TestTwoTasksInOneSlot(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	web := b.service("web", 1)
	b.settle()
	second := storetest.Task(b.s.View().Service(web), 1)
	b.apply(store.Put(second, 0))
	b.settle()
	if w := b.wanted(web); len(w) != 1 {
		t.Fatalf("%v", w)
	}
}

func TestScheduleSaysWhy(t *testing.T) {
	b := newBed(t)
	b.node("a", b.token)
	web := b.service("web", 1, func(s *api.Service) { s.Spec.Task.Resources.ReserveMemoryBytes = 9 << 30 })
	odd := b.service("odd", 1, func(s *api.Service) { s.Spec.Task.Constraints = []string{"node.labels.a=b"} }) // control would have refused it
	b.settle()
	if got, want := b.wanted(web)[0].Status.Message, "no suitable node (1 node paused or drained; 1 node: 9 GiB reserved, 8 GiB free)"; got != want {
		t.Errorf("message = %q, want %q", got, want)
	}
	if got := b.wanted(odd)[0].Status.Message; !strings.Contains(got, "parsing constraint") {
		t.Errorf("message = %q", got)
	}
	if steps, _ := orchestrator.Schedule(b.input(), nil); len(steps) != 0 {
		t.Errorf("the same reason again: %v", steps)
	}
	b.node("b", b.token, func(n *api.Node) { n.Description.MemoryBytes = 10 << 30 })
	b.settle()
	b.want(web, "1:assigned@b")
	if got := b.wanted(web)[0].Status.Message; got != "" {
		t.Errorf("message = %q", got)
	}
}

func TestUnknownNodesGetNothingNew(t *testing.T) {
	b := newBed(t)
	n := b.node("a", b.token)
	b.live[n.Id] = api.Liveness_LIVENESS_UNKNOWN
	web := b.service("web", 1)
	b.settle()
	b.want(web, "1:pending")
}
