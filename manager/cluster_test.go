package manager

import (
	"context"
	"crypto"
	"crypto/tls"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/ca"
	"warden/door"
	"warden/join"
	"warden/secrets"
	"warden/store"
)

// addSecret commits a secret of one version, as the control service does.
func (c *cluster) addSecret(name, value string) *api.SecretVersion {
	c.t.Helper()
	record := c.first.m.store.View().Cluster()
	ks := must[*secrets.Keyset](c.t)(secrets.ParseKeyset(record.Keyset))
	s := &api.Secret{Id: warden.NewID(), Name: name, CurrentVersion: 1}
	sv := &api.SecretVersion{Id: store.SecretVersionID(s.Id, 1), SecretId: s.Id, Version: 1, SizeBytes: uint64(len(value)), KeysetGeneration: record.KeysetGeneration}
	var err error
	if sv.Ciphertext, sv.WrappedKey, err = secrets.SealVersion(ks, c.id, s.Id, 1, []byte(value)); err != nil {
		c.t.Fatal(err)
	}
	c.propose(store.Put(s, 0), store.Put(sv, 0))
	return sv
}

func (c *cluster) reveals(sv *api.SecretVersion, want string) {
	c.t.Helper()
	b, err := c.first.m.openSecret(sv.SecretId, 1)
	if err != nil {
		c.t.Fatal(err)
	}
	b.Use(func(got []byte) error {
		if string(got) != want {
			c.t.Errorf("the secret opens to %q", got)
		}
		return nil
	})
}

func TestThreeManagers(t *testing.T) {
	c := newCluster(t)
	b, d := c.join(api.Role_ROLE_MANAGER, "b"), c.join(api.Role_ROLE_MANAGER, "d")
	worker := c.join(api.Role_ROLE_WORKER, "w")

	// A worker's certificate opens the node door and nothing else, at any manager.
	for _, h := range []*host{c.first, b, d} {
		await(t, "a worker is let in at the node door", func() bool { // once this manager has heard of it
			_, err := c.dial(h, worker.cert, warden.DoorNode)
			return err == nil
		})
		for _, name := range []string{warden.DoorPeer, warden.DoorRaft, warden.DoorControl} {
			if !c.refused(h, worker.cert, name) {
				t.Errorf("a worker at %s: let in", name)
			}
		}
	}

	// A call that a follower forwards runs on the leader, on record with its way.
	forward := func(req *api.ForwardRequest) (reply *api.ForwardReply, err error) {
		t.Helper()
		err = attempt(t, "a follower forwards a call", func() (err error) {
			follower := b
			if c.leader(c.first, b, d) == b {
				follower = d
			}
			reply, err = follower.m.forward(t.Context(), api.Clone(req))
			return err
		})
		return reply, err
	}
	id := warden.NewID()
	reply, err := forward(&api.ForwardRequest{
		Method: api.Control_CreateZone_FullMethodName, Request: []byte("\x0a\x03pci"), Caller: &api.Actor{Kind: "uid", Name: "0", Via: "liar"}, RequestId: id,
	})
	if err != nil || len(reply.Reply) == 0 {
		t.Fatalf("forward = %v, %v", reply, err)
	}
	if _, err := forward(&api.ForwardRequest{
		Method: api.Control_CreateZone_FullMethodName, Request: []byte("\x0a\x03dmz"), Caller: &api.Actor{Kind: "node", Name: worker.id}, RequestId: warden.NewID(),
	}); warden.CodeOf(err) != warden.CodeDenied {
		t.Errorf("a node's call was forwarded: %v", err)
	}
	if _, err := forward(&api.ForwardRequest{Method: api.Control_CreateZone_FullMethodName, RequestId: id}); warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("a call of nobody was forwarded: %v", err)
	}

	// What a manager holds ends when its demotion, or its eviction, is committed.
	demoted := d
	if c.leader(c.first, b, d) == d {
		demoted = b
	}
	open := func(h *host) (conns []*tls.Conn) {
		t.Helper()
		for _, name := range []string{warden.DoorPeer, warden.DoorRaft} {
			conn, err := c.dial(c.first, h.cert, name)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			conns = append(conns, conn)
		}
		return conns
	}
	conns := open(demoted)
	n := c.record(demoted)
	n.DesiredRole = api.Role_ROLE_WORKER
	c.propose(store.Put(n, n.Meta.Version))
	for _, conn := range conns {
		cut(t, conn)
	}
	await(t, "a demoted manager is let in at the node door", func() bool {
		_, err := c.dial(c.first, demoted.cert, warden.DoorNode)
		return err == nil
	})
	for _, name := range []string{warden.DoorPeer, warden.DoorRaft} {
		if !c.refused(c.first, demoted.cert, name) {
			t.Errorf("a demoted manager at %s: let in", name)
		}
	}
	await(t, "the demotion is done", func() bool { return c.record(demoted).Role == api.Role_ROLE_WORKER })
}

