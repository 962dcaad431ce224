package control

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"warden"
	"warden/api"
	"warden/policy"
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
	if err := checkValue(op, r.Data); err != nil {
		return nil, err
	}
	if len(r.Zones) > warden.ZonesMax {
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
	return s.alter(ctx, func(v *store.View) (change, error) {
		record := &api.Secret{Id: id, Name: r.Name, Labels: r.Labels, Zones: zones, CurrentVersion: 1}
		c, err := create(v, op, r.Name, record)
		if err != nil || c.made != nil {
			return c, err
		}
		if v.SecretByName(r.Name) != nil {
			return c, warden.Hint(warden.Errorf(warden.CodeExists, op, "a secret has this name"), "choose another name, or remove that secret")
		}
		for _, z := range zones {
			if v.Zone(z) == nil {
				return c, noZone(op, z)
			}
		}
		version, err := seal(v, id, 1, r.Data)
		if err != nil {
			return c, warden.Wrap(op, err)
		}
		c.ops = append(c.ops, store.Put(version, 0))
		return c, nil
	})
}

func checkValue(op string, data []byte) error {
	switch {
	case len(data) == 0:
		return warden.Errorf(warden.CodeInvalid, op, "the value is empty")
	case len(data) > warden.SecretBytesMax:
		return warden.Errorf(warden.CodeTooLarge, op, "the value has %d bytes, at most %d", len(data), warden.SecretBytesMax)
	}
	return nil
}

// seal returns a new version of the secret under the cluster's keyset.
func seal(v *store.View, secretID string, version uint64, data []byte) (*api.SecretVersion, error) {
	cluster := v.Cluster()
	ks, err := secrets.ParseKeyset(cluster.Keyset)
	if err != nil {
		return nil, err
	}
	ciphertext, wrapped, err := secrets.SealVersion(ks, cluster.Id, secretID, version, data)
	if err != nil {
		return nil, err
	}
	return &api.SecretVersion{
		Id: store.SecretVersionID(secretID, version), SecretId: secretID, Version: version, Ciphertext: ciphertext, WrappedKey: wrapped,
		SizeBytes: uint64(len(data)), KeysetGeneration: cluster.KeysetGeneration,
	}, nil
}

