package control

import (
	"context"
	"fmt"
	"maps"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// UpdateCluster changes the settings of the cluster. A value out of range is refused, never replaced.
func (s *Server) UpdateCluster(ctx context.Context, r *api.UpdateClusterRequest) (*api.ChangeReply, error) {
	const op = "updating the cluster"
	ttl := time.Duration(r.LeafTtlNs)
	if ttl < warden.LeafTTLMin || ttl > warden.LeafTTLMax {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeInvalid, op, "a life of %s for certificates is out of range", ttl),
			fmt.Sprintf("give one from %s to %s", warden.LeafTTLMin, warden.LeafTTLMax)))
	}
	reply, err := s.commit(ctx, func(v *store.View) (change, error) {
		c := api.Clone(v.Cluster())
		c.LeafTtlNs = r.LeafTtlNs
		return change{ops: []*api.Operation{put(store.Wrap(c), c.Meta.Version)}, id: c.Id, action: "update cluster"}, nil
	})
	return reply, api.Error(err)
}

// CreateZone declares a zone.
func (s *Server) CreateZone(ctx context.Context, r *api.CreateZoneRequest) (*api.ChangeReply, error) {
	if err := warden.CheckName("zone", r.Name); err != nil {
		return nil, api.Error(err)
	}
	z := &api.Zone{Id: warden.NewID(), Name: r.Name}
	reply, err := s.commit(ctx, func(v *store.View) (change, error) {
		if len(v.Zones()) >= warden.ZonesMax {
			return change{}, warden.Errorf(warden.CodeTooLarge, "creating zone "+r.Name, "a cluster has at most %d zones", warden.ZonesMax)
		}
		return change{ops: []*api.Operation{put(store.Wrap(z), 0)}, id: z.Id, action: "create zone", name: z.Name}, nil
	})
	return reply, api.Error(err)
}

// RemoveZone removes a zone that nothing names any more.
func (s *Server) RemoveZone(ctx context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	reply, err := s.remove(ctx, api.Kind_KIND_ZONE, r.Reference)
	return reply, api.Error(err)
}

// remove deletes the object that a reference means; the apply says whether something needs it.
func (s *Server) remove(ctx context.Context, kind api.Kind, ref string) (*api.ChangeReply, error) {
	return s.commit(ctx, func(v *store.View) (change, error) {
		id, err := v.Resolve(kind, ref)
		if err != nil {
			return change{}, err
		}
		_, record := store.Unwrap(v.Object(kind, id))
		return change{ops: []*api.Operation{remove(kind, id, record.GetMeta().GetVersion())}, id: id, action: "remove " + store.Noun(kind), name: ref}, nil
	})
}

// UpdateNode changes availability, labels, zone or role. A change of role answers when every manager has acknowledged it, or
// its lease is over; silent_managers names those.
func (s *Server) UpdateNode(ctx context.Context, r *api.UpdateNodeRequest) (*api.ChangeReply, error) {
	id, err := s.cfg.Store.View().Resolve(api.Kind_KIND_NODE, r.Reference)
	if err != nil {
		return nil, api.Error(err)
	}
	if r.Role == api.Role_ROLE_WORKER {
		if err := s.beforeManagerGoes(ctx, id); err != nil {
			return nil, api.Error(err)
		}
	}
	var warnings []string
	reply, err := s.commit(ctx, func(v *store.View) (change, error) {
		now := v.Node(id)
		if now == nil {
			return change{}, warden.Errorf(warden.CodeNotFound, "updating node "+r.Reference, "it was removed meanwhile")
		}
		n := api.Clone(now)
		warnings = nil
		if r.Availability != api.Availability_AVAILABILITY_UNSPECIFIED {
			n.Availability = r.Availability
		}
		if err := relabel(n, r); err != nil {
			return change{}, err
		}
		if r.Zone != "" && r.Zone != n.Zone {
			if v.Zone(r.Zone) == nil {
				return change{}, noZone("moving node "+n.Id, r.Zone)
			}
			n.Zone = r.Zone
			warnings = append(warnings, "its tasks of another zone move, and its certificate is renewed with the new zone")
		}
		w, err := s.rerole(v, n, r.Role)
		if err != nil {
			return change{}, err
		}
		warnings = append(warnings, w...)
		return change{ops: []*api.Operation{put(store.Wrap(n), now.Meta.Version)}, id: n.Id, action: "update node", name: n.Hostname}, nil
	})
	if err != nil {
		return nil, api.Error(err)
	}
	reply.Warnings = warnings
	if r.Role != api.Role_ROLE_UNSPECIFIED {
		reply.SilentManagers = s.cfg.Cluster.AwaitManagers(ctx, reply.Index)
	}
	return reply, nil
}

