package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"warden"
	"warden/api"
)

var update = flag.Bool("update", false, "write the golden files")

var testNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func before(d time.Duration) int64 { return testNow.Add(-d).UnixNano() }

// golden compares with testdata/golden/NAME, or writes it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

func testNodes() ([]*api.Node, []*api.NodeState) {
	m, w := api.Role_ROLE_MANAGER, api.Role_ROLE_WORKER
	description := &api.NodeDescription{Version: "1.0.0", Os: "linux", Arch: "amd64", NanoCpus: 2e9, MemoryBytes: 4 << 30, Executor: "process", SecretMounts: "detached",
		EngineLabels: map[string]string{"gpu": "no"}, Hostname: "m1"}
	nodes := []*api.Node{
		{Id: "w2" + strings.Repeat("d", 23), Hostname: "w2\x1b[31m", Role: w, DesiredRole: w, Zone: "pci", Availability: api.Availability_AVAILABILITY_PAUSE, Ip: "192.0.2.5"},
		{Id: "m1" + strings.Repeat("a", 23), Meta: &api.Meta{Version: 4, Index: 12, CreatedNs: before(time.Hour), UpdatedNs: before(time.Minute)}, Hostname: "m1", Role: m, DesiredRole: m,
			Zone: "default", Availability: api.Availability_AVAILABILITY_DRAIN, Address: "192.0.2.1:2377", Description: description, LeafNotAfterNs: testNow.Add(90 * 24 * time.Hour).UnixNano(),
			KeyHash: []byte{0xab, 0xcd}, LeafRole: m, LeafZone: "default", LeafGeneration: 1, Labels: map[string]string{"rack": "1"}},
		{Id: "m2" + strings.Repeat("b", 23), Hostname: "m2", Role: m, DesiredRole: m, Zone: "default", Availability: api.Availability_AVAILABILITY_DRAIN},
		{Id: "m3" + strings.Repeat("c", 23), Hostname: "m3", Role: m, DesiredRole: w, Zone: "default", Availability: api.Availability_AVAILABILITY_ACTIVE},
	}
	states := []*api.NodeState{
		{NodeId: nodes[1].Id, Liveness: api.Liveness_LIVENESS_READY, Leader: true, Reachable: true, Raft: "voter", LockState: "sealed"},
		{NodeId: nodes[0].Id, Liveness: api.Liveness_LIVENESS_DOWN, Message: "no session for 20s"},
	}
	return nodes, states
}

func testTasks() []*api.Task {
	task := func(id string, slot uint64, age time.Duration, desired, state api.TaskState, node, message, failure string, exit int32) *api.Task {
		return &api.Task{Id: id + strings.Repeat("t", 23), Meta: &api.Meta{CreatedNs: before(age), UpdatedNs: before(age)}, ServiceId: "svc", ServiceName: "web", Slot: slot, NodeId: node,
			DesiredState: desired, Spec: &api.TaskSpec{Image: "host", Zone: "pci"}, Status: &api.TaskStatus{State: state, Message: message, Error: failure, ExitCode: exit, TimeNs: before(age)}}
	}
	run, stop := api.TaskState_TASK_RUNNING, api.TaskState_TASK_SHUTDOWN
	return []*api.Task{
		task("t1", 1, time.Hour, stop, api.TaskState_TASK_FAILED, "w2"+strings.Repeat("d", 23), "ended", "", 3),
		task("t2", 1, time.Minute, run, run, "w2"+strings.Repeat("d", 23), "started", "", 0),
		task("t3", 2, 10*time.Second, run, api.TaskState_TASK_PENDING, "", `no suitable node (2 nodes not in zone "pci")`, "", 0),
		task("t4", 1, 2*time.Hour, stop, api.TaskState_TASK_REJECTED, "gone"+strings.Repeat("g", 21), "", "no such program\n\x1b[2J", 0),
	}
}

