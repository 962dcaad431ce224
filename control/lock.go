package control

import (
	"context"
	"fmt"
	"time"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/store"
)

// UpdateCluster changes the settings of the cluster. A value out of range is refused, never replaced. Where autolock is on, turning
// it on again is refused: the caller's fresh key would not be the cluster's.
func (s *Server) UpdateCluster(ctx context.Context, r *api.UpdateClusterRequest) (*api.ChangeReply, error) {
	const op = "updating the cluster"
	ttl := time.Duration(r.LeafTtlNs)
	if ttl != 0 && (ttl < warden.LeafTTLMin || ttl > warden.LeafTTLMax) {
		return nil, api.Error(warden.Hint(warden.Errorf(warden.CodeInvalid, op, "a life of %s for certificates is out of range", ttl),
			fmt.Sprintf("give one from %s to %s", warden.LeafTTLMin, warden.LeafTTLMax)))
	}
	var to *autolock.Recipient
	if r.Autolock != nil && *r.Autolock {
		parsed, err := autolock.ParseRecipient(r.UnlockRecipient)
		if err != nil {
			return nil, api.Error(warden.Wrap(op, err))
		}
		to = &parsed
	}
	reply, err := s.changeCluster(ctx, "update cluster", func(c *api.Cluster) (changed bool, err error) {
		if ttl != 0 && c.LeafTtlNs != r.LeafTtlNs {
			c.LeafTtlNs, changed = r.LeafTtlNs, true
		}
		if r.Autolock == nil || c.Autolock == *r.Autolock && (to == nil || string(c.UnlockRecipient) == string(to[:])) {
			return changed, nil
		}
		if c.Autolock && to != nil {
			return false, warden.Hint(warden.Errorf(warden.CodeExists, op, "autolock is on already, under unlock key %s", c.UnlockKeyId),
				"to have another key, run `wardenctl swarm unlock-key --rotate`")
		}
		relock(c, to)
		return true, nil
	})
	return reply, api.Error(err)
}

// RotateUnlockKey makes another unlock recipient the cluster's. Managers seal their keys to it by themselves, with a fresh DEK
// and a fresh node key each. Errors: CodeInvalid where autolock is off, or the recipient protects nothing.
func (s *Server) RotateUnlockKey(ctx context.Context, r *api.RotateUnlockKeyRequest) (*api.ChangeReply, error) {
	const op = "rotating the unlock key"
	to, err := autolock.ParseRecipient(r.UnlockRecipient)
	if err != nil {
		return nil, api.Error(warden.Wrap(op, err))
	}
	reply, err := s.changeCluster(ctx, "rotate unlock key", func(c *api.Cluster) (bool, error) {
		switch {
		case !c.Autolock:
			return false, warden.Hint(warden.Errorf(warden.CodeInvalid, op, "autolock is off: there is no unlock key"),
				"turn it on with `wardenctl swarm update --autolock=true`, which makes one")
		case string(c.UnlockRecipient) == string(to[:]): // the call was made again
			return false, nil
		}
		relock(c, &to)
		return true, nil
	})
	return reply, api.Error(err)
}

// relock changes the lock of the cluster. Under another unlock key every manager needs a DEK that the one before never sealed.
func relock(c *api.Cluster, to *autolock.Recipient) {
	c.LockGeneration++
	c.Autolock, c.UnlockRecipient, c.UnlockKeyId = to != nil, nil, ""
	if to != nil {
		c.UnlockRecipient, c.UnlockKeyId = to[:], to.KeyID()
		c.DekGeneration++
	}
}

// RotateDEK has every manager make a new DEK and node key, and seal its state anew.
func (s *Server) RotateDEK(ctx context.Context, _ *api.RotateDEKRequest) (*api.ChangeReply, error) {
	reply, err := s.changeCluster(ctx, "rotate DEKs", func(c *api.Cluster) (bool, error) {
		c.DekGeneration++
		return true, nil
	})
	return reply, api.Error(err)
}

// RotateIssuing makes a new issuing CA. Every node renews its leaf by itself; until it has, its record vouches for its key.
func (s *Server) RotateIssuing(ctx context.Context, _ *api.RotateIssuingRequest) (*api.ChangeReply, error) {
	reply, err := s.changeCluster(ctx, "rotate issuing CA", func(c *api.Cluster) (bool, error) {
		return true, s.cfg.Cluster.NextIssuing(c)
	})
	return reply, api.Error(err)
}

// changeCluster commits what change makes of the cluster's record; nothing where it reports that nothing changed.
func (s *Server) changeCluster(ctx context.Context, action string, plan func(*api.Cluster) (changed bool, err error)) (*api.ChangeReply, error) {
	return s.commit(ctx, func(v *store.View) (change, error) {
		c := api.Clone(v.Cluster())
		ch := change{kind: api.Kind_KIND_CLUSTER, id: c.Id, action: action}
		changed, err := plan(c)
		if !changed {
			ch.made = c.Meta
		}
		ch.ops = []*api.Operation{store.Put(c, c.Meta.Version)}
		return ch, err
	})
}

// rotations says how far the nodes have followed rotations of the cluster's keys, where not all have. states are those of v's nodes, in
// their order.
func rotations(v *store.View, states []*api.NodeState) (notes []string) {
	c := v.Cluster()
	var nodes, leaves, managers, keys int
	for i, n := range v.Nodes() {
		nodes++
		if n.LeafGeneration == c.GetIssuingGeneration() && len(n.NextKeyHash) == 0 {
			leaves++
		}
		if n.EffectiveRole() != api.Role_ROLE_MANAGER {
			continue
		}
		managers++
		if s := states[i]; s.GetLockState() == "unlocked" && s.GetDekGeneration() == c.GetDekGeneration() && n.LeafDekGeneration == c.GetDekGeneration() && len(n.NextKeyHash) == 0 {
			keys++
		}
	}
	if leaves < nodes && c.GetIssuingGeneration() > 1 {
		notes = append(notes, fmt.Sprintf("%d of %d nodes have a leaf of the issuing CA of generation %d", leaves, nodes, c.GetIssuingGeneration()))
	}
	if keys < managers && c.GetDekGeneration() > 1 {
		notes = append(notes, fmt.Sprintf("%d of %d managers have keys of generation %d, with nothing on their disks under older ones", keys, managers, c.GetDekGeneration()))
	}
	return notes
}
