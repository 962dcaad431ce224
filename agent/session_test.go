package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"warden"
	"warden/agent"
	"warden/api"
	"warden/dispatcher"
	"warden/internal/sensitive"
	"warden/store"
	"warden/store/storetest"
)

// cluster is one manager's dispatcher over a real store, and one node's agent over a fake executor, with net.Pipe between.
type cluster struct {
	t      *testing.T
	store  *store.Store
	node   *api.Node
	exec   *fakeExecutor
	values map[string]string // of secrets, by ID

	dispatcher *dispatcher.Dispatcher
	agent      *agent.Agent

	mu        sync.Mutex // guards the fields below
	lease     bool
	peer      dispatcher.Peer
	serve     context.Context // of the sessions
	cut       context.CancelCauseFunc
	installed int
	evicted   *api.EvictRequest
	served    []error // how sessions ended
	managers  *api.ManagerList
}

// newCluster returns one whose store holds what seed makes, besides cluster, node and zones.
func newCluster(t *testing.T, seed func(*cluster) []*api.Object) *cluster {
	t.Helper()
	now := time.Now()
	node := &api.Node{Id: warden.NewID(), Hostname: "n1", Role: api.Role_ROLE_WORKER, DesiredRole: api.Role_ROLE_WORKER, Zone: "default",
		Availability: api.Availability_AVAILABILITY_ACTIVE, KeyHash: make([]byte, 32), LeafRole: api.Role_ROLE_WORKER, LeafZone: "default", LeafGeneration: 1}
	c := &cluster{t: t, node: node, exec: newFakeExecutor(), values: map[string]string{}, lease: true,
		peer: dispatcher.Peer{NodeID: node.Id, Zone: "default", NotBefore: now, NotAfter: now.Add(warden.LeafTTLDefault), IP: "192.0.2.7"}}
	objects := append(seed(c), store.Wrap(node), store.Wrap(&api.Zone{Id: warden.NewID(), Name: "default"}), store.Wrap(&api.Zone{Id: warden.NewID(), Name: "pci"}),
		store.Wrap(&api.Cluster{Id: warden.NewID(), IssuingGeneration: 1, LeafTtlNs: int64(warden.LeafTTLDefault)}))
	c.store = storetest.New(t, objects...)
	c.serve, c.cut = context.WithCancelCause(t.Context())
	c.dispatcher = dispatcher.New(dispatcher.Config{
		NodeID: warden.NewID(), Store: c.store, Logger: slog.New(slog.DiscardHandler),
		Open: func(id string, _ uint64) (sensitive.Bytes, error) {
			if v, ok := c.values[id]; ok {
				return sensitive.New([]byte(v)), nil
			}
			return sensitive.Bytes{}, warden.Errorf(warden.CodeCorrupt, "opening", "no value")
		},
		Issue: func(_ context.Context, nodeID string, _ [32]byte, csr []byte, reason string) (*api.InstallRequest, error) {
			if nodeID != node.Id || string(csr) != "csr" || reason == "" {
				return nil, errors.New("not this node's CSR")
			}
			return &api.InstallRequest{Chain: [][]byte{[]byte("leaf")}}, nil
		},
		Report:  c.report,
		MayPush: func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.lease },
		Refused: func(string, error) {},
		Managers: func() *api.ManagerList {
			return &api.ManagerList{Managers: []*api.ManagerInfo{{NodeId: node.Id, Address: "192.0.2.1:2377"}}, Index: c.store.View().Index()}
		},
	})
	c.agent = c.newAgent()
	return c
}

func (c *cluster) newAgent() *agent.Agent {
	return agent.New(agent.Config{
		NodeID: c.node.Id, Zone: func() string { c.mu.Lock(); defer c.mu.Unlock(); return c.peer.Zone }, Executor: c.exec, Logger: slog.New(slog.DiscardHandler),
		Describe: func() *api.NodeDescription { return &api.NodeDescription{Hostname: "n1", NanoCpus: 2e9} },
		Dial:     c.dial,
		Renew:    func() ([]byte, error) { return []byte("csr"), nil },
		Install: func(*api.InstallRequest) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.installed++
			c.peer.RenewOnly = false
			return nil
		},
		SetManagers: func(m *api.ManagerList) { c.mu.Lock(); defer c.mu.Unlock(); c.managers = m },
		Evicted:     func(r *api.EvictRequest) { c.mu.Lock(); defer c.mu.Unlock(); c.evicted = r },
	})
}

