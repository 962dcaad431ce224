package agent_test

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"warden"
	"warden/agent"
	"warden/api"
)

// TestAssignmentRules: a set that breaks one rule is refused with its code, and changes nothing.
func TestAssignmentRules(t *testing.T) {
	secretID := strings.Repeat("s", warden.IDLength)
	ref := func(target string) *api.SecretReference {
		return &api.SecretReference{SecretId: secretID, Version: 2, Target: target, Mode: 0o400}
	}
	edit := func(f func(*api.Task)) func(*api.AssignmentSet) {
		return func(s *api.AssignmentSet) { f(s.PutTasks[0]) }
	}
	for _, c := range []struct {
		name   string
		change func(*api.AssignmentSet)
		code   warden.Code
	}{
		{"nothing wrong", func(*api.AssignmentSet) {}, ""},
		{"sequence", func(s *api.AssignmentSet) { s.Sequence = 5 }, warden.CodeInvalid},
		{"no zone", func(s *api.AssignmentSet) { s.Zone = "" }, warden.CodeInvalid},
		{"other zone", func(s *api.AssignmentSet) { s.Zone = "pci" }, warden.CodeWrongZone},
		{"zone that the node's leaf does not name", func(s *api.AssignmentSet) { s.Zone, s.PutTasks[0].Spec.Zone = "pci", "pci" }, warden.CodeWrongZone},
		{"secret of another zone", func(s *api.AssignmentSet) { s.PutSecrets[0].Zones = []string{"a", "pci"} }, warden.CodeWrongZone},
		{"secret of this zone", func(s *api.AssignmentSet) { s.PutSecrets[0].Zones = []string{"pci", "default"} }, ""},
		{"task ID", edit(func(t *api.Task) { t.Id = "../../etc" }), warden.CodeInvalid},
		{"node", edit(func(t *api.Task) { t.NodeId = secretID }), warden.CodeForeign},
		{"desired state", edit(func(t *api.Task) { t.DesiredState = api.TaskState_TASK_COMPLETE }), warden.CodeInvalid},
		{"service name", edit(func(t *api.Task) { t.ServiceName = "a/b" }), warden.CodeInvalid},
		{"no specification", edit(func(t *api.Task) { t.Spec = nil }), warden.CodeInvalid},
		{"image", edit(func(t *api.Task) { t.Spec.Image = strings.Repeat("i", 5000) }), warden.CodeInvalid},
		{"words", edit(func(t *api.Task) { t.Spec.Command = make([]string, warden.CommandArgsMax+1) }), warden.CodeTooLarge},
		{"command", edit(func(t *api.Task) { t.Spec.Command = []string{strings.Repeat("c", warden.CommandBytesMax+1)} }), warden.CodeTooLarge},
		{"zero byte", edit(func(t *api.Task) { t.Spec.Command = []string{"a\x00b"} }), warden.CodeInvalid},
		{"environment", edit(func(t *api.Task) { t.Spec.Env = make([]string, warden.EnvMax+1) }), warden.CodeTooLarge},
		{"variable", edit(func(t *api.Task) { t.Spec.Env = []string{"=x"} }), warden.CodeInvalid},
		{"labels", edit(func(t *api.Task) { t.Spec.Labels = map[string]string{"": ""} }), warden.CodeInvalid},
		{"limit", edit(func(t *api.Task) { t.Spec.Resources = &api.Resources{LimitMemoryBytes: -1} }), warden.CodeInvalid},
		{"grace", edit(func(t *api.Task) { t.Spec.StopGraceNs = int64(warden.StopGraceMax) + 1 }), warden.CodeInvalid},
		{"target .", edit(func(t *api.Task) { t.Spec.Secrets[0].Target = "." }), warden.CodeInvalid},
		{"target ..", edit(func(t *api.Task) { t.Spec.Secrets[0].Target = ".." }), warden.CodeInvalid},
		{"target path", edit(func(t *api.Task) { t.Spec.Secrets[0].Target = "a/b" }), warden.CodeInvalid},
		{"target empty", edit(func(t *api.Task) { t.Spec.Secrets[0].Target = "" }), warden.CodeInvalid},
		{"target zero byte", edit(func(t *api.Task) { t.Spec.Secrets[0].Target = "a\x00" }), warden.CodeInvalid},
		{"same target", edit(func(t *api.Task) { t.Spec.Secrets = append(t.Spec.Secrets, ref("a")) }), warden.CodeInvalid},
		{"mode", edit(func(t *api.Task) { t.Spec.Secrets[0].Mode = 0o4400 }), warden.CodeInvalid},
		{"version", edit(func(t *api.Task) { t.Spec.Secrets[0].Version = 0 }), warden.CodeInvalid},
		{"references", edit(func(t *api.Task) { t.Spec.Secrets = make([]*api.SecretReference, warden.SecretRefsMax+1) }), warden.CodeTooLarge},
		{"task twice", func(s *api.AssignmentSet) { s.PutTasks = append(s.PutTasks, s.PutTasks[0]) }, warden.CodeInvalid},
		{"too many tasks", func(s *api.AssignmentSet) {
			for i := range warden.AssignTasksMax {
				task := api.Clone(s.PutTasks[0])
				task.Id = fmt.Sprintf("%025d", i)
				s.PutTasks = append(s.PutTasks, task)
			}
		}, warden.CodeTooLarge},
		{"removes an unknown task", func(s *api.AssignmentSet) { s.RemoveTasks = []string{secretID} }, warden.CodeInvalid},
		{"puts what it removes", func(s *api.AssignmentSet) {
			s.RemoveTasks = []string{put("", 'a').Id}
			s.PutTasks = append(s.PutTasks, put("host", 'a'))
		}, warden.CodeInvalid},
		{"another specification", func(s *api.AssignmentSet) { s.PutTasks = append(s.PutTasks, put("exit0", 'a')) }, warden.CodeInvalid},
		{"another time to stop", func(s *api.AssignmentSet) {
			s.PutTasks[0] = put("host", 'a')
			s.PutTasks[0].Spec.StopGraceNs = 7
		}, warden.CodeInvalid},
		{"another time to stop, now", func(s *api.AssignmentSet) {
			s.PutTasks[0] = put("host", 'a')
			s.PutTasks[0].Spec.StopGraceNs, s.PutTasks[0].DesiredState = 7, api.TaskState_TASK_SHUTDOWN
		}, ""},
		{"secret ID", func(s *api.AssignmentSet) { s.PutSecrets[0].SecretId = "x" }, warden.CodeInvalid},
		{"secret twice", func(s *api.AssignmentSet) { s.PutSecrets = append(s.PutSecrets, s.PutSecrets[0]) }, warden.CodeInvalid},
		{"secret too large", func(s *api.AssignmentSet) { s.PutSecrets[0].Data = make([]byte, warden.SecretBytesMax+1) }, warden.CodeTooLarge},
		{"removes an unknown secret", func(s *api.AssignmentSet) { s.RemoveSecrets = []string{secretID + "@2"} }, warden.CodeInvalid},
		{"managers", func(s *api.AssignmentSet) { s.Managers.Managers = make([]*api.ManagerInfo, warden.ManagersMax+1) }, warden.CodeTooLarge},
		{"manager's ID", func(s *api.AssignmentSet) { s.Managers.Managers[0].NodeId = "m" }, warden.CodeInvalid},
		{"manager's key", func(s *api.AssignmentSet) { s.Managers.Managers[0].KeyHashes = [][]byte{{1}} }, warden.CodeInvalid},
		{"issuers", func(s *api.AssignmentSet) { s.Managers.DistrustedIssuers = make([]byte, 31) }, warden.CodeInvalid},
	} {
		a := &agent.Assignment{NodeID: self, OwnZone: "default"}
		if err := a.Take(&api.AssignmentSet{Sequence: 1, Zone: "default", PutTasks: []*api.Task{put("host", 'a')}}); err != nil {
			t.Fatal(err)
		}
		task := put("host", 'b')
		task.Spec.Secrets = []*api.SecretReference{ref("a")}
		set := &api.AssignmentSet{Sequence: 2, Complete: true, Zone: "default", PutTasks: []*api.Task{task},
			PutSecrets: []*api.SecretMaterial{{SecretId: secretID, Version: 2, Data: []byte("v")}},
			Managers:   &api.ManagerList{Managers: []*api.ManagerInfo{{NodeId: self, Address: "192.0.2.1:2377", KeyHashes: [][]byte{make([]byte, 32)}}}}}
		c.change(set)
		err := a.Take(set)
		if warden.CodeOf(err) != c.code {
			t.Errorf("%s: Take = %v [%s], want [%s]", c.name, err, warden.CodeOf(err), c.code)
		}
		if err != nil && (a.Sequence != 1 || a.Complete || len(a.Tasks) != 1 || len(a.Secrets) != 0) {
			t.Errorf("%s: the refused set left %+v", c.name, a)
		}
	}
}

