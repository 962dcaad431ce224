package control

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
)

// List returns records of one kind, redacted. References of a secret version are its secret's, those of an exposure its
// node's (also a removed node's whole ID).
func (s *Server) List(ctx context.Context, r *api.ListRequest) (*api.ListReply, error) {
	if !r.Local {
		if err := s.verify.leader(ctx); err != nil {
			return nil, api.Error(err)
		}
	}
	v := s.cfg.Store.View()
	objects, err := find(v, r.Kind, r.References)
	if err != nil {
		return nil, api.Error(err)
	}
	reply := &api.ListReply{Index: v.Index()}
	var ids []string
	for _, o := range objects {
		reply.Objects = append(reply.Objects, redact(o))
		if n := o.GetNode(); n != nil {
			ids = append(ids, n.Id)
		}
	}
	if r.Kind == api.Kind_KIND_NODE {
		reply.Nodes = s.cfg.Cluster.NodeStates(ids)
	}
	return reply, nil
}

// referencesMax bounds what one List may look up.
const referencesMax = 1000

// find returns the records that the references mean; all of the kind where there are none.
func find(v *store.View, kind api.Kind, references []string) ([]*api.Object, error) {
	if len(references) > referencesMax {
		return nil, warden.Errorf(warden.CodeTooLarge, "listing", "%d references, at most %d", len(references), referencesMax)
	}
	if len(references) == 0 {
		return every(v, kind)
	}
	var out []*api.Object
	for _, ref := range references {
		switch kind {
		case api.Kind_KIND_SECRET_VERSION:
			id, err := v.Resolve(api.Kind_KIND_SECRET, ref)
			if err != nil {
				return nil, err
			}
			for _, sv := range v.SecretVersions(id) {
				out = append(out, store.Wrap(sv))
			}
		case api.Kind_KIND_EXPOSURE:
			id := ref
			if v.Tombstone(ref) == nil {
				var err error
				if id, err = v.Resolve(api.Kind_KIND_NODE, ref); err != nil {
					return nil, err
				}
			}
			for _, e := range v.ExposuresByNode(id) {
				out = append(out, store.Wrap(e))
			}
		default:
			id, err := v.Resolve(kind, ref)
			if err != nil {
				return nil, err
			}
			out = append(out, v.Object(kind, id))
		}
	}
	return out, nil
}

func every(v *store.View, kind api.Kind) ([]*api.Object, error) {
	switch kind {
	case api.Kind_KIND_CLUSTER:
		return wrap([]*api.Cluster{v.Cluster()}), nil
	case api.Kind_KIND_NODE:
		return wrap(v.Nodes()), nil
	case api.Kind_KIND_TOMBSTONE:
		return wrap(v.Tombstones()), nil
	case api.Kind_KIND_ZONE:
		return wrap(v.Zones()), nil
	case api.Kind_KIND_TOKEN:
		return wrap(v.Tokens()), nil
	case api.Kind_KIND_SERVICE:
		return wrap(v.Services()), nil
	case api.Kind_KIND_TASK:
		return wrap(v.Tasks()), nil
	case api.Kind_KIND_SECRET:
		return wrap(v.Secrets()), nil
	case api.Kind_KIND_SECRET_VERSION:
		var out []*api.Object
		for _, s := range v.Secrets() {
			out = append(out, wrap(v.SecretVersions(s.Id))...)
		}
		return out, nil
	case api.Kind_KIND_EXPOSURE:
		return wrap(v.Exposures()), nil
	}
	return nil, warden.Errorf(warden.CodeInvalid, "listing", "unknown kind %d", kind)
}

func wrap[R store.Record](records []R) []*api.Object {
	out := make([]*api.Object, len(records))
	for i, r := range records {
		out[i] = store.Wrap(r)
	}
	return out
}

// redact returns the record without anything secret. A record that has nothing secret comes back as it is.
func redact(o *api.Object) *api.Object {
	switch o.GetOf().(type) {
	case *api.Object_Cluster:
		o = proto.Clone(o).(*api.Object)
		c := o.GetCluster()
		c.Keyset, c.SealedRootKey, c.SealedIssuingKey = nil, nil, nil
	case *api.Object_Token:
		o = proto.Clone(o).(*api.Object)
		o.GetToken().Key = nil
	case *api.Object_SecretVersion:
		sv := o.GetSecretVersion()
		o = store.Wrap(&api.SecretVersion{
			Id: sv.Id, Meta: sv.Meta, SecretId: sv.SecretId, Version: sv.Version, SizeBytes: sv.SizeBytes, KeysetGeneration: sv.KeysetGeneration,
		})
	}
	return o
}

// nearExpiry is the part of a leaf's life after which a missing renewal is worth a word: it was due at two thirds.
const nearExpiry = 0.8

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
	}
	r.Nodes = states
	now := time.Now()
	for i, n := range v.Nodes() {
		var state *api.NodeState
		if i < len(states) && states[i].NodeId == n.Id {
			state = states[i]
		}
		report{r}.node(n, state, now)
	}
	if r.Managers > r.ManagersReachable && err == nil {
		r.Unwell = append(r.Unwell, fmt.Sprintf("%d of %d managers reachable; %d are needed for a majority", r.ManagersReachable, r.Managers, r.Managers/2+1))
	}
	if r.Workers > r.WorkersReady && err == nil {
		r.Unwell = append(r.Unwell, fmt.Sprintf("%d of %d workers ready", r.WorkersReady, r.Workers))
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

// nodeStates asks the leader's memory.
func (s *Server) nodeStates(ctx context.Context, v *store.View) ([]*api.NodeState, error) {
	ids := make([]string, 0, 16)
	for _, n := range v.Nodes() {
		ids = append(ids, n.Id)
	}
	local := s.cfg.Cluster.NodeStates(ids)
	if s.cfg.Store.IsLeader() {
		return local, s.verify.leader(ctx)
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