func (c *cluster) dial(context.Context) (net.Conn, string, error) {
	near, far := net.Pipe()
	c.mu.Lock()
	ctx, peer := c.serve, c.peer
	c.mu.Unlock()
	go func() {
		err := c.dispatcher.Serve(ctx, far, peer)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.served = append(c.served, err)
	}()
	return near, "manager", nil
}

// report commits as the leader does.
func (c *cluster) report(ctx context.Context, reports []*api.NodeTaskReport) error {
	cmd := storetest.Command()
	for _, r := range reports {
		cmd.Operations = append(cmd.Operations, &api.Operation{Of: &api.Operation_ReportTask{ReportTask: &api.ReportTask{
			TaskId: r.GetReport().GetTaskId(), NodeId: r.GetNodeId(), Status: r.GetReport().GetStatus()}}})
	}
	_, err := c.store.Propose(ctx, cmd)
	return err
}

// run starts dispatcher and agent; the function it returns ends the agent.
func (c *cluster) run() (stop func() error) {
	ctx, cancel := context.WithCancel(c.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.dispatcher.Run(ctx) })
	c.t.Cleanup(func() { cancel(); wg.Wait() })
	return c.runAgent()
}

func (c *cluster) runAgent() (stop func() error) {
	ctx, cancel := context.WithCancel(c.t.Context())
	done := make(chan error, 1)
	a := c.agent
	go func() { done <- a.Run(ctx) }()
	once := sync.OnceValue(func() error { cancel(); return <-done })
	c.t.Cleanup(func() { once() })
	return once
}

// task returns a task of the node with secrets, as the orchestrator and scheduler would have made it.
func (c *cluster) task(image string, secretIDs ...string) *api.Task {
	t := &api.Task{Id: warden.NewID(), ServiceId: warden.NewID(), ServiceName: "web", NodeId: c.node.Id, DesiredState: api.TaskState_TASK_RUNNING,
		Status: &api.TaskStatus{State: api.TaskState_TASK_ASSIGNED}, Spec: &api.TaskSpec{Image: image, Zone: "default"}}
	for i, id := range secretIDs {
		t.Spec.Secrets = append(t.Spec.Secrets, &api.SecretReference{SecretId: id, SecretName: "s", Version: 1, Target: "s" + string(rune('0'+i))})
	}
	return t
}

// secret returns a secret with one version, which opens to value.
func (c *cluster) secret(name, value string, zones ...string) []*api.Object {
	id := warden.NewID()
	c.values[id] = value
	return []*api.Object{store.Wrap(&api.Secret{Id: id, Name: name, Zones: zones, CurrentVersion: 1}),
		store.Wrap(&api.SecretVersion{Id: store.SecretVersionID(id, 1), SecretId: id, Version: 1, Ciphertext: []byte("x"), WrappedKey: []byte("x"), SizeBytes: uint64(len(value))})}
}

// await waits until the condition holds, looking at each change of the store.
func (c *cluster) await(what string, holds func() bool) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			c.mu.Lock()
			defer c.mu.Unlock()
			c.t.Fatalf("waited in vain for: %s (sessions ended: %v)", what, c.served)
		}
	}
}

func (c *cluster) awaitState(id string, state api.TaskState) {
	c.t.Helper()
	c.await("task in state "+state.Word(), func() bool { return c.store.View().Task(id).GetStatus().GetState() == state })
}

// put commits objects as they are, over what is there.
func (c *cluster) put(objects ...store.Record) {
	c.t.Helper()
	for _, o := range objects {
		storetest.Propose(c.t, c.store, store.Put(o, o.GetMeta().GetVersion()))
	}
}

