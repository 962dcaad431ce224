package dispatcher_test

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"warden"
	"warden/api"
	"warden/dispatcher"
)

// TestRenewAt: the reasons, and when.
func TestRenewAt(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	day := 24 * time.Hour
	for _, c := range []struct {
		name     string
		change   func(*api.Node, *api.Cluster, *dispatcher.Peer)
		from, to time.Duration // from now
		reason   string
	}{
		{"new leaf", func(*api.Node, *api.Cluster, *dispatcher.Peer) {}, 51 * day, 60 * day, "two thirds"},
		{"old leaf", func(_ *api.Node, _ *api.Cluster, p *dispatcher.Peer) {
			p.NotBefore, p.NotAfter = p.NotBefore.Add(-70*day), p.NotAfter.Add(-70*day)
		}, -19 * day, -10 * day, "two thirds"},
		{"short leaf", func(_ *api.Node, c *api.Cluster, p *dispatcher.Peer) {
			p.NotAfter = now.Add(6 * time.Second)
			c.LeafTtlNs = int64(6 * time.Second)
		}, 3400 * time.Millisecond, 4 * time.Second, "two thirds"},
		{"expired", func(_ *api.Node, _ *api.Cluster, p *dispatcher.Peer) { p.NotAfter = now.Add(-time.Second) }, 0, 0, "expired"},
		{"renew only", func(_ *api.Node, _ *api.Cluster, p *dispatcher.Peer) { p.RenewOnly = true }, 0, 0, "expired"},
		{"promoted", func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) {
			n.Role, n.DesiredRole = api.Role_ROLE_MANAGER, api.Role_ROLE_MANAGER
		}, 0, 0, "role is now manager"},
		{"being promoted", func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) { n.DesiredRole = api.Role_ROLE_MANAGER }, 51 * day, 60 * day, "two thirds"},
		{"demoted", func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) {
			n.Role, n.LeafRole = api.Role_ROLE_MANAGER, api.Role_ROLE_MANAGER
		}, 0, 0, "role is now worker"},
		{"moved", func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) { n.Zone = "pci" }, 0, 0, `zone is now "pci"`},
		{"rotated", func(_ *api.Node, c *api.Cluster, _ *dispatcher.Peer) { c.IssuingGeneration++ }, 0, 0, "issuing CA"},
		{"keys of managers rotated", func(n *api.Node, c *api.Cluster, _ *dispatcher.Peer) {
			n.Role, n.DesiredRole, n.LeafRole = api.Role_ROLE_MANAGER, api.Role_ROLE_MANAGER, api.Role_ROLE_MANAGER
			c.DekGeneration = n.LeafDekGeneration + 1
		}, 0, 0, "keys of managers"},
		{"keys of managers rotated: a worker", func(_ *api.Node, c *api.Cluster, _ *dispatcher.Peer) { c.DekGeneration++ }, 51 * day, 60 * day, "two thirds"},
		{"unfinished", func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) { n.NextKeyHash = make([]byte, 32) }, 0, 0, "not finished"},
		{"just installed", func(n *api.Node, _ *api.Cluster, p *dispatcher.Peer) { n.NextKeyHash = p.KeyHash[:] }, 51 * day, 60 * day, "two thirds"},
		{"life changed", func(_ *api.Node, c *api.Cluster, _ *dispatcher.Peer) {
			c.LeafTtlNs, c.LeafTtlChangedNs = int64(time.Hour), now.Add(time.Minute).UnixNano()
		}, time.Minute, time.Minute + warden.RenewSpread, "has changed"},
		{"life changed to what it is", func(_ *api.Node, c *api.Cluster, _ *dispatcher.Peer) {
			c.LeafTtlChangedNs = now.Add(time.Minute).UnixNano()
		}, 51 * day, 60 * day, "two thirds"},
		{"life changed before", func(_ *api.Node, c *api.Cluster, _ *dispatcher.Peer) {
			c.LeafTtlNs, c.LeafTtlChangedNs = int64(time.Hour), now.Add(-time.Minute).UnixNano()
		}, 51 * day, 60 * day, "two thirds"},
	} {
		node := &api.Node{Id: warden.NewID(), Role: api.Role_ROLE_WORKER, DesiredRole: api.Role_ROLE_WORKER, LeafRole: api.Role_ROLE_WORKER,
			Zone: "default", LeafZone: "default", LeafGeneration: 1}
		cluster := &api.Cluster{IssuingGeneration: 1, LeafTtlNs: int64(90 * day)}
		peer := dispatcher.Peer{NodeID: node.Id, KeyHash: [32]byte{1}, NotBefore: now.Add(-warden.LeafBackdate), NotAfter: now.Add(90 * day)}
		c.change(node, cluster, &peer)
		at, reason := dispatcher.RenewAt(node, cluster, peer, now)
		if at.Before(now.Add(c.from)) || at.After(now.Add(c.to)) || !strings.Contains(reason, c.reason) {
			t.Errorf("%s: RenewAt = now + %v, %q; want between %v and %v, %q", c.name, at.Sub(now), reason, c.from, c.to, c.reason)
		}
	}
}

// TestRenewAtLaws: the same leaf gets the same time whenever it is asked; it is never past the leaf's end; nodes spread.
func TestRenewAtLaws(t *testing.T) {
	spread := map[time.Time]bool{}
	rapid.Check(t, func(t *rapid.T) {
		issued := time.Unix(rapid.Int64Range(1e9, 3e9).Draw(t, "issued"), 0)
		life := time.Duration(rapid.Int64Range(5, 397*24*3600).Draw(t, "life")) * time.Second
		node := &api.Node{Id: rapid.StringMatching(`[0-9a-z]{25}`).Draw(t, "id")}
		node.Role, node.LeafRole = api.Role_ROLE_WORKER, node.EffectiveRole()
		cluster := &api.Cluster{LeafTtlNs: rapid.Int64().Draw(t, "ttl"), LeafTtlChangedNs: rapid.Int64Range(0, 3e18).Draw(t, "changed")}
		peer := dispatcher.Peer{NodeID: node.Id, NotBefore: issued.Add(-warden.LeafBackdate), NotAfter: issued.Add(life)}
		at, _ := dispatcher.RenewAt(node, cluster, peer, issued)
		again, _ := dispatcher.RenewAt(node, cluster, peer, issued.Add(life/2))
		if !at.Equal(again) || !at.After(issued) || !at.Before(peer.NotAfter) {
			t.Fatalf("RenewAt = %v and %v for a leaf from %v to %v", at, again, issued, peer.NotAfter)
		}
		spread[at] = true
	})
	if len(spread) < 10 {
		t.Errorf("only %d different times", len(spread))
	}
}
