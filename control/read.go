package control

import (
	"context"
	"google.golang.org/protobuf/proto"

	"warden"
	"warden/api"
	"warden/store"
)

// List returns records of one kind, redacted. References of a secret version are its secret's, those of an exposure its
// node's (also a removed node's whole ID).
func (s *Server) List(ctx context.Context, r *api.ListRequest) (*api.ListReply, error) {
	v := s.cfg.Store.View()
	if !r.Local {
		var err error
		if v, err = s.fresh(ctx); err != nil {
			return nil, api.Error(err)
		}
	}
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
	switch r.Kind {
	case api.Kind_KIND_NODE:
		reply.Nodes = s.cfg.Cluster.NodeStates(ids)
	case api.Kind_KIND_SECRET:
		var of []*api.Secret
		for _, o := range objects {
			of = append(of, o.GetSecret())
		}
		reply.Uses = secretUses(v, of)
	}
	if n := proto.Size(reply); n > warden.MessageMax {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeTooLarge, "listing", "the answer has %d bytes, at most %d", n, warden.MessageMax),
			"name the ones that you want to see"))
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
		if v.Cluster() == nil { // a replica that has not followed yet
			return nil, nil
		}
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