func (c *cluster) setDesired(id string, state api.TaskState) {
	c.t.Helper()
	c.await("the change of desired state", func() bool {
		next := api.Clone(c.store.View().Task(id))
		next.DesiredState = state
		_, err := c.store.Propose(c.t.Context(), storetest.Command(store.Put(next, next.GetMeta().GetVersion())))
		return err == nil
	})
}

// remove deletes the record of an ended task, as the orchestrator does in time.
func (c *cluster) remove(taskID string) {
	c.t.Helper()
	storetest.Propose(c.t, c.store, store.Delete(c.store.View().Task(taskID)))
}

// TestSession goes through the life of tasks over one session: complete set, states back, diffs, stop, removal.
func TestSession(t *testing.T) {
	var web, once, bad *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		secret := c.secret("db", "hunter2-canary")
		web, once, bad = c.task("host", secret[0].GetSecret().GetId()), c.task("exit0"), c.task("invalid")
		return append(secret, store.Wrap(web), store.Wrap(once), store.Wrap(bad))
	})
	c.run()
	c.awaitState(web.Id, api.TaskState_TASK_RUNNING)
	c.awaitState(once.Id, api.TaskState_TASK_COMPLETE)
	c.awaitState(bad.Id, api.TaskState_TASK_REJECTED)
	if got := c.exec.secrets[web.Id]["s0"]; got != "hunter2-canary" {
		t.Errorf("the task's secret is %q", got)
	}
	if f := c.exec.files[0]; f.Mode != 0o400 || f.Data.Use(func([]byte) error { return nil }) == nil {
		t.Errorf("the secret has mode %o, or was not wiped after the start", f.Mode)
	}
	if got := len(c.agent.Tasks()); got != 3 {
		t.Errorf("the node has %d tasks, want 3: ended ones stay for their logs", got)
	}
	c.remove(once.Id)
	c.remove(bad.Id)
	c.await("ended tasks without a record to go from the node", func() bool { return slices.Equal(c.agent.Tasks(), []string{web.Id}) })
	if claims := c.dispatcher.Claims(); len(claims) != 1 || claims[0].NodeId != c.node.Id || claims[0].Ip != "192.0.2.7" || claims[0].Description.GetHostname() != "n1" || claims[0].SeenNs == 0 {
		t.Errorf("Claims() = %v", claims)
	}
	if m, since := c.agent.Session(); m != "manager" || since.IsZero() {
		t.Errorf("Session() = %q, %v", m, since)
	}
	if c.managers.GetManagers()[0].GetAddress() != "192.0.2.1:2377" {
		t.Errorf("managers = %v", c.managers)
	}
	var lines []string
	err := c.dispatcher.Logs(t.Context(), c.node.Id, &api.LogsRequest{TaskId: web.Id, Tail: -1}, func(l *api.LogChunk) error {
		lines = append(lines, string(l.Data))
		return nil
	})
	if err != nil || !slices.Equal(lines, []string{"one", "two"}) {
		t.Errorf("Logs = %q, %v", lines, err)
	}
	c.setDesired(web.Id, api.TaskState_TASK_SHUTDOWN)
	c.awaitState(web.Id, api.TaskState_TASK_SHUTDOWN)
	c.remove(web.Id)
	c.await("the stopped task to go", func() bool { return len(c.agent.Tasks()) == 0 && !c.exec.has(web.Id) })
}

// TestMemoryLimitIsNamed: a task that the kernel ended at its memory limit says so, not only by which signal.
func TestMemoryLimitIsNamed(t *testing.T) {
	var task *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		task = c.task("oom")
		return []*api.Object{store.Wrap(task)}
	})
	c.run()
	c.awaitState(task.Id, api.TaskState_TASK_FAILED)
	if got := c.store.View().Task(task.Id).GetStatus().GetError(); !strings.Contains(got, "memory limit") {
		t.Errorf("the task's error is %q, want the memory limit named", got)
	}
}

