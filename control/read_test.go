package control_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

var kinds = []api.Kind{
	api.Kind_KIND_CLUSTER, api.Kind_KIND_NODE, api.Kind_KIND_TOMBSTONE, api.Kind_KIND_ZONE, api.Kind_KIND_TOKEN, api.Kind_KIND_SERVICE,
	api.Kind_KIND_TASK, api.Kind_KIND_SECRET, api.Kind_KIND_SECRET_VERSION, api.Kind_KIND_EXPOSURE,
}

// populated returns a world with a record of every kind.
func populated(t *testing.T) (*world, map[api.Kind]string) {
	t.Helper()
	box, db := worker("box"), storetest.Secret("db")
	web := storetest.Service("web", "default", storetest.Reference(db))
	task := storetest.Placed(storetest.Task(web, 1), box.Id)
	gone := &api.Tombstone{Id: warden.NewID(), Hostname: "gone", Role: api.Role_ROLE_WORKER}
	w := newWorld(t, box, db, storetest.SecretVersion(db, 1), web, task, gone, storetest.Token(api.Role_ROLE_WORKER),
		&api.Exposure{Id: store.ExposureID(box.Id, db.Id, 1), NodeId: box.Id, SecretId: db.Id, SecretName: "db", Version: 1},
		&api.Exposure{Id: store.ExposureID(gone.Id, db.Id, 1), NodeId: gone.Id, SecretId: db.Id, SecretName: "db", Version: 1})
	return w, map[api.Kind]string{
		api.Kind_KIND_NODE: "box", api.Kind_KIND_TOMBSTONE: gone.Id[:9], api.Kind_KIND_ZONE: "pci", api.Kind_KIND_SERVICE: "web", api.Kind_KIND_TASK: task.Id,
		api.Kind_KIND_SECRET: "db", api.Kind_KIND_SECRET_VERSION: "db", api.Kind_KIND_EXPOSURE: gone.Id,
	}
}

func TestList(t *testing.T) {
	w, refs := populated(t)
	all := map[api.Kind]int{api.Kind_KIND_NODE: 2, api.Kind_KIND_ZONE: 2, api.Kind_KIND_EXPOSURE: 2}
	for _, k := range kinds {
		r := do[*api.ListReply](t, w.Server, "List", &api.ListRequest{Kind: k})
		if len(r.Objects) != max(1, all[k]) || r.Index == 0 {
			t.Errorf("List(%s) = %v", k, r)
		}
		for _, o := range r.Objects {
			if kind, _ := store.Unwrap(o); kind != k {
				t.Errorf("List(%s) has a %s", k, kind)
			}
		}
		if ref := refs[k]; ref != "" {
			r := do[*api.ListReply](t, w.Server, "List", &api.ListRequest{Kind: k, References: []string{ref}})
			if len(r.Objects) != 1 {
				t.Errorf("List(%s, %s) = %v", k, ref, r)
			}
		}
	}
	r := do[*api.ListReply](t, w.Server, "List", &api.ListRequest{Kind: api.Kind_KIND_NODE})
	for i, o := range r.Objects {
		if r.Nodes[i].NodeId != o.GetNode().Id {
			t.Error("the states are not in the order of the nodes")
		}
	}
	if s, err := follower(t, nil).List(t.Context(), &api.ListRequest{Kind: api.Kind_KIND_CLUSTER, Local: true}); err != nil || len(s.Objects) != 0 {
		t.Errorf("List of a cluster that has not arrived = %v, %v", s, err)
	}
	_, err := follower(t, nil).List(t.Context(), &api.ListRequest{Kind: api.Kind_KIND_NODE})
	wantError(t, "List on a manager that does not lead", api.FromError(err), warden.CodeNotLeader)
}

