package api_test

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"warden/api"
)

func base() *api.TaskSpec {
	return &api.TaskSpec{Image: "host", Command: []string{"a", "b"}, Env: []string{"A=1", "B=2"}, Labels: map[string]string{"a": "b", "c": "d"}, Zone: "default",
		Constraints: []string{"node.role==worker"}, Resources: &api.Resources{ReserveNanoCpus: 1, ReserveMemoryBytes: 2, LimitNanoCpus: 3, LimitMemoryBytes: 4},
		Secrets: []*api.SecretReference{{SecretId: "s1", SecretName: "s", Version: 3, Target: "x", Uid: 1, Gid: 2, Mode: 0o440}, {SecretId: "s2", SecretName: "t", Version: 1, Target: "y"}},
		Restart: api.RestartCondition_RESTART_ANY, StopGraceNs: 1, RestartDelayNs: 2, RestartAttemptsMax: 3, Force: 1}
}

// Each field of a task's spec either counts as a change or does not, and has rows here.
func TestChanged(t *testing.T) {
	rows := []struct {
		field, name string
		change      func(*api.TaskSpec)
		want        bool
	}{
		{"", "nothing", func(*api.TaskSpec) {}, false},
		{"image", "other", func(s *api.TaskSpec) { s.Image = "web:2" }, true},
		{"command", "word added", func(s *api.TaskSpec) { s.Command = append(s.Command, "") }, true},
		{"command", "words in another order", func(s *api.TaskSpec) { s.Command = []string{"b", "a"} }, true},
		{"command", "none", func(s *api.TaskSpec) { s.Command = nil }, true},
		{"env", "other value", func(s *api.TaskSpec) { s.Env[0] = "A=2" }, true},
		{"env", "another order, which programs see", func(s *api.TaskSpec) { s.Env = []string{"B=2", "A=1"} }, true},
		{"labels", "other value", func(s *api.TaskSpec) { s.Labels["a"] = "x" }, true},
		{"labels", "one less", func(s *api.TaskSpec) { delete(s.Labels, "a") }, true},
		{"zone", "other", func(s *api.TaskSpec) { s.Zone = "pci" }, true},
		{"constraints", "other: the node says", func(s *api.TaskSpec) { s.Constraints = []string{"node.labels.a==b"} }, false},
		{"constraints", "none", func(s *api.TaskSpec) { s.Constraints = nil }, false},
		{"secrets", "other version", func(s *api.TaskSpec) { s.Secrets[0].Version = 4 }, true},
		{"secrets", "other secret", func(s *api.TaskSpec) { s.Secrets[0].SecretId = "s3" }, true},
		{"secrets", "other target", func(s *api.TaskSpec) { s.Secrets[0].Target = "z" }, true},
		{"secrets", "targets swapped", func(s *api.TaskSpec) { s.Secrets[0].Target, s.Secrets[1].Target = "y", "x" }, true},
		{"secrets", "other user", func(s *api.TaskSpec) { s.Secrets[0].Uid = 9 }, true},
		{"secrets", "other group", func(s *api.TaskSpec) { s.Secrets[0].Gid = 9 }, true},
		{"secrets", "other mode", func(s *api.TaskSpec) { s.Secrets[0].Mode = 0o400 }, true},
		{"secrets", "the default mode written out", func(s *api.TaskSpec) { s.Secrets[1].Mode = 0o400 }, false},
		{"secrets", "another order", func(s *api.TaskSpec) { s.Secrets[0], s.Secrets[1] = s.Secrets[1], s.Secrets[0] }, false},
		{"secrets", "one less", func(s *api.TaskSpec) { s.Secrets = s.Secrets[:1] }, true},
		{"resources", "none", func(s *api.TaskSpec) { s.Resources = nil }, true},
		{"resources", "reserved CPU", func(s *api.TaskSpec) { s.Resources.ReserveNanoCpus = 9 }, true},
		{"resources", "reserved memory", func(s *api.TaskSpec) { s.Resources.ReserveMemoryBytes = 9 }, true},
		{"resources", "limit of CPU", func(s *api.TaskSpec) { s.Resources.LimitNanoCpus = 9 }, true},
		{"resources", "limit of memory", func(s *api.TaskSpec) { s.Resources.LimitMemoryBytes = 9 }, true},
		{"restart", "other condition", func(s *api.TaskSpec) { s.Restart = api.RestartCondition_RESTART_NONE }, false},
		{"stop_grace_ns", "other", func(s *api.TaskSpec) { s.StopGraceNs = 9 }, false},
		{"restart_delay_ns", "other", func(s *api.TaskSpec) { s.RestartDelayNs = 9 }, false},
		{"restart_attempts_max", "other", func(s *api.TaskSpec) { s.RestartAttemptsMax = 9 }, false},
		{"force", "raised", func(s *api.TaskSpec) { s.Force++ }, true},
	}
	seen := map[string]bool{}
	for _, row := range rows {
		seen[row.field] = true
		s := base()
		row.change(s)
		if got := api.Changed(s, base()); got != row.want {
			t.Errorf("%s, %s: Changed() = %v, want %v", row.field, row.name, got, row.want)
		}
		if got := api.Changed(base(), s); got != row.want {
			t.Errorf("%s, %s: Changed() the other way round = %v, want %v", row.field, row.name, got, row.want)
		}
	}
	fields := base().ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		if name := string(fields.Get(i).Name()); !seen[name] {
			t.Errorf("does field %s count as a change? It has no row", name)
		}
	}
	empty := base()
	empty.Resources, empty.Labels, empty.Env = &api.Resources{}, map[string]string{}, []string{}
	none := base()
	none.Resources, none.Labels, none.Env = nil, nil, nil
	if api.Changed(empty, none) {
		t.Error("what is empty and what is absent are the same")
	}
}

