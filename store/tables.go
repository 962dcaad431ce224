package store

import (
	"fmt"

	"github.com/hashicorp/go-memdb"
	"google.golang.org/protobuf/proto"

	"warden/api"
)

// Record is what all records have in common. Each is the protobuf message itself.
type Record interface {
	proto.Message
	GetId() string
	GetMeta() *api.Meta
}

// Names of the indexes beside "id". memdb never enforces uniqueness: the rules do.
const (
	byID      = "id"
	byName    = "name"
	byZone    = "zone"
	byKey     = "key"
	byNode    = "node"
	byService = "service"
	bySecret  = "secret"
	bySeq     = "seq"
	byManager = "manager" // of nodes: those that are or are to become managers, under yes
)

const yes = "yes"

// requests is the table of results of the last request IDs.
const requests = "requests"

// kinds lists all kinds in the order in which snapshots hold them.
var kinds = []api.Kind{
	api.Kind_KIND_CLUSTER, api.Kind_KIND_NODE, api.Kind_KIND_TOMBSTONE, api.Kind_KIND_ZONE, api.Kind_KIND_TOKEN,
	api.Kind_KIND_SERVICE, api.Kind_KIND_TASK, api.Kind_KIND_SECRET, api.Kind_KIND_SECRET_VERSION, api.Kind_KIND_EXPOSURE,
}

// table returns the name of a kind's table.
func table(k api.Kind) string { return k.String() }

// one indexes a record by one string; records without it are left out.
type one func(any) string

// FromObject implements memdb.SingleIndexer.
func (f one) FromObject(o any) (bool, []byte, error) {
	s := f(o)
	return s != "", key(s), nil
}

// FromArgs implements memdb.Indexer.
func (f one) FromArgs(args ...any) ([]byte, error) { return fromArgs(args) }

// PrefixFromArgs implements memdb.PrefixIndexer.
func (f one) PrefixFromArgs(args ...any) ([]byte, error) {
	b, err := fromArgs(args)
	if err != nil {
		return nil, err
	}
	return b[:len(b)-1], nil
}

// many indexes a record by several strings.
type many func(any) []string

// FromObject implements memdb.MultiIndexer.
func (f many) FromObject(o any) (bool, [][]byte, error) {
	var keys [][]byte
	for _, s := range f(o) {
		if s != "" {
			keys = append(keys, key(s))
		}
	}
	return len(keys) > 0, keys, nil
}

// FromArgs implements memdb.Indexer.
func (f many) FromArgs(args ...any) ([]byte, error) { return fromArgs(args) }

// key ends s with a zero byte, so that no key is the prefix of another.
func key(s string) []byte { return append([]byte(s), 0) }

func fromArgs(args []any) ([]byte, error) {
	if len(args) == 1 {
		if s, ok := args[0].(string); ok {
			return key(s), nil
		}
	}
	return nil, fmt.Errorf("want one string, got %v", args)
}

// newDB returns an empty database. It panics where the schema below is wrong.
func newDB() *memdb.MemDB {
	db, err := memdb.NewMemDB(schema())
	if err != nil {
		panic("the schema of the state is invalid: " + err.Error())
	}
	return db
}

func schema() *memdb.DBSchema {
	s := &memdb.DBSchema{Tables: map[string]*memdb.TableSchema{}}
	add := func(name string, indexes ...*memdb.IndexSchema) {
		t := &memdb.TableSchema{Name: name, Indexes: map[string]*memdb.IndexSchema{}}
		for _, i := range indexes {
			t.Indexes[i.Name] = i
		}
		s.Tables[name] = t
	}
	id := func() *memdb.IndexSchema {
		return &memdb.IndexSchema{Name: byID, Unique: true, Indexer: one(func(o any) string { return o.(Record).GetId() })}
	}
	index := func(name string, unique bool, i memdb.Indexer) *memdb.IndexSchema {
		return &memdb.IndexSchema{Name: name, Unique: unique, AllowMissing: true, Indexer: i}
	}
	add(table(api.Kind_KIND_CLUSTER), id())
	add(table(api.Kind_KIND_NODE), id(),
		index(byName, false, one(func(o any) string { return o.(*api.Node).GetHostname() })),
		index(byZone, false, one(func(o any) string { return o.(*api.Node).GetZone() })),
		index(byKey, false, many(func(o any) []string { return nodeKeys(o.(*api.Node)) })),
		index(byManager, false, one(func(o any) string {
			if isManager(o.(*api.Node)) {
				return yes
			}
			return ""
		})))
	add(table(api.Kind_KIND_TOMBSTONE), id(),
		index(byKey, false, many(func(o any) []string { return hashStrings(o.(*api.Tombstone).GetKeyHashes()...) })))
	add(table(api.Kind_KIND_ZONE), id(),
		index(byName, true, one(func(o any) string { return o.(*api.Zone).GetName() })))
	add(table(api.Kind_KIND_TOKEN), id())
	add(table(api.Kind_KIND_SERVICE), id(),
		index(byName, true, one(func(o any) string { return o.(*api.Service).GetSpec().GetName() })),
		index(byZone, false, one(func(o any) string { return o.(*api.Service).GetSpec().GetTask().GetZone() })),
		index(bySecret, false, many(func(o any) []string { return secretIDs(o.(*api.Service).GetSpec().GetTask()) })))
	add(table(api.Kind_KIND_TASK), id(),
		index(byNode, false, one(func(o any) string { return o.(*api.Task).GetNodeId() })),
		index(byService, false, one(func(o any) string { return o.(*api.Task).GetServiceId() })),
		index(bySecret, false, many(func(o any) []string { return secretIDs(o.(*api.Task).GetSpec()) })))
	add(table(api.Kind_KIND_SECRET), id(),
		index(byName, true, one(func(o any) string { return o.(*api.Secret).GetName() })),
		index(byZone, false, many(func(o any) []string { return o.(*api.Secret).GetZones() })))
	add(table(api.Kind_KIND_SECRET_VERSION), id(),
		index(bySecret, false, one(func(o any) string { return o.(*api.SecretVersion).GetSecretId() })))
	add(table(api.Kind_KIND_EXPOSURE), id(),
		index(byNode, false, one(func(o any) string { return o.(*api.Exposure).GetNodeId() })),
		index(bySecret, false, one(func(o any) string { return o.(*api.Exposure).GetSecretId() })))
	add(requests,
		&memdb.IndexSchema{Name: byID, Unique: true, Indexer: one(func(o any) string { return o.(*api.StoredResult).GetRequestId() })},
		&memdb.IndexSchema{Name: bySeq, Unique: true, Indexer: one(func(o any) string { return seq(o.(*api.StoredResult).GetResult().GetIndex()) })})
	return s
}