// Each bytes field of each record is either known to be public or is cut out, so that a new field is thought about.
func TestListShowsNoUnknownBytes(t *testing.T) {
	public := map[string]bool{}
	for _, f := range strings.Fields(`Cluster.root_cert Cluster.issuing_cert Cluster.unlock_recipient Cluster.distrusted_issuers Node.key_hash
		Node.next_key_hash Node.leaf Node.join_key_hash Tombstone.key_hashes Token.root_hash`) {
		public[f] = true
	}
	plant := []byte("planted-in-every-bytes-field")
	var records []store.Record
	for i, r := range []store.Record{
		&api.Cluster{}, &api.Node{}, &api.Tombstone{}, &api.Zone{Name: "z"}, &api.Token{}, &api.Service{Spec: &api.ServiceSpec{Name: "s"}}, &api.Task{},
		&api.Secret{Name: "s"}, &api.SecretVersion{}, &api.Exposure{},
	} {
		m := r.ProtoReflect()
		fields := m.Descriptor().Fields()
		m.Set(fields.ByName("id"), protoreflect.ValueOfString(fmt.Sprintf("a%d", i)))
		for k := range fields.Len() {
			f := fields.Get(k)
			if f.Kind() != protoreflect.BytesKind {
				continue
			}
			if f.IsList() {
				m.Mutable(f).List().Append(protoreflect.ValueOfBytes(plant))
			} else {
				m.Set(f, protoreflect.ValueOfBytes(plant))
			}
		}
		if sv, ok := r.(*api.SecretVersion); ok {
			sv.SecretId = "a7"
		}
		records = append(records, r)
	}
	s := follower(t, nil, records...)
	for _, kind := range kinds {
		r, err := s.List(asRoot(t.Context()), &api.ListRequest{Kind: kind, Local: true})
		if err != nil || len(r.Objects) != 1 {
			t.Fatalf("List(%s) = %v, %v", kind, r, err)
		}
		_, record := store.Unwrap(r.Objects[0])
		record.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
			if name := string(record.ProtoReflect().Descriptor().Name()) + "." + string(f.Name()); f.Kind() == protoreflect.BytesKind && !public[name] {
				t.Errorf("List shows %s", name)
			}
			return true
		})
	}
}

func TestServiceDefaults(t *testing.T) {
	db, card := storetest.Secret("db"), storetest.Secret("card", "pci")
	db.CurrentVersion = 2
	w := newWorld(t, db, storetest.SecretVersion(db, 1), storetest.SecretVersion(db, 2), card, storetest.SecretVersion(card, 1))
	reply := do[*api.ChangeReply](t, w.Server, "CreateService", secretRefs(&api.SecretReference{SecretName: "db"}, &api.SecretReference{SecretId: db.Id[:10], Target: "old", Version: 1, Mode: 0o440, Uid: 7}))
	x := w.store.View().Service(reply.Id).Spec.Task
	if x.Zone != "default" || x.Restart != api.RestartCondition_RESTART_ANY || x.StopGraceNs != int64(warden.StopGraceDefault) {
		t.Errorf("task = %v", x)
	}
	got := []string{}
	for _, r := range x.Secrets {
		got = append(got, fmt.Sprintf("%t %s@%d %s %o %d", r.SecretId == db.Id, r.SecretName, r.Version, r.Target, r.Mode, r.Uid))
	}
	if want := "[true db@0 db 400 0 true db@1 old 440 7]"; fmt.Sprint(got) != want {
		t.Errorf("secrets = %v, want %s", got, want)
	}
	in := secretRefs(&api.SecretReference{SecretName: "card"})
	in.Spec.Name, in.Spec.Task.Zone, in.Spec.Task.Constraints = "shop", "pci", []string{"node.labels.disk == ssd"}
	do[*api.ChangeReply](t, w.Server, "CreateService", in)
	if got := w.store.View().ServiceByName("shop").Spec.Task.Constraints; fmt.Sprint(got) != "[node.labels.disk==ssd]" {
		t.Errorf("constraints = %q", got)
	}
	do[*api.ChangeReply](t, w.Server, "ScaleService", &api.ScaleServiceRequest{Reference: "shop", Replicas: 0})
	do[*api.ChangeReply](t, w.Server, "RemoveService", &api.ReferenceRequest{Reference: "shop"})
	do[*api.ChangeReply](t, w.Server, "RemoveSecret", &api.ReferenceRequest{Reference: "card"})
	do[*api.ChangeReply](t, w.Server, "RemoveZone", &api.ReferenceRequest{Reference: "pci"})
	if v := w.store.View(); v.Zone("pci") != nil || v.SecretByName("card") != nil || len(v.SecretVersions(card.Id)) != 0 {
		t.Error("something is left")
	}
	before := w.store.View().Cluster().Meta.Version
	do[*api.ChangeReply](t, w.Server, "UpdateCluster", &api.UpdateClusterRequest{})
	if w.store.View().Cluster().Meta.Version != before {
		t.Error("UpdateCluster of nothing changes something")
	}
	if r := do[*api.ChangeReply](t, w.Server, "UpdateCluster", &api.UpdateClusterRequest{LeafTtlNs: int64(warden.LeafTTLMin)}); r.Version != before+1 {
		t.Errorf("UpdateCluster = %v", r)
	}
}

