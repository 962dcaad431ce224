package api

import (
	"cmp"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
)

// Resolve returns the spec as a task that is made now gets it: a reference that follows its secret names the version that
// current returns for the secret's ID. The spec itself where nothing follows, else a copy. Pure.
func Resolve(spec *TaskSpec, current func(secretID string) uint64) *TaskSpec {
	follows := func(r *SecretReference) bool { return r.GetVersion() == 0 }
	if !slices.ContainsFunc(spec.GetSecrets(), follows) {
		return spec
	}
	spec = proto.CloneOf(spec)
	for _, r := range spec.GetSecrets() {
		if follows(r) {
			r.Version = current(r.GetSecretId())
		}
	}
	return spec
}

// Changed reports whether a task that has one spec must be replaced to become what the service wants; both are resolved. Image,
// command, environment, labels, zone, secrets, resources and force count. How a task is restarted and stopped does not: the
// service's word of today counts for tasks that run. Constraints do not either: a task stays while its node meets them, which
// the caller looks at. The order of secrets means nothing. Pure.
func Changed(want, has *TaskSpec) bool {
	if want == has {
		return false
	}
	w, h := want.GetResources(), has.GetResources()
	return want.GetImage() != has.GetImage() ||
		want.GetZone() != has.GetZone() ||
		want.GetForce() != has.GetForce() ||
		w.GetReserveNanoCpus() != h.GetReserveNanoCpus() ||
		w.GetReserveMemoryBytes() != h.GetReserveMemoryBytes() ||
		w.GetLimitNanoCpus() != h.GetLimitNanoCpus() ||
		w.GetLimitMemoryBytes() != h.GetLimitMemoryBytes() ||
		!slices.Equal(want.GetCommand(), has.GetCommand()) ||
		!slices.Equal(want.GetEnv(), has.GetEnv()) ||
		!maps.Equal(want.GetLabels(), has.GetLabels()) ||
		!sameSecrets(want.GetSecrets(), has.GetSecrets())
}

func sameSecrets(a, b []*SecretReference) bool {
	if len(a) != len(b) {
		return false
	}
	if slices.EqualFunc(a, b, sameSecret) {
		return true
	}
	byTarget := func(a, b *SecretReference) int { return cmp.Compare(a.GetTarget(), b.GetTarget()) } // no two have the same
	return slices.EqualFunc(slices.SortedFunc(slices.Values(a), byTarget), slices.SortedFunc(slices.Values(b), byTarget), sameSecret)
}

func sameSecret(a, b *SecretReference) bool {
	const modeDefault = 0o400
	return a.GetSecretId() == b.GetSecretId() && a.GetVersion() == b.GetVersion() && a.GetTarget() == b.GetTarget() &&
		a.GetUid() == b.GetUid() && a.GetGid() == b.GetGid() && cmp.Or(a.GetMode(), modeDefault) == cmp.Or(b.GetMode(), modeDefault)
}

// Rollout says how far a service's tasks are what it wants. It is derived from the records alone.
type Rollout struct {
	Total   int // slots that the service wants
	Updated int // slots whose task is the wanted one, whatever its state
	Running int // slots whose task runs, be it the wanted one or an older one
	Done    int // slots whose task is the wanted one and runs, or has done its work and is not started again
}

// Complete reports whether each slot has the wanted task, running or done.
func (r Rollout) Complete() bool { return r.Done >= r.Total }

// RolloutOf counts the service's tasks; those of other services and those told to stop are left out. current returns the current version
// of a secret, by ID. fits reports whether a placed task's node meets the service's constraints; nil where they do not matter:
// then a task whose constraints alone are older counts as updated. Pure.
func RolloutOf(s *Service, tasks []*Task, current func(secretID string) uint64, fits func(*Task) bool) Rollout {
	r := Rollout{Total: int(s.GetSpec().GetReplicas())}
	want := Resolve(s.GetSpec().GetTask(), current)
	for _, t := range tasks {
		if t.GetServiceId() != s.GetId() || t.GetDesiredState() != TaskState_TASK_RUNNING {
			continue
		}
		state := t.GetStatus().GetState()
		runs := state == TaskState_TASK_RUNNING
		if runs {
			r.Running++
		}
		if Changed(want, t.GetSpec()) || fits != nil && t.Holds() && !fits(t) {
			continue
		}
		r.Updated++
		if runs || Finished(want, t) {
			r.Done++
		}
	}
	return r
}

// Finished reports whether the task did its work, and the service's restart condition wants no other in its place. Pure.
func Finished(want *TaskSpec, t *Task) bool {
	return t.GetStatus().GetState() == TaskState_TASK_COMPLETE && t.GetStatus().GetExitCode() == 0 && want.GetRestart() != RestartCondition_RESTART_ANY
}
