package dispatcher

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"warden"
	"warden/api"
)

// fakeView is a state that a test draws.
type fakeView struct {
	nodes    map[string]*api.Node
	zones    map[string]bool
	secrets  map[string]*api.Secret
	versions map[version]*api.SecretVersion
	tasks    []*api.Task
}

func (v *fakeView) Node(id string) *api.Node { return v.nodes[id] }
func (v *fakeView) Zone(name string) *api.Zone {
	if !v.zones[name] {
		return nil
	}
	return &api.Zone{Name: name}
}
func (v *fakeView) Secret(id string) *api.Secret { return v.secrets[id] }
func (v *fakeView) SecretVersion(id string, n uint64) *api.SecretVersion {
	return v.versions[version{id, n}]
}
func (v *fakeView) TasksByNode(string) []*api.Task { return v.tasks } // of all nodes: wanted has to look

func drawView(t *rapid.T) *fakeView {
	v := &fakeView{nodes: map[string]*api.Node{}, zones: map[string]bool{"a": true, "b": rapid.Bool().Draw(t, "zone b")},
		secrets: map[string]*api.Secret{}, versions: map[version]*api.SecretVersion{}}
	zone := rapid.SampledFrom([]string{"a", "b", "c"})
	if rapid.IntRange(0, 9).Draw(t, "node gone") > 0 {
		v.nodes["n"] = &api.Node{Id: "n", Zone: zone.Draw(t, "node's zone")}
	}
	for i := range 4 {
		id := fmt.Sprint("s", i)
		if rapid.IntRange(0, 9).Draw(t, "secret gone") > 0 {
			v.secrets[id] = &api.Secret{Id: id, Zones: rapid.SliceOfN(zone, 0, 2).Draw(t, "secret's zones")}
			for n := range uint64(2) {
				v.versions[version{id, n + 1}] = &api.SecretVersion{SizeBytes: rapid.Uint64Range(0, 400).Draw(t, "size")}
			}
		}
	}
	for i := range rapid.IntRange(0, 8).Draw(t, "tasks") {
		task := &api.Task{Id: fmt.Sprint("t", i), NodeId: rapid.SampledFrom([]string{"n", "n", "n", "m"}).Draw(t, "task's node"),
			DesiredState: rapid.SampledFrom([]api.TaskState{api.TaskState_TASK_RUNNING, api.TaskState_TASK_RUNNING, api.TaskState_TASK_SHUTDOWN}).Draw(t, "desired"),
			Status:       &api.TaskStatus{State: rapid.SampledFrom([]api.TaskState{api.TaskState_TASK_ASSIGNED, api.TaskState_TASK_RUNNING, api.TaskState_TASK_FAILED}).Draw(t, "state")},
			Spec:         &api.TaskSpec{Zone: zone.Draw(t, "task's zone")}}
		for range rapid.IntRange(0, 3).Draw(t, "references") {
			task.Spec.Secrets = append(task.Spec.Secrets, &api.SecretReference{SecretId: fmt.Sprint("s", rapid.IntRange(0, 3).Draw(t, "secret")),
				Version: rapid.Uint64Range(1, 2).Draw(t, "version")})
		}
		v.tasks = append(v.tasks, task)
	}
	return v
}

func same(a, b assignment) bool {
	return maps.EqualFunc(a.tasks, b.tasks, func(x, y *api.Task) bool { return x.GetDesiredState() == y.GetDesiredState() }) &&
		slices.Equal(slices.SortedFunc(maps.Keys(a.secrets), version.compare), slices.SortedFunc(maps.Keys(b.secrets), version.compare))
}

// TestDiff: from any assignment to any other, in messages of any size, have + add − drop == want; a message leaves no task
// that is to run without its secrets, is within its bound but for the last item, and nothing is sent twice.
func TestDiff(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, _ := wantedIn(drawView(t), nil)
		want, _ := wantedIn(drawView(t), nil)
		// A task's specification never changes: the second view's task with a known ID gets the first's secrets.
		for id, task := range want.tasks {
			if old := have.tasks[id]; old != nil && old.GetDesiredState() == api.TaskState_TASK_RUNNING && !proto.Equal(old.GetSpec(), task.GetSpec()) {
				delete(have.tasks, id)
			}
		}
		bytesMax := rapid.IntRange(1, 2000).Draw(t, "bytes")
		for step := 0; ; step++ {
			c := diff(have, want, bytesMax)
			if c.empty() {
				if c.more || !same(have, want) {
					t.Fatalf("ended at %v, want %v", have, want)
				}
				return
			}
			if step > 40 {
				t.Fatal("no end")
			}
			bytes := 0
			for _, ver := range c.addSecrets {
				if _, ok := have.secrets[ver]; ok {
					t.Fatalf("secret %s sent twice", ver)
				}
				bytes += want.secrets[ver]
			}
			for _, task := range c.addTasks {
				bytes += proto.Size(task)
			}
			if bytes > bytesMax+500 {
				t.Fatalf("%d bytes, want %d", bytes, bytesMax)
			}
			have = c.apply(have, want.secrets)
			for _, task := range c.addTasks {
				for _, ref := range task.GetSpec().GetSecrets() {
					if _, ok := have.secrets[version{ref.GetSecretId(), ref.GetVersion()}]; !ok && task.GetDesiredState() == api.TaskState_TASK_RUNNING {
						t.Fatalf("task %s sent before secret %s", task.GetId(), ref.GetSecretId())
					}
				}
			}
			if !c.more && !same(have, want) {
				t.Fatalf("said to be the last step, but have %v, want %v", have, want)
			}
		}
	})
}