// seq spells a raft index so that strings sort as the numbers do.
func seq(index uint64) string { return fmt.Sprintf("%016x", index) }

// nodeKeys returns the hashes of all keys that the record ties to the node: current, next, and that of its join.
func nodeKeys(n *api.Node) []string {
	return hashStrings(n.GetKeyHash(), n.GetNextKeyHash(), n.GetJoinKeyHash())
}

// hashStrings returns the distinct, non-empty hashes in hexadecimal.
func hashStrings(hashes ...[]byte) []string {
	var out []string
	seen := map[string]bool{"": true}
	for _, h := range hashes {
		if s := fmt.Sprintf("%x", h); !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	return out
}

// secretIDs returns the distinct IDs of the secrets that a task uses.
func secretIDs(spec *api.TaskSpec) []string {
	var out []string
	seen := map[string]bool{"": true}
	for _, r := range spec.GetSecrets() {
		if id := r.GetSecretId(); !seen[id] {
			seen[id] = true
			out = append(out, id)
		}
	}
	return out
}

// Wrap returns the record as an Object. It panics for a type that is no record.
func Wrap(r Record) *api.Object {
	switch r := r.(type) {
	case *api.Cluster:
		return &api.Object{Of: &api.Object_Cluster{Cluster: r}}
	case *api.Node:
		return &api.Object{Of: &api.Object_Node{Node: r}}
	case *api.Tombstone:
		return &api.Object{Of: &api.Object_Tombstone{Tombstone: r}}
	case *api.Zone:
		return &api.Object{Of: &api.Object_Zone{Zone: r}}
	case *api.Token:
		return &api.Object{Of: &api.Object_Token{Token: r}}
	case *api.Service:
		return &api.Object{Of: &api.Object_Service{Service: r}}
	case *api.Task:
		return &api.Object{Of: &api.Object_Task{Task: r}}
	case *api.Secret:
		return &api.Object{Of: &api.Object_Secret{Secret: r}}
	case *api.SecretVersion:
		return &api.Object{Of: &api.Object_SecretVersion{SecretVersion: r}}
	case *api.Exposure:
		return &api.Object{Of: &api.Object_Exposure{Exposure: r}}
	}
	panic(fmt.Sprintf("%T is no record", r))
}

// Unwrap is the inverse of Wrap. An empty object gives KIND_UNSPECIFIED and nil.
func Unwrap(o *api.Object) (api.Kind, Record) {
	switch of := o.GetOf().(type) {
	case *api.Object_Cluster:
		return api.Kind_KIND_CLUSTER, of.Cluster
	case *api.Object_Node:
		return api.Kind_KIND_NODE, of.Node
	case *api.Object_Tombstone:
		return api.Kind_KIND_TOMBSTONE, of.Tombstone
	case *api.Object_Zone:
		return api.Kind_KIND_ZONE, of.Zone
	case *api.Object_Token:
		return api.Kind_KIND_TOKEN, of.Token
	case *api.Object_Service:
		return api.Kind_KIND_SERVICE, of.Service
	case *api.Object_Task:
		return api.Kind_KIND_TASK, of.Task
	case *api.Object_Secret:
		return api.Kind_KIND_SECRET, of.Secret
	case *api.Object_SecretVersion:
		return api.Kind_KIND_SECRET_VERSION, of.SecretVersion
	case *api.Object_Exposure:
		return api.Kind_KIND_EXPOSURE, of.Exposure
	}
	return api.Kind_KIND_UNSPECIFIED, nil
}

// setMeta replaces the meta of a record that nobody shares yet.
func setMeta(r Record, m *api.Meta) {
	switch r := r.(type) {
	case *api.Cluster:
		r.Meta = m
	case *api.Node:
		r.Meta = m
	case *api.Tombstone:
		r.Meta = m
	case *api.Zone:
		r.Meta = m
	case *api.Token:
		r.Meta = m
	case *api.Service:
		r.Meta = m
	case *api.Task:
		r.Meta = m
	case *api.Secret:
		r.Meta = m
	case *api.SecretVersion:
		r.Meta = m
	case *api.Exposure:
		r.Meta = m
	}
}

// Put returns the operation that puts the record. expect is the version that it must have now; 0: it must not exist.
func Put(r Record, expect uint64) *api.Operation {
	return &api.Operation{Of: &api.Operation_Put{Put: &api.Put{Object: Wrap(r), Expect: expect}}}
}

// Delete returns the operation that removes the record as it was read: its version must be the same still.
func Delete(r Record) *api.Operation {
	kind, _ := Unwrap(Wrap(r))
	return &api.Operation{Of: &api.Operation_Delete{Delete: &api.Delete{Kind: kind, Id: r.GetId(), Expect: r.GetMeta().GetVersion()}}}
}
