package store

import (
	"io"
	"sync/atomic"

	"github.com/hashicorp/go-memdb"
	"github.com/hashicorp/raft"

	"warden"
	"warden/api"
)

// machine is the raft.FSM: it feeds the state, publishes views, then tells the watchers. raft calls its methods from one
// goroutine; only view may be read from others.
type machine struct {
	state *State
	hub   *hub
	view  atomic.Pointer[View]
}

func newMachine() *machine {
	m := &machine{state: NewState(), hub: newHub()}
	m.view.Store(m.state.View())
	return m
}

// Apply implements raft.FSM. It returns an *api.Result.
func (m *machine) Apply(l *raft.Log) any {
	result, keys := m.state.Apply(l.Index, l.Data)
	m.view.Store(m.state.View())
	m.hub.publish(l.Index, keys, false)
	return result
}

// Snapshot implements raft.FSM. It costs nothing: the view is immutable.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) { return &snapshot{m.state.View()}, nil }

// Restore implements raft.FSM. The old state stays where the snapshot is refused.
func (m *machine) Restore(r io.ReadCloser) error {
	defer r.Close()
	s, err := ReadState(r)
	if err != nil {
		return err
	}
	m.state = s
	m.view.Store(s.View())
	m.hub.publish(s.index, nil, true)
	return nil
}

// snapshot implements raft.FSMSnapshot.
type snapshot struct{ view *View }

// Persist implements raft.FSMSnapshot.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.view.Write(sink); err != nil {
		sink.Cancel()
		return warden.Wrap("writing a snapshot of the state", err)
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (s *snapshot) Release() {}

// restorer inserts records into an empty state as they are. It keeps the IDs itself: a look into the database between writes costs more
// than a write.
type restorer struct {
	s    *State
	txn  *memdb.Txn
	seen map[Key]struct{}
}

func newRestorer(s *State) *restorer {
	return &restorer{s: s, txn: s.db.Txn(true), seen: map[Key]struct{}{}}
}

// object inserts one record. Errors: CodeCorrupt for one that lacks its ID or is there already.
func (r *restorer) object(o *api.Object) error {
	const op = "restoring an object"
	kind, rec := Unwrap(o)
	if rec == nil || rec.GetId() == "" {
		return warden.Errorf(warden.CodeCorrupt, op, "a %s without an ID", Noun(kind))
	}
	key := Key{kind, rec.GetId()}
	if _, twice := r.seen[key]; twice {
		return warden.Errorf(warden.CodeCorrupt, op, "%s %s is twice there", Noun(kind), clip(rec.GetId()))
	}
	r.seen[key] = struct{}{}
	if rec.GetMeta() == nil {
		setMeta(rec, &api.Meta{Version: 1, Index: 1})
	}
	if t, ok := rec.(*api.Task); ok {
		r.s.specs.share(nil, t)
	}
	r.s.counts[kind]++
	must(r.txn.Insert(table(kind), rec))
	return nil
}