// TestRestart: the daemon's end leaves tasks as they are (I7), the next one adopts them, and what the cluster does not name
// any more goes. A task that ran and that the machine lost is failed, not started again.
func TestRestart(t *testing.T) {
	var web, lost *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		web, lost = c.task("host"), c.task("host")
		return []*api.Object{store.Wrap(web), store.Wrap(lost)}
	})
	stop := c.run()
	c.awaitState(web.Id, api.TaskState_TASK_RUNNING)
	c.awaitState(lost.Id, api.TaskState_TASK_RUNNING)
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Fatalf("Run = %v", err)
	}
	if !c.exec.has(web.Id) {
		t.Fatal("the end of the daemon ended a task")
	}
	c.exec.mu.Lock()
	delete(c.exec.tasks, lost.Id)
	c.exec.tasks["stray"] = &fakeTask{e: c.exec, id: "stray", ended: make(chan struct{})}
	c.exec.mu.Unlock()
	c.agent = c.newAgent()
	c.runAgent()
	c.awaitState(lost.Id, api.TaskState_TASK_FAILED)
	c.remove(lost.Id)
	c.await("the stray task to go", func() bool { return slices.Equal(c.agent.Tasks(), []string{web.Id}) })
	if n := c.exec.starts(); n != 2 {
		t.Errorf("%d starts, want 2", n)
	}
	if err := c.agent.StopAll(t.Context()); err != nil || c.exec.has(web.Id) || len(c.agent.Tasks()) != 0 {
		t.Errorf("StopAll = %v, tasks left %v", err, c.agent.Tasks())
	}
}

// TestStopAllWithoutRun: leave works on a daemon that just came up, too.
func TestStopAllWithoutRun(t *testing.T) {
	exec := newFakeExecutor()
	exec.tasks["old"] = &fakeTask{e: exec, id: "old", ended: make(chan struct{})}
	a := agent.New(agent.Config{NodeID: warden.NewID(), Zone: func() string { return "default" }, Executor: exec, Logger: slog.New(slog.DiscardHandler)})
	if err := a.StopAll(t.Context()); err != nil || exec.has("old") {
		t.Fatalf("StopAll = %v", err)
	}
	if err := a.Run(t.Context()); warden.CodeOf(err) != warden.CodeConflict {
		t.Errorf("Run after StopAll = %v", err)
	}
}

// TestI6SecretsStayInTheirZone: the dispatcher sends neither task nor secret where zones don't agree, although the store
// (here seeded past its own rules) says so; and takes both back when an operator moves the node.
func TestI6SecretsStayInTheirZone(t *testing.T) {
	var forbidden, moved, good *api.Task
	var goodID string
	c := newCluster(t, func(c *cluster) []*api.Object {
		pci, free := c.secret("pci-key", "canary-pci", "pci"), c.secret("free", "canary-free")
		goodID = free[0].GetSecret().GetId()
		forbidden, moved, good = c.task("host", pci[0].GetSecret().GetId()), c.task("host"), c.task("host", goodID)
		moved.Spec.Zone = "pci"
		return append(append(pci, free...), store.Wrap(forbidden), store.Wrap(moved), store.Wrap(good))
	})
	c.run()
	c.awaitState(good.Id, api.TaskState_TASK_RUNNING)
	if got := c.agent.Tasks(); !slices.Equal(got, []string{good.Id}) {
		t.Fatalf("the node has %v, want %v alone", got, good.Id)
	}
	node := api.Clone(c.store.View().Node(c.node.Id))
	node.Zone, node.LeafZone = "pci", "pci"
	c.put(node)
	c.await("the task of the old zone to go", func() bool { return !slices.Contains(c.agent.Tasks(), good.Id) })
	c.awaitState(good.Id, api.TaskState_TASK_SHUTDOWN)
	if got := c.agent.Tasks(); slices.Contains(got, moved.Id) {
		t.Errorf("the node has %v before its leaf names the zone", got)
	}
	c.mu.Lock()
	c.peer.Zone = "pci" // the leaf was renewed
	c.mu.Unlock()
	c.agent.Redial()
	c.awaitState(moved.Id, api.TaskState_TASK_RUNNING)
	c.awaitState(forbidden.Id, api.TaskState_TASK_ASSIGNED)
}

