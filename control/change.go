package control

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"strconv"

	"warden"
	"warden/api"
	"warden/store"
)

// attemptsMax is how often a change is tried on fresh state after conflicts.
const attemptsMax = 20

// fresh returns a view that has all that was acknowledged before the call, by whichever leader. Errors: CodeNotLeader.
func (s *Server) fresh(ctx context.Context) (*store.View, error) {
	if err := s.cfg.Store.Fresh(ctx); err != nil {
		return nil, err
	}
	return s.cfg.Store.View(), nil
}

// change is one attempt: the operations that a plan makes from a view, and what the reply and the log call it.
type change struct {
	ops    []*api.Operation
	kind   api.Kind
	id     string
	action string
	name   string
	made   *api.Meta                // there is nothing to do: the object is as the caller wants it
	create bool                     // the object with the ID is there afterwards
	check  func(v *store.View) bool // where not nil: whether the state has what these operations put
}

// version returns that which the command gave the object; the state may have a newer one by now. 0 where it was removed.
func (c change) version(res *api.Result) uint64 {
	i := slices.IndexFunc(c.ops, func(op *api.Operation) bool {
		kind, record := store.Unwrap(op.GetPut().GetObject())
		return record != nil && kind == c.kind && record.GetId() == c.id
	})
	if i < 0 || i >= len(res.Versions) {
		return 0
	}
	return res.Versions[i]
}

// commit makes a change on the leader, and tries again on fresh state where somebody else was faster. Attempt n has the
// request ID of the call and n, so that a call which is made again comes upon the stored result of the attempt that counted.
func (s *Server) commit(ctx context.Context, plan func(v *store.View) (change, error)) (*api.ChangeReply, error) {
	actor, err := actorOf(ctx)
	if err != nil {
		return nil, err
	}
	id, err := requestID(ctx)
	if err != nil {
		return nil, err
	}
	v, err := s.fresh(ctx)
	if err != nil {
		return nil, err
	}
	log := s.cfg.Logger.With("subject", actor.Kind+":"+actor.Name, "via", actor.Via, "request_id", id, "decision", "allow")
	for attempt := range attemptsMax {
		c, err := plan(v)
		if err != nil {
			log.Info("refused a request", "action", c.action, "resource", c.id, "code", string(warden.CodeOf(err)), "reason", err.Error())
			return nil, err
		}
		if c.made != nil {
			reply := &api.ChangeReply{Id: c.id, Version: c.made.Version, Index: c.made.Index}
			if res := s.result(id); res != nil { // by this very call, and others may have changed it since
				reply.Version, reply.Index = cmp.Or(c.version(res), reply.Version), res.Index
			}
			return reply, nil
		}
		res, err := s.cfg.Store.Propose(ctx, &api.Command{Actor: actor, RequestId: attemptID(id, attempt), Operations: c.ops})
		planned := v.Index()
		v = s.cfg.Store.View()
		if warden.CodeOf(err) == warden.CodeConflict {
			continue
		}
		if err != nil {
			log.Info("failed to change by request", "action", c.action, "resource", c.id, "name", c.name, "code", string(warden.CodeOf(err)))
			return nil, err
		}
		if c.check != nil && !c.check(v) {
			continue
		}
		if c.create && res.Index <= planned && v.Object(c.kind, c.id) == nil { // the result is an old one
			return nil, doneBefore(res.Index, nil)
		}
		log.Info("changed by request", "action", c.action, "resource", c.id, "name", c.name, "index", res.Index)
		return &api.ChangeReply{Id: c.id, Version: c.version(res), Index: res.Index}, nil
	}
	return nil, warden.Hint(warden.Errorf(warden.CodeConflict, "changing the state", "others changed the same object %d times meanwhile", attemptsMax), "try again")
}

// alter is commit for calls that leave an object behind. Where such a call is made again and refused now, though it had its effect
// before, it says so: somebody else has changed or removed since what it made.
func (s *Server) alter(ctx context.Context, plan func(v *store.View) (change, error)) (*api.ChangeReply, error) {
	ctx, id, err := withRequestID(ctx)
	if err != nil {
		return nil, err
	}
	reply, err := s.commit(ctx, plan)
	return reply, s.changedSince(id, err)
}

// changedSince returns CodeConflict for a refusal of a call that had its effect before, by its request ID.
func (s *Server) changedSince(id string, refused error) error {
	if refused == nil || api.Transient(refused) || warden.CodeOf(refused) == warden.CodeInvalid {
		return refused
	}
	if index := s.made(id); index != 0 {
		return doneBefore(index, refused)
	}
	return refused
}

