package control

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
)

// CreateZone declares a zone.
func (s *Server) CreateZone(ctx context.Context, r *api.CreateZoneRequest) (*api.ChangeReply, error) {
	reply, err := s.createZone(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) createZone(ctx context.Context, r *api.CreateZoneRequest) (*api.ChangeReply, error) {
	if err := warden.CheckName("zone", r.Name); err != nil {
		return nil, err
	}
	op := "creating zone " + r.Name
	ctx, id, err := s.newID(ctx, api.Kind_KIND_ZONE)
	if err != nil {
		return nil, err
	}
	return s.alter(ctx, func(v *store.View) (change, error) {
		c, err := create(v, op, r.Name, &api.Zone{Id: id, Name: r.Name})
		switch {
		case err != nil || c.made != nil:
			return c, err
		case v.Zone(r.Name) != nil:
			return c, warden.Hint(warden.Errorf(warden.CodeExists, op, "there is a zone of this name"), "use it, or choose another name")
		case len(v.Zones()) >= warden.ZonesMax:
			return c, warden.Errorf(warden.CodeTooLarge, op, "a cluster has at most %d zones", warden.ZonesMax)
		}
		return c, nil
	})
}

// RemoveZone removes a zone that nothing names any more.
func (s *Server) RemoveZone(ctx context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	reply, err := s.remove(ctx, api.Kind_KIND_ZONE, r.Reference)
	return reply, api.Error(err)
}

// UpdateNode changes availability, labels, zone or role. A change of role answers when every manager has acknowledged it, or
// its lease is over; silent_managers names those. What the node has already is not an error, so that a call can be made again.
func (s *Server) UpdateNode(ctx context.Context, r *api.UpdateNodeRequest) (*api.ChangeReply, error) {
	reply, err := s.updateNode(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) updateNode(ctx context.Context, r *api.UpdateNodeRequest) (*api.ChangeReply, error) {
	op := "updating node " + r.Reference
	if _, ok := api.Availability_name[int32(r.Availability)]; !ok {
		return nil, warden.Errorf(warden.CodeInvalid, op, "unknown availability %d", r.Availability)
	}
	if _, ok := api.Role_name[int32(r.Role)]; !ok {
		return nil, warden.Errorf(warden.CodeInvalid, op, "unknown role %d", r.Role)
	}
	if r.Role != api.Role_ROLE_UNSPECIFIED {
		s.managers.Lock()
		defer s.managers.Unlock()
	}
	var warnings []string
	reply, err := s.alter(ctx, func(v *store.View) (change, error) {
		warnings = nil
		c := change{kind: api.Kind_KIND_NODE, action: "update node", name: r.Reference}
		id, err := v.Resolve(api.Kind_KIND_NODE, r.Reference)
		if err != nil {
			return c, err
		}
		now := v.Node(id)
		n := api.Clone(now)
		c.id, c.name = id, n.Hostname
		if r.Availability != api.Availability_AVAILABILITY_UNSPECIFIED {
			n.Availability = r.Availability
		}
		if warnings, err = relabel(n, r); err != nil {
			return c, err
		}
		if r.Zone != "" && r.Zone != n.Zone {
			if v.Zone(r.Zone) == nil {
				return c, noZone("moving node "+n.Id, r.Zone)
			}
			n.Zone = r.Zone
			warnings = append(warnings, "its tasks of another zone move, and its certificate is renewed with the new zone")
		}
		w, err := s.rerole(ctx, v, n, r.Role)
		if err != nil {
			return c, err
		}
		warnings = append(warnings, w...)
		if proto.Equal(now, n) {
			c.made = now.Meta
		}
		c.ops = []*api.Operation{store.Put(n, now.Meta.Version)}
		return c, nil
	})
	if err != nil {
		return nil, err
	}
	reply.Warnings = warnings
	if r.Role != api.Role_ROLE_UNSPECIFIED {
		reply.SilentManagers = s.cfg.Cluster.AwaitManagers(ctx, reply.Index)
	}
	return reply, nil
}

func relabel(n *api.Node, r *api.UpdateNodeRequest) (warnings []string, err error) {
	for _, k := range r.LabelsRemove {
		if _, ok := n.Labels[k]; !ok {
			warnings = append(warnings, fmt.Sprintf("it has no label %q", clip(k)))
		}
		delete(n.Labels, k)
	}
	if n.Labels == nil {
		n.Labels = map[string]string{}
	}
	maps.Copy(n.Labels, r.LabelsAdd)
	return warnings, checkLabels("labelling node "+n.Id, n.Labels)
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
func (s *Server) rerole(ctx context.Context, v *store.View, n *api.Node, role api.Role) (warnings []string, err error) {
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
		return []string{"it is a " + role.Word() + " already"}, nil
	case role == api.Role_ROLE_WORKER:
		if err := s.beforeManagerGoes(ctx, n.Id); err != nil {
			return nil, err
		}
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
			return nil, warden.Hint(warden.Errorf(warden.CodeNoQuorum, op, "the node is not ready, and as a manager it would count towards the majority all the same"),
				"bring it up first: `wardenctl node ls`")
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
// Made again with the same request ID, it does again what comes after the command.
func (s *Server) RemoveNode(ctx context.Context, r *api.RemoveNodeRequest) (*api.RemoveNodeReply, error) {
	reply, err := s.removeNode(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) removeNode(ctx context.Context, r *api.RemoveNodeRequest) (*api.RemoveNodeReply, error) {
	ctx, _, err := withRequestID(ctx)
	if err != nil {
		return nil, err
	}
	e, err := s.evict(ctx, r)
	if warden.CodeOf(err) == warden.CodeNotFound {
		e, err = s.evicted(ctx, r.Reference, err)
	}
	if err != nil {
		return nil, err
	}
	t := e.tombstone
	reply := &api.RemoveNodeReply{Id: t.Id, Hostname: t.Hostname, Role: t.Role, Index: e.index}
	if e.knew { // new keys first: the answers of the others can wait
		s.afterManager(ctx, reply, e.revoked)
	}
	reply.SilentManagers = s.cfg.Cluster.AwaitManagers(ctx, e.index)
	if e.knew {
		reply.AllSecrets, reply.Exposures = true, allSecrets(s.cfg.Store.View(), t.Id)
	} else if r.Compromised {
		reply.Exposures = exposures(e.seen, s.cfg.Store.View().ExposuresByNode(t.Id))
		if len(reply.Exposures) > 0 {
			reply.Todo = append(reply.Todo, "give each secret listed a new value with `wardenctl secret rotate`: the node may have seen the present one")
		}
	}
	return reply, nil
}

// eviction is what the command of one did.
type eviction struct {
	tombstone *api.Tombstone
	knew      bool // what managers know: it is one, or was
	revoked   int
	index     uint64
	seen      []*api.Exposure // before the command, which forgets those of versions that are gone
}

func (s *Server) evict(ctx context.Context, r *api.RemoveNodeRequest) (*eviction, error) {
	op := "removing node " + r.Reference
	s.managers.Lock()
	defer s.managers.Unlock()
	var e *eviction
	done, err := s.commit(ctx, func(v *store.View) (change, error) {
		c := change{action: "remove node", id: r.Reference, name: r.Reference}
		if t := v.Tombstone(r.Reference); t != nil {
			return c, warden.Errorf(warden.CodeNotFound, op, "it was removed at %s", time.Unix(0, t.RemovedNs).UTC().Format(time.RFC3339))
		}
		id, err := v.Resolve(api.Kind_KIND_NODE, r.Reference)
		if err != nil {
			return c, err
		}
		n := v.Node(id)
		c.kind, c.id, c.name = api.Kind_KIND_TOMBSTONE, id, n.Hostname
		manager := n.Role == api.Role_ROLE_MANAGER || n.DesiredRole == api.Role_ROLE_MANAGER
		e = &eviction{knew: manager || n.WasManager, seen: v.ExposuresByNode(id)}
		if err := s.mayRemove(ctx, op, n, manager, r.Force || r.Compromised); err != nil {
			return c, err
		}
		now := time.Now().UnixNano()
		e.tombstone = &api.Tombstone{Id: id, Hostname: n.Hostname, Role: n.Role, Zone: n.Zone, Compromised: r.Compromised, RemovedNs: now, WasManager: e.knew}
		for _, h := range [][]byte{n.KeyHash, n.NextKeyHash, n.JoinKeyHash} {
			if len(h) > 0 {
				e.tombstone.KeyHashes = append(e.tombstone.KeyHashes, h)
			}
		}
		c.ops = []*api.Operation{store.Put(e.tombstone, 0), store.Delete(n)}
		if e.knew {
			tokens := revokeAll(v, now, func(*api.Token) bool { return true })
			e.revoked = len(tokens)
			c.ops = append(c.ops, tokens...)
		}
		return c, nil
	})
	if err != nil {
		return nil, err
	}
	e.index = done.Index
	if t := s.cfg.Store.View().Tombstone(e.tombstone.Id); t.GetMeta().GetIndex() != e.index {
		return nil, warden.Errorf(warden.CodeNotFound, op, "it was removed, and another node has its name now")
	}
	return e, nil
}

// mayRemove refuses what needs force, and what would lose quorum even with it.
func (s *Server) mayRemove(ctx context.Context, op string, n *api.Node, manager, force bool) error {
	switch {
	case manager && !force:
		return warden.Hint(warden.Errorf(warden.CodeInUse, op, "it is a manager"), "demote it first with `wardenctl node demote`, or evict it at once with --force")
	case manager:
		err := s.beforeManagerGoes(ctx, n.Id)
		if a, aerr := actorOf(ctx); err != nil && warden.CodeOf(err) != warden.CodeNotLeader || aerr == nil && a.Via != n.Id {
			return err
		}
		return warden.Hint(warden.Errorf(warden.CodeInvalid, op, "it is the manager that was asked, which could not tell what came of it"),
			"run the command on another manager, or `wardenctl swarm leave --force` on this one")
	case !force && s.cfg.Cluster.NodeStates([]string{n.Id})[0].Liveness != api.Liveness_LIVENESS_DOWN:
		return warden.Hint(warden.Errorf(warden.CodeInUse, op, "it is not down"), "let it leave with `wardenctl swarm leave`, or evict it at once with --force")
	}
	return nil
}

// evicted returns the eviction that an earlier call with the same request ID made; gone where none did.
func (s *Server) evicted(ctx context.Context, ref string, gone error) (*eviction, error) {
	index, err := s.done(ctx, api.Kind_KIND_NODE, ref)
	if err != nil {
		return nil, err
	}
	v := s.cfg.Store.View()
	for _, t := range v.Tombstones() {
		if index == 0 || t.Meta.Index != index {
			continue
		}
		e := &eviction{tombstone: t, knew: t.WasManager, index: index}
		for _, o := range v.Tokens() {
			if o.RevokedNs != 0 && o.Meta.Index == index {
				e.revoked++
			}
		}
		return e, nil
	}
	return nil, gone
}

// exposures returns those of both lists, each once.
func exposures(lists ...[]*api.Exposure) []*api.Exposure {
	byID := map[string]*api.Exposure{}
	for _, l := range lists {
		for _, e := range l {
			byID[e.Id] = e
		}
	}
	return slices.SortedFunc(maps.Values(byID), func(a, b *api.Exposure) int { return cmp.Compare(a.Id, b.Id) })
}

// afterManager does what a manager's eviction asks for beyond a node's. What fails is left to the operator, in words.
func (s *Server) afterManager(ctx context.Context, reply *api.RemoveNodeReply, revoked int) {
	reply.Done = append(reply.Done, fmt.Sprintf("revoked %d outstanding join tokens", revoked))
	actor, err := actorOf(ctx)
	if err == nil {
		var done, todo []string
		done, todo, err = s.cfg.Cluster.RotateKeys(context.WithoutCancel(ctx), actor, reply.Index)
		reply.Done, reply.Todo = append(reply.Done, done...), append(reply.Todo, todo...)
	}
	if err != nil {
		s.cfg.Logger.Error("failed to rotate keys after a manager's eviction", "node_id", reply.Id, "error", err)
		reply.Todo = append(reply.Todo, "keys were not all rotated ("+err.Error()+"): remove another manager, or build a new cluster, to be rid of what it knew")
	}
}

// allSecrets lists every version of every secret: a manager could read them all. Times are those of an assignment, and zero
// where the node was assigned none.
func allSecrets(v *store.View, nodeID string) []*api.Exposure {
	var out []*api.Exposure
	for _, sec := range v.Secrets() {
		for _, sv := range v.SecretVersions(sec.Id) {
			e := &api.Exposure{Id: store.ExposureID(nodeID, sec.Id, sv.Version), NodeId: nodeID, SecretId: sec.Id, SecretName: sec.Name, Version: sv.Version}
			if seen := v.Object(api.Kind_KIND_EXPOSURE, e.Id).GetExposure(); seen != nil {
				e = seen
			}
			out = append(out, e)
		}
	}
	return out
}
