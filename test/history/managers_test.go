package history

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"warden"
	"warden/api"
	"warden/autolock"
	"warden/door"
	"warden/internal/testcluster"
	"warden/internal/thief"
	"warden/test/bed"
)

// steal copies the identity of a manager that runs, and proves that it is good: it opens the door for managers.
func (r *run) steal(m *member) (s thief.Member) {
	testcluster.Await(r.t, limit, func() (err error) {
		if s, err = r.identityOf(m); err != nil {
			return err
		}
		for _, at := range r.managers {
			if at != m {
				err = knock(s, r.workers[0].Host, at, warden.DoorPeer)
				break
			}
		}
		if err != nil {
			return fmt.Errorf("with the identity of %s: %w", m.Name, err)
		}
		return nil
	})
	return s
}

// openKeyFile reads the key file of a host, with the unlock key that it is sealed under where it is.
func (r *run) openKeyFile(m *member) (id autolock.Identity, err error) {
	kf, err := autolock.ReadKeyFile(filepath.Join(m.State(), "identity/node.key"))
	if err != nil {
		return id, err
	}
	if !kf.Locked {
		return kf.Identity()
	}
	r.mu.Lock()
	text, ok := r.keys[kf.KeyID]
	r.mu.Unlock()
	if !ok {
		return id, fmt.Errorf("%s is sealed under unlock key %q, which nobody made", m.Name, kf.KeyID)
	}
	key, err := autolock.ParseUnlockKey([]byte(text))
	if err != nil {
		return id, err
	}
	return kf.Unlock(key)
}

func (r *run) identityOf(m *member) (thief.Member, error) {
	id, err := r.openKeyFile(m)
	if err != nil {
		return thief.Member{}, err
	}
	return thief.Of(id)
}

// errSilent is what knock returns at a door that let it in and waits for what it says.
var errSilent = errors.New("the door is open, and nothing comes out")

// knock returns nil where what is behind the door begins to talk.
func knock(s thief.Member, from *bed.Host, at *member, doorName string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var conn *tls.Conn
	err := inNetwork(from, func() (err error) {
		conn, err = door.Dial(ctx, at.Address(), doorName, s.Cert, door.Expect{Root: s.Root, Loose: true})
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil { // the client's side of the handshake ends before the manager has looked at it
		return err
	}
	if _, err = io.ReadFull(conn, make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return errSilent
	}
	return err
}

// wantShut: no manager opens a door to the certificate of a manager that was removed, but to tell it that (I4).
func (r *run) wantShut(s thief.Member, managers ...*member) {
	for _, at := range managers {
		for _, name := range []string{warden.DoorPeer, warden.DoorRaft, warden.DoorControl} {
			if err := knock(s, r.workers[0].Host, at, name); err == nil || errors.Is(err, errSilent) {
				r.violated("I4", "the certificate of manager %s, which was removed, opens %s of %s: %v", s.NodeID, name, at.Name, err)
			}
		}
		r.wantToldOnly(at, s.NodeID, r.workers[0].Host, *s.Cert, s.Root)
	}
}

// replaced removes a manager, by its eviction or by its demotion before, often while it hangs or, late, is cut off. Nothing of the others is
// lost by that, and nothing opens to its certificate. Then its host becomes another manager. late: it hears of it
// when no key of the others is one that it knows.
func (c *client) replaced(m *member, late bool) {
	n, home := c.nodeOf(m), m.zones.now()[0]
	var others []*member
	for _, o := range c.managers {
		if o != m {
			others = append(others, o)
		}
	}
	before := map[*member]*api.InfoReply{}
	for _, o := range c.members {
		testcluster.Await(c.t, limit, func() (err error) {
			before[o], err = c.info(o)
			return err
		})
	}
	s := c.steal(m)
	undo := func() {}
	switch how := c.rand.IntN(3); {
	case late: // which takes it some 15 s
		c.bed.Isolate(m.Host)
		undo = func() {
			c.rekeyed(others)
			c.bed.Heal()
		}
	case how == 0:
		c.demoted(n)
	case how == 1:
		m.Pause()
		undo = m.Resume
	}
	c.removed(n)
	undo()
	c.wantOut(m)
	c.wantShut(s, others...)
	for _, o := range c.members {
		if o != m {
			c.wantKept(o, before[o])
		}
	}
	c.rejoined(m, n, api.Role_ROLE_MANAGER, home)
	c.mu.Lock()
	c.stolen = append(c.stolen, s)
	c.mu.Unlock()
	c.awaitWhole()
}

// rekeyed has managers make new keys, and waits until they use them.
func (c *client) rekeyed(managers []*member) {
	c.sure("cluster/lock", call{Verb: "rotate-dek"}, func(ctx context.Context, at *member) error {
		_, err := at.control.RotateDEK(ctx, &api.RotateDEKRequest{})
		return err
	})
	testcluster.Await(c.t, limit, func() error {
		ctx, cancel := context.WithTimeout(c.t.Context(), patience)
		defer cancel()
		cluster, err := managers[0].control.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_CLUSTER})
		if err != nil {
			return err
		}
		for _, m := range managers {
			reply, err := managers[0].control.List(ctx, &api.ListRequest{Kind: api.Kind_KIND_NODE, References: []string{m.id}})
			if err != nil {
				return err
			}
			n, want := reply.Objects[0].GetNode(), cluster.Objects[0].GetCluster().DekGeneration
			if n.LeafDekGeneration != want || len(n.NextKeyHash) > 0 {
				return fmt.Errorf("%s has a leaf of DEK generation %d, want %d", m.Name, n.LeafDekGeneration, want)
			}
		}
		return nil
	})
}

// wantKept: a host is the node that it was before, and has what it had.
func (c *client) wantKept(m *member, before *api.InfoReply) {
	var now *api.InfoReply
	testcluster.Await(c.t, limit, func() (err error) {
		now, err = c.info(m)
		return err
	})
	if now.NodeId != before.NodeId || now.State != before.State || now.Role != before.Role {
		c.violated("I4", "%s was node %s, a %s that was %q; since another manager was removed it is node %s, a %s that is %q",
			m.Name, before.NodeId, before.Role.Word(), before.State, now.NodeId, now.Role.Word(), now.State)
	}
	files := []string{"identity/node.key", "identity/node.crt"}
	if before.Role == api.Role_ROLE_MANAGER {
		files = append(files, "raft/log.db")
		if a, b := before.Facts.Manager.GetRaft().GetAppliedIndex(), now.Facts.Manager.GetRaft().GetAppliedIndex(); b < a {
			c.violated("I4", "%s had applied the log to %d before another manager was removed, and to %d after", m.Name, a, b)
		}
	}
	for _, name := range files {
		if _, err := os.Stat(filepath.Join(m.State(), name)); err != nil {
			c.violated("I4", "another manager was removed, and %s has lost %s: %v", m.Name, name, err)
		}
	}
}