// doneBefore is the refusal of a call whose request ID had its effect at the index before. why is what stands in the way of another
// one; nil: what it made is not there.
func doneBefore(index uint64, why error) error {
	if why == nil {
		why = errors.New("what it made is not there, unless the request ID was used for another request")
	}
	return warden.Hint(warden.Errorf(warden.CodeConflict, "repeating a call", "it had its effect at index %d, and others have changed that since: %w", index, why),
		"look at it before you make the change again; each request needs an ID of its own")
}

func usedBefore(op string) error {
	return warden.Hint(warden.Errorf(warden.CodeInvalid, op, "the request ID was used for another request"), "give each request an ID of its own")
}

// attemptID returns the request ID of an attempt's command. '#' is in no caller's request ID.
func attemptID(id string, attempt int) string {
	if attempt == 0 {
		return id
	}
	return id + "#" + strconv.Itoa(attempt)
}

// newID returns the ID of what a call creates: by its kind and the request ID, so that a call that is made again means the
// same object. Request IDs are random unless the caller chose its own.
func (s *Server) newID(ctx context.Context, kind api.Kind) (context.Context, string, error) {
	ctx, request, err := withRequestID(ctx)
	if err != nil {
		return ctx, "", err
	}
	sum := sha256.Sum256([]byte("warden object\x00" + s.cfg.ClusterID + "\x00" + store.Noun(kind) + "\x00" + request))
	return ctx, warden.Base36(sum[:16], warden.IDLength), nil
}

// create returns the change that puts a new object, or what an earlier call with the request ID made of it.
func create(v *store.View, op, name string, record store.Record, more ...*api.Operation) (change, error) {
	kind, _ := store.Unwrap(store.Wrap(record))
	c := change{kind: kind, id: record.GetId(), action: op, name: name, create: true, ops: append([]*api.Operation{store.Put(record, 0)}, more...)}
	if o := v.Object(kind, c.id); o != nil {
		if nameOf(o) != name {
			return c, usedBefore(op)
		}
		_, record := store.Unwrap(o)
		c.made = record.GetMeta()
	}
	return c, nil
}

// nameOf returns the name of a zone, service or secret.
func nameOf(o *api.Object) string {
	switch o := o.GetOf().(type) {
	case *api.Object_Zone:
		return o.Zone.GetName()
	case *api.Object_Service:
		return o.Service.GetSpec().GetName()
	case *api.Object_Secret:
		return o.Secret.GetName()
	}
	return ""
}

// remove deletes the object that a reference means; the apply says whether something needs it.
func (s *Server) remove(ctx context.Context, kind api.Kind, ref string) (*api.ChangeReply, error) {
	return s.removeFound(ctx, kind, ref, func(v *store.View) (string, error) { return v.Resolve(kind, ref) })
}

// removeFound is remove where find says which object the reference means, or why it can't be removed.
func (s *Server) removeFound(ctx context.Context, kind api.Kind, ref string, find func(v *store.View) (string, error)) (*api.ChangeReply, error) {
	ctx, _, err := withRequestID(ctx)
	if err != nil {
		return nil, err
	}
	reply, err := s.commit(ctx, func(v *store.View) (change, error) {
		c := change{kind: kind, id: ref, action: "remove " + store.Noun(kind), name: ref}
		id, err := find(v)
		if err != nil {
			return c, err
		}
		_, record := store.Unwrap(v.Object(kind, id))
		c.id, c.ops = id, []*api.Operation{store.Delete(record)}
		return c, nil
	})
	if warden.CodeOf(err) == warden.CodeNotFound {
		if index, perr := s.done(ctx, kind, ref); perr != nil || index != 0 {
			return &api.ChangeReply{Id: ref, Index: index}, perr
		}
	}
	return reply, err
}

// done returns the index at which an earlier call with the same request ID had its effect; 0 where none did. ref must mean
// nothing now: it proposes to remove that, and only a stored result can make that succeed.
func (s *Server) done(ctx context.Context, kind api.Kind, ref string) (uint64, error) {
	actor, err := actorOf(ctx)
	if err != nil {
		return 0, err
	}
	id, err := requestID(ctx)
	if err != nil {
		return 0, err
	}
	op := &api.Operation{Of: &api.Operation_Delete{Delete: &api.Delete{Kind: kind, Id: ref}}}
	for attempt := range attemptsMax {
		res, err := s.cfg.Store.Propose(ctx, &api.Command{Actor: actor, RequestId: attemptID(id, attempt), Operations: []*api.Operation{op}})
		switch {
		case err == nil:
			return res.GetIndex(), nil
		case res == nil: // nothing was decided
			return 0, err
		case warden.CodeOf(err) != warden.CodeConflict:
			return 0, nil
		}
	}
	return 0, nil
}
