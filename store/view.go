package store

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/go-memdb"

	"warden"
	"warden/api"
)

// View is the state as of one index: immutable, lock-free, safe for concurrent use, and never stale in itself. Getters return
// nil where there is no such record; lists are sorted by ID unless said otherwise. Messages must not be changed: clone them
// (api.Clone) to make the next version.
type View struct {
	db    *memdb.MemDB
	index uint64
	time  int64
}

// Index returns the raft index of the last command applied.
func (v *View) Index() uint64 { return v.index }

// Time returns the last command time in Unix nanoseconds. It never falls.
func (v *View) Time() int64 { return v.time }

// Cluster returns the one cluster record.
func (v *View) Cluster() *api.Cluster {
	return first[*api.Cluster](v.txn(), api.Kind_KIND_CLUSTER, byID+"_prefix", "")
}

// Node returns the node with the ID.
func (v *View) Node(id string) *api.Node { return get[*api.Node](v, api.Kind_KIND_NODE, id) }

// Nodes returns all nodes.
func (v *View) Nodes() []*api.Node { return all[*api.Node](v, api.Kind_KIND_NODE) }

// NodesByKey returns the nodes that the hash of a key belongs to: their current or next one, or the one that they joined with.
func (v *View) NodesByKey(hash []byte) []*api.Node {
	return list[*api.Node](v.txn(), api.Kind_KIND_NODE, byKey, hex.EncodeToString(hash))
}

// Managers returns the nodes that are managers or are to become ones: all that either role of their record says it of.
func (v *View) Managers() []*api.Node {
	return list[*api.Node](v.txn(), api.Kind_KIND_NODE, byManager, yes)
}

// Tombstone returns the tombstone of the node ID.
func (v *View) Tombstone(id string) *api.Tombstone {
	return get[*api.Tombstone](v, api.Kind_KIND_TOMBSTONE, id)
}

// Tombstones returns all tombstones.
func (v *View) Tombstones() []*api.Tombstone {
	return all[*api.Tombstone](v, api.Kind_KIND_TOMBSTONE)
}

// TombstoneByKey returns the tombstone of a node that had the key with this hash.
func (v *View) TombstoneByKey(hash []byte) *api.Tombstone {
	return first[*api.Tombstone](v.txn(), api.Kind_KIND_TOMBSTONE, byKey, hex.EncodeToString(hash))
}

// Zone returns the zone with the name.
func (v *View) Zone(name string) *api.Zone {
	return first[*api.Zone](v.txn(), api.Kind_KIND_ZONE, byName, name)
}

// Zones returns all zones.
func (v *View) Zones() []*api.Zone { return all[*api.Zone](v, api.Kind_KIND_ZONE) }

// Token returns the join token with the ID.
func (v *View) Token(id string) *api.Token { return get[*api.Token](v, api.Kind_KIND_TOKEN, id) }

// Tokens returns all join tokens, ended ones that are still remembered included.
func (v *View) Tokens() []*api.Token { return all[*api.Token](v, api.Kind_KIND_TOKEN) }

// Service returns the service with the ID.
func (v *View) Service(id string) *api.Service {
	return get[*api.Service](v, api.Kind_KIND_SERVICE, id)
}

// ServiceByName returns the service with the name.
func (v *View) ServiceByName(name string) *api.Service {
	return first[*api.Service](v.txn(), api.Kind_KIND_SERVICE, byName, name)
}

// Services returns all services.
func (v *View) Services() []*api.Service { return all[*api.Service](v, api.Kind_KIND_SERVICE) }

// Task returns the task with the ID.
func (v *View) Task(id string) *api.Task { return get[*api.Task](v, api.Kind_KIND_TASK, id) }

// Tasks returns all tasks.
func (v *View) Tasks() []*api.Task { return all[*api.Task](v, api.Kind_KIND_TASK) }

// TasksByNode returns the tasks that were placed on the node, ended ones included.
func (v *View) TasksByNode(id string) []*api.Task {
	return list[*api.Task](v.txn(), api.Kind_KIND_TASK, byNode, id)
}

// TasksByService returns the tasks of the service ID, also where the service is gone.
func (v *View) TasksByService(id string) []*api.Task {
	return list[*api.Task](v.txn(), api.Kind_KIND_TASK, byService, id)
}

// Secret returns the secret with the ID.
func (v *View) Secret(id string) *api.Secret { return get[*api.Secret](v, api.Kind_KIND_SECRET, id) }

// SecretByName returns the secret with the name.
func (v *View) SecretByName(name string) *api.Secret {
	return first[*api.Secret](v.txn(), api.Kind_KIND_SECRET, byName, name)
}

// Secrets returns all secrets.
func (v *View) Secrets() []*api.Secret { return all[*api.Secret](v, api.Kind_KIND_SECRET) }

// SecretVersion returns one version of a secret.
func (v *View) SecretVersion(secretID string, version uint64) *api.SecretVersion {
	return get[*api.SecretVersion](v, api.Kind_KIND_SECRET_VERSION, SecretVersionID(secretID, version))
}

