package control

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/store"
)

// logStreamsMax bounds how many tasks one call reads at once.
const logStreamsMax = 256

// Logs streams the logs of tasks and services from wherever the tasks run. It ends when all of them have; what could not be
// read is an error at the end where nothing was, and a warning in this manager's log otherwise.
func (s *Server) Logs(r *api.ControlLogsRequest, stream grpc.ServerStreamingServer[api.LogChunk]) error {
	return api.Error(s.logs(stream.Context(), r, stream.Send))
}

func (s *Server) logs(ctx context.Context, r *api.ControlLogsRequest, send func(*api.LogChunk) error) error {
	const op = "reading logs"
	if err := s.decide(ctx, api.Control_Logs_FullMethodName, r); err != nil {
		return err
	}
	if r.Tail < -1 || r.Tail > warden.TailLogMax {
		return warden.Errorf(warden.CodeInvalid, op, "the number of lines is -1 for all, or 0 to %d", warden.TailLogMax)
	}
	tasks, err := logTasks(s.cfg.Store.View(), r.References)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex // guards the stream and sent: one sender at a time
	errs := make([]error, len(tasks))
	sent := false
	var wg sync.WaitGroup
	for i, t := range tasks {
		wg.Go(func() {
			errs[i] = s.cfg.Cluster.RelayLogs(ctx, t.NodeId, &api.LogsRequest{TaskId: t.Id, Follow: r.Follow, Tail: r.Tail}, func(c *api.LogChunk) error {
				mu.Lock()
				defer mu.Unlock()
				sent = true
				err := send(c)
				if err != nil {
					cancel() // the caller is gone: so are the other tasks' streams
				}
				return err
			})
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return warden.Wrap(op, ctx.Err())
	}
	if !sent && !slices.Contains(errs, nil) {
		return warden.Wrap(op+" of task "+tasks[0].Id, errs[0])
	}
	for i, err := range errs {
		if err != nil {
			s.cfg.Logger.Warn("failed to read the logs of a task", "task_id", tasks[i].Id, "node_id", tasks[i].NodeId, "error", err)
		}
	}
	return nil
}

// logTasks returns the placed tasks that the references mean, the newest first where there are too many. It is never empty.
func logTasks(v *store.View, references []string) ([]*api.Task, error) {
	const op = "reading logs"
	if len(references) == 0 || len(references) > referencesMax {
		return nil, warden.Errorf(warden.CodeInvalid, op, "want 1 to %d services or tasks", referencesMax)
	}
	found := map[string]*api.Task{}
	for _, ref := range references {
		id, err := v.Resolve(api.Kind_KIND_SERVICE, ref)
		if err == nil {
			for _, t := range v.TasksByService(id) {
				found[t.Id] = t
			}
			continue
		}
		if warden.CodeOf(err) == warden.CodeNotFound {
			id, err = v.Resolve(api.Kind_KIND_TASK, ref)
		}
		switch {
		case warden.CodeOf(err) == warden.CodeNotFound:
			return nil, warden.Errorf(warden.CodeNotFound, op, "no service or task is %q", ref)
		case err != nil:
			return nil, err
		}
		found[id] = v.Task(id)
	}
	maps.DeleteFunc(found, func(_ string, t *api.Task) bool { return t.NodeId == "" })
	if len(found) == 0 {
		return nil, warden.Hint(warden.Errorf(warden.CodeUnavailable, op, "no task of these was placed on a node yet"), "`wardenctl service ps` says why")
	}
	out := slices.SortedFunc(maps.Values(found), func(a, b *api.Task) int {
		return cmp.Or(cmp.Compare(b.Meta.CreatedNs, a.Meta.CreatedNs), cmp.Compare(a.Id, b.Id))
	})
	return out[:min(len(out), logStreamsMax)], nil
}

// Events streams what this manager applies from here on. A watcher that falls too far behind gets one "resync".
func (s *Server) Events(r *api.EventsRequest, stream grpc.ServerStreamingServer[api.Event]) error {
	return api.Error(s.events(stream.Context(), r, stream.Send))
}

var eventKinds = []api.Kind{
	api.Kind_KIND_CLUSTER, api.Kind_KIND_NODE, api.Kind_KIND_TOMBSTONE, api.Kind_KIND_ZONE, api.Kind_KIND_TOKEN,
	api.Kind_KIND_SERVICE, api.Kind_KIND_TASK, api.Kind_KIND_SECRET, api.Kind_KIND_SECRET_VERSION, api.Kind_KIND_EXPOSURE,
}

func (s *Server) events(ctx context.Context, r *api.EventsRequest, send func(*api.Event) error) error {
	const op = "watching events"
	if err := s.decide(ctx, api.Control_Events_FullMethodName, r); err != nil {
		return err
	}
	if r.SinceIndex != 0 {
		return warden.Errorf(warden.CodeUnsupported, op, "events of the past are not kept")
	}
	kinds := r.Kinds
	if len(kinds) == 0 {
		kinds = eventKinds
	}
	for _, k := range kinds {
		if !slices.Contains(eventKinds, k) {
			return warden.Errorf(warden.CodeInvalid, op, "unknown kind %d", k)
		}
	}
	w := s.cfg.Store.Watch(kinds...)
	defer w.Close()
	told := snapshot(s.cfg.Store.View(), kinds)
	for {
		ch, err := w.Next(ctx)
		if ctx.Err() != nil {
			return nil // the caller is gone
		}
		if err != nil {
			return warden.Wrap(op, err) // the manager stops
		}
		now := s.cfg.Store.View()
		if ch.Resync {
			if err := send(&api.Event{TimeNs: time.Now().UnixNano(), Index: now.Index(), Action: "resync", Detail: "events were lost: list again"}); err != nil {
				return err
			}
			told = snapshot(now, kinds)
		}
		var events []*api.Event
		for _, k := range ch.Keys {
			after := now.Object(k.Kind, k.ID)
			if e := event(told[k], after, k, now); e != nil {
				events = append(events, e)
			}
			told[k] = after
			if after == nil {
				delete(told, k)
			}
		}
		slices.SortStableFunc(events, func(a, b *api.Event) int { return cmp.Compare(a.Index, b.Index) })
		for _, e := range events {
			if err := send(e); err != nil {
				return err
			}
		}
	}
}

// snapshot returns the records of the kinds by key. A view may be newer than the changes that the watcher has told of yet, so
// that what was told is kept by record, and no change is told twice or never.
func snapshot(v *store.View, kinds []api.Kind) map[store.Key]*api.Object {
	out := map[store.Key]*api.Object{}
	for _, k := range kinds {
		objects, err := every(v, k)
		if err != nil {
			continue // no such kind: checked before
		}
		for _, o := range objects {
			_, record := store.Unwrap(o)
			out[store.Key{Kind: k, ID: record.GetId()}] = o
		}
	}
	return out
}

// event tells one change by its record before and after; nil where there is none to tell.
func event(before, after *api.Object, k store.Key, v *store.View) *api.Event {
	e := &api.Event{Kind: k.Kind, Id: k.ID, Index: v.Index(), TimeNs: v.Time()}
	switch {
	case before == nil && after == nil:
		return nil
	case before == nil:
		e.Action = "create"
	case after == nil:
		e.Action, after = "remove", before
	default:
		_, was := store.Unwrap(before)
		if _, is := store.Unwrap(after); was.GetMeta().GetIndex() == is.GetMeta().GetIndex() {
			return nil // told already
		}
		e.Action = "update"
	}
	_, record := store.Unwrap(after)
	if e.Action != "remove" {
		e.Index, e.TimeNs = record.GetMeta().GetIndex(), record.GetMeta().GetUpdatedNs()
	}
	switch o := after.Of.(type) {
	case *api.Object_Cluster:
		e.Detail = fmt.Sprintf("certificate life: %s, issuing CA: %d, keyset: %d, autolock: %t",
			time.Duration(o.Cluster.LeafTtlNs), o.Cluster.IssuingGeneration, o.Cluster.KeysetGeneration, o.Cluster.Autolock)
	case *api.Object_Node:
		e.Name, e.Detail = o.Node.Hostname, nodeDetail(before.GetNode(), o.Node)
	case *api.Object_Tombstone:
		e.Name, e.Detail = o.Tombstone.Hostname, fmt.Sprintf("evicted, compromised: %t", o.Tombstone.Compromised)
	case *api.Object_Zone:
		e.Name = o.Zone.Name
	case *api.Object_Token:
		e.Name, e.Detail = o.Token.Role.Word(), fmt.Sprintf("uses: %d, revoked: %t", o.Token.Uses, o.Token.RevokedNs != 0)
	case *api.Object_Service:
		e.Name, e.Detail = o.Service.Spec.GetName(), fmt.Sprintf("replicas: %d", o.Service.Spec.GetReplicas())
		if was := before.GetService(); was != nil && was.SpecVersion != o.Service.SpecVersion {
			e.Detail += ", what its tasks run: changed"
		}
	case *api.Object_Task:
		e.Name = fmt.Sprintf("%s.%d", o.Task.ServiceName, o.Task.Slot)
		e.Detail = "state: " + o.Task.GetStatus().GetState().Word()
		if o.Task.NodeId != "" {
			e.Detail += ", node: " + o.Task.NodeId
		}
		if why := o.Task.GetStatus().GetError(); why != "" {
			e.Detail += ", error: " + why
		}
	case *api.Object_Secret:
		e.Name, e.Detail = o.Secret.Name, fmt.Sprintf("version: %d", o.Secret.CurrentVersion)
	case *api.Object_SecretVersion:
		e.Name, e.Detail = v.Secret(o.SecretVersion.SecretId).GetName(), fmt.Sprintf("version: %d", o.SecretVersion.Version)
	case *api.Object_Exposure:
		e.Name, e.Detail = o.Exposure.SecretName, fmt.Sprintf("version: %d, node: %s", o.Exposure.Version, o.Exposure.NodeId)
	}
	return e
}

func nodeDetail(before, n *api.Node) string {
	switch {
	case before == nil:
		return fmt.Sprintf("role: %s, zone: %s", n.EffectiveRole().Word(), n.Zone)
	case before.EffectiveRole() != n.EffectiveRole():
		return "role: " + n.EffectiveRole().Word()
	case before.Availability != n.Availability:
		return "availability: " + n.Availability.Word()
	case before.Zone != n.Zone:
		return "zone: " + n.Zone
	case !bytes.Equal(before.KeyHash, n.KeyHash):
		return "certificate renewed"
	case !bytes.Equal(before.NextKeyHash, n.NextKeyHash):
		return "certificate issued"
	}
	return ""
}