// TestTables shows each list as users see it.
func TestTables(t *testing.T) {
	nodes, states := testNodes()
	names := map[string]string{nodes[0].Id: nodes[0].Hostname}
	var out bytes.Buffer
	show := func(name string, l listing, formats ...string) {
		for _, format := range append([]string{""}, formats...) {
			fmt.Fprintf(&out, "# %s %s\n", name, format)
			if err := l.write(&out, format); err != nil {
				t.Errorf("%s: write(%q) = %v", name, format, err)
			}
		}
	}
	show("node ls", nodeListing(nodes, states, nil, nodes[1].Id, false), "table {{.Hostname}}\\t{{.Role}}\\t{{.Self}}", "{{.Hostname}}", "json")
	show("service ps", taskListing(testTasks(), names, nil, nil, &listFlags{}, testNow))
	show("service ps --format", taskListing(testTasks(), names, nil, nil, &listFlags{format: "x", noTrunc: true}, testNow), "{{.ID}} {{.Name}} {{.UpToDate}}")
	services := []*api.Service{
		{Id: "svc", Meta: meta(before(time.Hour)), Spec: &api.ServiceSpec{Name: "web", Replicas: 2, Labels: map[string]string{"b": "2", "a": "1"}, Task: &api.TaskSpec{Image: "host", Zone: "pci"}}},
		{Id: strings.Repeat("s", 25), Spec: &api.ServiceSpec{Name: "api", Task: &api.TaskSpec{Image: "host", Zone: "default"}}},
	}
	none := func(string) uint64 { return 0 }
	show("service ls", serviceListing(services, testTasks(), none, nil, &listFlags{}, testNow), "table {{.Name}}\t{{.Labels}}\t{{.CreatedAt}}\t{{.UpToDate}}")
	rolling := []*api.Service{api.Clone(services[0]), services[1]}
	rolling[0].Spec.Task.Image = "new"
	halfway := testTasks()
	halfway[2].Spec = rolling[0].Spec.Task
	show("service ls while a service is updated", serviceListing(rolling, halfway, none, nil, &listFlags{}, testNow))
	show("service ps while a service is updated", taskListing(halfway, names, wanted(rolling, none), nil, &listFlags{}, testNow))
	show("secret ls", secretListing([]*api.Secret{
		{Id: strings.Repeat("q", 25), Meta: meta(before(48 * time.Hour)), Name: "zz", Zones: []string{"pci", "default"}, CurrentVersion: 3},
		{Id: strings.Repeat("r", 25), Meta: meta(before(5 * time.Second)), Name: "db", CurrentVersion: 1},
		{Id: strings.Repeat("s", 25), Meta: meta(before(5 * time.Second)), Name: "popular", CurrentVersion: 9},
	}, []*api.SecretUse{
		{SecretId: strings.Repeat("q", 25), Version: 2, Tasks: 1},
		{SecretId: strings.Repeat("q", 25), Version: 3, Current: true},
		{SecretId: strings.Repeat("r", 25), Version: 1, Current: true, Services: []string{"web"}, Tasks: 3},
		{SecretId: strings.Repeat("s", 25), Version: 8, Services: []string{"e", "a"}},
		{SecretId: strings.Repeat("s", 25), Version: 9, Services: []string{"a", "b", "c"}},
	}, nil, testNow))
	show("zone ls", zoneListing([]*api.Zone{{Id: strings.Repeat("z", 25), Meta: meta(before(time.Hour)), Name: "pci"}}, nil, testNow), "{{upper .Name}} {{json .}}")
	show("swarm token ls", tokenListing([]*api.Token{
		{Id: "aaa", Role: api.Role_ROLE_WORKER, ExpiresNs: before(time.Minute), Meta: meta(before(time.Hour))},
		{Id: "bbb", Role: api.Role_ROLE_WORKER, ExpiresNs: before(-time.Minute), UsesMax: 2, Uses: 2, Zone: "pci", Hostname: "w1", Cidr: "192.0.2.0/24"},
		{Id: "ccc", Role: api.Role_ROLE_MANAGER, ExpiresNs: before(-time.Hour), RevokedNs: 1},
		{Id: "ddd", Role: api.Role_ROLE_MANAGER, ExpiresNs: before(-time.Hour)},
	}, nil, testNow))
	golden(t, "tables.txt", out.Bytes())
}

