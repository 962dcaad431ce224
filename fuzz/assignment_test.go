package fuzz_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/agent"
	"warden/api"
)

// FuzzAssignment gives a node two assignment sets of arbitrary bytes: whatever they are, it takes them whole or not at all,
// and what it has taken obeys the rules that the executor relies on.
func FuzzAssignment(f *testing.F) {
	id := func(c string) string { return strings.Repeat(c, warden.IDLength) }
	self := id("n")
	task := &api.Task{Id: id("t"), NodeId: self, ServiceName: "web", DesiredState: api.TaskState_TASK_RUNNING,
		Spec: &api.TaskSpec{Image: "host", Zone: "default", Command: []string{"sleep", "1"}, Env: []string{"A=b"},
			Secrets: []*api.SecretReference{{SecretId: id("s"), Version: 1, Target: "key", Mode: 0o400}}}}
	stop := api.Clone(task)
	stop.DesiredState = api.TaskState_TASK_SHUTDOWN
	first := &api.AssignmentSet{Sequence: 1, Complete: true, Zone: "default", PutTasks: []*api.Task{task},
		PutSecrets: []*api.SecretMaterial{{SecretId: id("s"), Version: 1, Data: []byte("v")}},
		Managers:   &api.ManagerList{Managers: []*api.ManagerInfo{{NodeId: id("m"), Address: "192.0.2.1:2377", KeyHashes: [][]byte{make([]byte, 32)}}}}}
	seconds := []*api.AssignmentSet{
		{Sequence: 2, Zone: "default", PutTasks: []*api.Task{stop}, RemoveSecrets: []string{id("s") + "@1"}},
		{Sequence: 2, Zone: "pci", RemoveTasks: []string{task.Id}},
		{Sequence: 2, Zone: "default"},
	}
	encode := func(set *api.AssignmentSet) []byte {
		b, err := proto.Marshal(set)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	for _, second := range seconds {
		a := &agent.Assignment{NodeID: self, OwnZone: "default"}
		if err := a.Take(first); err != nil {
			f.Fatalf("a valid seed was refused: %v", err)
		}
		if err := a.Take(second); err != nil {
			f.Fatalf("a valid seed was refused: %v", err)
		}
		f.Add(encode(first), encode(second))
	}
	f.Add([]byte{}, []byte{0xff})
	f.Fuzz(func(t *testing.T, b1, b2 []byte) {
		a := &agent.Assignment{NodeID: self, OwnZone: "default"}
		for _, b := range [][]byte{b1, b2} {
			set := &api.AssignmentSet{}
			if proto.Unmarshal(b, set) != nil {
				continue
			}
			before := *a
			if err := a.Take(set); err != nil {
				if a.Sequence != before.Sequence || a.Complete != before.Complete || a.Zone != before.Zone ||
					len(a.Tasks) != len(before.Tasks) || len(a.Secrets) != len(before.Secrets) {
					t.Fatalf("a refused set (%v) left its marks", err)
				}
				continue
			}
			if a.Sequence != before.Sequence+1 || warden.CheckName("zone", a.Zone) != nil {
				t.Fatalf("took sequence %d of zone %q after %d", a.Sequence, a.Zone, before.Sequence)
			}
			for key, task := range a.Tasks {
				checkTask(t, self, a.Zone, key, task)
			}
		}
	})
}

func checkTask(t *testing.T, self, zone, key string, task *api.Task) {
	if key != task.GetId() || !warden.ValidID(key) || task.GetNodeId() != self || task.GetSpec().GetZone() != zone {
		t.Fatalf("took task %v in zone %q", task, zone)
	}
	targets := map[string]bool{}
	for _, ref := range task.GetSpec().GetSecrets() {
		target := ref.GetTarget()
		if target == "" || target == "." || target == ".." || strings.ContainsAny(target, "/\x00") || targets[target] || ref.GetMode() > 0o777 {
			t.Fatalf("took target %q, mode %o", target, ref.GetMode())
		}
		targets[target] = true
	}
}
