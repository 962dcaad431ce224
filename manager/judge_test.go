package manager

import (
	"testing"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/store"
	"warden/store/storetest"
)

// Each door by each state of the record: "" is let in. The view is fresh, and stale where the name says so.
func TestJudge(t *testing.T) {
	const in = warden.Code("")
	hash := func(b byte) (h [32]byte) { h[0] = b; return h }
	current, next, other := hash(1), hash(2), hash(3)
	record := func(role, desired api.Role) *api.Node {
		return &api.Node{Id: warden.NewID(), Role: role, DesiredRole: desired, KeyHash: current[:], NextKeyHash: next[:], Zone: warden.DefaultZone}
	}
	const w, m = api.Role_ROLE_WORKER, api.Role_ROLE_MANAGER
	worker, manager, demoted, promoting := record(w, w), record(m, m), record(m, w), record(w, m)
	gone := &api.Tombstone{Id: warden.NewID(), Role: m, KeyHashes: [][]byte{current[:]}}
	var objects []*api.Object
	for _, n := range []*api.Node{worker, manager, demoted, promoting} {
		objects = append(objects, store.Wrap(n))
	}
	v := storetest.New(t, append(objects, store.Wrap(gone))...).View()

	type verdict struct{ node, peer, raft, staleRaft warden.Code }
	for _, c := range []struct {
		what string
		id   ca.Identity
		live bool
		want verdict
	}{
		{"a worker", ca.Identity{NodeID: worker.Id, Role: ca.RoleWorker, KeyHash: current}, false, verdict{in, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"a worker with its next key", ca.Identity{NodeID: worker.Id, Role: ca.RoleWorker, KeyHash: next}, false, verdict{in, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"a worker with another key", ca.Identity{NodeID: worker.Id, Role: ca.RoleWorker, KeyHash: other}, false, verdict{warden.CodeWrongKey, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"a worker with a manager's leaf", ca.Identity{NodeID: worker.Id, Role: ca.RoleManager, KeyHash: current}, false, verdict{in, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"a manager", ca.Identity{NodeID: manager.Id, Role: ca.RoleManager, KeyHash: current}, false, verdict{in, in, in, in}},
		{"a live manager", ca.Identity{NodeID: manager.Id, Role: ca.RoleManager, KeyHash: current}, true, verdict{in, in, in, in}},
		{"a manager with its next key", ca.Identity{NodeID: manager.Id, Role: ca.RoleManager, KeyHash: next}, false, verdict{in, in, in, in}},
		{"a manager with another key", ca.Identity{NodeID: manager.Id, Role: ca.RoleManager, KeyHash: other}, false, verdict{warden.CodeWrongKey, warden.CodeWrongKey, warden.CodeWrongKey, in}},
		{"a live manager with another key", ca.Identity{NodeID: manager.Id, Role: ca.RoleManager, KeyHash: other}, true, verdict{warden.CodeWrongKey, warden.CodeWrongKey, warden.CodeWrongKey, in}},
		{"a manager that still has a worker's leaf", ca.Identity{NodeID: manager.Id, Role: ca.RoleWorker, KeyHash: current}, false, verdict{in, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"a manager that is wanted as a worker", ca.Identity{NodeID: demoted.Id, Role: ca.RoleManager, KeyHash: current}, false, verdict{in, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"a worker that is wanted as a manager", ca.Identity{NodeID: promoting.Id, Role: ca.RoleManager, KeyHash: current}, false, verdict{in, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"no record", ca.Identity{NodeID: warden.NewID(), Role: ca.RoleManager, KeyHash: current}, false, verdict{warden.CodeDenied, warden.CodeDenied, warden.CodeDenied, in}},
		{"no record, live", ca.Identity{NodeID: warden.NewID(), Role: ca.RoleManager, KeyHash: current}, true, verdict{warden.CodeDenied, warden.CodeDenied, warden.CodeDenied, in}},
		{"no record, a worker's leaf", ca.Identity{NodeID: warden.NewID(), Role: ca.RoleWorker, KeyHash: current}, false, verdict{warden.CodeDenied, warden.CodeWrongRole, warden.CodeWrongRole, warden.CodeWrongRole}},
		{"removed", ca.Identity{NodeID: gone.Id, Role: ca.RoleManager, KeyHash: current}, false, verdict{in, warden.CodeEvicted, warden.CodeEvicted, warden.CodeEvicted}}, // in for the order to wipe
		{"removed, live", ca.Identity{NodeID: gone.Id, Role: ca.RoleManager, KeyHash: current}, true, verdict{warden.CodeEvicted, warden.CodeEvicted, warden.CodeEvicted, warden.CodeEvicted}},
	} {
		for _, d := range []struct {
			door  string
			fresh bool
			want  warden.Code
		}{
			{warden.DoorNode, true, c.want.node}, {warden.DoorPeer, true, c.want.peer}, {warden.DoorPeer, false, c.want.peer},
			{warden.DoorRaft, true, c.want.raft}, {warden.DoorRaft, false, c.want.staleRaft},
			{"warden-new/1", true, warden.CodeDenied},
		} {
			want := d.want
			if d.door == "warden-new/1" && c.id.NodeID == gone.Id {
				want = warden.CodeEvicted
			}
			if got := warden.CodeOf(judge(v, d.door, c.id, c.live, d.fresh)); got != want {
				t.Errorf("%s at %s, fresh %t: [%s], want [%s]", c.what, d.door, d.fresh, got, want)
			}
		}
		if err := judge(v, warden.DoorControl, c.id, c.live, true); warden.CodeOf(err) != warden.CodeWrongRole {
			t.Errorf("%s at the operators' door: %v", c.what, err)
		}
	}
	if err := judge(v, warden.DoorControl, ca.Identity{NodeID: warden.NewID(), Role: ca.RoleOperator}, false, true); warden.CodeOf(err) != warden.CodeDenied {
		t.Errorf("an operator: %v", err)
	}
}

func TestQuorumWithout(t *testing.T) {
	for _, c := range []struct {
		voters, silent []string
		ok             bool
	}{
		{nil, nil, false},
		{[]string{"a"}, nil, true},
		{[]string{"a"}, []string{"a"}, false},
		{[]string{"a", "b"}, nil, true},
		{[]string{"a", "b"}, []string{"b"}, false},
		{[]string{"a", "b", "c", "d"}, []string{"d"}, true},
		{[]string{"a", "b", "c", "d"}, []string{"c", "d"}, false},
		{[]string{"a", "b", "c", "d", "e"}, []string{"d", "e"}, true},
	} {
		err := quorumWithout("x", c.voters, c.silent)
		if (err == nil) != c.ok || err != nil && (warden.CodeOf(err) != warden.CodeNoQuorum || warden.HintOf(err) == "") {
			t.Errorf("quorumWithout(%v, %v) = %v", c.voters, c.silent, err)
		}
	}
}

// TestLeaseIsLostInAHandshake: who came to the node door while this manager had its lease, and is done shaking hands when it has
// cut its sessions, gets none.
func TestLeaseIsLostInAHandshake(t *testing.T) {
	c := newCluster(t)
	w := c.join(api.Role_ROLE_WORKER, "w")
	if err := c.first.m.judge(warden.DoorNode, w.identity, false); err != nil {
		t.Errorf("with the lease: %v", err)
	}
	lost := &Manager{cfg: c.first.m.cfg, store: c.first.m.store}
	if err := lost.judge(warden.DoorNode, w.identity, false); warden.CodeOf(err) != warden.CodeUnavailable {
		t.Errorf("without it: %v, want %s", err, warden.CodeUnavailable)
	}
}