// RotateSecret seals a value as the next version and makes it the current one, in one command. The orchestrator replaces the
// tasks of the services that follow the secret; services that pin a version keep it. The value is in no reply, log or error.
func (s *Server) RotateSecret(ctx context.Context, r *api.RotateSecretRequest) (*api.RotateSecretReply, error) {
	defer clear(r.Data)
	reply, err := s.rotateSecret(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) rotateSecret(ctx context.Context, r *api.RotateSecretRequest) (*api.RotateSecretReply, error) {
	op := "rotating secret " + r.Reference
	if err := checkValue(op, r.Data); err != nil {
		return nil, err
	}
	ctx, request, err := withRequestID(ctx)
	if err != nil {
		return nil, err
	}
	full := "" // ID of the secret, where it has as many versions as it may
	done, err := s.alter(ctx, func(v *store.View) (change, error) {
		c := change{kind: api.Kind_KIND_SECRET, action: "rotate secret", name: r.Reference}
		id, err := v.Resolve(api.Kind_KIND_SECRET, r.Reference)
		if err != nil {
			return c, err
		}
		now := v.Secret(id)
		next := api.Clone(now)
		next.CurrentVersion++
		c.id, c.name = id, now.Name
		if err := mayRotate(v, op, now, uint64(len(r.Data))); err != nil {
			if len(v.SecretVersions(id)) >= warden.SecretVersionsMax {
				full = id
			}
			return c, err
		}
		version, err := seal(v, id, next.CurrentVersion, r.Data)
		if err != nil {
			return c, warden.Wrap(op, err)
		}
		c.ops = []*api.Operation{store.Put(next, now.Meta.Version), store.Put(version, 0)}
		return c, nil
	})
	if err != nil && full != "" { // perhaps this call has made the last of them before, and the reply was lost
		if index := s.made(request); index != 0 {
			done, err = &api.ChangeReply{Id: full, Index: index}, nil
		}
	}
	if err != nil {
		return nil, err
	}
	v := s.cfg.Store.View()
	reply := &api.RotateSecretReply{Id: done.Id, Index: done.Index, Version: rotatedAt(v, done.Id, done.Index)}
	if reply.Version == 0 {
		return nil, doneBefore(done.Index, nil)
	}
	for _, sv := range v.Services() {
		if sv.Spec.Replicas > 0 && follows(sv, done.Id) {
			reply.Services = append(reply.Services, sv.Spec.Name)
		}
	}
	slices.Sort(reply.Services)
	return reply, nil
}

// made returns the index at which an earlier call with the request ID had its effect; 0 where none did.
func (s *Server) made(request string) uint64 { return s.result(request).GetIndex() }

// result returns the stored result of the attempt by which an earlier call with the request ID had its effect; nil where none did.
// It proposes nothing.
func (s *Server) result(request string) *api.Result {
	v := s.cfg.Store.View()
	for attempt := range attemptsMax {
		switch r := v.Result(attemptID(request, attempt)); {
		case r != nil && r.Code == "":
			return r
		case r == nil || r.Code != string(warden.CodeConflict):
			return nil
		}
	}
	return nil
}

// rotatedAt returns the version that was made at the index; 0 where none was.
func rotatedAt(v *store.View, secretID string, index uint64) uint64 {
	resealed := false
	for _, sv := range v.SecretVersions(secretID) {
		if sv.Meta.Index == index {
			return sv.Version
		}
		resealed = resealed || sv.Meta.Version > 1 && sv.Meta.Index > index
	}
	if resealed { // which has changed the index of the one that was made; a repeated call comes here, and nothing newer than it
		return v.Secret(secretID).GetCurrentVersion()
	}
	return 0
}

// mayRotate refuses one version too many, and a value that a service which follows the secret can't have.
func mayRotate(v *store.View, op string, secret *api.Secret, size uint64) error {
	if versions := v.SecretVersions(secret.Id); len(versions) >= warden.SecretVersionsMax {
		return warden.Hint(warden.Errorf(warden.CodeTooLarge, op, "it has %d versions, which is the most", len(versions)),
			fmt.Sprintf("remove some that nothing uses, the oldest first: `wardenctl secret inspect %s` shows them, `wardenctl secret rm %s@N` removes one", secret.Name, secret.Name))
	}
	known := func(zone string) bool { return v.Zone(zone) != nil }
	for _, sv := range v.Services() {
		if !follows(sv, secret.Id) {
			continue
		}
		name, zone := sv.Spec.Name, sv.Spec.Task.Zone
		if d := policy.SecretMayEnter(secret.Zones, zone, known); !d.Allow {
			return warden.Hint(warden.Errorf(warden.CodeWrongZone, op, "service %s follows it in zone %q: %s", name, zone, d.Reason),
				"move the service to a zone of the secret, or take the secret from it, with `wardenctl service update`")
		}
		total := uint64(0)
		for _, ref := range sv.Spec.Task.Secrets {
			switch n := ref.Version; {
			case n == 0 && ref.SecretId == secret.Id:
				total += size
			case n == 0:
				total += v.SecretVersion(ref.SecretId, v.Secret(ref.SecretId).GetCurrentVersion()).GetSizeBytes()
			default:
				total += v.SecretVersion(ref.SecretId, n).GetSizeBytes()
			}
		}
		if total > warden.TaskSecretsMax {
			return warden.Hint(warden.Errorf(warden.CodeTooLarge, op, "the secrets of service %s, which follows it, would have %d bytes together, at most %d", name, total, warden.TaskSecretsMax),
				fmt.Sprintf("give a shorter value, or pin the service first: `wardenctl service update --secret-rm %s --secret-add %s@%d %s`", secret.Name, secret.Name, secret.CurrentVersion, name))
		}
	}
	return nil
}

// follows reports whether a service takes whatever version of the secret is current.
func follows(sv *api.Service, secretID string) bool {
	return slices.ContainsFunc(sv.Spec.Task.Secrets, func(r *api.SecretReference) bool { return r.SecretId == secretID && r.Version == 0 })
}

// RemoveSecret removes a secret and all its versions, or with "NAME@VERSION" that version. Refused while a service or task uses
// it; the error names the users.
func (s *Server) RemoveSecret(ctx context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	name, number, one := strings.Cut(r.Reference, "@")
	if !one {
		reply, err := s.remove(ctx, api.Kind_KIND_SECRET, r.Reference)
		return reply, api.Error(err)
	}
	op := "removing secret " + clip(r.Reference)
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != number {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeInvalid, op, "%q is no version", clip(number)), "write NAME@VERSION, such as db@3"))
	}
	reply, err := s.removeFound(ctx, api.Kind_KIND_SECRET_VERSION, r.Reference, func(v *store.View) (string, error) {
		id, err := v.Resolve(api.Kind_KIND_SECRET, name)
		if err != nil {
			return "", err
		}
		secret := v.Secret(id)
		if v.SecretVersion(id, n) == nil {
			return "", warden.Hint(warden.Errorf(warden.CodeNotFound, op, "secret %q has no version %d", secret.Name, n), fmt.Sprintf("see `wardenctl secret inspect %s`", secret.Name))
		}
		return store.SecretVersionID(id, n), mayRemove(v, op, secret, n)
	})
	return reply, api.Error(err)
}