// An evicted manager is cut off on commit, gets no key that is made afterwards, and what it issued itself opens nothing.
func TestEvictedManager(t *testing.T) {
	c := newCluster(t)
	evil := c.join(api.Role_ROLE_MANAGER, "evil")
	sv := c.addSecret("db", "hunter2")
	old := api.Clone(c.first.m.store.View().Cluster())

	// It knows the issuing CA's key: a leaf of an ID that nobody has, and one of the first manager's.
	_, ghost, _ := issueLeaf(t, c.authority, warden.NewID(), ca.RoleManager)
	_, double, _ := issueLeaf(t, c.authority, c.first.id, ca.RoleManager)
	for what, cert := range map[string]*tls.Certificate{"an unknown ID": ghost, "another's ID": double} {
		for _, name := range []string{warden.DoorPeer, warden.DoorRaft, warden.DoorNode} {
			if conn, err := c.dial(c.first, cert, name); err == nil {
				t.Logf("%s at %s: no answer yet", what, name)
				cut(t, conn) // at the latest when the manager has caught up
			}
		}
	}
	var conns []*tls.Conn
	for _, name := range []string{warden.DoorPeer, warden.DoorRaft, warden.DoorNode} {
		conn, err := c.dial(c.first, evil.cert, name)
		if err != nil {
			t.Fatal(name, err)
		}
		conns = append(conns, conn)
	}
	c.evict(evil)
	since := c.first.m.store.View().Tombstone(evil.id).GetMeta().GetIndex()
	var done, todo []string
	err := attempt(t, "the keys are rotated", func() (err error) {
		c.leads(c.first, evil)
		done, todo, err = c.first.m.RotateKeys(t.Context(), &api.Actor{Kind: "uid", Name: "0"}, since)
		return err
	})
	if err != nil || len(done) == 0 || len(todo) == 0 || since == 0 {
		t.Fatalf("RotateKeys = %q, %q, %v", done, todo, err)
	}
	for _, conn := range conns {
		cut(t, conn)
	}
	members := must[[]store.Member](t)(c.first.m.store.Configuration())
	if len(members) != 1 || members[0].ID != c.first.id {
		t.Errorf("members = %+v", members)
	}
	now := c.first.m.store.View().Cluster()
	if heard := evil.m.store.View().Cluster(); string(heard.Keyset) != string(old.Keyset) || string(heard.IssuingCert) != string(old.IssuingCert) {
		t.Error("the evicted manager was sent the new keys")
	}
	for _, name := range []string{warden.DoorPeer, warden.DoorRaft} {
		if !c.refused(c.first, evil.cert, name) {
			t.Errorf("an evicted manager at %s: let in", name)
		}
	}
	// The new generation is trusted, the first manager's own key still is by its record, and the secret opens, but not to the old keyset.
	if string(now.IssuingCert) == string(old.IssuingCert) || now.IssuingGeneration != 2 || now.KeysetGeneration != 2 {
		t.Error("nothing was rotated")
	}
	c.reveals(sv, "hunter2")
	v := c.first.m.store.View().SecretVersion(sv.SecretId, 1)
	if _, err := secrets.OpenVersion(must[*secrets.Keyset](t)(secrets.ParseKeyset(old.Keyset)), c.id, sv.SecretId, 1, v.Ciphertext, v.WrappedKey); err == nil {
		t.Error("the old keyset opens the re-sealed secret")
	}
	if one, err := hasOneKey(now); !one || err != nil {
		t.Errorf("the keyset has older keys: %v", err)
	}
	if _, err := c.dial(c.first, c.first.cert, warden.DoorNode); err != nil {
		t.Errorf("a recorded key under the distrusted CA: %v", err)
	}
	c.join(api.Role_ROLE_WORKER, "after") // under the new CA

	// The same again, as where the answer was lost: it says the same, and new leaves for all would lose the next answer, too.
	again, _, err := c.first.m.RotateKeys(t.Context(), &api.Actor{Kind: "uid", Name: "0"}, since)
	if n := c.first.m.store.View().Cluster(); err != nil || len(again) != len(done) || n.IssuingGeneration != 2 || n.KeysetGeneration != 2 {
		t.Errorf("RotateKeys for an eviction after which keys were rotated = %q, %v: generations %d and %d, want 2", again, err, n.IssuingGeneration, n.KeysetGeneration)
	}
}