func TestInspectOutput(t *testing.T) {
	nodes, states := testNodes()
	task := testTasks()[1]
	task.Spec.Secrets = []*api.SecretReference{{SecretId: "sid", SecretName: "db", Version: 2, Target: "password", Mode: 0o400}}
	task.Spec.StopGraceNs = int64(10 * time.Second)
	task.Spec.Restart = api.RestartCondition_RESTART_ON_FAILURE
	var out bytes.Buffer
	if err := writeObjects(&out, []object{nodeView(nodes[1], states[0]), taskView(task)}, ""); err != nil {
		t.Fatal(err)
	}
	if !json.Valid(out.Bytes()) {
		t.Error("inspect prints no valid JSON")
	}
	golden(t, "inspect.json", out.Bytes())

	out.Reset()
	if err := writeObjects(&out, nil, ""); err != nil || out.String() != "[]\n" {
		t.Errorf("writeObjects(nothing) = %q, %v, want an empty array", out.String(), err)
	}
	for _, format := range []string{"{{.Nonsense}}", "{{.ID", "{{.ID.Deeper}}", "{{nope .}}"} {
		if err := writeObjects(&out, []object{taskView(task)}, format); warden.CodeOf(err) != warden.CodeUsage {
			t.Errorf("writeObjects(%q) = %v, want usage", format, err)
		}
	}
}

// TestInspectShowsNothingSecret (I10): whatever a record holds, its bytes fields (keys, sealed values, certificates) do not appear, but
// for the hashes of public keys; every other field does, so that a new one is not forgotten.
func TestInspectShowsNothingSecret(t *testing.T) {
	for name, c := range map[string]struct {
		message proto.Message
		view    func(proto.Message) object
	}{
		"node": {&api.Node{}, func(m proto.Message) object { return nodeView(m.(*api.Node), &api.NodeState{}) }},
		"zone": {&api.Zone{}, func(m proto.Message) object { return zoneView(m.(*api.Zone)) }},
		"secret use": {&api.SecretUse{}, func(m proto.Message) object {
			return secretView(&api.Secret{Id: m.(*api.SecretUse).GetSecretId()}, []*api.SecretUse{m.(*api.SecretUse)})
		}},
		"secret":  {&api.Secret{}, func(m proto.Message) object { return secretView(m.(*api.Secret), nil) }},
		"service": {&api.Service{}, func(m proto.Message) object { return serviceView(m.(*api.Service), api.Rollout{}) }},
		"task":    {&api.Task{}, func(m proto.Message) object { return taskView(m.(*api.Task)) }},
	} {
		marks := map[string]string{}
		fill(c.message.ProtoReflect(), "", marks)
		var out bytes.Buffer
		if err := writeObjects(&out, []object{c.view(c.message)}, ""); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out.String(), "CANARY") {
			t.Errorf("inspect of a %s shows bytes:\n%s", name, out.String())
		}
		for field, mark := range marks {
			if !strings.Contains(out.String(), mark) {
				t.Errorf("inspect of a %s does not show %s", name, field)
			}
		}
	}
}

