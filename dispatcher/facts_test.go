package dispatcher_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"warden"
	"warden/api"
	"warden/dispatcher"
	"warden/internal/tally"
	"warden/store"
)

// A session is counted while it is open, a task once, with the time from its placement to the acknowledgement, and a renewal
// with its reason and how it went.
func TestFacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		placed, known := task('a', strings.Repeat("n", warden.IDLength)), task('b', strings.Repeat("n", warden.IDLength))
		placed.Meta = &api.Meta{Version: 1, Index: 1, UpdatedNs: time.Now().UnixNano()}
		known.Status.State = api.TaskState_TASK_RUNNING
		m := newManager(t, store.Wrap(placed), store.Wrap(known))
		m.peer.NotAfter = time.Now().Add(-time.Second)
		n := &node{
			assign: func(s grpc.BidiStreamingServer[api.AssignmentSet, api.AssignmentAck]) error {
				for {
					set, err := s.Recv()
					if err != nil {
						return err
					}
					time.Sleep(30 * time.Millisecond)
					if err := s.Send(&api.AssignmentAck{Sequence: set.Sequence}); err != nil {
						return err
					}
				}
			},
			renew: func(*api.RenewRequest) ([]byte, error) { return nil, nil }, // no CSR: refused
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); m.serve(ctx, n) }()
		time.Sleep(400 * time.Millisecond)
		var f api.ManagerFacts
		m.Facts(&f)
		if f.Sessions != 1 || f.Dispatch.Count != 1 || f.Dispatch.SumSeconds < .03 || f.Dispatch.SumSeconds > .1 {
			t.Errorf("Facts = %v, want one session, and one task dispatched in 30 ms or a bit more", &f)
		}
		if len(f.Renewals) != 1 || f.Renewals[0].Reason != "expired" || f.Renewals[0].Result != string(warden.CodeInvalid) || f.Renewals[0].Count != 1 {
			t.Errorf("renewals = %v, want one that was refused", f.Renewals)
		}
		cancel()
		<-done
		f.Reset()
		m.Facts(&f)
		if f.Sessions != 0 || f.Dispatch.Count != 1 {
			t.Errorf("Facts after the session = %v", &f)
		}
	})
}

// Every reason of RenewAt has a class, and no two reasons share one.
func TestReasonClass(t *testing.T) {
	now := time.Now()
	day := 24 * time.Hour
	worker, manager := api.Role_ROLE_WORKER, api.Role_ROLE_MANAGER
	for want, c := range map[string]struct {
		change func(*api.Node, *api.Cluster, *dispatcher.Peer)
	}{
		"age":        {func(*api.Node, *api.Cluster, *dispatcher.Peer) {}},
		"expired":    {func(_ *api.Node, _ *api.Cluster, p *dispatcher.Peer) { p.RenewOnly = true }},
		"unfinished": {func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) { n.NextKeyHash = make([]byte, 32) }},
		"role":       {func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) { n.Role, n.DesiredRole = manager, manager }},
		"zone":       {func(n *api.Node, _ *api.Cluster, _ *dispatcher.Peer) { n.Zone = "pci" }},
		"issuer":     {func(_ *api.Node, c *api.Cluster, _ *dispatcher.Peer) { c.IssuingGeneration++ }},
		"dek": {func(n *api.Node, c *api.Cluster, _ *dispatcher.Peer) {
			n.Role, n.DesiredRole, n.LeafRole, c.DekGeneration = manager, manager, manager, 1
		}},
		"ttl": {func(_ *api.Node, c *api.Cluster, _ *dispatcher.Peer) {
			c.LeafTtlNs, c.LeafTtlChangedNs = int64(time.Hour), now.Add(time.Minute).UnixNano()
		}},
	} {
		node := &api.Node{Id: warden.NewID(), Role: worker, DesiredRole: worker, LeafRole: worker, Zone: "default", LeafZone: "default", LeafGeneration: 1}
		cluster := &api.Cluster{IssuingGeneration: 1, LeafTtlNs: int64(90 * day)}
		peer := dispatcher.Peer{NodeID: node.Id, KeyHash: [32]byte{1}, NotBefore: now.Add(-warden.LeafBackdate), NotAfter: now.Add(90 * day)}
		c.change(node, cluster, &peer)
		_, reason := dispatcher.RenewAt(node, cluster, peer, now)
		if got := dispatcher.ReasonClass(reason); got != want {
			t.Errorf("ReasonClass(%q) = %q, want %q", reason, got, want)
		}
	}
	if got := dispatcher.ReasonClass("because"); got != tally.Other {
		t.Errorf("ReasonClass of no reason = %q", got)
	}
}