// What this manager has open to another ends with the other's role, as what it has open here does: its logs would still be believed.
func TestI4NothingIsAskedOfAnEvictedManager(t *testing.T) {
	for what, end := range map[string]func(*cluster, *host){
		"evicted": (*cluster).evict,
		"demoted": func(c *cluster, h *host) {
			n := c.record(h)
			n.DesiredRole = api.Role_ROLE_WORKER
			c.propose(store.Put(n, n.Meta.Version))
		},
	} {
		t.Run(what, func(t *testing.T) {
			c := newCluster(t)
			evil := c.join(api.Role_ROLE_MANAGER, "evil")
			open := must[api.PeerClient](t)(c.first.m.peers.client(evil.id))
			ask := func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				_, err := open.Recipient(ctx, &api.RecipientRequest{})
				return err
			}
			await(t, "it answers", func() bool { return ask() == nil })
			end(c, evil)
			await(t, "the connection is cut", func() bool { return ask() != nil })
			if _, err := c.first.m.peers.client(evil.id); warden.CodeOf(err) != warden.CodeUnavailable {
				t.Errorf("a client for it: %v", err)
			}
		})
	}
}

// A rotation that was left half done is finished by the next leader; new secrets may come at any moment.
func TestKeysetRotationResumes(t *testing.T) {
	c := newCluster(t)
	first := c.addSecret("a", "one")
	m := c.first.m
	actor := &api.Actor{Kind: "system", Name: "test"}
	// The first step alone: the keyset has two keys, the secret is under the old one.
	half := api.Clone(m.store.View().Cluster())
	ks := must[*secrets.Keyset](t)(secrets.ParseKeyset(half.Keyset))
	half.Keyset = must[[]byte](t)(must[*secrets.Keyset](t)(ks.Rotate()).Bytes())
	half.KeysetGeneration++
	c.propose(store.Put(half, half.Meta.Version))
	if one, err := hasOneKey(half); one || err != nil {
		t.Fatalf("hasOneKey = %t, %v", one, err)
	}
	second := c.addSecret("b", "two")
	m.resume(t.Context())
	now := m.store.View().Cluster()
	if one, _ := hasOneKey(now); !one {
		t.Error("older keys are left")
	}
	c.reveals(first, "one")
	c.reveals(second, "two")
	before := now.Meta.Version
	m.resume(t.Context())
	if v := m.store.View().Cluster().Meta.Version; v != before {
		t.Error("resumed what was done")
	}
	if _, err := m.rotateKeyset(t.Context(), actor); err != nil {
		t.Fatal(err)
	}
	c.reveals(first, "one")
	c.reveals(second, "two")
	if _, err := ks.Open(m.store.View().Cluster().SealedIssuingKey, c.id, purposeIssuing); err == nil {
		t.Error("the first keyset still opens the issuing key")
	}
}

// A leader that dies between the eviction of a manager and the rotation of its keys leaves the rotation to the next one.
func TestRotationIsDueAfterAnEviction(t *testing.T) {
	c := newCluster(t)
	secret := c.addSecret("a", "one")
	gone := c.join(api.Role_ROLE_MANAGER, "gone")
	m := c.first.m
	before := m.store.View().Cluster()
	c.evict(gone) // the command alone
	var after *api.Cluster
	await(t, "the rotation", func() bool { // an election between, and the next leader does it by itself
		c.leads(c.first, gone)
		m.resume(t.Context())
		after = m.store.View().Cluster()
		return after.RotatedIndex >= due(m.store.View())
	})
	if after.IssuingGeneration != before.IssuingGeneration+1 || after.KeysetGeneration != before.KeysetGeneration+1 {
		t.Errorf("generations %d and %d after the eviction was followed up, %d and %d before", after.IssuingGeneration, after.KeysetGeneration,
			before.IssuingGeneration, before.KeysetGeneration)
	}
	c.reveals(secret, "one")
	m.resume(t.Context())
	if again := m.store.View().Cluster(); again.Meta.Version != after.Meta.Version {
		t.Error("rotated again what was rotated")
	}
}

