package store

import (
	"github.com/hashicorp/go-memdb"

	"warden"
	"warden/api"
)

// tx is the application of one command.
type tx struct {
	s        *State
	base     *memdb.Txn // the state before the command; reading it costs less than reading txn, which copies what it wrote then
	txn      *memdb.Txn
	index    uint64
	now      int64 // effective command time
	cmd      *api.Command
	versions []uint64
	written  map[Key]Record   // the records that changed; nil: removed
	added    map[api.Kind]int // records that came, less those that went
	after    []func() error   // checks of the whole, run once all operations are done
	uses     map[string]int   // uses of tokens that the command takes and no new node has claimed yet
	loads    map[string]load  // of the nodes that the command places tasks on, before it
	shifts   map[string]load  // what the command has changed of the load of nodes
	genesis  bool             // no cluster existed before this command
}

// load is what the tasks that a node holds add up to.
type load struct {
	tasks                 int
	nanoCPUs, memoryBytes int64
}

// plus returns l with the task counted in, or out with sign -1.
func (l load) plus(t *api.Task, sign int) load {
	l.tasks += sign
	l.nanoCPUs += int64(sign) * t.GetSpec().GetResources().GetReserveNanoCpus()
	l.memoryBytes += int64(sign) * t.GetSpec().GetResources().GetReserveMemoryBytes()
	return l
}

// load returns what the node holds now, which costs a pass over its tasks once per command.
func (x *tx) load(nodeID string) load {
	l, ok := x.loads[nodeID]
	if !ok {
		for _, t := range list[*api.Task](x.base, api.Kind_KIND_TASK, byNode, nodeID) {
			if t.Holds() {
				l = l.plus(t, 1)
			}
		}
		x.loads[nodeID] = l
	}
	d := x.shifts[nodeID]
	return load{l.tasks + d.tasks, l.nanoCPUs + d.nanoCPUs, l.memoryBytes + d.memoryBytes}
}

// shift notes that a task changes from old to next; either may be nil.
func (x *tx) shift(old, next *api.Task) {
	if old.GetNodeId() != "" && old.Holds() {
		x.shifts[old.GetNodeId()] = x.shifts[old.GetNodeId()].plus(old, -1)
	}
	if next.GetNodeId() != "" && next.Holds() {
		x.shifts[next.GetNodeId()] = x.shifts[next.GetNodeId()].plus(next, 1)
	}
}

func newTx(s *State, txn *memdb.Txn, index uint64, now int64, cmd *api.Command) *tx {
	x := &tx{s: s, base: s.db.Txn(false), txn: txn, index: index, now: now, cmd: cmd, written: map[Key]Record{}, added: map[api.Kind]int{},
		uses: map[string]int{}, loads: map[string]load{}, shifts: map[string]load{}}
	x.genesis = x.cluster() == nil
	for _, o := range cmd.GetOperations() {
		if u := o.GetUseToken(); u != nil {
			x.uses[u.GetTokenId()]++
		}
	}
	return x
}

// run applies the operations in their order. What a manager passed on a moment before its eviction, and comes after that in the
// log, is refused: a token that it minted there would outlive the revocation of all.
func (x *tx) run() error {
	if via := x.cmd.GetActor().GetVia(); via != "" && x.find(api.Kind_KIND_TOMBSTONE, via) != nil {
		return warden.Errorf(warden.CodeEvicted, "applying a command", "node %s, which passed it on, was removed", clip(via))
	}
	for _, o := range x.cmd.GetOperations() {
		var version uint64
		var err error
		switch of := o.GetOf().(type) {
		case *api.Operation_Put:
			version, err = x.put(of.Put)
		case *api.Operation_Delete:
			err = x.delete(of.Delete)
		case *api.Operation_UseToken:
			err = x.useToken(of.UseToken.GetTokenId())
		case *api.Operation_ReportTask:
			x.reportTask(of.ReportTask)
		case *api.Operation_DescribeNode:
			x.describeNode(of.DescribeNode)
		default:
			err = warden.Errorf(warden.CodeInvalid, "applying a command", "an operation of an unknown kind")
		}
		if err != nil {
			return err
		}
		x.versions = append(x.versions, version)
	}
	for _, check := range x.after {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (x *tx) put(p *api.Put) (uint64, error) {
	kind, next := Unwrap(p.GetObject())
	if next == nil {
		return 0, warden.Errorf(warden.CodeInvalid, "putting an object", "it is empty")
	}
	op := "putting " + Noun(kind) + " " + clip(next.GetId())
	old := x.find(kind, next.GetId())
	switch {
	case old != nil && p.GetExpect() == 0:
		return 0, warden.Errorf(warden.CodeExists, op, "it exists already")
	case old == nil && p.GetExpect() != 0:
		return 0, warden.Errorf(warden.CodeConflict, op, "it is gone, version %d was expected", p.GetExpect())
	case old != nil && old.GetMeta().GetVersion() != p.GetExpect():
		return 0, warden.Errorf(warden.CodeConflict, op, "it has version %d, %d was expected", old.GetMeta().GetVersion(), p.GetExpect())
	}
	if err := x.rule(kind, old, next); err != nil {
		return 0, warden.Wrap(op, err)
	}
	return x.store(kind, old, next), nil
}

func (x *tx) delete(d *api.Delete) error {
	op := "removing " + Noun(d.GetKind()) + " " + clip(d.GetId())
	old := x.find(d.GetKind(), d.GetId())
	switch {
	case old == nil:
		return warden.Errorf(warden.CodeNotFound, op, "there is none")
	case old.GetMeta().GetVersion() != d.GetExpect():
		return warden.Errorf(warden.CodeConflict, op, "it has version %d, %d was expected", old.GetMeta().GetVersion(), d.GetExpect())
	}
	if err := x.ruleDelete(d.GetKind(), old); err != nil {
		return warden.Wrap(op, err)
	}
	x.remove(d.GetKind(), old)
	return nil
}

// find returns the record, or nil.
func (x *tx) find(kind api.Kind, id string) Record {
	if kind <= api.Kind_KIND_UNSPECIFIED || kind > api.Kind_KIND_EXPOSURE || id == "" {
		return nil
	}
	if r, ok := x.written[Key{kind, id}]; ok {
		return r
	}
	raw, err := x.base.First(table(kind), byID, id)
	must(err)
	if raw == nil {
		return nil
	}
	return raw.(Record)
}

// store writes next, which nobody shares, over old, and returns its version.
func (x *tx) store(kind api.Kind, old, next Record) uint64 {
	m := &api.Meta{Version: 1, Index: x.index, CreatedNs: x.now, UpdatedNs: x.now}
	if old == nil {
		x.added[kind]++
	} else {
		m.Version, m.CreatedNs = old.GetMeta().GetVersion()+1, old.GetMeta().GetCreatedNs()
	}
	setMeta(next, m)
	if kind == api.Kind_KIND_TASK {
		x.s.specs.share(as[*api.Task](old), next.(*api.Task))
		x.shift(as[*api.Task](old), next.(*api.Task))
	}
	must(x.txn.Insert(table(kind), next))
	x.written[Key{kind, next.GetId()}] = next
	return m.Version
}

func (x *tx) remove(kind api.Kind, old Record) {
	must(x.txn.Delete(table(kind), old))
	if kind == api.Kind_KIND_TASK {
		x.shift(as[*api.Task](old), nil)
	}
	x.added[kind]--
	x.written[Key{kind, old.GetId()}] = nil
}

func (x *tx) cluster() *api.Cluster {
	return first[*api.Cluster](x.txn, api.Kind_KIND_CLUSTER, byID+"_prefix", "")
}