func TestResolve(t *testing.T) {
	current := func(id string) uint64 { return map[string]uint64{"s1": 7, "s2": 9}[id] }
	s := base()
	if api.Resolve(s, current) != s {
		t.Error("a spec without followers is copied")
	}
	s.Secrets[1].Version = 0
	before := proto.CloneOf(s)
	got := api.Resolve(s, current)
	if v := []uint64{got.Secrets[0].Version, got.Secrets[1].Version}; v[0] != 3 || v[1] != 9 {
		t.Errorf("versions = %v, want the pinned 3 and the current 9", v)
	}
	if !proto.Equal(s, before) {
		t.Error("the service's own spec was changed")
	}
}

func TestRolloutOf(t *testing.T) {
	const running, shutdown = api.TaskState_TASK_RUNNING, api.TaskState_TASK_SHUTDOWN
	s := &api.Service{Id: "web", Spec: &api.ServiceSpec{Replicas: 6, Task: base()}}
	s.Spec.Task.Secrets[0].Version, s.Spec.Task.Restart = 0, api.RestartCondition_RESTART_ON_FAILURE
	task := func(version uint64, state, desired api.TaskState) *api.Task {
		x := &api.Task{ServiceId: "web", NodeId: "n", DesiredState: desired, Status: &api.TaskStatus{State: state}, Spec: base()}
		x.Spec.Secrets[0].Version = version
		return x
	}
	other := task(4, running, running)
	other.ServiceId = "other"
	tasks := []*api.Task{
		task(4, running, running), task(4, api.TaskState_TASK_STARTING, running), task(4, api.TaskState_TASK_COMPLETE, running), task(4, api.TaskState_TASK_FAILED, running),
		task(3, running, running), task(3, api.TaskState_TASK_PENDING, running), task(4, running, shutdown), other,
	}
	current := func(string) uint64 { return 4 }
	got := api.RolloutOf(s, tasks, current, nil)
	if want := (api.Rollout{Total: 6, Updated: 4, Running: 2, Done: 2}); got != want || got.Complete() {
		t.Errorf("RolloutOf() = %+v, want %+v", got, want)
	}
	got = api.RolloutOf(s, tasks[:1], current, func(*api.Task) bool { return false })
	if want := (api.Rollout{Total: 6, Running: 1}); got != want {
		t.Errorf("on nodes that do not fit: RolloutOf() = %+v, want %+v", got, want)
	}
	s.Spec.Replicas = 1
	if !api.RolloutOf(s, tasks[:1], current, nil).Complete() {
		t.Error("a service whose only task is the wanted one is not complete")
	}
}