// SecretVersions returns the versions of the secret, sorted by version.
func (v *View) SecretVersions(secretID string) []*api.SecretVersion {
	out := list[*api.SecretVersion](v.txn(), api.Kind_KIND_SECRET_VERSION, bySecret, secretID)
	slices.SortFunc(out, func(a, b *api.SecretVersion) int {
		switch {
		case a.GetVersion() < b.GetVersion():
			return -1
		case a.GetVersion() > b.GetVersion():
			return 1
		}
		return 0
	})
	return out
}

// ExposuresByNode returns what the node may have seen.
func (v *View) ExposuresByNode(id string) []*api.Exposure {
	return list[*api.Exposure](v.txn(), api.Kind_KIND_EXPOSURE, byNode, id)
}

// Exposures returns all exposures.
func (v *View) Exposures() []*api.Exposure { return all[*api.Exposure](v, api.Kind_KIND_EXPOSURE) }

// Result returns what the command with the request ID gave; nil where none is remembered. The versions are left out of large ones.
func (v *View) Result(requestID string) *api.Result {
	raw, err := v.txn().First(requests, byID, requestID)
	if err != nil || raw == nil {
		return nil
	}
	return raw.(*api.StoredResult).GetResult()
}

// Object returns the record of any kind with the ID, or nil.
func (v *View) Object(kind api.Kind, id string) *api.Object {
	if !slices.Contains(kinds, kind) {
		return nil
	}
	raw, err := v.txn().First(table(kind), byID, id)
	if err != nil || raw == nil {
		return nil
	}
	return Wrap(raw.(Record))
}

// SecretVersionID returns the ID of a secret version.
func SecretVersionID(secretID string, version uint64) string {
	return fmt.Sprintf("%s@%d", secretID, version)
}

// ExposureID returns the ID of the exposure of a secret version to a node.
func ExposureID(nodeID, secretID string, version uint64) string {
	return nodeID + "/" + SecretVersionID(secretID, version)
}

// Resolve returns the ID that ref means: an ID, a name (of a zone, service or secret; the host name of a node), or an
// unambiguous prefix of an ID, of at least warden.IDPrefixMin characters, in this order. Errors: CodeInvalid, CodeNotFound, CodeAmbiguous.
func (v *View) Resolve(kind api.Kind, ref string) (string, error) {
	noun := Noun(kind)
	op := "looking up the " + noun
	if !slices.Contains(kinds, kind) || ref == "" || len(ref) > warden.HostnameMax {
		return "", warden.Errorf(warden.CodeInvalid, op, "want an ID, a prefix of one, or a name")
	}
	if o := v.Object(kind, ref); o != nil {
		return ref, nil
	}
	txn := v.txn()
	switch kind {
	case api.Kind_KIND_NODE, api.Kind_KIND_ZONE, api.Kind_KIND_SERVICE, api.Kind_KIND_SECRET:
		if ids := idsOf(txn, kind, byName, ref); len(ids) > 0 {
			return only(op, noun, ref, ids)
		}
	}
	none := warden.Errorf(warden.CodeNotFound, op, "no %s is %q", noun, ref)
	ids := idsOf(txn, kind, byID+"_prefix", ref)
	switch {
	case len(ids) == 0:
		return "", none
	case len(ref) < warden.IDPrefixMin:
		return "", warden.Hint(none, fmt.Sprintf("an ID can be shortened to %d characters, not to fewer", warden.IDPrefixMin))
	}
	return only(op, noun, ref, ids)
}

func only(op, noun, ref string, ids []string) (string, error) {
	if len(ids) == 1 {
		return ids[0], nil
	}
	shown := ids[:min(len(ids), 4)]
	return "", warden.Hint(warden.Errorf(warden.CodeAmbiguous, op, "%q fits %d of them (%s)", ref, len(ids), strings.Join(shown, ", ")),
		"give more characters of the ID of the "+noun)
}

// Noun returns what users call the kind.
func Noun(kind api.Kind) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(kind.String(), "KIND_")), "_", " ")
}

func (v *View) txn() *memdb.Txn { return v.db.Txn(false) }

func get[T Record](v *View, kind api.Kind, id string) T { return first[T](v.txn(), kind, byID, id) }

func all[T Record](v *View, kind api.Kind) []T {
	return list[T](v.txn(), kind, byID+"_prefix", "")
}

// first returns the first record of the index, or nil.
func first[T Record](txn *memdb.Txn, kind api.Kind, index, arg string) T {
	raw, err := txn.First(table(kind), index, arg)
	if err != nil || raw == nil { // err: the schema has no such index, which tests would have found
		var none T
		return none
	}
	return raw.(T)
}

// list returns the records of the index, sorted by ID.
func list[T Record](txn *memdb.Txn, kind api.Kind, index, arg string) []T {
	it, err := txn.Get(table(kind), index, arg)
	if err != nil {
		return nil
	}
	var out []T
	for raw := it.Next(); raw != nil; raw = it.Next() {
		out = append(out, raw.(T))
	}
	return out
}

// idsOf returns the IDs of the records of the index.
func idsOf(txn *memdb.Txn, kind api.Kind, index, arg string) []string {
	var ids []string
	for _, r := range list[Record](txn, kind, index, arg) {
		ids = append(ids, r.GetId())
	}
	return ids
}
