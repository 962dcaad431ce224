package store_test

import (
	"bytes"
	"testing"

	"warden"
	"warden/api"
	"warden/store"
	"warden/store/storetest"
)

// TestNodesAreFoundByKeyAndRole: by each key that the record has and by none that it had, managers by either role, the same
// after a restore.
func TestNodesAreFoundByKeyAndRole(t *testing.T) {
	w := newWorld(t)
	next := storetest.Hash()
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.NextKeyHash = next }))
	first := w.s.View().Node(w.worker.Id).KeyHash
	check := func(what string, v *store.View, hash []byte, want string) {
		t.Helper()
		got := ""
		for _, n := range v.NodesByKey(hash) {
			got += n.Id
		}
		if got != want {
			t.Errorf("%s: nodes %q, want %q", what, got, want)
		}
	}
	managers := func(what string, v *store.View, want ...string) {
		t.Helper()
		got := map[string]bool{}
		for _, n := range v.Managers() {
			got[n.Id] = true
		}
		if len(got) != len(want) {
			t.Errorf("%s: managers %v, want %v", what, got, want)
		}
		for _, id := range want {
			if !got[id] {
				t.Errorf("%s: %s is no manager", what, id)
			}
		}
	}
	back, err := store.ReadState(bytes.NewReader(w.snapshot()))
	if err != nil {
		t.Fatal(err)
	}
	restored := back.View()
	for what, v := range map[string]*store.View{"state": w.s.View(), "restored": restored} {
		for _, h := range [][]byte{first, next, w.worker.JoinKeyHash} {
			check(what, v, h, w.worker.Id)
		}
		check(what+", nobody's key", v, storetest.Hash(), "")
		check(what+", no key", v, nil, "")
		managers(what, v, w.manager)
	}
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.KeyHash, n.NextKeyHash = next, nil }))
	check("a key that was replaced", w.s.View(), first, "")
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) {
		n.DesiredRole, n.Role, n.Address = api.Role_ROLE_MANAGER, api.Role_ROLE_MANAGER, "127.0.0.1:1"
	}))
	managers("promoted", w.s.View(), w.manager, w.worker.Id)
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.DesiredRole = api.Role_ROLE_WORKER }))
	managers("demoted, and still in raft", w.s.View(), w.manager, w.worker.Id)
	w.ok(put(w.s.View().Node(w.worker.Id), func(n *api.Node) { n.Role, n.Address = api.Role_ROLE_WORKER, "" }))
	managers("a worker", w.s.View(), w.manager)

	gone := w.s.View().Node(w.worker.Id)
	w.ok(store.Put(&api.Tombstone{Id: gone.Id, Hostname: gone.Hostname, Role: gone.Role, Zone: warden.DefaultZone}, 0), store.Delete(gone))
	check("removed", w.s.View(), next, "")
	if d := w.s.View().TombstoneByKey(next); d.GetId() != gone.Id {
		t.Errorf("the tombstone of its key is %q", d.GetId())
	}
	if d := w.s.View().TombstoneByKey(first); d != nil {
		t.Errorf("a key that it had before has the tombstone %q", d.GetId())
	}
}