func TestAdmit(t *testing.T) {
	c := newCluster(t)
	ask := func(h *host, token func(*api.Token)) (*api.JoinGrant, error) {
		return join.Join(t.Context(), c.first.address, c.mint(api.Role_ROLE_WORKER, token), join.Request{Key: h.key, Hostname: "w"}, nil)
	}
	one := c.mint(api.Role_ROLE_WORKER, func(r *api.Token) { r.UsesMax = 1 })
	req := join.Request{Key: must[crypto.Signer](t)(ca.NewKey()), Hostname: "w"}
	grant, err := join.Join(t.Context(), c.first.address, one, req, nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := join.Join(t.Context(), c.first.address, one, req, nil)
	if err != nil || again.NodeId != grant.NodeId || string(again.Chain[0]) != string(grant.Chain[0]) {
		t.Errorf("a repeat = %v, %v", again, err)
	}
	if _, err := join.Join(t.Context(), c.first.address, one, join.Request{Key: must[crypto.Signer](t)(ca.NewKey()), Hostname: "x"}, nil); warden.CodeOf(err) != warden.CodeUsedUp {
		t.Errorf("a second use: %v", err)
	}
	if _, err := join.Join(t.Context(), c.first.address, c.mint(api.Role_ROLE_WORKER, nil), req, nil); warden.CodeOf(err) != warden.CodeWrongKey {
		t.Errorf("the key with another token: %v", err)
	}
	worker := c.join(api.Role_ROLE_WORKER, "gone")
	c.evict(worker)
	if _, err := ask(worker, nil); warden.CodeOf(err) != warden.CodeEvicted {
		t.Errorf("an evicted node's key: %v", err)
	}
}

// A renewal is tied to the key that it replaces, and only a handshake with the new key makes it the current one.
func TestRenewalIsTiedToTheKeyItReplaces(t *testing.T) {
	c := newCluster(t)
	w := c.join(api.Role_ROLE_WORKER, "w")
	m := c.first.m
	next := must[crypto.Signer](t)(ca.NewKey())
	csr := must[[]byte](t)(ca.NewCSR(next))
	if _, err := m.issue(t.Context(), w.id, [32]byte{1}, csr, "test"); warden.CodeOf(err) != warden.CodeWrongKey {
		t.Errorf("for another session's key: %v", err)
	}
	if _, err := m.issue(t.Context(), w.id, w.identity.KeyHash, must[[]byte](t)(ca.NewCSR(w.key)), "test"); warden.CodeOf(err) != warden.CodeInvalid {
		t.Errorf("for the same key: %v", err)
	}
	if _, err := m.issue(t.Context(), w.id, w.identity.KeyHash, must[[]byte](t)(ca.NewCSR(c.first.key)), "test"); warden.CodeOf(err) != warden.CodeWrongKey {
		t.Errorf("for another node's key: %v", err)
	}
	inst, err := m.issue(t.Context(), w.id, w.identity.KeyHash, csr, "test")
	if err != nil || inst.Role != api.Role_ROLE_WORKER {
		t.Fatalf("issue = %v, %v", inst, err)
	}
	if n := c.record(w); string(n.KeyHash) != string(w.identity.KeyHash[:]) || len(n.NextKeyHash) != 32 {
		t.Error("the record does not hold both keys")
	}
	cert := &tls.Certificate{Certificate: inst.Chain, PrivateKey: next}
	for range 2 {
		if _, err := c.dial(c.first, cert, warden.DoorNode); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the new key is the current one", func() bool { return len(c.record(w).NextKeyHash) == 0 })
	if !c.refused(c.first, w.cert, warden.DoorNode) {
		t.Error("the replaced key opens the node door")
	}
	if _, err := m.issue(t.Context(), w.id, w.identity.KeyHash, csr, "test"); warden.CodeOf(err) != warden.CodeWrongKey {
		t.Errorf("a renewal by the replaced key: %v", err)
	}
	if _, err := door.Dial(t.Context(), c.first.address, warden.DoorNode, cert, door.Expect{Root: c.root, NodeID: c.first.id, KeyHashes: [][32]byte{c.first.identity.KeyHash}}); err != nil {
		t.Error(err)
	}
}

// TestReportToALeaderOfNobody: what a report is answered with extends a lease, so a leader that has no majority any more, and does not
// know it yet, answers none.
func TestReportToALeaderOfNobody(t *testing.T) {
	c := newCluster(t)
	b := c.join(api.Role_ROLE_MANAGER, "b")
	leader, other := c.roles(c.first, b)
	report := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := leader.m.takeReport(ctx, other.id, &api.ReportRequest{LockState: LockUnlocked})
		return err
	}
	await(t, "a leader takes a report", func() bool {
		c.leads(leader, other)
		return report() == nil
	})
	if err := other.m.transport.Close(); err != nil { // it hears nothing from here on, and raft waits for 500 ms
		t.Fatal(err)
	}
	if err := report(); err == nil {
		t.Error("a leader that nobody follows took a report")
	}
}

// TestReportsOfTasksEnd: a leader that hangs does not keep a manager from telling the next one.
func TestReportsOfTasksEnd(t *testing.T) {
	c := newCluster(t)
	b := c.join(api.Role_ROLE_MANAGER, "b")
	leader, other := c.roles(c.first, b)
	leader.m.live.mu.Lock() // nothing that it is told comes to an end
	ended := make(chan error, 1)
	go func() {
		ended <- other.m.reportTasks(context.Background(), []*api.NodeTaskReport{{NodeId: other.id, Report: &api.TaskReport{TaskId: "gone"}}})
	}()
	select {
	case err := <-ended:
		leader.m.live.mu.Unlock()
		if err == nil {
			t.Error("a report was taken by a leader that hangs")
		}
	case <-time.After(2 * reportTasksMax):
		leader.m.live.mu.Unlock()
		t.Error("a report to a leader that hangs does not end")
	}
}
