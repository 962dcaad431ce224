package control_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/control"
	"warden/store"
	"warden/store/storetest"
)

// What a view says of certificates, nodes and tasks is counted; what it names is not in the facts.
func TestClusterFacts(t *testing.T) {
	now := time.Unix(2e9, 0)
	id := warden.NewID()
	root, key, err := ca.NewRoot(id, now)
	if err != nil {
		t.Fatal(err)
	}
	issuing, _, err := ca.NewIssuing(root, key, id, 3, now)
	if err != nil {
		t.Fatal(err)
	}
	worker, manager, active := api.Role_ROLE_WORKER, api.Role_ROLE_MANAGER, api.Availability_AVAILABILITY_ACTIVE
	node := func(role api.Role, left time.Duration, generation, dek uint64) *api.Object {
		end := now.Add(left)
		return store.Wrap(&api.Node{Id: warden.NewID(), Hostname: "host-" + warden.NewID(), Role: role, DesiredRole: role, LeafRole: role, Zone: "default", Availability: active, KeyHash: storetest.Hash(),
			LeafNotAfterNs: end.UnixNano(), LeafNotBeforeNs: end.Add(-10*time.Hour - warden.LeafBackdate).UnixNano(), LeafGeneration: generation, LeafDekGeneration: dek})
	}
	task := func(state api.TaskState, nodeID, message string) *api.Object {
		return store.Wrap(&api.Task{Id: warden.NewID(), ServiceId: "s", ServiceName: "canary-service", NodeId: nodeID, DesiredState: api.TaskState_TASK_RUNNING,
			Status: &api.TaskStatus{State: state, Message: message}, Spec: &api.TaskSpec{Image: "host", Zone: "default"}})
	}
	zone := storetest.Zone("default")
	v := storetest.New(t,
		store.Wrap(&api.Cluster{Id: id, RootCert: root, IssuingCert: issuing, IssuingGeneration: 3, KeysetGeneration: 2, LockGeneration: 4, DekGeneration: 5, Autolock: true, UnlockKeyId: "k1",
			DistrustedIssuers: make([]byte, 64), UnlockRecipient: make([]byte, 32)}),
		node(manager, 9*time.Hour, 3, 5), node(manager, 9*time.Hour, 3, 4), node(worker, time.Hour, 3, 0), node(worker, -time.Second, 2, 0), node(worker, 0, 3, 0),
		store.Wrap(zone), store.Wrap(&api.Tombstone{Id: warden.NewID(), Hostname: "gone", RemovedNs: 1}),
		store.Wrap(&api.Service{Id: "s", Spec: &api.ServiceSpec{Name: "canary-service", Replicas: 7, Task: &api.TaskSpec{Image: "host", Zone: "default"}}}),
		store.Wrap(storetest.Secret("canary-secret")),
		task(api.TaskState_TASK_RUNNING, "n1", "started"), task(api.TaskState_TASK_RUNNING, "n1", "no suitable node (1 node down)"), task(api.TaskState_TASK_FAILED, "n1", ""),
		task(api.TaskState_TASK_PENDING, "", "no suitable node (3 nodes down)"), task(api.TaskState_TASK_PENDING, "", "no suitable node (3 nodes down)"),
		task(api.TaskState_TASK_PENDING, "", "no suitable node (1 node down; 1 node: 9 CPUs reserved, 1 CPU free)"), task(api.TaskState_TASK_PENDING, "", ""),
	).View()
	got := control.ClusterFacts(v, now)
	want := &api.ClusterFacts{
		RootNotAfterNs: got.RootNotAfterNs, IssuingNotAfterNs: got.IssuingNotAfterNs,
		IssuingGeneration: 3, KeysetGeneration: 2, LockGeneration: 4, DekGeneration: 5, Autolock: true, UnlockKeyId: "k1",
		LeavesNearExpiry: 1, LeavesExpired: 2, LeavesOldIssuer: 1, LeavesOldDek: 1, DistrustedIssuers: 2, Managers: 2, Workers: 3, Services: 1, Secrets: 1, Zones: 1, NodesRemoved: 1, TasksWanted: 7,
		Tasks:    []*api.TaskCount{{State: "pending", Count: 4}, {State: "running", Count: 2}, {State: "failed", Count: 1}},
		Unplaced: []*api.ReasonCount{{Reason: "down", Count: 2}, {Reason: "cpu", Count: 1}},
	}
	if !proto.Equal(got, want) {
		t.Errorf("ClusterFacts =\n%v\nwant\n%v", got, want)
	}
	if r, i := time.Unix(0, got.RootNotAfterNs), time.Unix(0, got.IssuingNotAfterNs); !i.After(now) || r.Before(i) {
		t.Errorf("the root ends %s, the issuing CA %s", r, i)
	}
	if empty := control.ClusterFacts(storetest.New(t).View(), now); empty.RootNotAfterNs != 0 || empty.Managers != 0 {
		t.Errorf("ClusterFacts of nothing = %v", empty)
	}
}

// BenchmarkClusterFacts is most of a scrape: 10,000 tasks, a tenth of them unplaced, on 1,000 nodes.
func BenchmarkClusterFacts(b *testing.B) {
	objects := []*api.Object{store.Wrap(&api.Cluster{Id: warden.NewID()})}
	for i := range 1000 {
		objects = append(objects, store.Wrap(&api.Node{Id: warden.NewID(), Hostname: fmt.Sprint("n", i), Role: api.Role_ROLE_WORKER, DesiredRole: api.Role_ROLE_WORKER, Zone: "default",
			Availability: api.Availability_AVAILABILITY_ACTIVE, KeyHash: storetest.Hash(), LeafNotBeforeNs: 1, LeafNotAfterNs: 2e18}))
	}
	for i := range 10_000 {
		t := &api.Task{Id: warden.NewID(), ServiceId: fmt.Sprint("s", i%100), DesiredState: api.TaskState_TASK_RUNNING, Status: &api.TaskStatus{State: api.TaskState_TASK_RUNNING}}
		if t.NodeId = "n"; i%10 == 0 {
			t.NodeId, t.Status = "", &api.TaskStatus{State: api.TaskState_TASK_PENDING, Message: fmt.Sprintf("no suitable node (%d nodes down)", i%100)}
		}
		objects = append(objects, store.Wrap(t))
	}
	v := storetest.New(b, objects...).View()
	b.ReportAllocs()
	for b.Loop() {
		control.ClusterFacts(v, time.Unix(1.9e9, 0))
	}
}
