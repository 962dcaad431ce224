package control

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
)

// Status answers from this replica; what only the leader's memory has, liveness above all, is asked of the leader, and where
// none answers the reply says so.
func (s *Server) Status(ctx context.Context, _ *api.StatusRequest) (*api.StatusReply, error) {
	st := s.cfg.Store
	v := st.View()
	c := v.Cluster()
	r := &api.StatusReply{
		ClusterId: s.cfg.ClusterID, NodeId: s.cfg.NodeID, LeaderId: st.Leader(), AppliedIndex: st.AppliedIndex(), CommitIndex: st.CommitIndex(),
		Autolock: c.GetAutolock(), Services: uint32(len(v.Services())), Secrets: uint32(len(v.Secrets())),
	}
	if n := v.Node(r.LeaderId); n != nil {
		r.LeaderHostname = n.Hostname
	}
	states, err := s.nodeStates(ctx, v)
	if err != nil {
		r.Unwell = append(r.Unwell, "no leader answers: "+err.Error())
		r.Notes = append(r.Notes, fmt.Sprintf("which nodes are up only the leader knows; all else is what this manager had at index %d", r.AppliedIndex))
	}
	r.Nodes = states
	if s.cfg.Facts != nil {
		r.Facts = s.cfg.Facts()
	}
	now := time.Now()
	var silent, down []string
	for i, n := range v.Nodes() {
		state := states[i]
		report{r}.node(n, state, now)
		switch manager := n.EffectiveRole() == api.Role_ROLE_MANAGER; {
		case manager && !state.Reachable:
			silent = append(silent, n.Hostname)
		case !manager && state.Liveness != api.Liveness_LIVENESS_READY:
			down = append(down, n.Hostname)
		}
	}
	if len(silent) > 0 && err == nil {
		r.Unwell = append(r.Unwell, fmt.Sprintf("%d of %d managers reachable, %d are needed for a majority; not %s", r.ManagersReachable, r.Managers, r.Managers/2+1, some(silent)))
	}
	if len(down) > 0 && err == nil {
		r.Unwell = append(r.Unwell, fmt.Sprintf("%d of %d workers ready; not %s", r.WorkersReady, r.Workers, some(down)))
	}
	if err == nil {
		r.Notes = append(r.Notes, rotations(v, states)...)
	}
	report{r}.tasks(v)
	if r.TasksWanted > r.TasksRunning {
		r.Unwell = append(r.Unwell, fmt.Sprintf("%d of %d tasks running", r.TasksRunning, r.TasksWanted))
	}
	if len(c.GetSealedRootKey()) > 0 {
		r.Notes = append(r.Notes, "the root CA key is in the replicated state")
	}
	if r.Managers > 0 && r.Managers%2 == 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%d managers bear the loss of no more than %d would: an odd number is better", r.Managers, r.Managers-1))
	}
	if !r.Autolock {
		r.Notes = append(r.Notes, "autolock is off: the disk of a manager opens by itself")
	}
	return r, nil
}

// some names a few.
func some(names []string) string {
	const shown = 5
	if len(names) > shown {
		return strings.Join(names[:shown], ", ") + fmt.Sprintf(" and %d more", len(names)-shown)
	}
	return strings.Join(names, ", ")
}

// nodeStates asks the leader's memory. Where no leader answers, the error comes with what is known here.
func (s *Server) nodeStates(ctx context.Context, v *store.View) ([]*api.NodeState, error) {
	ids := make([]string, 0, 16)
	for _, n := range v.Nodes() {
		ids = append(ids, n.Id)
	}
	local := s.cfg.Cluster.NodeStates(ids)
	if s.cfg.Store.IsLeader() {
		_, err := s.fresh(ctx)
		return local, err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	actor, err := actorOf(ctx)
	if err != nil {
		return local, err
	}
	raw, err := proto.Marshal(&api.ListRequest{Kind: api.Kind_KIND_NODE})
	if err != nil {
		return local, err
	}
	f, err := s.cfg.Forward(ctx, &api.ForwardRequest{Method: api.Control_List_FullMethodName, Request: raw, Caller: actor, RequestId: warden.NewID()})
	if err != nil {
		return local, err
	}
	var reply api.ListReply
	if err := proto.Unmarshal(f.Reply, &reply); err != nil {
		return local, err
	}
	known := map[string]*api.NodeState{}
	for _, n := range reply.Nodes {
		known[n.NodeId] = n
	}
	for i, id := range ids {
		if n := known[id]; n != nil {
			local[i] = n
		}
	}
	return local, nil
}

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
	if state.GetRaft() == "nonvoter" {
		r.Notes = append(r.Notes, name+": has no vote yet, and does not count towards a majority")
	}
	if state.GetLockState() == "old-key" {
		under := "under no unlock key: its disk opens by itself"
		if id := state.GetUnlockKeyId(); id != "" {
			under = "under the old unlock key " + id + ": a restart needs that one"
		}
		r.Notes = append(r.Notes, name+": still sealed "+under)
	}
	if n.GetDescription().GetSecretMounts() == "bind" {
		r.Notes = append(r.Notes, name+": its kernel has no detached mounts; secrets are bind-mounted from a root-only tmpfs")
	}
	switch expired, near, left := expiry(n, now); {
	case expired:
		r.expiring(name, "certificate expired at "+time.Unix(0, n.LeafNotAfterNs).UTC().Format(time.RFC3339)+"; the node renews it when it comes back")
	case near:
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
		wanted, running := int(sv.Spec.GetReplicas()), 0
		for _, t := range v.TasksByService(sv.Id) {
			if t.DesiredState != api.TaskState_TASK_RUNNING {
				continue
			}
			switch t.GetStatus().GetState() {
			case api.TaskState_TASK_RUNNING:
				running++
			case api.TaskState_TASK_COMPLETE: // it ended well; it has a successor where it is to run again
				wanted--
			default:
				r.problem(t)
			}
		}
		wanted = max(wanted, 0)
		r.TasksWanted += uint32(wanted)
		r.TasksRunning += uint32(min(running, wanted))
	}
}

func (r report) problem(t *api.Task) {
	if len(r.Problems) >= problemsMax {
		return
	}
	why := t.GetStatus().GetError()
	if why == "" {
		why = t.GetStatus().GetMessage()
	}
	r.Problems = append(r.Problems, &api.TaskProblem{
		TaskId: t.Id, ServiceName: t.ServiceName, Slot: t.Slot, State: t.GetStatus().GetState().Word(), Reason: why,
	})
}

// problemsMax keeps status to one screen.
const problemsMax = 20
