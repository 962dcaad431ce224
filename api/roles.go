package api

import "google.golang.org/protobuf/proto"

// EffectiveRole returns the role that the record gives now: manager only where both the desired and the followed role say
// so, so that a demotion counts from its commit on.
func (n *Node) EffectiveRole() Role {
	if n.GetRole() == Role_ROLE_MANAGER && n.GetDesiredRole() == Role_ROLE_MANAGER {
		return Role_ROLE_MANAGER
	}
	return Role_ROLE_WORKER
}

// Clone returns a deep copy, which may be changed.
func Clone[M proto.Message](m M) M { return proto.Clone(m).(M) }

// Word returns the role as users write it.
func (r Role) Word() string {
	switch r {
	case Role_ROLE_MANAGER:
		return "manager"
	case Role_ROLE_WORKER:
		return "worker"
	}
	return "unspecified"
}

// Word returns the availability as users write it.
func (a Availability) Word() string {
	switch a {
	case Availability_AVAILABILITY_ACTIVE:
		return "active"
	case Availability_AVAILABILITY_PAUSE:
		return "pause"
	case Availability_AVAILABILITY_DRAIN:
		return "drain"
	}
	return "unspecified"
}

// Word returns the state as users write it.
func (s TaskState) Word() string {
	switch s {
	case TaskState_TASK_NEW:
		return "new"
	case TaskState_TASK_PENDING:
		return "pending"
	case TaskState_TASK_ASSIGNED:
		return "assigned"
	case TaskState_TASK_ACCEPTED:
		return "accepted"
	case TaskState_TASK_PREPARING:
		return "preparing"
	case TaskState_TASK_STARTING:
		return "starting"
	case TaskState_TASK_RUNNING:
		return "running"
	case TaskState_TASK_COMPLETE:
		return "complete"
	case TaskState_TASK_FAILED:
		return "failed"
	case TaskState_TASK_REJECTED:
		return "rejected"
	case TaskState_TASK_SHUTDOWN:
		return "shutdown"
	case TaskState_TASK_ORPHANED:
		return "orphaned"
	}
	return "unspecified"
}

// Ended reports whether the state is one that a task never leaves.
func (s TaskState) Ended() bool { return s >= TaskState_TASK_COMPLETE }

// Holds reports whether the task occupies its node: placed there and not ended.
func (t *Task) Holds() bool { return t.GetNodeId() != "" && !t.GetStatus().GetState().Ended() }
