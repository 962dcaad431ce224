package control

import (
	"context"
	"crypto/sha256"
	"fmt"
	"time"

	"warden"
	"warden/api"
	"warden/store"
	"warden/tokens"
)

// CreateToken mints a join token. Its text is in the reply and nowhere else: the state keeps the hash of its secret.
func (s *Server) CreateToken(ctx context.Context, r *api.CreateTokenRequest) (*api.CreateTokenReply, error) {
	reply, err := s.createToken(ctx, r)
	return reply, api.Error(err)
}

func (s *Server) createToken(ctx context.Context, r *api.CreateTokenRequest) (*api.CreateTokenReply, error) {
	op := "minting a token for a " + r.Role.Word()
	if r.Role != api.Role_ROLE_WORKER && r.Role != api.Role_ROLE_MANAGER {
		return nil, warden.Errorf(warden.CodeInvalid, op, "the role is neither worker nor manager")
	}
	ttl := time.Duration(r.TtlNs)
	if ttl == 0 {
		ttl = warden.TokenTTLDefault
	}
	if ttl < warden.TokenTTLMin || ttl > warden.TokenTTLMax {
		return nil, warden.Errorf(warden.CodeInvalid, op, "a life of %s is outside %s to %s", ttl, warden.TokenTTLMin, warden.TokenTTLMax)
	}
	if len(r.Hostname) > warden.HostnameMax {
		return nil, warden.Errorf(warden.CodeTooLarge, op, "the host name is over %d characters", warden.HostnameMax)
	}
	if r.Cidr != "" {
		if _, err := tokens.ParseCIDR(r.Cidr); err != nil {
			return nil, warden.Wrap(op, err)
		}
	}
	v := s.cfg.Store.View()
	token, err := tokens.Mint(sha256.Sum256(v.Cluster().GetRootCert()))
	if err != nil {
		return nil, err
	}
	key := token.Key()
	reply := &api.CreateTokenReply{Id: token.ID}
	_, err = s.commit(ctx, func(v *store.View) (change, error) {
		if r.Zone != "" && v.Zone(r.Zone) == nil {
			return change{}, noZone(op, r.Zone)
		}
		now := time.Now()
		t := &api.Token{
			Id: token.ID, Role: r.Role, Zone: r.Zone, Hostname: r.Hostname, Cidr: r.Cidr, ExpiresNs: now.Add(ttl).UnixNano(), UsesMax: r.UsesMax,
			Key: key[:], RootHash: token.RootHash[:],
		}
		var ops []*api.Operation
		if r.Rotate {
			ops = revokeAll(v, func(o *api.Token) bool { return o.Role == r.Role }, now.UnixNano())
		}
		if len(v.Tokens())-len(ops) >= warden.TokensMax {
			return change{}, warden.Hint(warden.Errorf(warden.CodeTooLarge, op, "a cluster has at most %d outstanding tokens", warden.TokensMax),
				"revoke those that are not needed: `wardenctl swarm token ls`")
		}
		reply.ExpiresNs, reply.Revoked = t.ExpiresNs, uint32(len(ops))
		return change{ops: append(ops, put(store.Wrap(t), 0)), id: t.Id, action: "create token", name: r.Role.Word()}, nil
	})
	if err != nil {
		return nil, err
	}
	for _, m := range s.cfg.Cluster.Managers().Managers {
		reply.Addresses = append(reply.Addresses, m.Address)
	}
	return reply, token.Text().Use(func(b []byte) error { reply.Token = string(b); return nil })
}

// revokeAll returns the operations that revoke the outstanding tokens that match.
func revokeAll(v *store.View, match func(*api.Token) bool, now int64) []*api.Operation {
	var ops []*api.Operation
	for _, o := range v.Tokens() {
		if o.RevokedNs == 0 && o.ExpiresNs > now && match(o) {
			t := api.Clone(o)
			t.RevokedNs = now
			ops = append(ops, put(store.Wrap(t), o.Meta.Version))
		}
	}
	return ops
}

// RevokeToken ends one token.
func (s *Server) RevokeToken(ctx context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	reply, err := s.commit(ctx, func(v *store.View) (change, error) {
		id, err := v.Resolve(api.Kind_KIND_TOKEN, r.Reference)
		if err != nil {
			return change{}, err
		}
		now := v.Token(id)
		if now.RevokedNs != 0 {
			return change{}, warden.Errorf(warden.CodeRevoked, "revoking token "+id, "it was revoked at %s", time.Unix(0, now.RevokedNs).UTC().Format(time.RFC3339))
		}
		t := api.Clone(now)
		t.RevokedNs = time.Now().UnixNano()
		return change{ops: []*api.Operation{put(store.Wrap(t), now.Meta.Version)}, id: id, action: "revoke token", name: fmt.Sprint(t.Role.Word())}, nil
	})
	return reply, api.Error(err)
}
