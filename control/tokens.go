package control

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"strings"
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
		return nil, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "a life of %s is out of range", ttl),
			fmt.Sprintf("give one from %s to %s", warden.TokenTTLMin, warden.TokenTTLMax))
	}
	if len(r.Hostname) > warden.HostnameMax || strings.ContainsFunc(r.Hostname, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return nil, warden.Errorf(warden.CodeInvalid, op, "a host name has at most %d characters, and no spaces", warden.HostnameMax)
	}
	if r.Cidr != "" {
		if _, err := tokens.ParseCIDR(r.Cidr); err != nil {
			return nil, warden.Wrap(op, err)
		}
	}
	ctx, id, err := s.newID(ctx, api.Kind_KIND_TOKEN)
	if err != nil {
		return nil, err
	}
	id = id[len(id)-tokens.IDLength:]
	reply := &api.CreateTokenReply{Id: id}
	var token tokens.Token
	_, err = s.commit(ctx, func(v *store.View) (change, error) {
		c := change{kind: api.Kind_KIND_TOKEN, id: id, action: "create token", name: r.Role.Word()}
		if r.Zone != "" && v.Zone(r.Zone) == nil {
			return c, noZone(op, r.Zone)
		}
		if token, err = tokens.Mint(sha256.Sum256(v.Cluster().GetRootCert())); err != nil {
			return c, err
		}
		token.ID = id
		key, now := token.Key(), time.Now()
		t := &api.Token{
			Id: id, Role: r.Role, Zone: r.Zone, Hostname: r.Hostname, Cidr: r.Cidr, ExpiresNs: now.Add(ttl).UnixNano(), UsesMax: r.UsesMax,
			Key: key[:], RootHash: token.RootHash[:],
		}
		reply.ExpiresNs, reply.Revoked = t.ExpiresNs, 0
		if lost := v.Token(id); lost != nil { // its text went with a lost reply: a new secret in its place
			if lost.Uses > 0 || lost.RevokedNs != 0 || lost.Role != r.Role {
				return c, usedBefore(op)
			}
			c.ops = []*api.Operation{store.Delete(lost)}
		} else if request, _ := requestID(ctx); s.made(request) != 0 { // newID has put it there
			return c, usedBefore(op)
		} else {
			if r.Rotate {
				c.ops = revokeAll(v, now.UnixNano(), func(o *api.Token) bool { return o.Role == r.Role })
				reply.Revoked = uint32(len(c.ops))
			}
			if left := outstanding(v, now.UnixNano()) - len(c.ops); left >= warden.TokensMax {
				return c, warden.Hint(warden.Errorf(warden.CodeTooLarge, op, "a cluster has at most %d outstanding tokens", warden.TokensMax),
					"revoke those that are not needed: `wardenctl swarm token ls`")
			}
		}
		c.ops = append(c.ops, store.Put(t, 0))
		c.check = func(v *store.View) bool { return bytes.Equal(v.Token(id).GetKey(), key[:]) }
		return c, nil
	})
	if err != nil {
		return nil, err
	}
	for _, m := range s.cfg.Cluster.Managers().Managers {
		reply.Addresses = append(reply.Addresses, m.Address)
	}
	return reply, token.Text().Use(func(b []byte) error { reply.Token = string(b); return nil })
}

func isOutstanding(t *api.Token, now int64) bool {
	return t.RevokedNs == 0 && t.ExpiresNs > now && (t.UsesMax == 0 || t.Uses < t.UsesMax)
}

func outstanding(v *store.View, now int64) (n int) {
	for _, t := range v.Tokens() {
		if isOutstanding(t, now) {
			n++
		}
	}
	return n
}

// revokeAll returns the operations that revoke the outstanding tokens that match.
func revokeAll(v *store.View, now int64, match func(*api.Token) bool) []*api.Operation {
	var ops []*api.Operation
	for _, o := range v.Tokens() {
		if isOutstanding(o, now) && match(o) {
			t := api.Clone(o)
			t.RevokedNs = now
			ops = append(ops, store.Put(t, o.Meta.Version))
		}
	}
	return ops
}

// RevokeToken ends one token. One that was revoked before stays so, and the reply says since when.
func (s *Server) RevokeToken(ctx context.Context, r *api.ReferenceRequest) (*api.ChangeReply, error) {
	var warnings []string
	reply, err := s.alter(ctx, func(v *store.View) (change, error) {
		warnings = nil
		c := change{kind: api.Kind_KIND_TOKEN, action: "revoke token", name: r.Reference}
		id, err := v.Resolve(api.Kind_KIND_TOKEN, r.Reference)
		if err != nil {
			return c, err
		}
		now := v.Token(id)
		c.id, c.name = id, now.Role.Word()
		if now.RevokedNs != 0 {
			warnings = []string{"it was revoked at " + time.Unix(0, now.RevokedNs).UTC().Format(time.RFC3339)}
			c.made = now.Meta
			return c, nil
		}
		t := api.Clone(now)
		t.RevokedNs = time.Now().UnixNano()
		c.ops = []*api.Operation{store.Put(t, now.Meta.Version)}
		return c, nil
	})
	if err != nil {
		return nil, api.Error(err)
	}
	reply.Warnings = warnings
	return reply, nil
}
