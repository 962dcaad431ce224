package dispatcher

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/policy"
)

// setBytesMax is how many bytes of tasks and secrets one assignment set carries, but for the last item in it, which may go
// over: the largest possible set stays below warden.MessageMax.
const setBytesMax = 1 << 20

// view is what deciding about a node's assignment reads of the store; *store.View is one.
type view interface {
	Node(id string) *api.Node
	Zone(name string) *api.Zone
	Secret(id string) *api.Secret
	SecretVersion(secretID string, version uint64) *api.SecretVersion
	TasksByNode(id string) []*api.Task
}

// version names a secret version.
type version struct {
	secretID string
	number   uint64
}

// String returns the ID of the version's record.
func (v version) String() string { return fmt.Sprintf("%s@%d", v.secretID, v.number) }

func (v version) compare(w version) int {
	return cmp.Or(cmp.Compare(v.secretID, w.secretID), cmp.Compare(v.number, w.number))
}

// assignment is what a node has, or should have: tasks by ID, and the size in bytes of each secret version.
type assignment struct {
	zone    string
	tasks   map[string]*api.Task
	secrets map[version]int
}

func newAssignment(zone string) assignment {
	return assignment{zone: zone, tasks: map[string]*api.Task{}, secrets: map[version]int{}}
}

// refusal says why a task of the node is not sent to it.
type refusal struct{ taskID, reason string }

// wanted returns what the node should have by this view, and the tasks that it should not although they name it (I6).
// A secret version counts only while a task that has not ended, with desired state running, refers to it. An ended task stays
// until its record goes, so that its logs can be read, as far as there is room; an orphaned one was given up, and is wiped. broken are versions that
// could not be opened. A node whose leaf names another zone than its record gets nothing before its leaf is renewed. Pure.
func wanted(v view, nodeID, leafZone string, broken map[version]string) (assignment, []refusal) {
	node := v.Node(nodeID)
	want := newAssignment(node.GetZone())
	if node == nil || node.GetZone() != leafZone {
		return want, nil
	}
	declared := map[string]bool{}
	known := func(zone string) bool {
		is, asked := declared[zone]
		if !asked {
			is = v.Zone(zone) != nil
			declared[zone] = is
		}
		return is
	}
	var refused []refusal
	var ended []*api.Task
	for _, task := range v.TasksByNode(nodeID) {
		state := task.GetStatus().GetState()
		if task.GetNodeId() != nodeID || state == api.TaskState_TASK_ORPHANED {
			continue
		}
		if state.Ended() {
			ended = append(ended, task)
			continue
		}
		needs, reason := admit(v, node, task, known, broken)
		if reason != "" {
			refused = append(refused, refusal{task.GetId(), reason})
			continue
		}
		want.tasks[task.GetId()] = task
		maps.Copy(want.secrets, needs)
	}
	slices.SortFunc(ended, func(a, b *api.Task) int { // newest first: the node takes only so many
		return cmp.Or(cmp.Compare(b.GetMeta().GetIndex(), a.GetMeta().GetIndex()), cmp.Compare(a.GetId(), b.GetId()))
	})
	for _, task := range ended {
		if len(want.tasks) >= warden.AssignTasksMax {
			break
		}
		if task.GetDesiredState() == api.TaskState_TASK_RUNNING {
			task = api.Clone(task)
			task.DesiredState = api.TaskState_TASK_SHUTDOWN // whatever became of it on the node: it is not started again
		}
		if _, reason := admit(v, node, task, known, broken); reason == "" {
			want.tasks[task.GetId()] = task
		}
	}
	return want, refused
}

