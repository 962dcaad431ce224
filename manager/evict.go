package manager

import (
	"context"
	"fmt"
	"slices"
	"time"

	"warden"
	"warden/api"
	"warden/secrets"
	"warden/store"
)

// Maker is what the keys of a new cluster are made with.
type Maker struct {
	Now       time.Time
	LeafTTL   time.Duration
	Recipient []byte // X25519 public key; nil without autolock
	KeyID     string
}

// due returns the raft index of the newest eviction of a node that knew what managers know. Pure.
func due(v *store.View) uint64 {
	var index uint64
	for _, t := range v.Tombstones() {
		if t.WasManager {
			index = max(index, t.GetMeta().GetIndex())
		}
	}
	return index
}

// resume does what an earlier leader did not come to: a rotation that an eviction asks for, or the rest of one.
func (m *Manager) resume(ctx context.Context) {
	for _, err := m.commandTime(ctx); err != nil; _, err = m.commandTime(ctx) { // a leader that can change nothing yet
		select {
		case <-ctx.Done():
			return
		case <-time.After(warden.ReportPeriod):
		}
	}
	if v := m.store.View(); due(v) > v.Cluster().GetRotatedIndex() {
		_, _, err := m.RotateKeys(ctx, m.system("rotation"), due(v))
		if err != nil {
			m.logger.Error("failed to rotate keys after the eviction of a manager", "error", err)
			return
		}
		m.logger.Info("rotated keys after the eviction of a manager, as an earlier leader did not come to it")
		return
	}
	m.rotation.Lock()
	defer m.rotation.Unlock()
	if one, err := hasOneKey(m.store.View().Cluster()); one && err == nil {
		return
	}
	n, err := m.finishKeyset(ctx, m.system("rotation"))
	if err != nil {
		m.logger.Error("failed to finish the rotation of the cluster keyset", "error", err)
		return
	}
	m.logger.Info("finished the rotation of the cluster keyset", "versions", n)
}

// RotateKeys replaces what an evicted manager knew and the cluster can replace by itself: the issuing CA, where the root key
// is at hand, and the cluster keyset, under which every secret's data key and the CA keys are sealed anew. On the leader only.
// done says what it did, todo what is left to the operator. Nodes renew their leaves under the new issuing CA by themselves.
//
// since is the raft index of the eviction; keys that were rotated since then are left alone: the call is made again where its answer was
// lost, which the new leaves that it brings may be the cause of. 0: they are rotated in any case.
//
// First it sees to it that no evicted manager follows the log any more, which would bring it the new keys.
func (m *Manager) RotateKeys(ctx context.Context, actor *api.Actor, since uint64) (done, todo []string, err error) {
	m.rotation.Lock()
	defer m.rotation.Unlock()
	if err := m.expel(ctx); err != nil {
		return done, todo, warden.Wrap("rotating keys", err)
	}
	before := since > 0 && m.store.View().Cluster().GetRotatedIndex() >= since
	rotated := len(m.store.View().Cluster().SealedRootKey) > 0
	if !before {
		if rotated, err = m.rotateIssuing(ctx, actor); err != nil {
			return done, todo, err
		}
	}
	if rotated {
		done = append(done, "rotated the issuing CA; every node gets a new leaf by itself")
	} else {
		todo = append(todo, "rotate the issuing CA: the root key is not in the cluster")
	}
	var n int
	if before {
		n, err = m.finishKeyset(ctx, actor)
	} else {
		n, err = m.rotateKeyset(ctx, actor)
	}
	if err != nil {
		return done, todo, err
	}
	if before && n == 0 {
		done = append(done, "rotated the cluster keyset and sealed all secret versions under it")
	} else {
		done = append(done, fmt.Sprintf("rotated the cluster keyset and sealed %d secret versions under it", n))
	}
	if len(m.store.View().Cluster().SealedRootKey) > 0 {
		todo = append(todo, "the evicted manager held the root CA key: treat the root as compromised and build a new cluster when you can")
	}
	todo = append(todo, "give every secret a new value: the evicted manager could read them all")
	return done, todo, nil
}

// expel takes every evicted node out of raft's configuration: from then on the leader sends it no entry.
func (m *Manager) expel(ctx context.Context) error {
	members, err := m.store.Configuration()
	if err != nil {
		return err
	}
	v := m.store.View()
	for _, member := range members {
		if v.Tombstone(member.ID) == nil {
			continue
		}
		if err := m.removeMember(ctx, member.ID); err != nil {
			return err
		}
	}
	return nil
}

// removeMember takes a node out of raft's configuration, and ends what this manager has dialled to it for raft.
func (m *Manager) removeMember(ctx context.Context, id string) error {
	if err := m.store.RemoveServer(ctx, id); err != nil {
		return warden.Wrap("removing "+id+" from raft", err)
	}
	m.hangUp()
	return nil
}

