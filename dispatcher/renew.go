package dispatcher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"

	"warden"
	"warden/api"
)

// Back-off of renewals that fail.
const (
	renewBackoffMin = 500 * time.Millisecond
	renewBackoffMax = time.Minute
)

// RenewAt returns when to renew the leaf of p, and why: two thirds of its life, less up to 10 % of jitter drawn from node ID
// and leaf, so that nodes enrolled together do not renew together. Earlier where the records want another leaf: at once
// (now) where the leaf has expired, a renewal was begun and not finished, role, zone or issuing CA have changed, or managers
// are to have new keys; within RenewSpread of a change of the life that leaves are given, where this one was issued before. Pure.
func RenewAt(node *api.Node, cluster *api.Cluster, p Peer, now time.Time) (at time.Time, reason string) {
	issued := p.NotBefore.Add(warden.LeafBackdate) // leaves are backdated by this
	if issued.After(p.NotAfter) {
		issued = p.NotBefore
	}
	next := node.GetNextKeyHash()
	switch {
	case p.RenewOnly || now.After(p.NotAfter):
		return now, "the leaf has expired"
	case len(next) > 0 && !bytes.Equal(next, p.KeyHash[:]):
		return now, "the last renewal was not finished"
	case node.EffectiveRole() != node.GetLeafRole():
		return now, "the role is now " + node.EffectiveRole().Word()
	case node.GetZone() != node.GetLeafZone():
		return now, fmt.Sprintf("the zone is now %q", node.GetZone())
	case cluster.GetIssuingGeneration() != node.GetLeafGeneration():
		return now, "the issuing CA was rotated"
	case node.EffectiveRole() == api.Role_ROLE_MANAGER && node.GetLeafDekGeneration() < cluster.GetDekGeneration():
		return now, "the keys of managers were rotated"
	}
	life, draw := p.NotAfter.Sub(issued), jitter(p)
	at = issued.Add(life*2/3 - time.Duration(draw*float64(life)/10))
	reason = "two thirds of its life are over"
	changed := time.Unix(0, cluster.GetLeafTtlChangedNs())
	differs := (life - time.Duration(cluster.GetLeafTtlNs())).Abs() > time.Second // certificates have whole seconds
	if cluster.GetLeafTtlChangedNs() > 0 && changed.After(issued) && differs {
		if soon := changed.Add(time.Duration(draw * float64(warden.RenewSpread))); soon.Before(at) {
			at, reason = soon, "the life that leaves are given has changed"
		}
	}
	return at, reason
}

// jitter returns a number in [0, 1) that is the same each time for one leaf of one node.
func jitter(p Peer) float64 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", p.NodeID, p.NotBefore.UnixNano()))
	return float64(binary.BigEndian.Uint64(sum[:8])>>11) / (1 << 53)
}

// renew renews the leaf when it is time, and ends the session then: the node redials with the new one.
func (s *session) renew(ctx context.Context) error {
	backoff := renewBackoffMin
	var notBefore time.Time // of the next attempt, after one that failed
	for ctx.Err() == nil {
		now, v := time.Now(), s.d.cfg.Store.View()
		node, cluster := v.Node(s.peer.NodeID), v.Cluster()
		if node == nil || cluster == nil { // whoever judges connections closes this one
			if !s.awaitKick(ctx, warden.LeaseHold) {
				return nil
			}
			continue
		}
		at, reason := RenewAt(node, cluster, s.peer, now)
		if at.Before(notBefore) {
			at = notBefore
		}
		if wait := at.Sub(now); wait > 0 {
			s.awaitKick(ctx, wait)
			continue
		}
		s.hold(ctx)
		if ctx.Err() != nil {
			return nil
		}
		err := s.install(ctx, reason)
		s.d.counts.renewed(reason, err)
		if err == nil {
			sleep(ctx, redialTimeout)
			return warden.Errorf(warden.CodeUnavailable, "renewing the leaf", "a new leaf is installed; the session is over")
		}
		if ctx.Err() == nil {
			s.d.cfg.Logger.Warn("could not renew leaf", "node_id", s.peer.NodeID, "reason", reason, "error", err)
		}
		notBefore = time.Now().Add(backoff)
		backoff = min(2*backoff, renewBackoffMax)
	}
	return nil
}

// awaitKick waits for a change in the store, for d, or for the end of ctx: then it is false.
func (s *session) awaitKick(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-s.renewKick:
	case <-t.C:
	case <-ctx.Done():
		return false
	}
	return true
}

// install takes the node through one renewal: CSR, next key committed, leaf installed.
func (s *session) install(ctx context.Context, reason string) error {
	ctx, cancel := context.WithTimeout(ctx, installTimeout)
	defer cancel()
	reply, err := s.client.Renew(ctx, &api.RenewRequest{Reason: reason}, recvMax(renewMessageMax))
	if err != nil {
		return warden.Wrap("asking for a CSR", api.FromError(err))
	}
	if n := len(reply.GetCsr()); n == 0 || n > warden.CSRBytesMax {
		return warden.Errorf(warden.CodeInvalid, "asking for a CSR", "%d bytes", n)
	}
	req, err := s.d.cfg.Issue(ctx, s.peer.NodeID, s.peer.KeyHash, reply.GetCsr(), reason)
	if err != nil {
		return warden.Wrap("issuing a leaf", err)
	}
	if _, err := s.client.Install(ctx, req); err != nil {
		return warden.Wrap("installing a leaf", api.FromError(err))
	}
	s.d.cfg.Logger.Info("renewed leaf", "node_id", s.peer.NodeID, "reason", reason)
	return nil
}