// admit returns the secret versions that the task needs on the node, or why it must not get there.
func admit(v view, node *api.Node, task *api.Task, known func(string) bool, broken map[version]string) (map[version]int, string) {
	if d := policy.TaskMayRun(task.GetSpec().GetZone(), node.GetZone(), known); !d.Allow {
		return nil, d.Reason
	}
	if task.GetDesiredState() != api.TaskState_TASK_RUNNING {
		return nil, "" // it is only told to stop
	}
	needs := map[version]int{}
	for _, ref := range task.GetSpec().GetSecrets() {
		ver := version{ref.GetSecretId(), ref.GetVersion()}
		secret, record := v.Secret(ver.secretID), v.SecretVersion(ver.secretID, ver.number)
		if secret == nil || record == nil {
			return nil, fmt.Sprintf("secret %s does not exist", ver)
		}
		if d := policy.SecretMayEnter(secret.GetZones(), node.GetZone(), known); !d.Allow {
			return nil, fmt.Sprintf("secret %s: %s", ver, d.Reason)
		}
		if why, bad := broken[ver]; bad {
			return nil, fmt.Sprintf("secret %s can't be opened: %s", ver, why)
		}
		needs[ver] = int(min(record.GetSizeBytes(), warden.SecretBytesMax))
	}
	return needs, ""
}

// change leads from one assignment towards another. The slices are sorted by ID.
type change struct {
	zone        string
	dropTasks   []string
	dropSecrets []version
	addSecrets  []version
	addTasks    []*api.Task
	more        bool // a further change is needed after this one
}

func (c change) empty() bool {
	return len(c.dropTasks)+len(c.dropSecrets)+len(c.addSecrets)+len(c.addTasks) == 0
}

// diff returns the next change from have towards want: all that goes, and of what comes as much as fits into bytesMax, at
// least one item. A task comes with or after the secrets it needs. Applying changes until there is no more gives want. Pure.
func diff(have, want assignment, bytesMax int) change {
	c := change{zone: want.zone}
	for _, id := range slices.Sorted(maps.Keys(have.tasks)) {
		if want.tasks[id] == nil {
			c.dropTasks = append(c.dropTasks, id)
		}
	}
	for _, ver := range slices.SortedFunc(maps.Keys(have.secrets), version.compare) {
		if _, ok := want.secrets[ver]; !ok {
			c.dropSecrets = append(c.dropSecrets, ver)
		}
	}
	room := bytesMax
	added := map[version]bool{}
	for _, id := range slices.Sorted(maps.Keys(want.tasks)) {
		task := want.tasks[id]
		if old := have.tasks[id]; old.GetDesiredState() == task.GetDesiredState() && old != nil {
			continue
		}
		if task.GetDesiredState() == api.TaskState_TASK_RUNNING {
			for _, ref := range task.GetSpec().GetSecrets() {
				ver := version{ref.GetSecretId(), ref.GetVersion()}
				if _, ok := have.secrets[ver]; ok || added[ver] {
					continue
				}
				if room <= 0 {
					c.more = true
					return c.sorted()
				}
				added[ver] = true
				c.addSecrets = append(c.addSecrets, ver)
				room -= want.secrets[ver] + 64
			}
		}
		if room <= 0 {
			c.more = true
			return c.sorted()
		}
		c.addTasks = append(c.addTasks, task)
		room -= proto.Size(task)
	}
	return c.sorted()
}

func (c change) sorted() change {
	slices.SortFunc(c.addSecrets, version.compare)
	return c
}

// apply returns what a node that had `have` has after the change. sizes gives those of the secrets that came.
func (c change) apply(have assignment, sizes map[version]int) assignment {
	next := assignment{zone: c.zone, tasks: maps.Clone(have.tasks), secrets: maps.Clone(have.secrets)}
	for _, id := range c.dropTasks {
		delete(next.tasks, id)
	}
	for _, ver := range c.dropSecrets {
		delete(next.secrets, ver)
	}
	for _, ver := range c.addSecrets {
		next.secrets[ver] = sizes[ver]
	}
	for _, task := range c.addTasks {
		next.tasks[task.GetId()] = task
	}
	return next
}

// set returns the change as a message without the values of the secrets.
func (c change) set(sequence uint64, complete bool) *api.AssignmentSet {
	set := &api.AssignmentSet{Sequence: sequence, Complete: complete, PutTasks: c.addTasks, RemoveTasks: c.dropTasks, Zone: c.zone}
	for _, ver := range c.dropSecrets {
		set.RemoveSecrets = append(set.RemoveSecrets, ver.String())
	}
	return set
}