// mayRemove refuses the removal of a version that is in use; the hint names the users and what frees it.
func mayRemove(v *store.View, op string, secret *api.Secret, version uint64) error {
	if secret.CurrentVersion == version {
		return warden.Hint(warden.Errorf(warden.CodeInUse, op, "it is the current version"),
			fmt.Sprintf("make another the current one first: `wardenctl secret rotate %s FILE`; or remove all of it: `wardenctl secret rm %s`", secret.Name, secret.Name))
	}
	for _, u := range secretUses(v, []*api.Secret{secret}) {
		if u.Version != version || len(u.Services) == 0 && u.Tasks == 0 {
			continue
		}
		var who, frees []string
		if len(u.Services) > 0 {
			who = append(who, "pinned by "+some(u.Services))
			frees = append(frees, fmt.Sprintf("`wardenctl service update --secret-rm %s --secret-add %s SERVICE` lets a service follow the secret", secret.Name, secret.Name))
		}
		if u.Tasks > 0 {
			held := "1 task that has not ended"
			if u.Tasks > 1 {
				held = fmt.Sprintf("%d tasks that have not ended", u.Tasks)
			}
			who = append(who, "held by "+held)
			if len(u.Services) == 0 {
				frees = append(frees, "tasks give it back when they are replaced: `wardenctl service ls` shows how far that is")
			}
		}
		return warden.Hint(warden.Errorf(warden.CodeInUse, op, "it is in use: %s", strings.Join(who, ", ")), strings.Join(frees, "; "))
	}
	return nil
}

// secretUses returns each version of the secrets and who uses it: by secret in the order given, oldest first. One pass over all
// services and tasks.
func secretUses(v *store.View, of []*api.Secret) []*api.SecretUse {
	type key struct {
		id      string
		version uint64
	}
	var uses []*api.SecretUse
	byKey, current := map[key]*api.SecretUse{}, map[string]uint64{}
	for _, s := range of {
		current[s.Id] = s.CurrentVersion
		for _, sv := range v.SecretVersions(s.Id) {
			u := &api.SecretUse{SecretId: s.Id, Version: sv.Version, CreatedNs: sv.Meta.CreatedNs, SizeBytes: sv.SizeBytes, Current: sv.Version == s.CurrentVersion}
			uses = append(uses, u)
			byKey[key{s.Id, sv.Version}] = u
		}
	}
	each := func(refs []*api.SecretReference, f func(*api.SecretUse)) { // once a version, however many files have it
		for i, r := range refs {
			k := key{r.SecretId, cmp.Or(r.Version, current[r.SecretId])}
			u := byKey[k]
			if u == nil || slices.ContainsFunc(refs[:i], func(o *api.SecretReference) bool {
				return k == key{o.SecretId, cmp.Or(o.Version, current[o.SecretId])}
			}) {
				continue
			}
			f(u)
		}
	}
	for _, sv := range v.Services() {
		each(sv.Spec.GetTask().GetSecrets(), func(u *api.SecretUse) { u.Services = append(u.Services, sv.Spec.Name) })
	}
	for _, t := range v.Tasks() {
		if !t.Status.GetState().Ended() {
			each(t.Spec.GetSecrets(), func(u *api.SecretUse) { u.Tasks++ })
		}
	}
	for _, u := range uses {
		slices.Sort(u.Services)
	}
	return uses
}