func TestStatus(t *testing.T) {
	m2, box, late, dead := storetest.Manager(warden.NewID()), worker("box"), worker("late"), worker("dead")
	m2.Hostname = "m2"
	now := time.Now()
	box.Description.SecretMounts = "bind"
	late.LeafNotBeforeNs, late.LeafNotAfterNs = now.Add(-85*time.Hour).UnixNano(), now.Add(15*time.Hour).UnixNano()
	box.LeafNotBeforeNs, box.LeafNotAfterNs = now.Add(-70*time.Hour).UnixNano(), now.Add(30*time.Hour).UnixNano() // renewal is due, no more
	dead.LeafNotBeforeNs, dead.LeafNotAfterNs = now.Add(-2*time.Hour).UnixNano(), now.Add(-time.Hour).UnixNano()
	web, job := storetest.Service("web", "default"), storetest.Service("job", "default")
	web.Spec.Replicas = 3
	in := func(s *api.Service, slot uint64, state api.TaskState, message, failure string) *api.Task {
		x := storetest.Placed(storetest.Task(s, slot), box.Id)
		x.Status = &api.TaskStatus{State: state, Message: message, Error: failure}
		return x
	}
	running := in(web, 1, api.TaskState_TASK_RUNNING, "", "")
	failed := in(web, 2, api.TaskState_TASK_FAILED, "ended", "exit code 1")
	pending := storetest.Task(web, 3)
	pending.Status.Message = "no suitable node"
	past := in(web, 2, api.TaskState_TASK_RUNNING, "", "")
	past.DesiredState = api.TaskState_TASK_SHUTDOWN
	w := newWorld(t, m2, box, late, dead, web, job, running, failed, pending, past, in(job, 1, api.TaskState_TASK_COMPLETE, "", ""))
	w.cluster.liveness[box.Id], w.cluster.liveness[late.Id] = api.Liveness_LIVENESS_READY, api.Liveness_LIVENESS_READY
	w.cluster.message[late.Id] = "its clock is 9s off"
	w.cluster.raft = map[string]string{w.self: "voter", m2.Id: "nonvoter"}
	r := do[*api.StatusReply](t, w.Server, "Status", &api.StatusRequest{})
	if r.Managers != 2 || r.ManagersReachable != 1 || r.Workers != 3 || r.WorkersReady != 2 || r.TasksWanted != 3 || r.TasksRunning != 1 || r.Services != 2 ||
		r.LeaderId != w.self || len(r.Nodes) != 5 || r.CommitIndex < r.AppliedIndex {
		t.Errorf("Status = %v", r)
	}
	contains := func(what string, lines []string, wants ...string) {
		t.Helper()
		if len(lines) != len(wants) {
			t.Errorf("%s = %q, want %d lines", what, lines, len(wants))
		}
		for _, want := range wants {
			if !slices.ContainsFunc(lines, func(s string) bool { return strings.Contains(s, want) }) {
				t.Errorf("%s = %q, want %q in it", what, lines, want)
			}
		}
	}
	contains("unwell", r.Unwell, "1 of 2 managers reachable, 2 are needed for a majority; not m2", "2 of 3 workers ready; not dead", "1 of 3 tasks running",
		"late ("+late.Id+"): certificate ends in", "dead ("+dead.Id+"): certificate expired at", "late ("+late.Id+"): its clock is 9s off")
	contains("certificates", r.Certificates, "late", "dead")
	contains("notes", r.Notes, "m2 ("+m2.Id+"): has no vote yet", "bind-mounted", "odd number", "autolock is off")
	var problems []string
	for _, p := range r.Problems {
		problems = append(problems, fmt.Sprintf("%s.%d %s: %s", p.ServiceName, p.Slot, p.State, p.Reason))
	}
	contains("problems", problems, "web.2 failed: exit code 1", "web.3 pending: no suitable node")

	w = newWorld(t)
	if r := do[*api.StatusReply](t, w.Server, "Status", &api.StatusRequest{}); len(r.Unwell) != 0 {
		t.Errorf("a cluster of one that is well: %q", r.Unwell)
	}
}

