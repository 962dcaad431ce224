package agent

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
)

// Bounds of what a manager may send besides those in package warden.
const (
	addressMax           = warden.HostnameMax + 6 // host:port
	keyHashesMax         = 2                      // current and next
	distrustedIssuersMax = 1024
	imageMax             = 4 << 10
	modeMax              = 0o777
	modeDefault          = 0o400
)

// Assignment is what one session has assigned to a node: the sum of its sets. The zero value but for NodeID is a session
// before its first set. Not safe for concurrent use.
//
// A session starts with one or more sets of which the last is marked complete: what none of them names ends on the node.
// Each later set changes that.
type Assignment struct {
	NodeID   string // this node's: tasks of another are refused
	OwnZone  string // in this node's own leaf: tasks of another zone, and secrets that may not enter it, are refused (I6)
	Sequence uint64 // of the last set taken
	Complete bool   // the complete set has been taken
	Zone     string
	Tasks    map[string]*api.Task // by ID
	Secrets  map[string]bool      // "<secret id>@<version>" of those that the node holds
}

// Take checks the set against what came before and adds it; on an error nothing is changed. Values of secrets are not kept.
// Errors: CodeInvalid, CodeTooLarge, CodeWrongZone, CodeForeign. Pure.
func (a *Assignment) Take(set *api.AssignmentSet) error {
	next, err := a.plus(set)
	if err != nil {
		return warden.Wrap(fmt.Sprintf("taking assignment set %d", set.GetSequence()), err)
	}
	*a = *next
	return nil
}

func (a *Assignment) plus(set *api.AssignmentSet) (*Assignment, error) {
	if set.GetSequence() != a.Sequence+1 {
		return nil, invalid("want set %d", a.Sequence+1)
	}
	if set.GetComplete() && a.Complete {
		return nil, invalid("a second complete set")
	}
	if err := warden.CheckName("zone", set.GetZone()); err != nil {
		return nil, err
	}
	next := &Assignment{NodeID: a.NodeID, OwnZone: a.OwnZone, Sequence: set.GetSequence(), Complete: a.Complete || set.GetComplete(), Zone: set.GetZone(),
		Tasks: map[string]*api.Task{}, Secrets: map[string]bool{}}
	for id, task := range a.Tasks {
		next.Tasks[id] = task
	}
	for id := range a.Secrets {
		next.Secrets[id] = true
	}
	if err := next.secrets(set); err != nil {
		return nil, err
	}
	if err := next.tasks(set); err != nil {
		return nil, err
	}
	return next, checkManagers(set.GetManagers())
}

func (a *Assignment) secrets(set *api.AssignmentSet) error {
	for _, id := range set.GetRemoveSecrets() {
		if !a.Secrets[id] {
			return invalid("removes a secret version that was not given")
		}
		delete(a.Secrets, id)
	}
	for _, m := range set.GetPutSecrets() {
		id := versionID(m.GetSecretId(), m.GetVersion())
		switch {
		case !warden.ValidID(m.GetSecretId()) || m.GetVersion() == 0:
			return invalid("a secret without a valid ID and version")
		case len(m.GetData()) > warden.SecretBytesMax:
			return tooLarge("the value of secret %s", id)
		case a.Secrets[id]:
			return invalid("secret %s is given twice", id)
		case len(m.GetZones()) > 0 && !slices.Contains(m.GetZones(), a.OwnZone):
			return warden.Errorf(warden.CodeWrongZone, "", "secret %s may not enter zone %q, which this node's certificate names", id, a.OwnZone)
		}
		a.Secrets[id] = true
	}
	if len(a.Secrets) > warden.SecretsMax {
		return tooLarge("the number of secret versions")
	}
	return nil
}

func (a *Assignment) tasks(set *api.AssignmentSet) error {
	touched := make(map[string]bool, len(set.GetRemoveTasks())+len(set.GetPutTasks()))
	for _, id := range set.GetRemoveTasks() {
		if a.Tasks[id] == nil {
			return invalid("removes a task that was not assigned")
		}
		delete(a.Tasks, id)
		touched[id] = true
	}
	for _, task := range set.GetPutTasks() {
		if err := a.checkTask(task); err != nil {
			return err
		}
		if touched[task.GetId()] {
			return invalid("task %s is named twice", task.GetId())
		}
		touched[task.GetId()] = true
		if old := a.Tasks[task.GetId()]; old != nil {
			if !sameSpec(old, task) {
				return invalid("task %s has another specification than before", task.GetId())
			}
			if old.GetDesiredState() > task.GetDesiredState() {
				return invalid("task %s was to stop already", task.GetId())
			}
		}
		a.Tasks[task.GetId()] = task
	}
	if len(a.Tasks) > warden.AssignTasksMax {
		return tooLarge("the number of tasks")
	}
	for _, task := range a.Tasks { // those of earlier sets too: the zone may have changed
		if zone := task.GetSpec().GetZone(); zone != a.Zone || zone != a.OwnZone {
			return warden.Errorf(warden.CodeWrongZone, "", "task %s is of zone %q, the node of %q, its certificate of %q", task.GetId(), zone, a.Zone, a.OwnZone)
		}
	}
	return nil
}