// fill sets every field of a message to a mark of its own, and returns the marks of those that can be found in text.
func fill(m protoreflect.Message, path string, marks map[string]string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		at, n := path+string(f.Name()), 1000+len(marks)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOf(fmt.Sprintf("key%d", n)).MapKey(), protoreflect.ValueOf("v"))
			marks[at] = fmt.Sprintf("key%d", n)
		case f.IsList() && f.Message() != nil:
			fill(m.Mutable(f).List().AppendMutable().Message(), at+".", marks)
		case f.IsList():
			m.Mutable(f).List().Append(protoreflect.ValueOf(fmt.Sprintf("text%d", n)))
			marks[at] = fmt.Sprintf("text%d", n)
		case f.Message() != nil:
			fill(m.Mutable(f).Message(), at+".", marks)
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOf(fmt.Sprintf("text%d", n)))
			marks[at] = fmt.Sprintf("text%d", n)
		case f.Kind() == protoreflect.EnumKind:
			m.Set(f, protoreflect.ValueOfEnum(2)) // a manager; enums are shown as words, which the golden files check
		case f.Kind() == protoreflect.BytesKind:
			m.Set(f, protoreflect.ValueOf([]byte("CANARY"+at)))
		case strings.HasSuffix(at, "_ns") && strings.Contains(at, "grace"), strings.HasSuffix(at, "_ns") && strings.Contains(at, "delay"):
			m.Set(f, protoreflect.ValueOf(int64(n)*int64(time.Second)))
			marks[at] = time.Duration(int64(n) * int64(time.Second)).String()
		case strings.HasSuffix(at, "_ns"):
			m.Set(f, protoreflect.ValueOf(int64(n)*int64(time.Hour)))
			marks[at] = stamp(int64(n) * int64(time.Hour))
		case f.Kind() == protoreflect.Int64Kind:
			m.Set(f, protoreflect.ValueOf(int64(n)))
			marks[at] = fmt.Sprint(n)
		case f.Kind() == protoreflect.Uint64Kind:
			m.Set(f, protoreflect.ValueOf(uint64(n)))
			marks[at] = fmt.Sprint(n)
		case f.Kind() == protoreflect.Uint32Kind:
			m.Set(f, protoreflect.ValueOf(uint32(n)))
			marks[at] = fmt.Sprint(n)
		case f.Kind() == protoreflect.Int32Kind:
			m.Set(f, protoreflect.ValueOf(int32(n)))
			marks[at] = fmt.Sprint(n)
		}
	}
}

