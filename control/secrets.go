package control

import (
	"context"
	"slices"

	"warden"
	"warden/api"
	"warden/secrets"
	"warden/store"
)

// CreateSecret seals a value under a data key of its own and stores it as version 1. The value is in no reply, log or error.
func (s *Server) CreateSecret(ctx context.Context, r *api.CreateSecretRequest) (*api.ChangeReply, error) {
	defer clear(r.Data)
	reply, err := s.createSecret(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) createSecret(ctx context.Context, r *api.CreateSecretRequest) (*api.ChangeReply, error) {
	if err := warden.CheckName("secret", r.Name); err != nil {
		return nil, err
	}
	op := "creating secret " + r.Name
	switch {
	case len(r.Data) == 0:
		return nil, warden.Errorf(warden.CodeInvalid, op, "the value is empty")
	case len(r.Data) > warden.SecretBytesMax:
		return nil, warden.Errorf(warden.CodeTooLarge, op, "the value has %d bytes, at most %d", len(r.Data), warden.SecretBytesMax)
	case len(r.Zones) > warden.ZonesMax:
		return nil, warden.Errorf(warden.CodeTooLarge, op, "%d zones, at most %d", len(r.Zones), warden.ZonesMax)
	}
	if err := checkLabels(op, r.Labels); err != nil {
		return nil, err
	}
	ctx, id, err := s.newID(ctx, api.Kind_KIND_SECRET)
	if err != nil {
		return nil, err
	}
	zones := slices.Compact(slices.Sorted(slices.Values(r.Zones)))
	return s.commit(ctx, func(v *store.View) (change, error) {
		record := &api.Secret{Id: id, Name: r.Name, Labels: r.Labels, Zones: zones, CurrentVersion: 1}
		c, err := create(v, op, r.Name, record)
		if err != nil || c.made != nil {
			return c, err
		}
		if len(v.Secrets()) >= warden.SecretsMax {
			return c, warden.Errorf(warden.CodeTooLarge, op, "a cluster has at most %d secrets", warden.SecretsMax)
		}
		if v.SecretByName(r.Name) != nil {
			return c, warden.Hint(warden.Errorf(warden.CodeExists, op, "a secret has this name"), "choose another name, or remove that secret")
		}
		for _, z := range zones {
			if v.Zone(z) == nil {
				return c, noZone(op, z)
			}
		}
		cluster := v.Cluster()
		ks, err := secrets.ParseKeyset(cluster.Keyset)
		if err != nil {
			return c, err
		}
		ciphertext, wrapped, err := secrets.SealVersion(ks, cluster.Id, id, 1, r.Data)
		if err != nil {
			return c, warden.Wrap(op, err)
		}
		c.ops = append(c.ops, store.Put(&api.SecretVersion{
			Id: store.SecretVersionID(id, 1), SecretId: id, Version: 1, Ciphertext: ciphertext, WrappedKey: wrapped,
			SizeBytes: uint64(len(r.Data)), KeysetGeneration: cluster.KeysetGeneration,
		}, 0))
		return c, nil
	})
}

// RemoveSecret removes a secret and all its versions. Refused while a service or task uses it; the error names the users.
func (s *Server) RemoveSecret(ctx context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	reply, err := s.remove(ctx, api.Kind_KIND_SECRET, r.Reference)
	return reply, api.Error(err)
}