// TestLargeAssignment: secrets that don't fit into one message come in several, and nothing that a later one names ends.
func TestLargeAssignment(t *testing.T) {
	tasks := []*api.Task{}
	c := newCluster(t, func(c *cluster) (all []*api.Object) {
		for i := range 12 {
			var ids []string
			for j := range 2 {
				s := c.secret("s"+string(rune('a'+i))+string(rune('a'+j)), string(make([]byte, warden.SecretBytesMax)))
				ids = append(ids, s[0].GetSecret().GetId())
				all = append(all, s...)
			}
			task := c.task("host", ids...)
			tasks = append(tasks, task)
			all = append(all, store.Wrap(task))
		}
		return all
	})
	stop := c.run()
	for _, task := range tasks {
		c.awaitState(task.Id, api.TaskState_TASK_RUNNING)
	}
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	c.agent = c.newAgent() // adopts all; the sets of the new session must not end one
	c.runAgent()
	c.await("a session", func() bool { m, _ := c.agent.Session(); return m != "" })
	c.setDesired(tasks[0].Id, api.TaskState_TASK_SHUTDOWN)
	c.awaitState(tasks[0].Id, api.TaskState_TASK_SHUTDOWN)
	c.remove(tasks[0].Id)
	c.await("the stopped task to go", func() bool { return len(c.agent.Tasks()) == len(tasks)-1 })
	for _, task := range tasks[1:] {
		if !c.exec.has(task.Id) || c.store.View().Task(task.Id).GetStatus().GetState() != api.TaskState_TASK_RUNNING {
			t.Errorf("task %s did not outlive the new session", task.Id)
		}
	}
	if n := c.exec.starts(); n != len(tasks) {
		t.Errorf("%d starts, want %d", n, len(tasks))
	}
}

// TestBrokenSecret: a task whose secret can't be opened is held back, others are not.
func TestBrokenSecret(t *testing.T) {
	var broken, good *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		bad, fine := c.secret("bad", ""), c.secret("fine", "v")
		delete(c.values, bad[0].GetSecret().GetId())
		broken, good = c.task("host", fine[0].GetSecret().GetId(), bad[0].GetSecret().GetId()), c.task("host", fine[0].GetSecret().GetId())
		return append(append(bad, fine...), store.Wrap(broken), store.Wrap(good))
	})
	c.run()
	c.awaitState(good.Id, api.TaskState_TASK_RUNNING)
	if got := c.agent.Tasks(); !slices.Equal(got, []string{good.Id}) {
		t.Errorf("the node has %v, want %v alone", got, good.Id)
	}
}

// TestRenewal: an expired leaf is renewed and nothing else is done; the node redials and works.
func TestRenewal(t *testing.T) {
	var web *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		web = c.task("host")
		return []*api.Object{store.Wrap(web)}
	})
	c.peer.RenewOnly = true
	c.run()
	c.awaitState(web.Id, api.TaskState_TASK_RUNNING)
	c.await("the end of the first session", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.installed == 1 && len(c.served) == 1 })
}

// TestEvict: a live session whose context is cancelled with CodeEvicted, and a node that dials in with a tombstone: both
// stop, wipe, and say so.
func TestEvict(t *testing.T) {
	for _, live := range []bool{true, false} {
		var web *api.Task
		c := newCluster(t, func(c *cluster) []*api.Object {
			web = c.task("host")
			return []*api.Object{store.Wrap(web)}
		})
		stop := c.run()
		c.awaitState(web.Id, api.TaskState_TASK_RUNNING)
		if !live {
			stop()
			c.agent = c.newAgent()
			c.mu.Lock()
			c.peer.Tombstone = &api.Tombstone{Id: c.node.Id, Meta: &api.Meta{Index: 77}, RemovedNs: 5}
			c.mu.Unlock()
			stop = c.runAgent()
		} else {
			c.cut(warden.Errorf(warden.CodeEvicted, "", "removed"))
		}
		c.await("the eviction", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.evicted != nil })
		if err := stop(); warden.CodeOf(err) != warden.CodeEvicted {
			t.Errorf("live %v: Run = %v", live, err)
		}
		if c.exec.has(web.Id) || len(c.agent.Tasks()) != 0 {
			t.Errorf("live %v: tasks are left", live)
		}
		if !live && (c.evicted.Index != 77 || c.evicted.TimeNs != 5 || c.evicted.NodeId != c.node.Id) {
			t.Errorf("evict = %v", c.evicted)
		}
	}
}

