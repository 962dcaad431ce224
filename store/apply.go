package store

import (
	"github.com/hashicorp/go-memdb"

	"warden"
	"warden/api"
)

// tx is the application of one command.
type tx struct {
	txn      *memdb.Txn
	index    uint64
	now      int64 // effective command time
	cmd      *api.Command
	versions []uint64
	changed  map[Key]struct{}
	after    []func() error // checks of the whole, run once all operations are done
	uses     map[string]int // uses of tokens that the command takes and no new node has claimed yet
	genesis  bool           // no cluster existed before this command
}

func newTx(txn *memdb.Txn, index uint64, now int64, cmd *api.Command) *tx {
	x := &tx{txn: txn, index: index, now: now, cmd: cmd, changed: map[Key]struct{}{}, uses: map[string]int{}}
	x.genesis = x.cluster() == nil
	for _, o := range cmd.GetOperations() {
		if u := o.GetUseToken(); u != nil {
			x.uses[u.GetTokenId()]++
		}
	}
	return x
}

// run applies the operations in their order.
func (x *tx) run() error {
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
	raw, err := x.txn.First(table(kind), byID, id)
	must(err)
	if raw == nil {
		return nil
	}
	return raw.(Record)
}

// store writes next, which nobody shares, over old, and returns its version.
func (x *tx) store(kind api.Kind, old, next Record) uint64 {
	m := &api.Meta{Version: 1, Index: x.index, CreatedNs: x.now, UpdatedNs: x.now}
	if old != nil {
		m.Version, m.CreatedNs = old.GetMeta().GetVersion()+1, old.GetMeta().GetCreatedNs()
	}
	setMeta(next, m)
	must(x.txn.Insert(table(kind), next))
	x.changed[Key{kind, next.GetId()}] = struct{}{}
	return m.Version
}

func (x *tx) remove(kind api.Kind, old Record) {
	must(x.txn.Delete(table(kind), old))
	x.changed[Key{kind, old.GetId()}] = struct{}{}
}

func (x *tx) cluster() *api.Cluster {
	return first[*api.Cluster](x.txn, api.Kind_KIND_CLUSTER, byID+"_prefix", "")
}