// A manager that does not lead asks the leader who is up, and without one says what it has.
func TestStatusElsewhere(t *testing.T) {
	box := worker("box")
	w := newWorld(t, box)
	w.cluster.liveness[box.Id] = api.Liveness_LIVENESS_READY
	leader := true
	s := follower(t, func(ctx context.Context, f *api.ForwardRequest) (*api.ForwardReply, error) {
		if !leader {
			return nil, warden.Errorf(warden.CodeNoLeader, "asking the leader", "the managers have no leader")
		}
		return w.runOn(ctx, f)
	}, w.store.View().Cluster(), box)
	if r := do[*api.StatusReply](t, s, "Status", &api.StatusRequest{}); r.WorkersReady != 1 || len(r.Unwell) != 0 {
		t.Errorf("Status by way of the leader = %v", r)
	}
	leader = false
	r := do[*api.StatusReply](t, s, "Status", &api.StatusRequest{})
	if len(r.Unwell) != 1 || !strings.Contains(r.Unwell[0], "no leader") || !strings.Contains(fmt.Sprint(r.Notes), "only the leader knows") || r.Workers != 1 {
		t.Errorf("Status without a leader = %v", r)
	}
}

func TestLogs(t *testing.T) {
	box := worker("box")
	web, idle := storetest.Service("web", "default"), storetest.Service("idle", "default")
	t1, t2, waits := storetest.Placed(storetest.Task(web, 1), box.Id), storetest.Placed(storetest.Task(web, 2), box.Id), storetest.Task(idle, 1)
	w := newWorld(t, box, web, idle, t1, t2, waits)
	read := func(r *api.ControlLogsRequest, fail error) ([]string, error) {
		var got []string
		err := w.Logs(r, &stream[api.LogChunk]{ctx: asRoot(t.Context()), send: func(c *api.LogChunk) error {
			got = append(got, c.TaskId)
			return fail
		}})
		slices.Sort(got)
		return got, api.FromError(err)
	}
	refs := func(r ...string) *api.ControlLogsRequest {
		return &api.ControlLogsRequest{References: r, Tail: -1}
	}
	both := []string{t1.Id, t2.Id}
	slices.Sort(both)
	if got, err := read(refs("web", t1.Id), nil); err != nil || !slices.Equal(got, both) {
		t.Errorf("Logs(web and one of its tasks) = %v, %v, want each once", got, err)
	}
	if got, err := read(refs(t1.Id[:8]), nil); err != nil || !slices.Equal(got, []string{t1.Id}) {
		t.Errorf("Logs(task) = %v, %v", got, err)
	}
	w.cluster.logs[t1.Id] = warden.Errorf(warden.CodeUnavailable, "", "no session")
	if got, err := read(refs("web"), nil); err != nil || !slices.Equal(got, []string{t2.Id}) || !strings.Contains(w.log.String(), "failed to read the logs of a task") {
		t.Errorf("Logs where one task can't be read = %v, %v", got, err)
	}
	_, err := read(refs(t1.Id), nil)
	wantError(t, "Logs of a task that can't be read", err, warden.CodeUnavailable, "no session")
	w.cluster.logs[t2.Id] = w.cluster.logs[t1.Id]
	_, err = read(refs("web"), nil)
	wantError(t, "Logs where none can be read", err, warden.CodeUnavailable, "no session")
	delete(w.cluster.logs, t2.Id)
	_, err = read(refs(t2.Id), errors.New("gone"))
	wantError(t, "Logs to a caller that is gone", err, warden.CodeUnavailable)
	for _, c := range []struct {
		req  *api.ControlLogsRequest
		code warden.Code
		text string
	}{
		{refs(), warden.CodeInvalid, "services or tasks"},
		{refs(many(1001, "%d")...), warden.CodeInvalid, ""},
		{refs("nobody"), warden.CodeNotFound, "no service or task"},
		{refs("idle"), warden.CodeUnavailable, "service ps"},
		{&api.ControlLogsRequest{References: []string{"web"}, Tail: -2}, warden.CodeInvalid, "lines"},
		{&api.ControlLogsRequest{References: []string{"web"}, Tail: warden.TailLogMax + 1}, warden.CodeInvalid, "lines"},
	} {
		_, err := read(c.req, nil)
		wantError(t, fmt.Sprintf("Logs(%.60v)", c.req), err, c.code, c.text)
	}
}