func TestScreens(t *testing.T) {
	nodes, states := testNodes()
	var out bytes.Buffer
	show := func(name string, err error) {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		fmt.Fprintf(&out, "# ^ %s\n", name)
	}
	manager := &health{
		info: &api.InfoReply{State: "running", ClusterId: "cluster", NodeId: nodes[1].Id, Role: api.Role_ROLE_MANAGER, Zone: "default", Hostname: "m1", Version: "1.0.0", StateDir: "/var/lib/warden",
			Executor: "process", Address: "192.0.2.1:2377", SessionManager: nodes[1].Id, SessionSinceNs: before(time.Hour), Tasks: []string{"a", "b"},
			LeafSubject: "CN=m1,O=cluster,OU=manager", LeafNotAfterNs: testNow.Add(48 * time.Hour).UnixNano()},
		cluster: &api.StatusReply{LeaderId: nodes[1].Id, LeaderHostname: "m1", AppliedIndex: 11, CommitIndex: 12, Autolock: true, Managers: 3, ManagersReachable: 1, Workers: 1, TasksRunning: 1,
			TasksWanted: 2, Services: 1, Secrets: 4, Nodes: states, Unwell: []string{"2 managers do not answer"}, Certificates: []string{"m1: 48 hours left"}, Notes: []string{"old-key: m2"},
			Problems: []*api.TaskProblem{{TaskId: "t3", ServiceName: "web", Slot: 2, State: "pending", Reason: "no suitable node"}, {TaskId: "t1", ServiceName: "web", Slot: 1, State: "failed"}}},
		nodes: nodes,
	}
	show("status of a manager", manager.write(&out, testNow))
	worker := &health{info: &api.InfoReply{State: "running", NodeId: nodes[0].Id, Role: api.Role_ROLE_WORKER, Zone: "pci", Hostname: "w2", LeafNotAfterNs: before(time.Hour)}}
	show("status of a lost worker", worker.write(&out, testNow))
	early := &health{info: &api.InfoReply{State: "running", NodeId: nodes[0].Id, Role: api.Role_ROLE_WORKER, Zone: "pci", Hostname: "w2", SessionManager: nodes[1].Id,
		SessionSinceNs: before(time.Minute), LeafNotBeforeNs: testNow.Add(time.Hour).UnixNano(), LeafNotAfterNs: testNow.Add(48 * time.Hour).UnixNano()}}
	show("status of a worker whose clock is behind", early.write(&out, testNow))
	locked := &health{info: &api.InfoReply{State: "locked", NodeId: nodes[1].Id, Hostname: "m1", UnlockKeyId: "key0000001"}}
	show("status of a locked manager", locked.write(&out, testNow))
	mute := &health{info: &api.InfoReply{State: "running", Role: api.Role_ROLE_MANAGER, NodeId: nodes[1].Id, Hostname: "m1"}, clusterErr: warden.Errorf(warden.CodeTimeout, "asking", "no answer")}
	show("status of a manager that does not answer", mute.write(&out, testNow))
	show("node rm of a manager", writeRemoval(&out, &api.RemoveNodeReply{Id: nodes[2].Id, Hostname: "m2", Role: api.Role_ROLE_MANAGER, AllSecrets: true,
		Exposures: []*api.Exposure{{SecretName: "db", Version: 1, FirstNs: before(time.Hour), LastNs: before(time.Minute)}},
		Done:      []string{"all join tokens were revoked", "the cluster keyset was rotated"}, Todo: []string{"give every secret a new value"}}, false, false))
	show("node rm of a worker that held nothing", writeRemoval(&out, &api.RemoveNodeReply{Id: nodes[0].Id, Hostname: "w2", Role: api.Role_ROLE_WORKER}, true, false))
	show("node rm", writeRemoval(&out, &api.RemoveNodeReply{Id: nodes[0].Id, Hostname: "w2", Role: api.Role_ROLE_WORKER}, false, false))
	show("swarm init", writeInit(&out, &api.InitReply{NodeId: nodes[1].Id}, nil))
	show("swarm init --autolock", writeInit(&out, &api.InitReply{NodeId: nodes[1].Id, UnlockKeyId: "key0000001"}, []byte(fakeUnlockKey)))
	show("swarm join-token", writeToken(&out, &api.CreateTokenRequest{Role: api.Role_ROLE_WORKER}, &api.CreateTokenReply{Id: "tok", Token: fakeToken, ExpiresNs: before(-time.Hour)}, testNow))
	golden(t, "screens.txt", out.Bytes())

	for name, want := range map[*health]warden.Code{manager: warden.CodeUnavailable, worker: warden.CodeUnavailable, locked: warden.CodeLocked, mute: warden.CodeUnavailable,
		{info: &api.InfoReply{State: "running", Role: api.Role_ROLE_WORKER, SessionManager: "m"}}: ""} {
		if err := name.verdict(testNow); warden.CodeOf(err) != want {
			t.Errorf("verdict(%v) = %v, want %q", name.info, err, want)
		}
	}
}

func TestReasons(t *testing.T) {
	want := []string{"failed: exit code 3", `pending: no suitable node (2 nodes not in zone "pci")`, "rejected: no such program\n\x1b[2J"}
	if got := reasons(append(testTasks(), &api.Task{ServiceId: "other", Status: &api.TaskStatus{Error: "x"}}), "svc"); strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("reasons = %q, want %q", got, want)
	}
}

// TestManagerStatus: who is shown as reachable counts towards a majority.
func TestManagerStatus(t *testing.T) {
	manager := &api.Node{Role: api.Role_ROLE_MANAGER, DesiredRole: api.Role_ROLE_MANAGER}
	for want, st := range map[string]*api.NodeState{
		"Leader":      {Leader: true, Reachable: true, Raft: "voter"},
		"Reachable":   {Reachable: true, Raft: "voter"},
		"Nonvoter":    {Reachable: true, Raft: "nonvoter"},
		"Unreachable": {Raft: "nonvoter"},
	} {
		if got := managerStatus(manager, st); got != want {
			t.Errorf("managerStatus(%v) = %q, want %q", st, got, want)
		}
	}
	worker := &api.Node{Role: api.Role_ROLE_WORKER, DesiredRole: api.Role_ROLE_WORKER}
	if got := managerStatus(worker, &api.NodeState{Reachable: true, Raft: "voter"}); got != "" {
		t.Errorf("a worker is shown as %q", got)
	}
}