// changeCluster proposes change(cluster) until no one else changed the record meanwhile.
func (m *Manager) changeCluster(ctx context.Context, actor *api.Actor, change func(*api.Cluster) error) error {
	for {
		now := m.store.View().Cluster()
		next := api.Clone(now)
		if err := change(next); err != nil {
			return err
		}
		_, err := m.store.Propose(ctx, command(actor, store.Put(next, now.Meta.Version)))
		if warden.CodeOf(err) != warden.CodeConflict {
			return err
		}
	}
}

// rotateIssuing makes a new generation of the issuing CA and distrusts the old one where no record vouches for a key.
func (m *Manager) rotateIssuing(ctx context.Context, actor *api.Actor) (rotated bool, err error) {
	err = m.changeCluster(ctx, actor, func(c *api.Cluster) error {
		if rotated = len(c.SealedRootKey) > 0; !rotated {
			return nil
		}
		return nextIssuing(c, time.Now())
	})
	return rotated, warden.Wrap("rotating the issuing CA", err)
}

// rotateKeyset adds a key to the keyset, seals everything under it anew, and drops the old keys. Started again after a crash
// it does the same once more: whatever key a record is under, the keyset has it until the last step.
func (m *Manager) rotateKeyset(ctx context.Context, actor *api.Actor) (versions int, err error) {
	const op = "rotating the cluster keyset"
	index := due(m.store.View())
	err = m.changeCluster(ctx, actor, func(c *api.Cluster) error {
		c.RotatedIndex = max(c.RotatedIndex, index)
		old, err := secrets.ParseKeyset(c.Keyset)
		if err != nil {
			return err
		}
		next, err := old.Rotate()
		if err != nil {
			return err
		}
		if err := resealCA(c, old, next); err != nil {
			return err
		}
		c.KeysetGeneration++
		c.Keyset, err = next.Bytes()
		return err
	})
	if err != nil {
		return 0, warden.Wrap(op, err)
	}
	versions, err = m.finishKeyset(ctx, actor)
	return versions, warden.Wrap(op, err)
}

// finishKeyset is the rest of a rotation, which a new leader goes on with: it seals anew what is under an older key, and drops
// the older keys. It does nothing where there is one key.
func (m *Manager) finishKeyset(ctx context.Context, actor *api.Actor) (versions int, err error) {
	if one, err := hasOneKey(m.store.View().Cluster()); one || err != nil {
		return 0, err
	}
	for again := true; again; { // a secret made meanwhile may still be under the old key
		again = false
		v := m.store.View()
		ks, err := secrets.ParseKeyset(v.Cluster().Keyset)
		if err != nil {
			return versions, err
		}
		var due []*api.SecretVersion
		for _, s := range v.Secrets() {
			for _, sv := range v.SecretVersions(s.Id) {
				if sv.KeysetGeneration != v.Cluster().KeysetGeneration {
					due = append(due, sv)
				}
			}
		}
		for sv := range slices.Values(due) {
			next := api.Clone(sv)
			if next.WrappedKey, err = secrets.Rewrap(ks, v.Cluster().Id, sv.SecretId, sv.Version, sv.WrappedKey); err != nil {
				return versions, err
			}
			next.KeysetGeneration = v.Cluster().KeysetGeneration
			_, err := m.store.Propose(ctx, command(actor, store.Put(next, sv.Meta.Version)))
			switch warden.CodeOf(err) {
			case "":
				versions++
			case warden.CodeConflict, warden.CodeNotFound:
			default:
				return versions, err
			}
			again = true
		}
	}
	err = m.changeCluster(ctx, actor, func(c *api.Cluster) error {
		ks, err := secrets.ParseKeyset(c.Keyset)
		if err != nil {
			return err
		}
		primary, err := ks.OnlyPrimary()
		if err != nil {
			return err
		}
		if err := resealCA(c, ks, primary); err != nil { // nothing that is needed may stay under a key that goes
			return err
		}
		c.Keyset, err = primary.Bytes()
		return err
	})
	return versions, err
}

// resealCA seals the CA's keys, which old opens, under next's primary.
func resealCA(c *api.Cluster, old, next *secrets.Keyset) error {
	for _, k := range []struct {
		sealed  *[]byte
		purpose string
	}{{&c.SealedRootKey, purposeRoot}, {&c.SealedIssuingKey, purposeIssuing}} {
		if len(*k.sealed) == 0 {
			continue
		}
		der, err := old.Open(*k.sealed, c.Id, k.purpose)
		if err != nil {
			return err
		}
		*k.sealed, err = next.Seal(der, c.Id, k.purpose)
		clear(der)
		if err != nil {
			return err
		}
	}
	return nil
}

// hasOneKey reports whether the keyset holds its primary alone.
func hasOneKey(c *api.Cluster) (bool, error) {
	if c == nil {
		return true, nil
	}
	ks, err := secrets.ParseKeyset(c.Keyset)
	if err != nil {
		return false, err
	}
	if ks, err = ks.OnlyPrimary(); err != nil {
		return false, err
	}
	primary, err := ks.Bytes()
	return len(primary) == len(c.Keyset), err
}