// watch returns the stream of events from now on, but for zones named "touch…", which it makes until the stream tells of one.
// stop ends it; ended gets what it ended with.
func watch(t *testing.T, w *world) (next func() *api.Event, stop func() error, ended chan error) {
	t.Helper()
	events, done := make(chan *api.Event, 1000), make(chan error, 1)
	ctx, cancel := context.WithCancel(asRoot(t.Context()))
	t.Cleanup(cancel)
	go func() {
		done <- w.Events(&api.EventsRequest{}, &stream[api.Event]{ctx: ctx, send: func(e *api.Event) error { events <- proto.Clone(e).(*api.Event); return nil }})
	}()
	next = func() *api.Event {
		t.Helper()
		for {
			select {
			case e := <-events:
				if !strings.HasPrefix(e.Name, "touch") {
					return e
				}
			case <-time.After(time.Minute):
				t.Fatal("no event")
			}
		}
	}
	stop = func() error {
		cancel()
		return <-done
	}
	for range 1200 { // a minute
		do[*api.ChangeReply](t, w.Server, "CreateZone", &api.CreateZoneRequest{Name: "touch" + warden.NewID()})
		select {
		case e := <-events:
			if e.Action != "create" || e.Kind != api.Kind_KIND_ZONE || !strings.HasPrefix(e.Name, "touch") {
				t.Errorf("first event = %v", e)
			}
			return next, stop, done
		case <-time.After(50 * time.Millisecond):
		}
	}
	t.Fatal("the stream tells nothing")
	return nil, nil, nil
}