// TestLease: without it nothing is sent, and the session stays.
func TestLease(t *testing.T) {
	var web *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		web = c.task("host")
		return []*api.Object{store.Wrap(web)}
	})
	c.lease = false
	c.run()
	c.await("the session", func() bool { return len(c.dispatcher.Claims()) == 1 })
	if n := len(c.agent.Tasks()); n != 0 {
		t.Errorf("%d tasks were sent without the lease", n)
	}
	c.mu.Lock()
	c.lease = true
	c.mu.Unlock()
	c.awaitState(web.Id, api.TaskState_TASK_RUNNING)
}

// TestLogsHoldNothingUp: however many logs are followed, the node is told of its tasks.
func TestLogsHoldNothingUp(t *testing.T) {
	var web, other *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		web, other = c.task("host"), c.task("host")
		return []*api.Object{store.Wrap(web), store.Wrap(other)}
	})
	c.run()
	c.awaitState(web.Id, api.TaskState_TASK_RUNNING)
	const most = 512
	ctx, cancel := context.WithCancel(t.Context())
	first, ended := make(chan struct{}, 2*most), make(chan error, most)
	follow := func() error {
		return c.dispatcher.Logs(ctx, c.node.Id, &api.LogsRequest{TaskId: web.Id, Follow: true}, func(*api.LogChunk) error { first <- struct{}{}; return nil })
	}
	for range most {
		go func() { ended <- follow() }()
	}
	c.await("two lines of each log", func() bool { return len(first) == 2*most })
	if err := follow(); warden.CodeOf(err) != warden.CodeLimited {
		t.Errorf("one more = %v, want %s", err, warden.CodeLimited)
	}
	c.awaitState(other.Id, api.TaskState_TASK_RUNNING)
	c.setDesired(other.Id, api.TaskState_TASK_SHUTDOWN)
	c.awaitState(other.Id, api.TaskState_TASK_SHUTDOWN)
	cancel()
	for range most {
		if err := <-ended; err == nil {
			t.Error("a followed log came to an end")
		}
	}
	err := c.dispatcher.Logs(t.Context(), c.node.Id, &api.LogsRequest{TaskId: web.Id}, func(*api.LogChunk) error { return nil })
	if err != nil {
		t.Errorf("after all have ended: %v", err)
	}
}

// TestSessionsReplaceEachOther: Close and a newer session end the older one; the agent redials, tasks go on.
func TestSessionsReplaceEachOther(t *testing.T) {
	var web *api.Task
	c := newCluster(t, func(c *cluster) []*api.Object {
		web = c.task("host")
		return []*api.Object{store.Wrap(web)}
	})
	c.run()
	c.awaitState(web.Id, api.TaskState_TASK_RUNNING)
	first := c.dispatcher.Claims()[0].SessionId
	c.dispatcher.Close(first, "lost its claim")
	c.await("another session", func() bool { claims := c.dispatcher.Claims(); return len(claims) == 1 && claims[0].SessionId != first })
	c.agent.Redial()
	c.await("the end of the second session", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return len(c.served) == 2 })
	c.await("its claim", func() bool { return len(c.dispatcher.Claims()) == 1 })
	c.setDesired(web.Id, api.TaskState_TASK_SHUTDOWN)
	c.awaitState(web.Id, api.TaskState_TASK_SHUTDOWN)
	if n := c.exec.starts(); n != 1 {
		t.Errorf("%d starts, want 1", n)
	}
}
