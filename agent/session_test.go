package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
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
		peer: dispatcher.Peer{NodeID: node.Id, NotBefore: now, NotAfter: now.Add(warden.LeafTTLDefault), IP: "192.0.2.7"}}
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
		Managers: func() *api.ManagerList {
			return &api.ManagerList{Managers: []*api.ManagerInfo{{NodeId: node.Id, Address: "192.0.2.1:2377"}}, Index: c.store.View().Index()}
		},
	})
	c.agent = c.newAgent()
	return c
}

func (c *cluster) newAgent() *agent.Agent {
	return agent.New(agent.Config{
		NodeID: c.node.Id, Executor: c.exec, Logger: slog.New(slog.DiscardHandler),
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
	c.await("ended tasks to go from the node", func() bool { return slices.Equal(c.agent.Tasks(), []string{web.Id}) })
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
	c.await("the stopped task to go", func() bool { return len(c.agent.Tasks()) == 0 && !c.exec.has(web.Id) })
}