func TestEvents(t *testing.T) {
	box := worker("box")
	w := newWorld(t, box)
	next, stop, _ := watch(t, w)
	await := func(action string, kind api.Kind, detail string) {
		t.Helper()
		if e := next(); e.Action != action || e.Kind != kind || !strings.Contains(e.Detail, detail) || e.Index == 0 || e.TimeNs == 0 {
			t.Errorf("event = %v, want %s of a %s with %q", e, action, kind, detail)
		}
	}
	do[*api.ChangeReply](t, w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "box", Availability: api.Availability_AVAILABILITY_PAUSE})
	await("update", api.Kind_KIND_NODE, "availability: pause")
	do[*api.ChangeReply](t, w.Server, "UpdateNode", &api.UpdateNodeRequest{Reference: "box", Zone: "pci"})
	await("update", api.Kind_KIND_NODE, "zone: pci")
	do[*api.CreateTokenReply](t, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
	await("create", api.Kind_KIND_TOKEN, "uses: 0")
	do[*api.ChangeReply](t, w.Server, "UpdateCluster", &api.UpdateClusterRequest{LeafTtlNs: int64(warden.LeafTTLMin)})
	await("update", api.Kind_KIND_CLUSTER, "certificate life")
	do[*api.ChangeReply](t, w.Server, "CreateService", task(func(*api.TaskSpec) {}))
	await("create", api.Kind_KIND_SERVICE, "replicas: 1")
	svc := w.store.View().ServiceByName("new")
	placed := storetest.Task(svc, 1)
	storetest.Propose(t, w.store, store.Put(placed, 0))
	await("create", api.Kind_KIND_TASK, "state: pending")
	spec := api.Clone(svc.Spec)
	spec.Task.Env = []string{"A=B"}
	do[*api.ChangeReply](t, w.Server, "UpdateService", &api.UpdateServiceRequest{Reference: "new", Version: 1, Spec: spec})
	await("update", api.Kind_KIND_SERVICE, "what its tasks run: changed")
	do[*api.ChangeReply](t, w.Server, "ScaleService", &api.ScaleServiceRequest{Reference: "new", Replicas: 2})
	if e := next(); e.Detail != "replicas: 2" {
		t.Errorf("event of scaling = %v", e)
	}
	do[*api.ChangeReply](t, w.Server, "CreateSecret", &api.CreateSecretRequest{Name: "db", Data: []byte("one")})
	await("create", api.Kind_KIND_SECRET, "version: 1")
	await("create", api.Kind_KIND_SECRET_VERSION, "version: 1")
	do[*api.RotateSecretReply](t, w.Server, "RotateSecret", &api.RotateSecretRequest{Reference: "db", Data: []byte("two")})
	await("update", api.Kind_KIND_SECRET, "version: 2")
	if e := next(); e.Kind != api.Kind_KIND_SECRET_VERSION || e.Name != "db" || e.Detail != "version: 2" {
		t.Errorf("event of a version = %v", e)
	}
	do[*api.RemoveNodeReply](t, w.Server, "RemoveNode", &api.RemoveNodeRequest{Reference: "box", Compromised: true})
	await("remove", api.Kind_KIND_NODE, "")
	await("create", api.Kind_KIND_TOMBSTONE, "compromised: true")
	if err := stop(); err != nil {
		t.Errorf("Events after the caller left = %v", err)
	}

	for _, c := range []struct {
		req  *api.EventsRequest
		code warden.Code
	}{{&api.EventsRequest{SinceIndex: 1}, warden.CodeUnsupported}, {&api.EventsRequest{Kinds: []api.Kind{77}}, warden.CodeInvalid}} {
		err := w.Events(c.req, &stream[api.Event]{ctx: asRoot(t.Context())})
		wantError(t, fmt.Sprintf("Events(%v)", c.req), api.FromError(err), c.code)
	}
	_, _, ended := watch(t, w)
	w.store.Close(t.Context())
	wantError(t, "Events of a manager that stops", api.FromError(<-ended), warden.CodeUnavailable)
}

// A caller that reads too slowly is told to list again.
func TestEventsResync(t *testing.T) {
	var records []store.Record
	for range warden.WatchKeysMax + 1 {
		x := storetest.Token(api.Role_ROLE_WORKER)
		x.ExpiresNs = 1
		records = append(records, x)
	}
	w := newWorld(t, records...)
	slow, events := make(chan struct{}), make(chan *api.Event)
	ctx, cancel := context.WithCancel(asRoot(t.Context()))
	defer cancel()
	go w.Events(&api.EventsRequest{Kinds: []api.Kind{api.Kind_KIND_TOKEN, api.Kind_KIND_ZONE}}, &stream[api.Event]{ctx: ctx, send: func(e *api.Event) error {
		<-slow
		events <- proto.Clone(e).(*api.Event)
		return nil
	}})
	for {
		do[*api.ChangeReply](t, w.Server, "CreateZone", &api.CreateZoneRequest{Name: "touch" + warden.NewID()})
		select {
		case slow <- struct{}{}: // the stream is there, and waits
		case <-time.After(50 * time.Millisecond):
			continue
		}
		break
	}
	for batch := range slices.Chunk(w.store.View().Tokens(), warden.CommandOpsMax) {
		var ops []*api.Operation
		for _, x := range batch {
			ops = append(ops, store.Delete(x))
		}
		storetest.Propose(t, w.store, ops...)
	}
	close(slow)
	for e := range events {
		if e.Action == "resync" {
			break
		}
		if e.Kind != api.Kind_KIND_ZONE {
			t.Fatalf("event = %v, want a resync", e)
		}
	}
}

