package manager

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/store"
)

// judge is Config.Judge of the doors: by the current state. A replica may be a moment behind the commit that made a node or
// renewed its key: what looks unknown at a handshake is judged again after it has caught up.
//
// Who comes to the node door after the lease was lost is not let in, also where the handshake began before: those sessions were cut.
func (m *Manager) judge(name string, id ca.Identity, live bool) error {
	if !live {
		if err := m.holds(name); err != nil {
			return err
		}
	}
	err := judge(m.store.View(), name, id, live, m.mayPush())
	if code := warden.CodeOf(err); live || code != warden.CodeWrongKey && code != warden.CodeDenied {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if serr := m.catchUp(ctx); serr != nil {
		return err
	}
	return judge(m.store.View(), name, id, live, m.mayPush())
}

// flight lets callers share: a run begins after each call of join that it serves, and runs follow one another. So many nodes
// that dial at once, or guess, ask the leader once, not each. Its zero value is ready.
type flight struct {
	mu      sync.Mutex // guards all below; not held while f runs
	running bool
	next    *run // that nobody has begun; nil: nobody waits for it
}

type run struct {
	done chan struct{}
	err  error // once done is closed
}

// join returns what a run of f gave that began after the call. f is the same for all callers, and bounds its own time.
func (fl *flight) join(ctx context.Context, f func() error) error {
	fl.mu.Lock()
	r := fl.next
	if r == nil {
		r = &run{done: make(chan struct{})}
		fl.next = r
		if !fl.running {
			fl.running = true
			go fl.fly(f) // ends when nobody waits
		}
	}
	fl.mu.Unlock()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (fl *flight) fly(f func() error) {
	for {
		fl.mu.Lock()
		r := fl.next
		fl.next = nil
		if r == nil {
			fl.running = false
			fl.mu.Unlock()
			return
		}
		fl.mu.Unlock()
		r.err = f()
		close(r.done)
	}
}

// catchUp is a sync that began after the call.
func (m *Manager) catchUp(ctx context.Context) error {
	return m.catching.join(ctx, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		return m.sync(ctx)
	})
}

// pinned reports whether the record of the subject holds the key of its leaf. Where the replica is still empty after a
// restart, the node's own list of managers says: or a cluster that was off for longer than a leaf lives never met again.
func (m *Manager) pinned(id ca.Identity) bool {
	v := m.store.View()
	if t := v.Tombstone(id.NodeID); t != nil {
		return slices.ContainsFunc(t.KeyHashes, func(h []byte) bool { return bytes.Equal(h, id.KeyHash[:]) })
	}
	if n := v.Node(id.NodeID); n != nil || m.ready.Load() {
		return hasKey(n, id.KeyHash)
	}
	for _, i := range m.cfg.Known().GetManagers() {
		if i.NodeId == id.NodeID {
			return slices.ContainsFunc(i.KeyHashes, func(h []byte) bool { return bytes.Equal(h, id.KeyHash[:]) })
		}
	}
	return false
}

func hasKey(n *api.Node, h [32]byte) bool {
	return n != nil && (bytes.Equal(n.KeyHash, h[:]) || bytes.Equal(n.NextKeyHash, h[:]))
}

// judge decides whether a subject with a valid chain may pass a door, or stay. Pure over the view.
//
// The raft door can't always ask for a live record, since a restarted replica is empty or stale until a leader commits: while
// the view is not fresh it refuses only what the state is sure of (a tombstone, a record that is no manager's). fresh: what
// the leader had committed a moment ago is in the view. Then it judges as the peer door does, so that a leaf that an evicted
// manager issued itself, with the CA key that it knew, opens nothing.
// Errors: CodeEvicted, CodeWrongRole, CodeWrongKey, CodeDenied.
func judge(v *store.View, name string, id ca.Identity, live, fresh bool) error {
	op := "entering " + name
	n, dead := v.Node(id.NodeID), v.Tombstone(id.NodeID)
	if name == warden.DoorControl {
		if id.Role != ca.RoleOperator {
			return warden.Errorf(warden.CodeWrongRole, op, "a %s's leaf opens no control door", id.Role)
		}
		return warden.Errorf(warden.CodeDenied, op, "no operator is known to this cluster")
	}
	if dead != nil && (name != warden.DoorNode || live) {
		return warden.Errorf(warden.CodeEvicted, op, "node %s was removed", id.NodeID)
	}
	switch name {
	case warden.DoorRaft, warden.DoorPeer:
		if id.Role != ca.RoleManager {
			return warden.Errorf(warden.CodeWrongRole, op, "node %s has a %s's leaf", id.NodeID, id.Role)
		}
		if n != nil && n.EffectiveRole() != api.Role_ROLE_MANAGER {
			return warden.Errorf(warden.CodeWrongRole, op, "node %s is recorded as a worker", id.NodeID)
		}
		if name == warden.DoorRaft && !fresh {
			return nil
		}
		if n == nil {
			return warden.Errorf(warden.CodeDenied, op, "node %s has no record", id.NodeID)
		}
	case warden.DoorNode:
		if dead != nil {
			return nil // let in for one message: the order to wipe
		}
		if n == nil {
			return warden.Errorf(warden.CodeDenied, op, "node %s has no record", id.NodeID)
		}
	default:
		return warden.Errorf(warden.CodeDenied, op, "no rule for this door")
	}
	if !hasKey(n, id.KeyHash) {
		return warden.Errorf(warden.CodeWrongKey, op, "node %s presents a key that is not the recorded one", id.NodeID)
	}
	return nil
}

func (m *Manager) distrustedBytes() []byte {
	if c := m.store.View().Cluster(); c != nil {
		return c.DistrustedIssuers
	}
	return nil
}

func (m *Manager) distrusted() [][32]byte { return Sums(m.distrustedBytes()) }