// wantedIn is wanted for a node "n" whose leaf names the zone of its record.
func wantedIn(v *fakeView, broken map[version]string) (assignment, []refusal) {
	return wanted(v, "n", v.nodes["n"].GetZone(), broken)
}

// TestI6Wanted: whatever the state says, a node should have only its own tasks of its own, declared zone, ended ones as ones to stop, and only the
// secrets that those of them that are to run refer to and that may enter that zone.
func TestI6Wanted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawView(t)
		broken := map[version]string{{"s0", 1}: "corrupt"}
		want, refused := wantedIn(v, broken)
		node := v.nodes["n"]
		needed := map[version]bool{}
		for _, task := range want.tasks {
			if node == nil || task.GetNodeId() != "n" || task.GetStatus().GetState() == api.TaskState_TASK_ORPHANED || task.GetSpec().GetZone() != node.GetZone() || !v.zones[node.GetZone()] {
				t.Fatalf("sends task %v to node %v", task, node)
			}
			if task.GetDesiredState() == api.TaskState_TASK_RUNNING {
				if task.GetStatus().GetState().Ended() {
					t.Fatalf("orders the ended task %v to run", task)
				}
				for _, ref := range task.GetSpec().GetSecrets() {
					needed[version{ref.GetSecretId(), ref.GetVersion()}] = true
				}
			}
		}
		for ver := range want.secrets {
			zones := v.secrets[ver.secretID].GetZones()
			if !needed[ver] || v.versions[ver] == nil || len(zones) > 0 && !slices.Contains(zones, node.GetZone()) || broken[ver] != "" {
				t.Fatalf("sends secret %s of zones %v", ver, zones)
			}
		}
		if len(needed) != len(want.secrets) {
			t.Fatalf("tasks need %v, sent are %v", needed, want.secrets)
		}
		live := 0
		for _, task := range v.tasks {
			if node != nil && task.GetNodeId() == "n" && !task.GetStatus().GetState().Ended() {
				live++
			}
		}
		sent := 0
		for _, task := range want.tasks {
			if !task.GetStatus().GetState().Ended() {
				sent++
			}
		}
		if live != sent+len(refused) {
			t.Fatalf("%d tasks are neither sent nor refused with a reason", live-sent-len(refused))
		}
		for _, r := range refused {
			if r.reason == "" {
				t.Fatalf("task %s is refused without a reason", r.taskID)
			}
		}
	})
}

// TestEndedTasksAsRoomAllows: they never push the assignment over what a node takes, and the newest stay.
func TestEndedTasksAsRoomAllows(t *testing.T) {
	v := &fakeView{nodes: map[string]*api.Node{"n": {Id: "n", Zone: "a"}}, zones: map[string]bool{"a": true}}
	for i := range warden.AssignTasksMax + 10 {
		task := &api.Task{Id: fmt.Sprint("t", i), Meta: &api.Meta{Index: uint64(i + 1)}, NodeId: "n", DesiredState: api.TaskState_TASK_RUNNING,
			Status: &api.TaskStatus{State: api.TaskState_TASK_FAILED}, Spec: &api.TaskSpec{Zone: "a"}}
		if i == 0 {
			task.Status.State = api.TaskState_TASK_RUNNING
		}
		v.tasks = append(v.tasks, task)
	}
	want, _ := wantedIn(v, nil)
	if len(want.tasks) != warden.AssignTasksMax || want.tasks["t0"] == nil || want.tasks["t1"] != nil || want.tasks[fmt.Sprint("t", warden.AssignTasksMax+9)] == nil {
		t.Errorf("%d tasks, want %d: the running one and the newest", len(want.tasks), warden.AssignTasksMax)
	}
}

// TestI6NothingBeforeTheLeafIsOfTheZone: a node that was moved is sent nothing while its leaf names the old zone.
func TestI6NothingBeforeTheLeafIsOfTheZone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawView(t)
		want, refused := wanted(v, "n", "elsewhere", nil)
		if len(want.tasks)+len(want.secrets)+len(refused) != 0 {
			t.Fatalf("sends %v, refuses %v", want, refused)
		}
	})
}
