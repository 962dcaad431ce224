package manager

import (
	"context"
	"testing"
	"time"

	"warden"
	"warden/api"
	"warden/store"
)

// A manager that starts is told by its peers how to seal its key file; nobody there costs little, and what no manager of the list says
// counts for nothing.
func TestAskPeers(t *testing.T) {
	c := newCluster(t)
	record := api.Clone(c.first.m.store.View().Cluster())
	record.Autolock, record.UnlockRecipient, record.UnlockKeyId = true, make([]byte, 32), "k1"
	record.LockGeneration, record.DekGeneration = 7, 9
	if _, err := c.first.m.store.Propose(t.Context(), command(&api.Actor{Kind: "system", Name: "test"}, store.Put(record, record.Meta.Version))); err != nil {
		t.Fatal(err)
	}
	second := c.join(api.Role_ROLE_MANAGER, "second")
	known := &api.ManagerList{Managers: []*api.ManagerInfo{managerInfo(c.first.m.store.View().Node(c.first.id))}}
	cfg := c.config(second, known)
	var got *api.LockState
	await(t, "a peer answers in time", func() bool {
		got = AskPeers(t.Context(), cfg, false)
		return got != nil
	})
	if !got.GetAutolock() || got.Generation != 7 || got.DekGeneration != 9 || len(got.Recipient) != 32 {
		t.Errorf("AskPeers = %v", got)
	}
	known.Managers[0].KeyHashes = [][]byte{make([]byte, 32)}
	if got := AskPeers(t.Context(), cfg, false); got != nil {
		t.Errorf("from one with another key than its list's: %v", got)
	}
	known.Managers[0].NodeId = second.id // itself
	if got := AskPeers(t.Context(), cfg, false); got != nil {
		t.Errorf("from itself: %v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	known.Managers[0] = &api.ManagerInfo{NodeId: warden.NewID(), Address: "192.0.2.1:2377"}
	if got := AskPeers(ctx, cfg, false); got != nil {
		t.Errorf("from nobody: %v", got)
	}
}

// A plain rotation of the issuing CA leaves room for evictions, and old DEKs are asked to be replaced.
func TestRotationsHaveTheirBounds(t *testing.T) {
	c := newCluster(t)
	m := c.first.m
	record := api.Clone(m.store.View().Cluster())
	if err := m.NextIssuing(record); err != nil || record.IssuingGeneration != 2 || len(record.DistrustedIssuers) != 32 {
		t.Fatalf("NextIssuing = %v, generation %d", err, record.IssuingGeneration)
	}
	record.DistrustedIssuers = make([]byte, 32*issuersMax)
	if err := m.NextIssuing(record); warden.CodeOf(err) != warden.CodeTooLarge || record.IssuingGeneration != 2 {
		t.Errorf("NextIssuing of a full list = %v", err)
	}
	record.SealedRootKey, record.DistrustedIssuers = nil, nil
	if err := m.NextIssuing(record); warden.CodeOf(err) != warden.CodeUnsupported {
		t.Errorf("NextIssuing without the root key = %v", err)
	}
	now := time.Now()
	for _, at := range []struct {
		now  time.Time
		want uint64
	}{{now, 1}, {now.Add(dekAge - time.Hour), 1}, {now.Add(dekAge + time.Hour), 2}} {
		if err := m.ageDEKs(t.Context(), at.now); err != nil {
			t.Fatal(err)
		}
		if got := m.store.View().Cluster().DekGeneration; got != at.want {
			t.Errorf("after %s: generation %d, want %d", at.now.Sub(now), got, at.want)
		}
	}
}