func relabel(n *api.Node, r *api.UpdateNodeRequest) error {
	op := "labelling node " + n.Id
	labels := maps.Clone(n.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	for _, k := range r.LabelsRemove {
		if _, ok := labels[k]; !ok {
			return warden.Errorf(warden.CodeNotFound, op, "it has no label %q", k)
		}
		delete(labels, k)
	}
	maps.Copy(labels, r.LabelsAdd)
	n.Labels = labels
	return checkLabels(op, labels)
}

func checkLabels(op string, labels map[string]string) error {
	if len(labels) > warden.LabelsMax {
		return warden.Errorf(warden.CodeTooLarge, op, "%d labels, at most %d", len(labels), warden.LabelsMax)
	}
	for k, v := range labels {
		if k == "" || len(k) > warden.LabelKeyMax || len(v) > warden.LabelValueMax {
			return warden.Errorf(warden.CodeInvalid, op, "a label has a key of 1 to %d and a value of at most %d bytes", warden.LabelKeyMax, warden.LabelValueMax)
		}
	}
	return nil
}

func noZone(op, name string) error {
	return warden.Hint(warden.Errorf(warden.CodeNotFound, op, "no zone is named %q", name), "declare it first with `wardenctl zone create`, or see `wardenctl zone ls`")
}

// rerole sets the desired role. A promotion counts at once; a demotion does, too, and raft follows.
func (s *Server) rerole(v *store.View, n *api.Node, role api.Role) (warnings []string, err error) {
	managers := 0
	for _, o := range v.Nodes() {
		if o.DesiredRole == api.Role_ROLE_MANAGER {
			managers++
		}
	}
	switch {
	case role == api.Role_ROLE_UNSPECIFIED:
		return nil, nil
	case role == n.DesiredRole:
		return nil, warden.Errorf(warden.CodeInvalid, "changing the role of node "+n.Id, "it is a %s already", role.Word())
	case role == api.Role_ROLE_WORKER:
		n.DesiredRole, managers = role, managers-1
	default:
		op := "promoting node " + n.Id
		if managers >= warden.ManagersMax {
			return nil, warden.Errorf(warden.CodeTooLarge, op, "a cluster has at most %d managers", warden.ManagersMax)
		}
		if n.Role != api.Role_ROLE_WORKER {
			return nil, warden.Hint(warden.Errorf(warden.CodeConflict, op, "its demotion is still going on"), "try again in a few seconds")
		}
		if st := s.cfg.Cluster.NodeStates([]string{n.Id}); st[0].Liveness != api.Liveness_LIVENESS_READY {
			return nil, warden.Hint(warden.Errorf(warden.CodeUnavailable, op, "the node is not ready"), "a manager that is not there counts against the quorum: bring it up first")
		}
		if n.Address, err = s.cfg.Address(n.GetDescription().GetAdvertise(), n.Ip); err != nil {
			return nil, warden.Wrap(op, err)
		}
		n.Role, n.DesiredRole, managers = role, role, managers+1
	}
	if managers%2 == 0 {
		warnings = append(warnings, fmt.Sprintf("the cluster has %d managers now: an odd number bears as much loss with one less", managers))
	}
	return warnings, nil
}

// beforeManagerGoes refuses what would lose quorum, and hands leadership over where it is this manager that goes: the call
// then runs on the next leader.
func (s *Server) beforeManagerGoes(ctx context.Context, id string) error {
	if err := s.cfg.Cluster.CanRemoveManager(id); err != nil {
		return err
	}
	if id != s.cfg.NodeID {
		return nil
	}
	if err := s.cfg.Cluster.StepDown(ctx); err != nil {
		return warden.Wrap("handing leadership over before this manager goes", err)
	}
	return warden.Errorf(warden.CodeNotLeader, "removing this manager", "leadership was handed over: the next leader does it")
}

// RemoveNode evicts: tombstone and removal in one command, then the answer of every manager, then, for a manager, new keys.
func (s *Server) RemoveNode(ctx context.Context, r *api.RemoveNodeRequest) (*api.RemoveNodeReply, error) {
	reply, err := s.removeNode(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) removeNode(ctx context.Context, r *api.RemoveNodeRequest) (*api.RemoveNodeReply, error) {
	op := "removing node " + r.Reference
	view := s.cfg.Store.View()
	if t := view.Tombstone(r.Reference); t != nil {
		return nil, warden.Errorf(warden.CodeNotFound, op, "it was removed at %s", time.Unix(0, t.RemovedNs).UTC().Format(time.RFC3339))
	}
	id, err := view.Resolve(api.Kind_KIND_NODE, r.Reference)
	if err != nil {
		return nil, err
	}
	n := view.Node(id)
	force := r.Force || r.Compromised
	manager := n.Role == api.Role_ROLE_MANAGER || n.DesiredRole == api.Role_ROLE_MANAGER
	if !force {
		if manager {
			return nil, warden.Hint(warden.Errorf(warden.CodeInUse, op, "it is a manager"), "demote it first with `wardenctl node demote`, or evict it at once with --force")
		}
		if st := s.cfg.Cluster.NodeStates([]string{id}); st[0].Liveness != api.Liveness_LIVENESS_DOWN {
			return nil, warden.Hint(warden.Errorf(warden.CodeInUse, op, "it is not down"), "let it leave with `wardenctl swarm leave`, or evict it at once with --force")
		}
	}
	if manager {
		if err := s.beforeManagerGoes(ctx, id); err != nil {
			return nil, err
		}
	}
	reply := &api.RemoveNodeReply{Id: id, Hostname: n.Hostname, Role: n.Role}
	revoked := 0
	done, err := s.commit(ctx, func(v *store.View) (change, error) {
		n := v.Node(id)
		if n == nil {
			return change{}, warden.Errorf(warden.CodeNotFound, op, "it was removed meanwhile")
		}
		now := time.Now().UnixNano()
		t := &api.Tombstone{Id: id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone, Compromised: r.Compromised, RemovedNs: now}
		for _, h := range [][]byte{n.KeyHash, n.NextKeyHash, n.JoinKeyHash} {
			if len(h) > 0 {
				t.KeyHashes = append(t.KeyHashes, h)
			}
		}
		ops := []*api.Operation{put(store.Wrap(t), 0), remove(api.Kind_KIND_NODE, id, n.Meta.Version)}
		revoked = 0
		if manager {
			tokens := revokeAll(v, func(*api.Token) bool { return true }, now)
			revoked = len(tokens)
			ops = append(ops, tokens...)
		}
		return change{ops: ops, id: id, action: "remove node", name: n.Hostname}, nil
	})
	if err != nil {
		return nil, err
	}
	reply.Index = done.Index
	reply.SilentManagers = s.cfg.Cluster.AwaitManagers(ctx, done.Index)
	if manager {
		s.afterManager(ctx, reply, revoked)
	}
	if r.Compromised || manager {
		v := s.cfg.Store.View()
		reply.Exposures = v.ExposuresByNode(id)
		if manager {
			reply.AllSecrets, reply.Exposures = true, allSecrets(v, id)
		}
		if len(reply.Exposures) > 0 && !manager {
			reply.Todo = append(reply.Todo, "give each secret listed a new value: the node may have seen the present one")
		}
	}
	return reply, nil
}

// afterManager does what a manager's eviction asks for beyond a node's. What fails is left to the operator, in words.
func (s *Server) afterManager(ctx context.Context, reply *api.RemoveNodeReply, revoked int) {
	reply.Done = append(reply.Done, fmt.Sprintf("revoked %d outstanding join tokens", revoked))
	actor, err := actorOf(ctx)
	if err == nil {
		var done, todo []string
		done, todo, err = s.cfg.Cluster.RotateKeys(context.WithoutCancel(ctx), actor)
		reply.Done, reply.Todo = append(reply.Done, done...), append(reply.Todo, todo...)
	}
	if err != nil {
		s.cfg.Logger.Error("failed to rotate keys after a manager's eviction", "node_id", reply.Id, "error", err)
		reply.Todo = append(reply.Todo, "keys were not all rotated: "+err.Error())
	}
}

// allSecrets lists every version of every secret: a manager could read them all.
func allSecrets(v *store.View, nodeID string) []*api.Exposure {
	var out []*api.Exposure
	for _, sec := range v.Secrets() {
		for _, sv := range v.SecretVersions(sec.Id) {
			out = append(out, &api.Exposure{
				NodeId: nodeID, SecretId: sec.Id, SecretName: sec.Name, Version: sv.Version, FirstNs: sv.GetMeta().GetCreatedNs(), LastNs: time.Now().UnixNano(),
			})
		}
	}
	return out
}