// sameSpec reports whether the specs are the same, but for the time to stop, which an order to stop may set anew.
func sameSpec(old, next *api.Task) bool {
	spec := old.GetSpec()
	if grace := next.GetSpec().GetStopGraceNs(); spec != nil && spec.GetStopGraceNs() != grace && next.GetDesiredState() == api.TaskState_TASK_SHUTDOWN {
		spec = proto.CloneOf(spec)
		spec.StopGraceNs = grace
	}
	return proto.Equal(spec, next.GetSpec())
}

// checkTask refuses a task that is not this node's or not well-formed.
func (a *Assignment) checkTask(task *api.Task) error {
	id, spec := task.GetId(), task.GetSpec()
	if !warden.ValidID(id) {
		return invalid("a task without a valid ID")
	}
	if task.GetNodeId() != a.NodeID {
		return warden.Errorf(warden.CodeForeign, "", "task %s is another node's", id)
	}
	if s := task.GetDesiredState(); s != api.TaskState_TASK_RUNNING && s != api.TaskState_TASK_SHUTDOWN {
		return invalid("task %s has no desired state that a node knows", id)
	}
	if err := warden.CheckName("service", task.GetServiceName()); err != nil {
		return err
	}
	if len(spec.GetImage()) == 0 || len(spec.GetImage()) > imageMax {
		return invalid("task %s: image", id)
	}
	if err := checkWords(spec); err != nil {
		return warden.Wrap("task "+id, err)
	}
	if r := spec.GetResources(); r.GetLimitNanoCpus() < 0 || r.GetLimitMemoryBytes() < 0 {
		return invalid("task %s: a negative limit", id)
	}
	if g := spec.GetStopGraceNs(); g < 0 || g > int64(warden.StopGraceMax) {
		return invalid("task %s: stop grace", id)
	}
	return warden.Wrap("task "+id, checkReferences(spec.GetSecrets()))
}

// checkWords bounds command, environment and labels.
func checkWords(spec *api.TaskSpec) error {
	if len(spec.GetCommand()) > warden.CommandArgsMax || total(spec.GetCommand()) > warden.CommandBytesMax {
		return tooLarge("the command")
	}
	if len(spec.GetEnv()) > warden.EnvMax {
		return tooLarge("the environment")
	}
	for _, e := range spec.GetEnv() {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" || len(e) > warden.EnvBytesMax {
			return invalid("an environment variable")
		}
	}
	for _, w := range [][]string{spec.GetCommand(), spec.GetEnv()} {
		for _, s := range w {
			if strings.ContainsRune(s, 0) {
				return invalid("a zero byte in command or environment")
			}
		}
	}
	if len(spec.GetLabels()) > warden.LabelsMax {
		return tooLarge("the number of labels")
	}
	for k, v := range spec.GetLabels() {
		if k == "" || len(k) > warden.LabelKeyMax || len(v) > warden.LabelValueMax {
			return invalid("a label")
		}
	}
	return nil
}

// checkReferences refuses references that name no version, or no plain file of their own.
func checkReferences(refs []*api.SecretReference) error {
	if len(refs) > warden.SecretRefsMax {
		return tooLarge("the number of secrets")
	}
	targets := make(map[string]bool, len(refs))
	for _, ref := range refs {
		target := ref.GetTarget()
		switch {
		case !warden.ValidID(ref.GetSecretId()) || ref.GetVersion() == 0:
			return invalid("a reference to a secret without a valid ID and version")
		case target == "" || len(target) > 255 || target == "." || target == ".." || strings.ContainsAny(target, "/\x00"):
			return invalid("the target of secret %s is not a plain file name", ref.GetSecretId())
		case targets[target]:
			return invalid("two secrets have the target %q", target)
		case ref.GetMode() > modeMax:
			return invalid("the mode of secret %s", ref.GetSecretId())
		}
		targets[target] = true
	}
	return nil
}

// checkManagers bounds the list; nil is a list that has not changed.
func checkManagers(list *api.ManagerList) error {
	if len(list.GetManagers()) > warden.ManagersMax {
		return tooLarge("the number of managers")
	}
	if n := len(list.GetDistrustedIssuers()); n%32 != 0 || n > 32*distrustedIssuersMax {
		return invalid("the list of distrusted issuers")
	}
	for _, m := range list.GetManagers() {
		if !warden.ValidID(m.GetNodeId()) || m.GetAddress() == "" || len(m.GetAddress()) > addressMax || len(m.GetKeyHashes()) > keyHashesMax {
			return invalid("a manager in the list")
		}
		for _, h := range m.GetKeyHashes() {
			if len(h) != 32 {
				return invalid("a key hash in the list of managers")
			}
		}
	}
	return nil
}

func versionID(secretID string, version uint64) string {
	return secretID + "@" + strconv.FormatUint(version, 10)
}

func total(words []string) (bytes int) {
	for _, w := range words {
		bytes += len(w)
	}
	return bytes
}

func invalid(format string, args ...any) error {
	return warden.Errorf(warden.CodeInvalid, "", format, args...)
}

func tooLarge(format string, args ...any) error {
	return warden.Errorf(warden.CodeTooLarge, "", format+" is over its bound", args...)
}