// TestAssignmentLaws: sets that a careful manager sends are taken, and sum up to what it meant; a task that was told to stop
// is never told to run.
func TestAssignmentLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, want := &agent.Assignment{NodeID: self, OwnZone: "default"}, map[string]*api.Task{}
		for n := range rapid.IntRange(1, 8).Draw(t, "sets") {
			set := &api.AssignmentSet{Sequence: uint64(n + 1), Zone: "default"}
			next := map[string]*api.Task{}
			for i := range 5 {
				task := put("host", 'a'+byte(i))
				old := want[task.Id]
				switch rapid.IntRange(0, 3).Draw(t, "what") {
				case 0:
					if old != nil {
						set.RemoveTasks = append(set.RemoveTasks, task.Id)
					}
					continue
				case 1:
					task.DesiredState = api.TaskState_TASK_SHUTDOWN
				case 2:
					if old.GetDesiredState() == api.TaskState_TASK_SHUTDOWN {
						bad := &api.AssignmentSet{Sequence: set.Sequence, Zone: "default", PutTasks: []*api.Task{task}}
						if err := a.Take(bad); warden.CodeOf(err) != warden.CodeInvalid {
							t.Fatalf("a stopped task was told to run: %v", err)
						}
						task = old
					}
				default:
					if old != nil {
						next[task.Id] = old
					}
					continue
				}
				set.PutTasks = append(set.PutTasks, task)
				next[task.Id] = task
			}
			if err := a.Take(set); err != nil {
				t.Fatal(err)
			}
			want = next
			if len(a.Tasks) != len(want) {
				t.Fatalf("has %v, want %v", a.Tasks, want)
			}
			for id, task := range want {
				if !proto.Equal(a.Tasks[id], task) {
					t.Fatalf("has %v, want %v", a.Tasks[id], task)
				}
			}
		}
	})
}