func TestListTooLarge(t *testing.T) {
	records := []store.Record{storetest.Secret("small")}
	for i := range 6 {
		x := storetest.Secret(fmt.Sprint("big", i))
		x.Labels = map[string]string{"a": strings.Repeat("x", warden.MessageMax/5)}
		records = append(records, x)
	}
	w := newWorld(t, records...)
	_, err := call(t.Context(), w.Server, "List", &api.ListRequest{Kind: api.Kind_KIND_SECRET})
	wantError(t, "List of too much", err, warden.CodeTooLarge, "name the ones")
	do[*api.ListReply](t, w.Server, "List", &api.ListRequest{Kind: api.Kind_KIND_SECRET, References: []string{"small"}})
}

// I10: nothing that a caller can read has a secret in it, nor has the log.
func TestI10NothingSecretLeaves(t *testing.T) {
	w := newWorld(t)
	var out strings.Builder
	show := func(m proto.Message) {
		raw, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		out.WriteString(prototext.Format(m))
		out.Write(raw)
	}
	next, stop, _ := watch(t, w)
	const value = "planted-secret-value-8f3a"
	for _, name := range []string{"a", "b", "a"} { // the third is refused
		if r, err := call(t.Context(), w.Server, "CreateSecret", &api.CreateSecretRequest{Name: name, Data: []byte(value)}); err != nil {
			out.WriteString(err.Error() + warden.HintOf(err))
		} else {
			show(r.(proto.Message))
		}
	}
	for _, bad := range []*api.CreateSecretRequest{{Name: "BAD", Data: []byte(value)}, {Name: "c", Data: []byte(value), Zones: []string{"nowhere"}}} {
		_, err := call(t.Context(), w.Server, "CreateSecret", bad)
		out.WriteString(err.Error() + warden.HintOf(err))
	}
	_, err := call(t.Context(), w.Server, "CreateService", task(func(s *api.TaskSpec) { s.Env = []string{"1A=" + value} }))
	out.WriteString(err.Error() + warden.HintOf(err))
	token := do[*api.CreateTokenReply](t, w.Server, "CreateToken", &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER})
	parts := strings.Split(token.Token, "-")
	do[*api.ChangeReply](t, w.Server, "CreateZone", &api.CreateZoneRequest{Name: "last"})
	for e := next(); e.Name != "last"; e = next() {
		show(e)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	for _, k := range kinds {
		show(do[*api.ListReply](t, w.Server, "List", &api.ListRequest{Kind: k}))
		show(do[*api.ListReply](t, w.Server, "List", &api.ListRequest{Kind: k, Local: true}))
	}
	show(do[*api.StatusReply](t, w.Server, "Status", &api.StatusRequest{}))
	out.WriteString(w.log.String())

	v := w.store.View()
	planted := map[string][]byte{
		"a secret's value": []byte(value), "a token's secret": []byte(parts[len(parts)-2]), "a token's key": v.Token(token.Id).Key,
		"the keyset": w.keyset[len(w.keyset)-40 : len(w.keyset)-10], "the issuing key": []byte("sealed"),
	}
	for _, s := range v.Secrets() {
		sv := v.SecretVersion(s.Id, 1)
		planted["a wrapped key"], planted["a ciphertext"] = sv.WrappedKey[8:], sv.Ciphertext[8:]
	}
	all := out.String()
	for what, secret := range planted {
		for _, spelt := range []string{string(secret), hex.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret), strings.Trim(fmt.Sprintf("%q", secret), `"`)} {
			if strings.Contains(strings.ReplaceAll(all, "sealed under", ""), spelt) {
				t.Errorf("%s is in what a caller or the log's reader sees", what)
			}
		}
	}
	for _, want := range []string{"changed by request", "refused a request", "request_id=", "subject=uid:0", "decision=allow"} {
		if !strings.Contains(w.log.String(), want) {
			t.Errorf("the log has no %q", want)
		}
	}
}
