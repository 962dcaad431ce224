package control

import (
	"fmt"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// report gathers a StatusReply.
type report struct{ *api.StatusReply }

// node counts one node and names what is wrong with it. state is nil where nobody knows.
func (r report) node(n *api.Node, state *api.NodeState, now time.Time) {
	name := fmt.Sprintf("%s (%s)", n.Hostname, n.Id)
	if n.EffectiveRole() == api.Role_ROLE_MANAGER {
		r.Managers++
		if state.GetReachable() {
			r.ManagersReachable++
		}
	} else {
		r.Workers++
		if state.GetLiveness() == api.Liveness_LIVENESS_READY {
			r.WorkersReady++
		}
	}
	if m := state.GetMessage(); m != "" {
		r.Unwell = append(r.Unwell, name+": "+m)
	}
	if l := state.GetLockState(); l == "old-key" {
		r.Notes = append(r.Notes, name+": sealed under an old unlock key")
	}
	if n.GetDescription().GetSecretMounts() == "bind" {
		r.Notes = append(r.Notes, name+": its kernel has no detached mounts; secrets are bind-mounted from a root-only tmpfs")
	}
	begin, end := time.Unix(0, n.LeafNotBeforeNs), time.Unix(0, n.LeafNotAfterNs)
	life := end.Sub(begin) - warden.LeafBackdate
	switch left := end.Sub(now); {
	case n.LeafNotAfterNs == 0:
	case left <= 0:
		r.expiring(name, "certificate expired at "+end.UTC().Format(time.RFC3339)+"; the node renews it when it comes back")
	case left < time.Duration(float64(life)*(1-nearExpiry)):
		r.expiring(name, "certificate ends in "+left.Round(time.Second).String()+" and was not renewed")
	}
}

func (r report) expiring(name, what string) {
	r.Certificates = append(r.Certificates, name+": "+what)
	r.Unwell = append(r.Unwell, name+": "+what)
}

// tasks counts what runs of what should, and says why the rest doesn't.
func (r report) tasks(v *store.View) {
	for _, sv := range v.Services() {
		r.TasksWanted += uint32(sv.Spec.GetReplicas())
	}
	for _, t := range v.Tasks() {
		if t.DesiredState != api.TaskState_TASK_RUNNING {
			continue
		}
		state := t.GetStatus().GetState()
		switch {
		case state == api.TaskState_TASK_RUNNING:
			r.TasksRunning++
			continue
		case state == api.TaskState_TASK_COMPLETE: // it ended well and is not to run again
			if r.TasksWanted > 0 {
				r.TasksWanted--
			}
			continue
		case len(r.Problems) >= problemsMax:
			continue
		}
		why := t.GetStatus().GetError()
		if why == "" {
			why = t.GetStatus().GetMessage()
		}
		r.Problems = append(r.Problems, &api.TaskProblem{
			TaskId: t.Id, ServiceName: t.ServiceName, Slot: t.Slot, State: state.Word(), Reason: why,
		})
	}
}

// problemsMax keeps status to one screen.
const problemsMax = 20
